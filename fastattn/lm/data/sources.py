"""Sources of a corpus: files, folders, patterns and data sets of the Hugging Face hub.

The order of files and documents is the same on every machine, and which documents are held out depends on their text
alone. Unreadable files are skipped and reported, never fatal.
"""

from __future__ import annotations

import glob
import hashlib
import re
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastattn.errors import DataError
from fastattn.files import check_regular
from fastattn.lm.data.clean import ForeignEncoding, repair_bytes
from fastattn.lm.data.formats import Reading, ReadOptions, Unreadable, read_file

# Folders of an installed Python that are not the standard library's own source, or were written by programs.
_NOT_STDLIB = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
_NOT_STDLIB |= {"encodings", "pydoc_data"}
_SPLIT = re.compile(r"(train|validation|valid|dev|test|unsupervised)(\[.*\])?")


@dataclass(frozen=True)
class Document:
    """A file, a record of one, or a piece of a long one that begins and ends at a line.

    Attributes:
        name: its file and its number there.
        text: what it says.
        source: the file or data set.
        repaired: bytes that were not UTF-8.
    """

    name: str
    text: str
    source: str = ""
    repaired: int = 0


@dataclass(frozen=True)
class Skipped:
    """A file that was not used, or not wholly, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class HubData:
    """A split of a data set of the Hugging Face hub."""

    name: str
    config: str | None = None
    split: str = "train"

    @classmethod
    def parse(cls, given: str) -> HubData:
        """From ``hf:NAME[:CONFIG][:SPLIT]``; with two parts, the second is a split if it has the name of one."""
        name, *rest = given.removeprefix("hf:").split(":")
        if not name or len(rest) > 2 or not all(rest):
            raise DataError(f"{given!r} names no data set: write hf:NAME, hf:NAME:CONFIG or hf:NAME:CONFIG:SPLIT.")
        if len(rest) == 1 and _SPLIT.fullmatch(rest[0]):
            return cls(name, split=rest[0])
        return cls(name, *rest)

    def __str__(self) -> str:
        return ":".join(part for part in ("hf", self.name, self.config, self.split) if part)

    def records(self) -> Iterator[dict[str, Any]]:
        """Its records, streamed; raises DataError where ``datasets`` is missing or fails."""
        try:
            from datasets import load_dataset
        except ModuleNotFoundError as error:
            raise DataError(f"{self} needs the package 'datasets': pip install datasets") from error
        try:
            yield from load_dataset(self.name, self.config, split=self.split, streaming=True)
        except Exception as error:  # the library's own, of many kinds
            raise DataError(f"{self} cannot be read: {type(error).__name__}: {error}") from error


Source = Path | HubData


def find_sources(given: Sequence[str] = ()) -> list[Source]:
    """The files and data sets that ``given`` names, each once: like ``find_files``, and ``hf:`` names."""
    hub = [HubData.parse(name) for name in given if name.startswith("hf:")]
    paths = [name for name in given if not name.startswith("hf:")]
    files = find_files(paths) if paths or not hub else []
    return [*files, *dict.fromkeys(hub)]


def find_files(paths: Sequence[str] | None = None) -> list[Path]:
    """The files that ``paths`` name, each once, in a fixed order.

    Args:
        paths: files, folders (searched through, hidden entries left out) and glob patterns (``**`` allowed). None is
            the Python standard library's own source, which every machine has.

    Raises:
        DataError: a path does not exist, a pattern matches nothing, or no file is found.

    Example:
        >>> from fastattn.lm.data import find_files
        >>> any(path.name == "argparse.py" for path in find_files())
        True
    """
    if not paths:
        return _stdlib_files()
    found: dict[Path, Path] = {}
    for path in (path for given in paths for path in _matching(given)):
        found.setdefault(path.resolve(), path)  # a file that several links lead to is read once
    if not found:
        raise DataError(f"No files were found in {', '.join(paths)}.")
    return list(found.values())


def _matching(given: str) -> list[Path]:
    path = Path(given).expanduser()
    if path.is_dir():
        return _visible_files(path)
    if path.exists():
        check_regular(path)
        return [path]
    if not glob.has_magic(given):
        raise DataError(f"The path {given!r} does not exist: give a file, a folder or a pattern like 'src/**/*.py'.")
    matches = [Path(match) for match in sorted(glob.glob(str(path), recursive=True))]
    files = [match for match in matches if match.is_file()]
    if not files:
        raise DataError(f"The pattern {given!r} matches no file.")
    return files


def _visible_files(folder: Path) -> list[Path]:
    files = (path for path in folder.rglob("*") if path.is_file())
    visible = ((path.relative_to(folder), path) for path in files)
    return [path for name, path in sorted(visible) if not any(part.startswith(".") for part in name.parts)]


def _stdlib_files() -> list[Path]:
    root = Path(sysconfig.get_paths()["stdlib"])
    files = ((path.relative_to(root), path) for path in root.rglob("*.py"))
    own = [path for name, path in sorted(files) if not _NOT_STDLIB.intersection(name.parts)]
    if not own:
        raise DataError(f"This Python has no standard library source in {root}: give text with --data.")
    return own


def read_documents(
    sources: Sequence[Source],
    skipped: list[Skipped],
    options: ReadOptions | None = None,
    advance: Callable[[int], object] = lambda count: None,
) -> Iterator[Document]:
    """The documents of each source; see ``read_sources``.

    Args:
        sources: from ``find_sources`` or ``find_files``.
        skipped: receives what could not be read.
        options: fields, encoding.
        advance: told how many bytes of the files have been read, as they are.
    """
    for found in read_sources(sources, options or ReadOptions(), advance):
        if isinstance(found, Skipped):
            skipped.append(found)
        else:
            yield found


def read_sources(
    sources: Sequence[Source],
    options: ReadOptions,
    advance: Callable[[int], object] = lambda count: None,
    root: Path = Path(),
) -> Iterator[Document | Skipped]:
    """The documents of each source, and after them why the source, or a part of it, was skipped.

    Memory holds one document, and no more of a file than it takes to cut it out. Text files that are very long are cut
    into several documents at line ends.

    Args:
        sources: from ``find_sources`` or ``find_files``. What is skipped is binary, empty, damaged, without permission,
            or a record without the field.
        options: fields, encoding.
        advance: told how many bytes of the files have been read, as they are.
        root: the folder that relative paths start from.
    """
    for source in sources:
        name, number, end = str(source), 0, ""
        reading = Reading(advance)
        try:
            for raw in _texts(source, root, options, reading):
                text, repaired = repair_bytes(raw)
                if text.strip():
                    yield Document(f"{name}#{number}" if number else name, text, name, repaired)
                    number += 1
        except (Unreadable, ForeignEncoding) as problem:
            end = f"{problem}; the {number} documents before that are used" if number else str(problem)
        if reading.problems:
            yield Skipped(name, f"{reading.problems} records, the first at {reading.first_problem}")
        if end or not (number or reading.problems):
            yield Skipped(name, end or "empty")


def _texts(source: Source, root: Path, options: ReadOptions, reading: Reading) -> Iterator[str]:
    if isinstance(source, Path):
        yield from read_file(root / source, options, reading)
        return
    for number, record in enumerate(source.records(), 1):
        yield from reading.text_of(record, f"record {number}", options.fields)


def text_rank(text: str) -> float:
    """A number in [0, 1) that depends on the text alone, uniform over texts: who is held out, copies alike."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big") / 2**48
