"""Repairs change what is broken and nothing else; personal data is masked and other numbers stay."""

import contextlib
import random
import sys

import pytest
from ftfy import fix_encoding

from fastattn.errors import DataError
from fastattn.lm.data.clean import STEPS, ForeignEncoding, clean, mend_mojibake, repair_bytes, usable_steps
from fastattn.lm.data.personal import KINDS, mask

ALL = tuple(STEPS)


@pytest.mark.parametrize(
    ("before", "after", "step"),
    [
        ("cafÃ© â€œquotedâ€\x9d", "café “quoted”", "mojibake"),
        ("e\u0301", "é", "normalise"),
        ("a\r\nb\rc\u2028d", "a\nb\nc\nd", "line-ends"),
        ("a\x00\x07b\ufeff\u200b\tc\x7f\ufffe", "ab\tc", "control-characters"),
    ],
)
def test_each_step_repairs_its_own(before, after, step):
    assert clean(before, ALL) == (after, (step,))
    assert clean(before, tuple(name for name in ALL if name != step))[0] != after


@pytest.mark.parametrize("text", ["plain\n\ttext", "naïve → 日本 👩‍👩‍👧 Größe", "if x:\n    return 'Ã'\n", ""])
def test_text_in_order_stays(text):
    assert clean(text, ALL) == (text, ())


def test_mojibake_is_found_wherever_ftfy_finds_it():
    """Only what stands near other than ASCII is searched for it; a short piece amid ASCII is the hard case."""
    source, pieces = random.Random(0), ["Â", "naïve ", "“so”", "日本", "а́ю", "Ò°", "à²"]
    for text in ("café “x” – ½ €", "Größe ñ", "приве́т", "ελ", "š ž", "日本語 。", "\xa0°"):
        for name in ("windows-1252", "latin-1", "windows-1251", "windows-1253", "macroman", "cp437"):
            with contextlib.suppress(UnicodeDecodeError):
                pieces.append(text.encode().decode(name))
    changed = 0
    for _ in range(400):
        chosen = [x for _ in range(source.randint(1, 3)) for x in (source.choice(pieces), "a" * source.randint(0, 30))]
        text = source.choice(["", "some text, ", "x"]) + " ".join(chosen)[: source.randint(1, 60)]
        changed += mend_mojibake(text) != text
        assert mend_mojibake(text) == fix_encoding(text), text
    assert 100 < changed < 390


def test_without_ftfy_the_other_steps_remain(monkeypatch):
    assert usable_steps(ALL) == ALL
    monkeypatch.setitem(sys.modules, "ftfy", None)
    assert usable_steps(ALL) == tuple(name for name in ALL if name != "mojibake")
    with pytest.raises(DataError, match="no cleaning step 'polish'; there are mojibake, normalise"):
        usable_steps(("polish",))


def test_bytes_that_are_not_utf_8():
    wrong = b"it\x92s \x80 5, na\xc3\xafve".decode("utf-8", "surrogateescape")
    assert repair_bytes(wrong) == ("it’s € 5, naïve", 2)
    assert repair_bytes("lone \ud83d half") == ("lone � half", 0)
    with pytest.raises(ForeignEncoding):
        repair_bytes("日本語".encode("shift-jis").decode("utf-8", "surrogateescape"))


PERSONAL = {
    "write to ann.lee+x@mail.example.co.uk.": "write to <EMAIL>.",
    "card 4111 1111 1111 1111, 5500-0000-0000-0004; amex 378282246310005": "card <CARD>, <CARD>; amex <CARD>",
    "to DE89 3704 0044 0532 0130 00 or GB82WEST12345698765432": "to <IBAN> or <IBAN>",
    "SSN 123-45-6789, NI AB 12 34 56 C": "SSN <ID>, NI <ID>",
    "from 192.168.0.17:8080, fe80::1ff:fe23:4567:890a": "from <IP>:8080, <IP>",
    "(555) 123-4567, 555.123.4567, +44 20 7946 0958, +4915112345678, 030 1234567": ", ".join(["<PHONE>"] * 5),
}


@pytest.mark.parametrize("text", PERSONAL)
def test_personal_data_is_masked(text):
    masked, counts = mask(text, tuple(KINDS))
    assert masked == PERSONAL[text]
    assert sum(counts.values()) == masked.count("<")


@pytest.mark.parametrize(
    "text",
    [
        "4111 1111 1111 1112, 0000000000000000",  # the check digit is wrong, or there is nothing to check
        "DE88 3704 0044 0532 0130 00",
        "2024-01-31 12:00:00, 1,234,567.89, 3.14159265358979, 1990-2000, 01/02/2003, 100 000 000",
        "000-12-3456, 256.1.1.1, 1.2.3, v1.2.3.4b, std::vector, 12:30:45, ::1, 00:1A:2B:3C:4D:5E",
        "@decorator, me@localhost, icon@2x.png, a @ b, 18446744073709551615, 0x7FFF_FFFF",
    ],
)
def test_other_numbers_stay(text):
    assert mask(text, tuple(KINDS)) == (text, {})


def test_kinds_are_chosen():
    assert mask("a@b.org 10.0.0.1", ("email",)) == ("<EMAIL> 10.0.0.1", {"email": 1})
