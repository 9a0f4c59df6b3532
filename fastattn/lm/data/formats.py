"""Reading one file of any format as texts: plain text, JSON lines, CSV and TSV, also in gzip or Zstandard; Parquet.

The suffix names the format, as in ``c4.json.gz``. Files may come from anyone: lines, JSON that is read as a whole and
the expansion of compressed files have limits. Bytes that are not UTF-8 come out as surrogates (U+DC80 ... U+DCFF),
for ``clean.repair_bytes`` to read. Memory holds a chunk, a line or a record; only a JSON array is read as a whole.
"""

from __future__ import annotations

import codecs
import contextlib
import csv
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from fastattn.errors import DataError, input_error
from fastattn.files import check_regular

_CHUNK = 1 << 20  # bytes or characters read at a time
_LONGEST_LINE = 1 << 26  # characters
_LARGEST_JSON = 1 << 27  # characters of an array, which is read as a whole
_EXPANSION, _FREE = 200, 1 << 26  # most bytes from each compressed one, from so many bytes on
_ROWS = 256  # of a Parquet file, decoded at a time
LONGEST_PIECE = 1 << 18
# Byte order marks; that of UTF-32 begins with that of UTF-16.
_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
csv.field_size_limit(_LONGEST_LINE)


class Unreadable(Exception):
    """A file, or the rest of it, cannot be used; the message says why."""


@dataclass(frozen=True)
class ReadOptions:
    """Options of reading.

    Attributes:
        fields: of a JSON object or of a table's header that make up a document, joined by line ends; all of them
            numbers are columns, from 1, of a table without a header.
        encoding: of the files; None is UTF-8, or what a byte order mark says.

    Raises:
        InputError: Python knows no such encoding of text.
    """

    fields: tuple[str, ...] = ("text",)
    encoding: str | None = None

    def __post_init__(self) -> None:
        try:
            "".encode(self.encoding or "utf-8")
        except LookupError:
            allowed = "an encoding that Python knows"
            raise input_error("encoding", repr(self.encoding), allowed, "For example latin-1 or utf-16.") from None

    @property
    def has_header(self) -> bool:
        return not all(name.isdecimal() for name in self.fields)


@dataclass
class Reading:
    """Progress and problems of reading a file.

    Attributes:
        advance: called with the number of bytes read.
        problems: records that were left out.
        first_problem: where and why, of the first of them.
    """

    advance: Callable[[int], object] = lambda count: None
    problems: int = 0
    first_problem: str = ""

    def leave_out(self, place: str, why: str) -> None:
        self.problems += 1
        self.first_problem = self.first_problem or f"{place}: {why}"

    def text_of(
        self, record: object, place: str, fields: Iterable[str], known: Sequence[str] | None = None
    ) -> Iterator[str]:
        """The document of a record, unless it lacks a field; ``known`` are all that there are, None those of it."""
        if not isinstance(record, Mapping):
            self.leave_out(place, "not a JSON object")
            return
        missing = [name for name in fields if name not in record]
        if missing:
            names = ", ".join(map(str, (known or list(record))[:12]))
            self.leave_out(place, f"no field {missing[0]!r} among {names}; choose with --field")
            return
        yield "\n".join(str(record[name]) for name in fields if record[name] is not None)


def read_file(path: Path, options: ReadOptions, reading: Reading) -> Iterator[str]:
    """The texts in a file: pieces of plain text, cut where it is longer than ``LONGEST_PIECE``, or one of each record.

    Raises:
        Unreadable: it cannot be read, from where this is raised on.
    """
    try:
        check_regular(path)
        if _suffix(path) == ".parquet":
            yield from _parquet(path, options, reading)
            return
        with contextlib.ExitStack() as stack:
            raw = stack.enter_context(path.open("rb", buffering=0))
            text = stack.enter_context(_decoded(_decompressed(path, _Counted(raw, reading)), options.encoding))
            yield from _texts(_suffix(path), text, options, reading)
    except DataError as error:
        raise Unreadable(str(error)) from error
    except UnicodeError as error:
        raise Unreadable(f"not {options.encoding or 'in the encoding of its byte order mark'} ({error})") from error
    except (EOFError, zlib.error, gzip.BadGzipFile, csv.Error) as error:
        raise Unreadable(f"damaged ({error})") from error
    except OSError as error:
        raise Unreadable(f"cannot be read ({error.strerror or error})") from error


