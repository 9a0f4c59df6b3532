"""Finding text files and reading them as documents. What cannot be read is skipped and named, never fatal.

The order of files and documents is the same on every machine, and which documents are held out depends on their text
alone.
"""

from __future__ import annotations

import glob
import hashlib
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from fastattn.errors import DataError

# Folders of an installed Python that are not the standard library's own source, or were written by programs.
_NOT_STDLIB = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
_NOT_STDLIB |= {"encodings", "pydoc_data"}
_PIECES = 64  # a corpus is cut so that no document is much larger than one part in this many
_LONGEST_PIECE = 1 << 18
_SHORTEST_PIECE = 256


@dataclass(frozen=True)
class Document:
    """A file, or a piece of a long one that begins and ends at a line."""

    name: str
    text: str


@dataclass(frozen=True)
class Skipped:
    """A file that was not used, and why."""

    name: str
    reason: str


def find_files(paths: Sequence[str] | None = None) -> list[Path]:
    """The files that ``paths`` name, each once, in a fixed order.

    Args:
        paths: files, folders (searched through, hidden entries left out) and glob patterns (``**`` allowed). None is
            the Python standard library's own source, which every machine has.

    Raises:
        DataError: a path does not exist, a pattern matches nothing, or no file is found.

    Example:
        >>> from fastattn.train.text import find_files
        >>> any(path.name == "argparse.py" for path in find_files())
        True
    """
    if not paths:
        return _stdlib_files()
    found: dict[Path, None] = {}
    for given in paths:
        for path in _matches(given):
            files = _files_below(path) if path.is_dir() else [path]
            found.update(dict.fromkeys(file.resolve() for file in files))
    if not found:
        raise DataError(f"No files were found under {', '.join(paths)}: give a file, a folder or a pattern with text.")
    return list(found)


def _matches(given: str) -> list[Path]:
    path = Path(given)
    if path.exists():
        return [path]
    matches = sorted(glob.glob(str(path), recursive=True))
    if not matches:
        raise DataError(f"Data path {given!r} does not exist and matches no file: check the spelling of --data.")
    return [Path(match) for match in matches]


def _files_below(folder: Path) -> list[Path]:
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


def read_documents(files: Sequence[Path], skipped: list[Skipped]) -> Iterator[Document]:
    """The text of each file, long ones cut into several documents at line ends.

    Pieces are about 1/64 of the whole or less, so that a part can be held out even of a single file.

    Args:
        files: from ``find_files``.
        skipped: receives what could not be read: binary, empty, not UTF-8, no permission.
    """
    longest = _piece_length(files)
    for path in files:
        text, problem = _read(path)
        if problem:
            skipped.append(Skipped(str(path), problem))
            continue
        for number, piece in enumerate(_pieces(text, longest)):
            yield Document(f"{path}#{number}" if number else str(path), piece)


def _piece_length(files: Sequence[Path]) -> int:
    total = 0
    for path in files:
        if path.is_file():
            total += path.stat().st_size
    return min(max(total // _PIECES, _SHORTEST_PIECE), _LONGEST_PIECE)


def _read(path: Path) -> tuple[str, str]:
    """The text and "", or "" and why there is none."""
    try:
        data = path.read_bytes()
    except OSError as error:
        return "", f"cannot be read ({error.strerror or error})"
    if b"\0" in data:
        return "", "binary (it holds zero bytes)"
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        return "", f"not UTF-8 (byte {error.start})"
    return (text, "") if text.strip() else ("", "empty")


def _pieces(text: str, longest: int) -> Iterator[str]:
    """Cut ``text`` after the last line end within each ``longest`` characters, or right there if there is none."""
    start = 0
    while len(text) - start > longest:
        end = text.rfind("\n", start, start + longest) + 1
        end = end if end > start else start + longest
        yield text[start:end]
        start = end
    yield text[start:]


def text_rank(text: str) -> float:
    """A number in [0, 1) that depends on the text alone, uniform over texts: who is held out, copies alike."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big") / 2**48
