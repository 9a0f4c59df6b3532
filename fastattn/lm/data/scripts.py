"""Scripts that are written without spaces between words: Chinese, Japanese, Thai, Lao, Khmer, Burmese.

In them a character stands for a word wherever words are counted or compared. Korean has spaces.
"""

from __future__ import annotations

import functools
import re

# A class of a regular expression: Han with its extensions, kana, Thai and Lao, Burmese, Khmer.
UNSPACED = (
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff\u3005\u3007\u3040-\u30ff\u31f0-\u31ff\uff66-\uff9d"
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"
)
_CHARACTER = re.compile(f"[{UNSPACED}]")
_WORD = re.compile(r"\w+")
_UNIT = re.compile(rf"[{UNSPACED}]|(?:(?![{UNSPACED}])\w)+")
_MOSTLY = 0.3  # part of the characters from which on a text counts as one without spaces
# Frequent words of each script, of which ordinary text has some.
_FREQUENT = {
    "Han": ("的", "是", "了", "在", "和", "不", "有", "人", "我", "他", "这", "這", "一", "为", "為", "与", "與"),
    "kana": ("の", "に", "は", "を", "た", "が", "で", "と", "し", "て", "も", "な"),
    "Thai": ("ที่", "และ", "ใน", "เป็น", "ของ", "มี", "การ", "ได้", "ไม่", "ให้", "จะ"),
}
_SCRIPTS = {
    "Han": re.compile("[\u4e00-\u9fff]"),
    "kana": re.compile("[\u3040-\u30ff]"),
    "Thai": re.compile("[\u0e00-\u0e7f]"),
}


def is_unspaced(text: str) -> bool:
    """Whether a text is written mostly without spaces between words.

    Example:
        >>> from fastattn.lm.data.scripts import is_unspaced
        >>> is_unspaced("今天天气很好。"), is_unspaced("The weather is fine.")
        (True, False)
    """
    if text.isascii() or not _CHARACTER.search(text):
        return False
    letters = sum(map(len, _WORD.findall(text)))
    return len(_CHARACTER.findall(text)) > _MOSTLY * max(letters, 1)


def units(text: str) -> list[str]:
    """The words of a text; each character of a script without spaces is one.

    Example:
        >>> from fastattn.lm.data.scripts import units
        >>> units("用 PyTorch 训练")
        ['用', 'PyTorch', '训', '练']
    """
    if text.isascii() or not _CHARACTER.search(text):
        return _WORD.findall(text)
    return _UNIT.findall(text)


@functools.lru_cache(maxsize=2)
def words(text: str) -> tuple[str, ...]:
    """The words of a text: its ``units`` if it is written mostly without spaces, else the parts between spaces.

    Example:
        >>> from fastattn.lm.data.scripts import words
        >>> words("It rains, again."), words("下雨了。")
        (('It', 'rains,', 'again.'), ('下', '雨', '了'))
    """
    return tuple(units(text) if is_unspaced(text) else text.split())


def lacks_frequent_words(text: str) -> bool:
    """Whether a text has fewer than two of the frequent words of its script, among those with a list."""
    counts = {name: len(pattern.findall(text)) for name, pattern in _SCRIPTS.items()}
    script = "kana" if counts["kana"] > 0.1 * counts["Han"] else "Han"
    script = "Thai" if counts["Thai"] > counts[script] else script
    return counts[script] > 0 and sum(word in text for word in _FREQUENT[script]) < 2