def _suffix(path: Path) -> str:
    return Path(path.name.lower().removesuffix(".gz").removesuffix(".zst")).suffix


class _Counted(io.RawIOBase):
    """A file that tells how much of it has been read."""

    def __init__(self, raw: io.RawIOBase, reading: Reading) -> None:
        self.raw, self.reading, self.count = raw, reading, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = self.raw.readinto(buffer) or 0
        self.reading.advance(count)
        self.count += count
        return count


class _Expanded(io.RawIOBase):
    """The content of a compressed file, which must not be far larger than any text would be."""

    def __init__(self, content: io.RawIOBase | gzip.GzipFile, compressed: _Counted) -> None:
        self.content, self.compressed, self.count = content, compressed, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = self.content.readinto(buffer) or 0
        self.count += count
        if self.count > max(_FREE, _EXPANSION * self.compressed.count):
            raise Unreadable(f"it expands to more than {_EXPANSION} times its size, as no text does")
        return count


def _decompressed(path: Path, raw: _Counted) -> io.BufferedReader:
    suffix = path.suffix.lower()
    if suffix == ".gz":
        content = gzip.GzipFile(fileobj=io.BufferedReader(raw, _CHUNK))
        return io.BufferedReader(_Expanded(content, raw), _CHUNK)
    return io.BufferedReader(_Expanded(_Zstandard(raw), raw) if suffix == ".zst" else raw, _CHUNK)


class _Zstandard(io.RawIOBase):
    """The content of a Zstandard file of one or more frames; a truncated one ends with EOFError."""

    def __init__(self, raw: io.RawIOBase) -> None:
        self._raw = io.BufferedReader(raw, _CHUNK)
        self._new, self._error = _zstandard()
        self._frame: Any = None
        self._input = self._output = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._output and self._feed():
            pass
        count = min(len(buffer), len(self._output))
        buffer[:count], self._output = self._output[:count], self._output[count:]
        return count

    def _feed(self) -> bool:
        """Decompress some more; False at the end."""
        self._input = self._input or self._raw.read1(1 << 11)  # of which at most 64 MiB come at once
        if not self._input:
            if self._frame is not None:
                raise EOFError("the file ends before the end of its Zstandard frame")
            return False
        self._frame = self._frame or self._new()
        try:
            self._output, self._input = self._frame.decompress(self._input), b""
        except self._error as error:
            raise EOFError(f"not Zstandard: {error}") from error
        if self._frame.eof:
            self._input, self._frame = self._frame.unused_data, None
        return True


def _zstandard() -> tuple[Callable[[], Any], type[Exception]]:
    """A maker of decompressors and their exception: Python's own from 3.14 on, else the package ``zstandard``."""
    try:
        from compression import zstd
    except ModuleNotFoundError:
        try:
            import zstandard
        except ModuleNotFoundError as error:
            raise Unreadable("needs the package 'zstandard': pip install zstandard") from error
        return lambda: zstandard.ZstdDecompressor().decompressobj(), zstandard.ZstdError
    return zstd.ZstdDecompressor, zstd.ZstdError


def _decoded(data: io.BufferedReader, encoding: str | None) -> TextIO:
    start = data.peek(4)[:4]
    marked = next((name for mark, name in _MARKS if start.startswith(mark)), None)
    name = encoding or marked or "utf-8"
    errors = "surrogateescape" if encoding is None and name.startswith("utf-8") else "strict"
    return io.TextIOWrapper(data, encoding=name, errors=errors, newline="")


def _texts(suffix: str, text: TextIO, options: ReadOptions, reading: Reading) -> Iterator[str]:
    if suffix in (".jsonl", ".ndjson"):
        yield from _json_lines(_lines(text), options, reading)
    elif suffix == ".json":
        yield from _json(text, options, reading)
    elif suffix == ".csv":
        yield from _rows(csv.reader(_lines(text)), options, reading)
    elif suffix == ".tsv":
        yield from _rows(csv.reader(_lines(text), delimiter="\t", quoting=csv.QUOTE_NONE), options, reading)
    else:
        yield from pieces(iter(lambda: text.read(_CHUNK), ""), LONGEST_PIECE)


