"""Masking personal data: e-mail addresses, phone and card numbers, IP addresses, IBANs, identity numbers by country.

Numbers with check digits are masked only if these are right (cards: Luhn; IBAN: mod 97), so other numbers stay.
"""

from __future__ import annotations

import functools
import ipaddress
import re
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

from fastattn.lm.data.identity import PATTERN, is_issued, luhn
from fastattn.lm.data.scripts import UNSPACED


def _is_card(match: re.Match[str]) -> bool:
    digits = re.sub(r"\D", "", match[0])
    return 13 <= len(digits) <= 19 and len(set(digits)) > 1 and luhn(digits)


def _is_iban(match: re.Match[str]) -> bool:
    """ISO 13616: the country and check digits moved to the end, letters as 10 ... 35, is 1 mod 97."""
    text = match[0].replace(" ", "")
    return 15 <= len(text) <= 34 and int("".join(str(int(c, 36)) for c in text[4:] + text[:4])) % 97 == 1


def _is_ip(match: re.Match[str]) -> bool:
    try:
        ipaddress.ip_address(match[0])
    except ValueError:
        return False
    return True


def _is_ipv6(match: re.Match[str]) -> bool:
    """At least three groups, so that "::1" and times of day ("12:30") stay."""
    return match[0].count(":") >= 2 and len(re.findall(r"[0-9A-Fa-f]+", match[0])) >= 3 and _is_ip(match)


def _is_phone(match: re.Match[str]) -> bool:
    return 8 <= len(re.sub(r"\D", "", match[0])) <= 15


class Kind(NamedTuple):
    """A kind of personal data: the pattern is tried only on texts that contain ``hint``."""

    token: str
    hint: Callable[[str], bool]
    pattern: re.Pattern[str]
    check: Callable[[re.Match[str]], bool] = lambda match: True


def _has(digits: int, pattern: str) -> Callable[[str], bool]:
    """Whether a text has so many digits, and what every match of a kind has. Most texts have not."""
    search = re.compile(pattern).search
    return lambda text: _digits(text) >= digits and search(text) is not None


_DIGIT = re.compile(r"\d")


@functools.lru_cache(maxsize=2)
def _digits(text: str) -> int:
    return sum(map(text.count, "0123456789")) if text.isascii() else len(_DIGIT.findall(text))


_CODES = _has(6, r"\d(?:[A-Z .-]{0,2}\d){5}")  # six digits, with letters or separators between them
_NUMBERS = _has(8, r"\d(?:[ ()./-]{0,3}\d){7}")  # eight digits
_IPV6 = re.compile(":[0-9A-Fa-f]{0,4}:")
# What must not stand beside a number; characters of scripts without spaces may.
_NOT_IN_NUMBER = rf"(?:(?<![\w.+-])|(?<=[{UNSPACED}]))"
_END = rf"(?:(?![\w-]|\.\d)|(?=[{UNSPACED}]))"

# In this order: what a longer number is decides before what a part of it could be.
KINDS = {
    "email": Kind(
        "<EMAIL>",
        lambda text: "@" in text,
        re.compile(
            rf"(?:(?<![\w.%+-])|(?<=[{UNSPACED}]))(?:(?![{UNSPACED}])[\w%+-])+(?:\.(?:(?![{UNSPACED}])[\w%+-])+)*"
            rf"@(?!\d+x\.)(?:[A-Za-z0-9](?:[A-Za-z0-9-]{{0,62}})\.)+[A-Za-z]{{2,24}}(?:\b|(?=[{UNSPACED}]))"
        ),
    ),
    "iban": Kind(
        "<IBAN>",
        _has(2, r"[A-Z]{2}\d{2}"),
        re.compile(rf"{_NOT_IN_NUMBER}[A-Z]{{2}}\d{{2}}(?: ?[A-Z0-9]{{4}}){{2,7}}(?: ?[A-Z0-9]{{1,3}})?{_END}"),
        _is_iban,
    ),
    "id": Kind("<ID>", _CODES, re.compile(rf"{_NOT_IN_NUMBER}(?:{PATTERN}){_END}"), is_issued),
    "card": Kind("<CARD>", _NUMBERS, re.compile(rf"{_NOT_IN_NUMBER}[2-6]\d{{3}}(?:[ -]?\d){{9,15}}{_END}"), _is_card),
    "ipv4": Kind(
        "<IP>", _has(4, r"\d\.\d{1,3}\.\d"), re.compile(rf"{_NOT_IN_NUMBER}(?:\d{{1,3}}\.){{3}}\d{{1,3}}{_END}"), _is_ip
    ),
    "ipv6": Kind(
        "<IP>",
        lambda text: text.count(":") >= 2 and _IPV6.search(text) is not None,
        re.compile(
            rf"(?:(?<![\w:.])|(?<=[{UNSPACED}]))[0-9A-Fa-f:]{{4,39}}(?:\.\d{{1,3}}){{0,3}}(?:(?![\w:])|(?=[{UNSPACED}]))"
        ),
        _is_ipv6,
    ),
    # International with +, in the North American form, national with 0 and separators, or mobile of mainland China.
    "phone": Kind(
        "<PHONE>",
        _NUMBERS,
        re.compile(
            rf"{_NOT_IN_NUMBER}(?<!\d )(?:\+\d{{1,3}}[ .-]?(?:\(\d{{1,4}}\)[ .-]?)?\d{{1,4}}(?:[ .-]?\d{{2,4}}){{1,4}}"
            rf"|(?:\(\d{{3}}\) ?|\d{{3}}[.-])\d{{3}}[.-]\d{{4}}"
            rf"|\(?0\d{{2,4}}\)?[ /-]\d{{3,4}}(?:[ -]?\d{{2,4}}){{1,2}}"
            rf"|1[3-9]\d(?P<gap>[ -]?)\d{{4}}(?P=gap)\d{{4}}){_END}"
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
            if not kind.check(match):
                return match[0]
            counts[name] += 1
            return kind.token

        text = kind.pattern.sub(replace, text)
    return text, counts
