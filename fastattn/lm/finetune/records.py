"""Records from files: JSON, JSON lines, CSV, TSV, Parquet, CoNLL, parallel texts, images, and folders of ``datasets``.

A record is a dict by column. ``columns.py`` maps columns to the fields of a task.
"""

from __future__ import annotations

import csv
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from fastattn.errors import DataError
from fastattn.files import read_limited, read_lines
from fastattn.lm.data.images import is_image
from fastattn.lm.finetune.image_folders import has_images, images_in, metadata_of

Record = dict[str, Any]
Located = Iterator[tuple[str, Record]]  # file and line of each record, and the record
_COLA = ("source", "label", "original label", "sentence")  # the columns of CoLA's files, which do not name them


@dataclass
class Records:
    """Records to be read once.

    Attributes:
        items: place and record, one after the other.
        class_names: of columns that hold numbers of classes.
        folder: that paths in the records are relative to.
    """

    items: Located
    class_names: dict[str, list[str]] = field(default_factory=dict)
    folder: Path = Path()


def read_records(path: Path, *, of_images: bool = True) -> Records:
    """The records of a file, by the suffix of its name, or of a folder of images or that ``datasets`` saved.

    Args:
        path: the file or folder.
        of_images: images may be read; other tasks must not take the plots of a run for their data.

    Raises:
        DataError: the file is missing, damaged or of an unknown kind; at once, or when its records are read.
    """
    if path.is_dir():
        return _of_folder(path, of_images)
    if of_images and is_image(path):
        return Records(iter([(str(path), {"image": str(path)})]))
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return _parquet(path)
    if suffix not in _READERS:
        raise DataError(f"{path} is not a file of examples by its name: use one of {', '.join(_READERS)}, .parquet.")
    return Records(_telling(path, _READERS[suffix](path)), folder=path.parent)


def _of_folder(path: Path, of_images: bool) -> Records:
    if of_images and (metadata := metadata_of(path)) is not None:
        return read_records(metadata)
    if of_images and not (path / "state.json").is_file() and has_images(path):
        return Records(images_in(path))
    return _saved_dataset(path)


def _telling(path: Path, items: Located) -> Located:
    """The records, with errors of reading as DataErrors."""
    try:
        yield from items
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror or error}).") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 (byte {error.start}).") from error


def parallel_records(source: Path, target: Path) -> Records:
    """Lines of two files, the n-th of one belonging to the n-th of the other."""

    def lines() -> Located:
        pairs = itertools.zip_longest(read_lines(source), read_lines(target))
        for number, (first, second) in enumerate(pairs, 1):
            if first is None or second is None:
                shorter = source if first is None else target
                raise DataError(f"{source} and {target} differ in length: {shorter} ends before line {number}.")
            if first.strip() and second.strip():
                yield f"{source}, line {number}", {"source": first.strip(), "target": second.strip()}

    return Records(_telling(source, lines()))


def _json_lines(path: Path) -> Located:
    for number, line in enumerate(read_lines(path), 1):
        if line.strip():
            yield f"{path}, line {number}", _object(f"{path}, line {number}", line)


def _object(place: str, text: str) -> Record:
    record = parse_json(place, text)
    if not isinstance(record, dict):
        raise DataError(f"{place}: not a JSON object, which is written {{...}}.")
    return record


def parse_json(place: str, text: str) -> Any:
    """JSON of any kind; raises DataError if it is none, or nested too deeply."""
    try:
        return json.loads(text)
    except ValueError as error:
        raise DataError(f"{place}: not JSON ({error}).") from error
    except RecursionError as error:
        raise DataError(f"{place}: the JSON is nested too deeply.") from error


def _json(path: Path) -> Located:
    """A list of objects, an object with such a list as "data" (SQuAD's too), or JSON lines by another name."""
    first = next((line for line in read_lines(path) if line.strip()), "")
    if first.lstrip().startswith("{") and _is_object(first):
        yield from _json_lines(path)
        return
    content = parse_json(str(path), read_limited(path))
    items = content.get("data") if isinstance(content, dict) else content
    if not isinstance(items, list):
        raise DataError(f'{path}: not a list of JSON objects, nor an object with such a list as "data".')
    for number, item in enumerate(items, 1):
        place = f"{path}, item {number}"
        if not isinstance(item, dict):
            raise DataError(f"{place}: not a JSON object, which is written {{...}}.")
        yield from _questions(place, item) if "paragraphs" in item else [(place, item)]


