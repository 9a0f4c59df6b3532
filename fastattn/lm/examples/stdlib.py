"""Real data that every machine has: the docstrings, comments and functions of Python's own standard library.

Everything is split by module (a file), so that what is held out comes from files of which nothing was seen, and a text
that occurs twice is used once.
"""

from __future__ import annotations

import ast
import copy
import hashlib
import re
import sysconfig
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeVar

from fastattn.lm.data import find_files

_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|\d+")
_COMMENT = re.compile(r"(?:^[ \t]*#.*\n)+", re.MULTILINE)  # lines that are nothing else
_SENTENCE_END = re.compile(r"(?<=[.!?:])\s+(?=[A-Z])|\s*\n\s*\n\s*")
_NOT_A_SUMMARY = re.compile(r">>>|[@:]|\w[\w.]*\(")  # a doctest, a directive, a signature
Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
Function = ast.FunctionDef | ast.AsyncFunctionDef
T = TypeVar("T", "Docstring", "Sentence", "Summary")


@dataclass(frozen=True)
class Docstring:
    """A docstring of a module, class or function."""

    module: str
    package: str
    text: str


@dataclass(frozen=True)
class Sentence:
    """A sentence of a docstring or comment."""

    module: str
    package: str
    text: str


@dataclass(frozen=True)
class Summary:
    """A function without its docstring and comments, its class, if any, and the docstring's first line."""

    module: str
    package: str
    owner: str
    source: str
    summary: str


class Module(NamedTuple):
    """A file of the standard library: its path below the root, its text and its syntax tree."""

    path: str
    text: str
    tree: ast.Module


def modules() -> Iterator[Module]:
    """The files that are Python in UTF-8."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in find_files():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of old escapes in the library itself
                text = path.read_text(encoding="utf-8")
                yield Module(path.relative_to(root).as_posix(), text, ast.parse(text))
        except (OSError, SyntaxError, UnicodeDecodeError):
            continue  # files in other encodings, and templates that are not Python


def docstrings(fewest_characters: int = 40) -> list[Docstring]:
    """All docstrings of at least so many characters, each once."""
    found = (
        Docstring(module.path, _package(module.path), text)
        for module in modules()
        for text in _docstrings(module.tree)
        if len(text) >= fewest_characters
    )
    return list(_each_once(found, lambda item: words(item.text)))


def sentences(fewest_words: int = 3, most_words: int = 14) -> list[Sentence]:
    """All sentences of docstrings and comments with so many words, each once; not what is mostly code."""
    found = (
        Sentence(module.path, _package(module.path), " ".join(sentence.split()))
        for module in modules()
        for text in (*_docstrings(module.tree), *_comments(module.text))
        for sentence in _SENTENCE_END.split(text)
        if fewest_words <= len(words(sentence)) and len(sentence.split()) <= most_words and _is_prose(sentence)
    )
    return list(_each_once(found, lambda item: words(item.text)))


def _docstrings(tree: ast.Module) -> list[str]:
    return [ast.get_docstring(node) or "" for node in ast.walk(tree) if isinstance(node, Documented)]


def _comments(text: str) -> Iterator[str]:
    """Comments that stand alone, lines that follow each other together."""
    for block in _COMMENT.findall(text):
        yield "\n".join(line.strip().lstrip("#").strip() for line in block.splitlines())


def _is_prose(text: str) -> bool:
    """Whether nearly all of it is letters and spaces."""
    return ">>>" not in text and sum(c.isalpha() or c.isspace() for c in text) > 0.8 * len(text)


def summaries() -> list[Summary]:
    """All functions whose docstring begins with a line of 3 to 20 words, each function and each line once."""
    found = (
        item
        for module in modules()
        for owner, node in _functions(module.tree)
        if (item := _summary(module.path, owner, node)) is not None
    )
    by_line = _each_once(found, lambda item: words(item.summary))
    return list(_each_once(by_line, lambda item: words(item.source)))


def words(text: str) -> tuple[str, ...]:
    """The words of text or code in lower case, names taken apart: ``get_fileName2`` is get, file, name, 2."""
    return tuple(word.lower() for word in _WORD.findall(text))


def largest_packages(items: Iterable[Docstring | Summary], fewest_modules: int, fewest_items: int) -> list[str]:
    """The packages with at least so many modules and items, the largest first."""
    counts: Counter[str] = Counter()
    files: defaultdict[str, set[str]] = defaultdict(set)
    for item in items:
        counts[item.package] += 1
        files[item.package].add(item.module)
    enough = (name for name, count in counts.items() if count >= fewest_items and len(files[name]) >= fewest_modules)
    return sorted(enough, key=lambda name: (-counts[name], name))


def split_by_module(items: list[T], held_out: float = 0.2) -> tuple[list[T], list[T]]:
    """Training and held-out items, no module in both: of each package about ``held_out`` of the items, if it can be."""
    sizes: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for item in items:
        sizes[item.package][item.module] += 1
    kept: set[str] = set()
    for counts in sizes.values():
        room = held_out * counts.total()
        for module in sorted(counts, key=_rank):
            if counts[module] <= room:
                room -= counts[module]
                kept.add(module)
    return [x for x in items if x.module not in kept], [x for x in items if x.module in kept]


def held_out_files(files: Sequence[Path], held_out: float = 0.05) -> set[Path]:
    """About this part of ``files``, chosen by their names in the library."""
    root = Path(sysconfig.get_paths()["stdlib"])
    ranked = sorted(files, key=lambda path: _rank(path.relative_to(root).as_posix()))
    return set(ranked[: round(held_out * len(ranked))])


def _rank(module: str) -> str:
    """An order of modules that is the same on every machine and has nothing to do with their names."""
    return hashlib.sha256(module.encode()).hexdigest()


def _package(module: str) -> str:
    return module.split("/")[0].removesuffix(".py")


def _each_once(items: Iterable[T], key: Callable[[T], Hashable]) -> Iterator[T]:
    seen: set[Hashable] = set()
    for item in items:
        mark = key(item)
        if mark not in seen:
            seen.add(mark)
            yield item


def _functions(tree: ast.AST, owner: str = "") -> Iterator[tuple[str, Function]]:
    """The functions below a node, and the innermost class that each stands in."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, Function):
            yield owner, node
        yield from _functions(node, node.name if isinstance(node, ast.ClassDef) else owner)


def _summary(module: str, owner: str, node: Function) -> Summary | None:
    line, _, _ = (ast.get_docstring(node) or "").partition("\n")
    line = line.strip()
    if not 3 <= len(words(line)) <= 20 or _NOT_A_SUMMARY.match(line):
        return None
    bare = copy.copy(node)  # shares all but what is set here
    bare.body, bare.decorator_list = node.body[1:] or [ast.Pass()], []
    return Summary(module, _package(module), owner, ast.unparse(ast.fix_missing_locations(bare)), line)
