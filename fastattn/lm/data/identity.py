"""National identity and tax numbers, by country, each with the check of its issuer so that other numbers stay.

BR  CPF                     modulo 11, twice
CA  social insurance number Luhn, in groups of three
CN  resident identity       date of birth, ISO 7064 MOD 11-2 (GB 11643)
ES  DNI and NIE             modulo 23
FR  NIR                     97 minus modulo 97
GB  national insurance      prefixes that are issued
IN  Aadhaar                 Verhoeff, in groups of four
IT  codice fiscale          table of the decree of 23 December 1976
KR  resident registration   date of birth, modulo 11
TH  identity card           modulo 11
US  social security number  areas that are issued
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Callable

_ODD = dict(zip("0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ", (
    1, 0, 5, 7, 9, 13, 15, 17, 19, 21, 1, 0, 5, 7, 9, 13, 15, 17, 19, 21, 2, 4, 18, 20, 11, 3, 6, 8, 12, 14, 16, 10,
    22, 25, 24, 23,
), strict=True))  # fmt: skip
_TURN = (1, 5, 7, 6, 2, 8, 3, 0, 9, 4)  # Verhoeff's permutation, applied once more at each place


def luhn(digits: str) -> bool:
    """Whether the last digit checks the others (ISO/IEC 7812-1).

    Example:
        >>> from fastattn.lm.data.identity import luhn
        >>> luhn("4111111111111111"), luhn("4111111111111112")
        (True, False)
    """
    doubled = (int(digit) * 2 for digit in digits[-2::-2])
    return (sum(map(int, digits[-1::-2])) + sum(x - 9 if x > 9 else x for x in doubled)) % 10 == 0


def verhoeff(digits: str) -> bool:
    """Whether the last digit checks the others (Verhoeff, 1969): products in the dihedral group of order ten."""
    total = 0
    for place, digit in enumerate(map(int, reversed(digits))):
        for _ in range(place % 8):
            digit = _TURN[digit]
        total = _dihedral(total, digit)
    return total == 0


def _dihedral(a: int, b: int) -> int:
    if a < 5:
        return (a + b) % 5 if b < 5 else 5 + (a + b - 5) % 5
    return 5 + (a - 5 - b) % 5 if b < 5 else (a - b) % 5


def _weighted(digits: str, weights: range | tuple[int, ...]) -> int:
    return sum(int(digit) * weight for digit, weight in zip(digits, weights, strict=False))


def _digits(found: str) -> str:
    return re.sub(r"\D", "", found)


def _is_date(text: str) -> bool:
    try:
        datetime.datetime.strptime(text, "%Y%m%d")
    except ValueError:
        return False
    return True


def _brazil(found: str) -> bool:
    digits = _digits(found)
    checks = [_weighted(digits, range(size + 1, 1, -1)) * 10 % 11 % 10 for size in (9, 10)]
    return len(set(digits)) > 1 and digits.endswith(f"{checks[0]}{checks[1]}")


def _china(found: str) -> bool:
    total = sum(int(digit) * pow(2, 17 - place, 11) for place, digit in enumerate(found[:17]))
    return _is_date(found[6:14]) and "10X98765432"[total % 11] == found[17].upper()


def _france(found: str) -> bool:
    text = found.replace(" ", "").upper().replace("2A", "19").replace("2B", "18")
    return 97 - int(text[:13]) % 97 == int(text[13:])


def _italy(found: str) -> bool:
    text = found.upper()
    total = sum(_ODD[c] if place % 2 == 0 else int(c, 36) - 10 * c.isalpha() for place, c in enumerate(text[:15]))
    return chr(ord("A") + total % 26) == text[15]


def _korea(found: str) -> bool:
    digits = _digits(found)
    century = {"1": "19", "2": "19", "3": "20", "4": "20", "5": "19", "6": "19", "7": "20", "8": "20"}[digits[6]]
    weights = (2, 3, 4, 5, 6, 7, 8, 9, 2, 3, 4, 5)
    return _is_date(century + digits[:6]) and (11 - _weighted(digits, weights) % 11) % 10 == int(digits[12])


def _spain(found: str) -> bool:
    text = re.sub(r"[ -]", "", found.upper()).translate(str.maketrans("XYZ", "012")) if found[0] in "XYZ" else found
    digits, letter = _digits(text), found[-1].upper()
    return "TRWAGMYFPDXBNJZSQVHLCKE"[int(digits) % 23] == letter


def _thailand(found: str) -> bool:
    digits = _digits(found)
    return (11 - _weighted(digits, range(13, 1, -1)) % 11) % 10 == int(digits[12])


Check = Callable[[str], bool]
NUMBERS: dict[str, tuple[str, Check]] = {
    "BR": (r"\d{3}\.\d{3}\.\d{3}-\d{2}", _brazil),
    "CA": (r"\d{3}[ -]\d{3}[ -]\d{3}", lambda found: found[0] not in "08" and luhn(_digits(found))),
    "CN": (r"[1-9]\d{5}(?:19|20)\d{2}[01]\d[0-3]\d{4}[\dXx]", _china),
    "ES": (r"(?:\d{8}|[XYZ]-?\d{7})-?[A-HJ-NP-TV-Z]", _spain),
    "FR": (r"[12] ?\d{2} ?[0-3]\d ?(?:\d{2}|2[AB]) ?\d{3} ?\d{3} ?\d{2}", _france),
    "GB": (
        r"(?!BG|GB|NK|KN|TN|NT|ZZ)[A-CEGHJ-PR-TW-Z][A-CEGHJ-NPR-TW-Z] ?\d{2} ?\d{2} ?\d{2} ?[A-D]", lambda found: True
    ),
    "IN": (r"[2-9]\d{3}[ -]\d{4}[ -]\d{4}", lambda found: verhoeff(_digits(found))),
    "IT": (r"[A-Z]{6}\d{2}[A-EHLMPRST][0-7]\d[A-Z]\d{3}[A-Z]", _italy),
    "KR": (r"\d{2}[01]\d[0-3]\d-[1-8]\d{6}", _korea),
    "TH": (r"\d-\d{4}-\d{5}-\d{2}-\d", _thailand),
    "US": (r"(?!000|666|9)\d{3}-(?!00)\d{2}-(?!0000)\d{4}", lambda found: True),
}  # fmt: skip
PATTERN = "|".join(f"(?P<{country}>{pattern})" for country, (pattern, _) in NUMBERS.items())


def is_issued(match: re.Match[str]) -> bool:
    """Whether a number found with ``PATTERN`` passes the check of its country."""
    country = str(match.lastgroup)
    return NUMBERS[country][1](match[country])