def _lines(text: TextIO) -> Iterator[str]:
    """The lines of a text with their ends; Unreadable from one on that is too long."""
    number, size, held = 1, 0, list[str]()
    while chunk := text.read(_CHUNK):
        if chunk.endswith("\r"):
            chunk += text.read(1)  # which may be the other half of a line end
        for part in io.StringIO(chunk, newline=""):
            held.append(part)
            size += len(part)
            if size > _LONGEST_LINE:
                raise Unreadable(f"line {number} is longer than {_LONGEST_LINE >> 20} Mi characters")
            if part.endswith(("\n", "\r")):
                yield "".join(held)
                number, size, held = number + 1, 0, []
    if held:
        yield "".join(held)


def _json_lines(lines: Iterable[str], options: ReadOptions, reading: Reading) -> Iterator[str]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            reading.leave_out(f"line {number}", f"not JSON: {error}")
            continue
        yield from reading.text_of(record, f"line {number}", options.fields)


def _json(text: TextIO, options: ReadOptions, reading: Reading) -> Iterator[str]:
    """JSON lines if the first line is an object; an array of objects if it is that; else plain text."""
    lines = _lines(text)
    first = next(lines, "")
    if isinstance(_parsed(first), dict):
        yield from _json_lines(_chain(first, lines), options, reading)
        return
    if first.lstrip().startswith("["):
        first = _whole(_chain(first, lines))
        records = _parsed(first)
        if isinstance(records, list) and records and isinstance(records[0], dict):
            for number, record in enumerate(records, 1):
                yield from reading.text_of(record, f"record {number}", options.fields)
            return
    yield from pieces(_chain(first, lines), LONGEST_PIECE)


def _whole(lines: Iterable[str]) -> str:
    """The text of a JSON array; Unreadable if it is too large to be read as a whole."""
    size, held = 0, list[str]()
    for line in lines:
        held.append(line)
        size += len(line)
        if size > _LARGEST_JSON:
            raise Unreadable(f"a JSON array of more than {_LARGEST_JSON >> 20} Mi characters: make it JSON lines")
    return "".join(held)


def _parsed(text: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _chain(first: str, others: Iterable[str]) -> Iterator[str]:
    yield first
    yield from others


def _rows(rows: Iterable[list[str]], options: ReadOptions, reading: Reading) -> Iterator[str]:
    header: list[str] | None = None
    for number, row in enumerate(rows, 1):
        if not row:
            continue
        if header is None and options.has_header:
            header = row
            continue
        names = header if header is not None else [str(column + 1) for column in range(len(row))]
        if len(names) != len(row):
            reading.leave_out(f"row {number}", f"{len(row)} columns where the header has {len(names)}")
            continue
        yield from reading.text_of(dict(zip(names, row, strict=True)), f"row {number}", options.fields)


def _parquet(path: Path, options: ReadOptions, reading: Reading) -> Iterator[str]:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ModuleNotFoundError as error:
        raise Unreadable("needs the package 'pyarrow': pip install pyarrow") from error
    size, number, told, held = path.stat().st_size, 0, 0, 0
    try:
        with ParquetFile(path) as file:
            known, rows = file.schema_arrow.names, max(file.metadata.num_rows, 1)
            columns = [name for name in options.fields if name in known] or known[:1]  # the others are missed below
            for batch in file.iter_batches(_ROWS, columns=columns):
                for record in batch.to_pylist():
                    number += 1
                    for text in reading.text_of(record, f"row {number}", options.fields, known):
                        held += len(text)
                        yield text
                if held > max(_FREE, _EXPANSION * size):
                    raise Unreadable(f"it expands to more than {_EXPANSION} times its size, as no text does")
                reading.advance(size * number // rows - told)
                told = size * number // rows
    except (ArrowException, OSError) as error:
        raise Unreadable(f"not Parquet, or damaged after row {number} ({error})") from error


def pieces(chunks: Iterable[str], longest: int) -> Iterator[str]:
    """Cut a text after the last line end within each ``longest`` characters, or right there if there is none."""
    text = ""
    for chunk in chunks:
        if "\0" in chunk:
            raise Unreadable("binary (it holds zero bytes)")
        text += chunk
        start = 0
        while len(text) - start > longest:
            end = text.rfind("\n", start, start + longest) + 1
            end = end if end > start else start + longest
            yield text[start:end]
            start = end
        text = text[start:]
    if text:
        yield text
