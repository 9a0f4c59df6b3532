"""Quality rules for documents. Each has a name, can be turned off, and is counted.

For prose: the quality and repetition rules of Gopher (Rae et al., "Scaling language models: methods, analysis &
insights from training Gopher", 2021, appendix A.1.1 and table A1), with its numbers. For source code: those of Codex
and The Stack (Chen et al., "Evaluating large language models trained on code", 2021, section 3.1; Kocetkov et al.,
"The Stack", 2022): length and kind of lines. In scripts without spaces a character counts as a word, runs are twice as
long, and the rule on the length of words does not apply.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import PurePath

import numpy as np
from numpy.typing import NDArray

from fastattn.lm.data.scripts import is_unspaced, lacks_frequent_words, words

# Suffixes of source code; a file of another is prose.
CODE = frozenset(
    f".{name}"
    for name in (
        *("py", "pyi", "pyx", "c", "h", "cc", "cpp", "cxx", "hpp", "cu", "cuh", "java", "kt", "scala", "go", "rs"),
        *("swift", "m", "cs", "fs", "js", "mjs", "jsx", "ts", "tsx", "rb", "php", "pl", "lua", "r", "jl", "hs", "ml"),
        *("clj", "ex", "erl", "sh", "bash", "zsh", "ps1", "sql", "css", "scss", "html", "xml", "yaml", "yml", "toml"),
        *("cmake", "gradle", "vim", "el", "lisp", "asm", "s", "v", "sv", "vhd", "proto", "mk"),
    )
)
_STOP_WORDS = frozenset(("the", "be", "to", "of", "and", "that", "have", "with"))
_BULLETS = ("•", "‣", "⁃", "◦", "▪", "-", "*", "·")
_LETTER = re.compile(r"[^\W\d_]")
_FACTOR = np.uint64(0x9E3779B97F4A7C15)  # odd, and its bits look random


@dataclass(frozen=True)
class Text:
    """A text, and what the rules look at, computed when first asked for."""

    text: str

    @cached_property
    def unspaced(self) -> bool:
        return is_unspaced(self.text)

    @cached_property
    def words(self) -> tuple[str, ...]:
        return words(self.text)

    @cached_property
    def lines(self) -> list[str]:
        return [line for line in map(str.strip, self.text.split("\n")) if line]

    @cached_property
    def paragraphs(self) -> list[str]:
        return [part for part in map(str.strip, re.split(r"\n\s*\n", self.text)) if part]

    @cached_property
    def word_characters(self) -> int:
        return int(self.lengths.sum())

    @cached_property
    def ends(self) -> NDArray[np.int64]:
        """Characters of the words up to and including each, from 0 on: ``ends[j] - ends[i]`` are those of a run."""
        return np.concatenate([[0], np.cumsum(self.lengths)])

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """Characters of each word."""
        return np.fromiter(map(len, self.words), np.int64, len(self.words))

    @cached_property
    def word_hashes(self) -> NDArray[np.uint64]:
        """A 64-bit number for each word, equal for equal words; in each process another one."""
        return np.fromiter(map(hash, self.words), np.int64, len(self.words)).view(np.uint64)

    def repeats(self, n: int, most: float) -> bool:
        """Whether the most frequent run of ``n`` words recurs and has more than this part of the characters."""
        runs, size = self._runs(n)
        longest = size * int(self.lengths.max(initial=1))  # no run has more characters
        times = max(2, math.ceil(most * self.word_characters / longest))
        if not _occurs(runs, times):
            return False
        _, first, counts = np.unique(runs, return_index=True, return_counts=True)
        times = int(counts.max())
        starts = first[counts == times]
        return times * int((self.ends[starts + size] - self.ends[starts]).max()) > most * self.word_characters

    def covered_by_repeats(self, n: int) -> float:
        """Part of the characters in any run of ``n`` words that occurred before, each character counted once."""
        runs, size = self._runs(n)
        if not _occurs(runs, 2):
            return 0.0
        is_first = np.zeros(len(runs), bool)
        is_first[np.unique(runs, return_index=True)[1]] = True
        repeats = np.flatnonzero(~is_first)
        begins = np.maximum(repeats, np.concatenate([[0], repeats[:-1] + size]))  # each word once
        return float((self.ends[repeats + size] - self.ends[begins]).sum()) / max(self.word_characters, 1)

    @cached_property
    def _hashed_runs(self) -> list[NDArray[np.uint64]]:
        """Hashes of all runs of one word, of two, and so on as far as they were asked for."""
        return [self.word_hashes]

    def _runs(self, n: int) -> tuple[NDArray[np.uint64], int]:
        """A hash of each run of ``n`` words, and their number; in a script without spaces twice as many characters."""
        size, known = 2 * n if self.unspaced else n, self._hashed_runs
        while len(known) < size:
            longer = known[-1][:-1] * _FACTOR + self.word_hashes[len(known) :]  # the order of the words counts
            known.append(longer ^ (longer >> np.uint64(29)))
        return known[size - 1], size


def _occurs(runs: NDArray[np.uint64], times: int) -> bool:
    """Whether one of the numbers occurs at least so many times. Sorting them is much faster than counting them."""
    ordered = np.sort(runs)
    return bool((ordered[times - 1 :] == ordered[: len(ordered) - times + 1]).any()) if len(runs) >= times else False


def _part_repeated(parts: Sequence[str]) -> float:
    return 1 - len(set(parts)) / len(parts) if parts else 0.0


def _with_letters(words: Sequence[str]) -> int:
    """Words with a letter; of those, where they are enough, that have nothing else."""
    plain = sum(map(str.isalpha, words))
    if plain >= 0.8 * len(words):
        return plain
    return sum(1 for word in words if word[0].isalpha() or _LETTER.search(word))


def _has_stop_words(words: Sequence[str]) -> bool:
    return len(_STOP_WORDS.intersection(words)) >= 2 or len(_STOP_WORDS.intersection(map(str.lower, words))) >= 2


def _characters_repeated(parts: Sequence[str]) -> float:
    total = sum(map(len, parts))
    return 1 - sum(map(len, set(parts))) / total if total else 0.0


def _part(parts: Sequence[str], is_so: Callable[[str], bool]) -> float:
    return sum(map(is_so, parts)) / len(parts) if parts else 0.0


# Largest part of the characters in the most frequent run of n words, and in any repeated run of n words.
_TOP_RUNS = {2: 0.20, 3: 0.18, 4: 0.16}
_ALL_RUNS = {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}


def _repeats_runs(text: Text) -> bool:
    for n, most in _ALL_RUNS.items():
        covered = text.covered_by_repeats(n)
        if covered > most:
            return True
        if covered == 0:
            return False  # then no longer run repeats either
    return False


Rule = Callable[[Text, "Lengths"], bool]  # whether a document is to be dropped


@dataclass(frozen=True)
class Lengths:
    """Fewest and most words of a document."""

    min_words: int = 50
    max_words: int = 100_000


PROSE: Mapping[str, Rule] = {
    "too-short": lambda text, lengths: len(text.words) < lengths.min_words,
    "too-long": lambda text, lengths: len(text.words) > lengths.max_words,
    "word-length": lambda text, _: not text.unspaced and not 3 <= text.word_characters / max(len(text.words), 1) <= 10,
    "symbols": lambda text, _: (
        max(text.text.count("#"), text.text.count("...") + text.text.count("…")) > 0.1 * len(text.words)
    ),
    "bullets": lambda text, _: _part(text.lines, lambda line: line.startswith(_BULLETS)) > 0.9,
    "ellipses": lambda text, _: _part(text.lines, lambda line: line.endswith(("...", "…"))) > 0.3,
    "alphabetic-words": lambda text, _: _with_letters(text.words) < 0.8 * len(text.words),
    "stop-words": lambda text, _: lacks_frequent_words(text.text) if text.unspaced else not _has_stop_words(text.words),
    "repeated-lines": lambda text, _: _part_repeated(text.lines) > 0.3 or _characters_repeated(text.lines) > 0.2,
    "repeated-paragraphs": lambda text, _: (
        _part_repeated(text.paragraphs) > 0.3 or _characters_repeated(text.paragraphs) > 0.2
    ),
    "frequent-run": lambda text, _: any(text.repeats(n, most) for n, most in _TOP_RUNS.items()),
    "repeated-runs": lambda text, _: _repeats_runs(text),
}

SOURCE_CODE: Mapping[str, Rule] = {
    "too-long": lambda text, lengths: len(text.words) > lengths.max_words,
    "long-lines": lambda text, _: max(map(len, text.lines), default=0) > 1000,
    "mean-line-length": lambda text, _: sum(map(len, text.lines)) > 100 * len(text.lines),
    "alphanumeric": lambda text, _: sum(map(str.isalnum, text.text)) < 0.25 * len(text.text),
}

RULES = tuple(dict.fromkeys([*PROSE, *SOURCE_CODE]))


def is_code(source: str) -> bool:
    """Whether a file's name says that it is source code."""
    path = PurePath(source.lower().removesuffix(".gz").removesuffix(".zst"))
    return path.suffix in CODE or path.name in ("makefile", "dockerfile")


def broken_rule(text: str, code: bool, lengths: Lengths, without: frozenset[str] = frozenset()) -> str | None:
    """The name of the first rule that ``text`` breaks; None if it breaks none.

    Args:
        text: a document.
        code: judge it as source code, not as prose.
        lengths: fewest and most words.
        without: names of rules that are turned off.

    Example:
        >>> from fastattn.lm.data.quality import Lengths, broken_rule
        >>> broken_rule("The end.", code=False, lengths=Lengths())
        'too-short'
    """
    document = Text(text)
    return next(_broken(document, SOURCE_CODE if code else PROSE, lengths, without), None)


def _broken(text: Text, rules: Mapping[str, Rule], lengths: Lengths, without: frozenset[str]) -> Iterator[str]:
    for name, is_broken in rules.items():
        if name not in without and is_broken(text, lengths):
            yield name
