"""Masking personal data: e-mail addresses, phone and card numbers, IP addresses, IBANs, national id numbers.

What a number is, its check digits say where it has some (cards: Luhn; IBAN: mod 97), so other numbers stay.
"""

from __future__ import annotations

import ipaddress
import re
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple


def luhn(digits: str) -> bool:
    """Whether the last digit checks the others (ISO/IEC 7812-1).

    Example:
        >>> from fastattn.lm.data.personal import luhn
        >>> luhn("4111111111111111"), luhn("4111111111111112")
        (True, False)
    """
    doubled = (int(digit) * 2 for digit in digits[-2::-2])
    return (sum(map(int, digits[-1::-2])) + sum(x - 9 if x > 9 else x for x in doubled)) % 10 == 0


def _is_card(found: str) -> bool:
    digits = re.sub(r"\D", "", found)
    return 13 <= len(digits) <= 19 and len(set(digits)) > 1 and luhn(digits)


def _is_iban(found: str) -> bool:
    """ISO 13616: the country and check digits moved to the end, letters as 10 ... 35, is 1 mod 97."""
    text = found.replace(" ", "")
    return 15 <= len(text) <= 34 and int("".join(str(int(c, 36)) for c in text[4:] + text[:4])) % 97 == 1


def _is_ip(found: str) -> bool:
    try:
        ipaddress.ip_address(found)
    except ValueError:
        return False
    return True


def _is_ipv6(found: str) -> bool:
    """At least three groups, so that "::1" and times of day ("12:30") stay."""
    return found.count(":") >= 2 and len(re.findall(r"[0-9A-Fa-f]+", found)) >= 3 and _is_ip(found)


def _is_phone(found: str) -> bool:
    return 8 <= len(re.sub(r"\D", "", found)) <= 15


class Kind(NamedTuple):
    """A kind of personal data: the pattern is tried only on texts that contain ``hint``."""

    token: str
    hint: Callable[[str], bool]
    pattern: re.Pattern[str]
    check: Callable[[str], bool] = lambda found: True


def _has_digit(text: str) -> bool:
    return _DIGITS.search(text) is not None


_DIGITS = re.compile(r"\d{2}")
_NOT_IN_NUMBER = r"(?<![\w.+-])"
_END = r"(?![\w-]|\.\d)"

# In this order: what a longer number is decides before what a part of it could be.
KINDS = {
    "email": Kind(
        "<EMAIL>",
        lambda text: "@" in text,
        re.compile(
            r"(?<![\w.%+-])[\w%+-]+(?:\.[\w%+-]+)*@(?!\d+x\.)(?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,62})\.)+[A-Za-z]{2,24}\b"
        ),
    ),
    "iban": Kind(
        "<IBAN>",
        _has_digit,
        re.compile(rf"(?<!\w)[A-Z]{{2}}\d{{2}}(?: ?[A-Z0-9]{{4}}){{2,7}}(?: ?[A-Z0-9]{{1,3}})?{_END}"),
        _is_iban,
    ),
    "card": Kind("<CARD>", _has_digit, re.compile(rf"{_NOT_IN_NUMBER}[2-6]\d{{3}}(?:[ -]?\d){{9,15}}{_END}"), _is_card),
    # US social security numbers that can have been issued; UK national insurance numbers.
    "id": Kind(
        "<ID>",
        _has_digit,
        re.compile(
            rf"{_NOT_IN_NUMBER}(?:(?!000|666|9)\d{{3}}-(?!00)\d{{2}}-(?!0000)\d{{4}}"
            rf"|(?!BG|GB|NK|KN|TN|NT|ZZ)[A-CEGHJ-PR-TW-Z][A-CEGHJ-NPR-TW-Z] ?\d{{2}} ?\d{{2}} ?\d{{2}} ?[A-D]){_END}"
        ),
    ),
    "ipv4": Kind("<IP>", _has_digit, re.compile(rf"(?<![\w.-])(?:\d{{1,3}}\.){{3}}\d{{1,3}}{_END}"), _is_ip),
    "ipv6": Kind(
        "<IP>",
        lambda text: ":" in text,
        re.compile(r"(?<![\w:.])[0-9A-Fa-f:]{4,39}(?:\.\d{1,3}){0,3}(?![\w:])"),
        _is_ipv6,
    ),
    # International with +, in the North American form, or national with 0 and separators.
    "phone": Kind(
        "<PHONE>",
        _has_digit,
        re.compile(
            rf"{_NOT_IN_NUMBER}(?<!\d )(?:\+\d{{1,3}}[ .-]?(?:\(\d{{1,4}}\)[ .-]?)?\d{{1,4}}(?:[ .-]?\d{{2,4}}){{1,4}}"
            rf"|(?:\(\d{{3}}\) ?|\d{{3}}[.-])\d{{3}}[.-]\d{{4}}"
            rf"|\(?0\d{{2,4}}\)?[ /-]\d{{3,4}}(?:[ -]?\d{{2,4}}){{1,2}}){_END}"
        ),
        _is_phone,
    ),
}


def mask(text: str, kinds: tuple[str, ...]) -> tuple[str, Counter[str]]:
    """The text with personal data of these ``kinds`` replaced by tokens like ``<EMAIL>``, and how many of each.

    Example:
        >>> from fastattn.lm.data.personal import KINDS, mask
        >>> mask("ann@example.org, +44 20 7946 0958, 192.168.0.17, v1.2.3", tuple(KINDS))[0]
        '<EMAIL>, <PHONE>, <IP>, v1.2.3'
    """
    counts: Counter[str] = Counter()
    for name in kinds:
        kind = KINDS[name]
        if not kind.hint(text):
            continue

        def replace(match: re.Match[str], name: str = name, kind: Kind = kind) -> str:
            if not kind.check(match[0]):
                return match[0]
            counts[name] += 1
            return kind.token

        text = kind.pattern.sub(replace, text)
    return text, counts
