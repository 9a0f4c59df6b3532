"""Repairing text: bytes of another encoding, mojibake, Unicode form, line ends, control characters. One step, one name.

Each step is a function of a text alone and leaves correct text unchanged.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Mapping

from fastattn.errors import DataError

_FOREIGN = 0.15  # part of a text that may be read as Windows-1252 before it must be something else
_BYTES = re.compile("[\udc80-\udcff]")
_SURROGATES = re.compile("[\ud800-\udfff]")
_LINE_ENDS = re.compile("\r\n?|[\u0085\u2028\u2029]")
_MAY_END_LINES = re.compile("[\r\u0085\u2028\u2029]")  # a set is searched for three times as fast
_NOT_ASCII = re.compile("[^\x00-\x7f]+")
_AROUND = 8  # characters beside one that is not ASCII, by which ftfy tells mojibake: it looks at 4
# C0 and C1 but for tab and line feed; soft line and byte order marks; what Unicode says is never a character.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b\u2060\ufeff\ufdd0-\ufdef\ufffe\uffff]")


class ForeignEncoding(Exception):
    """A text is neither UTF-8 nor Windows-1252."""


def repair_bytes(text: str) -> tuple[str, int]:
    """Read what was not UTF-8 (surrogates, from "surrogateescape") as Windows-1252; the text and how many bytes.

    Raises:
        ForeignEncoding: they are more than 15 % of the text, so it is in neither.

    Example:
        >>> from fastattn.lm.data.clean import repair_bytes
        >>> repair_bytes(b"a caf\\xe9 in Paris".decode("utf-8", "surrogateescape"))
        ('a café in Paris', 1)
    """
    if text.isascii() or not _SURROGATES.search(text):
        return text, 0
    repaired, count = _BYTES.subn(_windows_1252, text)
    if count > _FOREIGN * len(text):
        raise ForeignEncoding("neither UTF-8 nor Windows-1252; name its encoding with fastattn prepare --encoding")
    return _SURROGATES.sub("\ufffd", repaired), count


def _windows_1252(match: re.Match[str]) -> str:
    return bytes([ord(match[0]) - 0xDC00]).decode("cp1252", "replace")


def mend_mojibake(text: str) -> str:
    """Undo a wrong decoding that was stored ("cafÃ©"), with ``ftfy`` (Speer, "ftfy", 2019).

    Its search for mojibake is slow, and only what is not ASCII, with what stands beside it, can be mojibake.
    """
    if text.isascii():
        return text
    import ftfy
    from ftfy.badness import is_bad

    places = (match.span() for match in _NOT_ASCII.finditer(text))
    near = "\n".join([text[max(begin - _AROUND, 0) : end + _AROUND] for begin, end in places])
    return ftfy.fix_encoding(text) if is_bad(near) else text


def normalise(text: str) -> str:
    """Unicode's composed form (NFC): one way to write each character."""
    return unicodedata.normalize("NFC", text)


def unify_line_ends(text: str) -> str:
    return _LINE_ENDS.sub("\n", text) if _MAY_END_LINES.search(text) else text


def drop_control_characters(text: str) -> str:
    return _CONTROL.sub("", text)


STEPS: Mapping[str, Callable[[str], str]] = {
    "mojibake": mend_mojibake,
    "normalise": normalise,
    "line-ends": unify_line_ends,
    "control-characters": drop_control_characters,
}


def usable_steps(names: tuple[str, ...]) -> tuple[str, ...]:
    """``names`` without those whose package is missing here; raises DataError for an unknown one."""
    unknown = [name for name in names if name not in STEPS]
    if unknown:
        raise DataError(f"There is no cleaning step {unknown[0]!r}; there are {', '.join(STEPS)}.")
    try:
        import ftfy  # noqa: F401
    except ModuleNotFoundError:
        return tuple(name for name in names if name != "mojibake")
    return names


def clean(text: str, steps: tuple[str, ...]) -> tuple[str, tuple[str, ...]]:
    """The text after ``steps``, and the names of those that changed it."""
    changed = []
    for name in steps:
        after = STEPS[name](text)
        if after != text:
            changed.append(name)
            text = after
    return text, tuple(changed)