def _is_object(line: str) -> bool:
    """Whether a line is a record by itself, as in JSON lines."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return isinstance(record, dict) and not isinstance(record.get("data"), list)


def _questions(place: str, article: Record) -> Located:
    """The questions of an article of SQuAD, 1.1 or 2.0."""
    try:
        for paragraph in article["paragraphs"]:
            for question in paragraph["qas"]:
                answers = {
                    "text": [answer["text"] for answer in question["answers"]],
                    "answer_start": [answer["answer_start"] for answer in question["answers"]],
                }
                record = {"id": question.get("id"), "question": question["question"], "context": paragraph["context"]}
                yield f"{place}, question {question.get('id')}", record | {"answers": answers}
    except (KeyError, TypeError) as error:
        raise DataError(f"{place}: not an article of SQuAD ({error!r} is missing or wrong).") from error


def _table(path: Path, **dialect: Any) -> Located:
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.reader(file, **dialect)
        try:
            names = next(rows, [])
            if _is_cola(names):
                yield f"{path}, line 1", dict(zip(_COLA, names, strict=True))
                names = list(_COLA)
            for row in rows:
                if not row:
                    continue
                if len(row) != len(names):
                    raise csv.Error(f"{len(row)} columns, where the first line names {len(names)}")
                yield f"{path}, line {rows.line_num}", dict(zip(names, row, strict=True))
        except csv.Error as error:
            raise DataError(f"{path}, line {rows.line_num}: {error}.") from error


def _is_cola(row: Sequence[str]) -> bool:
    """Whether the first line of a table is one of CoLA: a source, 0 or 1, "*" or nothing, and a sentence."""
    return len(row) == len(_COLA) and row[1] in ("0", "1") and row[2] in ("", "*")


def _conll(path: Path) -> Located:
    """A word in each line, its label in the last column, an empty line after each sentence."""
    words: list[str] = []
    labels: list[str] = []
    began = 1
    for number, line in enumerate([*read_lines(path), ""], 1):
        columns = line.split("\t") if "\t" in line else line.split()
        if columns and columns[0] != "-DOCSTART-" and not (line.startswith("#") and len(columns) != 2):
            if len(columns) < 2:
                raise DataError(f"{path}, line {number}: a word without a label.")
            began = began if words else number
            words.append(columns[0])
            labels.append(columns[-1].strip())
        elif not line.strip() and words:
            yield f"{path}, line {began}", {"words": words, "labels": labels}
            words, labels = [], []


def _parquet(path: Path) -> Records:
    arrow, parquet = _arrow(path)
    try:
        file = parquet.ParquetFile(path)
    except (arrow.ArrowException, OSError) as error:
        raise DataError(f"{path} is missing or not a Parquet file ({error}).") from error
    facts = (file.schema_arrow.metadata or {}).get(b"huggingface", b"{}")
    return Records(_rows(path, file.iter_batches(), arrow.ArrowException), _class_names(facts))


def _arrow(path: Path) -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError as error:
        raise DataError(f"{path} needs the package 'pyarrow': pip install pyarrow") from error
    return pyarrow, pyarrow.parquet


def _rows(path: Path, batches: Iterable[Any], damaged: type[Exception]) -> Located:
    """The rows of Arrow's batches."""
    number = 0
    try:
        for batch in batches:
            for record in batch.to_pylist():
                number += 1
                yield f"{path}, row {number}", record
    except (damaged, OSError) as error:
        raise DataError(f"{path} is damaged after row {number} ({error}).") from error


def _class_names(facts: bytes) -> dict[str, list[str]]:
    """The names of classes that Hugging Face's ``datasets`` writes into a Parquet file."""
    try:
        features = json.loads(facts)["info"]["features"]
        return {name: names for name, feature in features.items() if (names := _names_of(feature))}
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}


def _names_of(feature: Any) -> list[str] | None:
    """Of a column of classes, or of lists of them."""
    if not isinstance(feature, Mapping):
        return None
    if feature.get("_type") in ("Sequence", "List", "LargeList"):
        return _names_of(feature.get("feature"))
    return feature.get("names") if feature.get("_type") == "ClassLabel" else None


def _saved_dataset(path: Path) -> Records:
    """A folder of ``datasets.Dataset.save_to_disk``: Arrow streams, and their names in ``state.json``."""
    if not (path / "state.json").is_file():
        todo = "give a file, a folder of images, or one of datasets.Dataset.save_to_disk"
        raise DataError(f"{path} is a folder without a data set that can be read as one: {todo}.")
    arrow, _ = _arrow(path)
    try:
        state = parse_json(f"{path / 'state.json'}", read_limited(path / "state.json"))
        files = [path / Path(file["filename"]).name for file in state["_data_files"]]
        streams = [arrow.ipc.open_stream(arrow.memory_map(str(file))) for file in files]
        facts = (streams[0].schema.metadata or {}).get(b"huggingface", b"{}")
    except (arrow.ArrowException, OSError, KeyError, TypeError, IndexError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is not a whole data set of datasets.save_to_disk ({error!r}).") from error
    return Records(_rows(path, itertools.chain(*streams), arrow.ArrowException), _class_names(facts))


_TSV: Callable[[Path], Located] = partial(_table, delimiter="\t", quoting=csv.QUOTE_NONE)
_READERS: dict[str, Callable[[Path], Located]] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json,
    ".csv": partial(_table, strict=True),
    ".tsv": _TSV,
    ".conll": _conll,
    ".iob2": _conll,
    ".bio": _conll,
    ".txt": _conll,
}
