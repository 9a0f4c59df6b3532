"""Labelled examples of the user's own, from JSONL, CSV or TSV: each task's fields, and errors that name line and field.

    classify   text, label                 and text_pair, if two texts are compared
    tag        words, labels               lists of equal length; in a table separated by spaces
    qa         question, context, answer   and answer_start, the character where the answer begins, if it occurs twice
    seq2seq    source, target
    instruct   prompt, response

A JSONL file has one object with these fields in each line; other fields are ignored. The first line of a CSV or TSV
file names its columns.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from fastattn.errors import DataError


@dataclass(frozen=True)
class Fields:
    """The fields of a task's examples."""

    required: tuple[str, ...]
    optional: tuple[str, ...] = ()

    def __str__(self) -> str:
        return ", ".join(self.required) + "".join(f" and optionally {name}" for name in self.optional)


FIELDS = {
    "classify": Fields(("text", "label"), ("text_pair",)),
    "tag": Fields(("words", "labels")),
    "qa": Fields(("question", "context", "answer"), ("answer_start",)),
    "seq2seq": Fields(("source", "target")),
    "instruct": Fields(("prompt", "response")),
}
_MAY_BE_EMPTY = {"text_pair", "target", "prompt"}


@dataclass(frozen=True)
class Example:
    """One example, checked.

    Attributes:
        place: file and line, for messages.
        fields: text by name; lists of words and labels for "tag", an int for "answer_start".
    """

    place: str
    fields: dict[str, Any]

    def error(self, field: str, problem: str) -> DataError:
        """A DataError that names file, line and field."""
        return DataError(f"{self.place}, field {field!r}: {problem}")


def read_examples(path: Path, task: str) -> list[Example]:
    """The examples of a file whose name ends in ``.jsonl``, ``.csv`` or ``.tsv``.

    Args:
        path: of the file.
        task: a key of ``FIELDS``.

    Raises:
        DataError: the file is missing, not UTF-8 or empty, or a line is not an example of the task.

    Example:
        >>> import pathlib, tempfile
        >>> from fastattn.lm.finetune.examples import read_examples
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "train.jsonl"
        >>> _ = path.write_text('{"text": "a good film", "label": "positive"}')
        >>> read_examples(path, "classify")[0].fields
        {'text': 'a good film', 'label': 'positive'}
    """
    if path.suffix not in _READERS:
        raise DataError(f"{path} is not a file of examples by its name: use a .jsonl, a .csv or a .tsv file.")
    try:
        found = [_checked(Example(f"{path}, line {n}", record), task) for n, record in _READERS[path.suffix](path)]
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror or error}).") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 (byte {error.start}).") from error
    if not found:
        raise DataError(f"{path} holds no examples: each is a line with the fields {FIELDS[task]}.")
    return found


def _jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError as error:
                raise DataError(f"{path}, line {number}: not JSON ({error}).") from error
            if not isinstance(record, dict):
                raise DataError(f"{path}, line {number}: not a JSON object, which is written {{...}}.")
            yield number, record


def _table(path: Path, **dialect: Any) -> Iterator[tuple[int, dict[str, Any]]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.reader(file, **dialect)
        try:
            names = next(rows, [])
            for row in rows:
                if not row:
                    continue
                if len(row) != len(names):
                    raise csv.Error(f"{len(row)} columns, where the first line names {len(names)}")
                yield rows.line_num, dict(zip(names, row, strict=True))
        except csv.Error as error:
            raise DataError(f"{path}, line {rows.line_num}: {error}.") from error


_READERS: dict[str, Callable[[Path], Iterator[tuple[int, dict[str, Any]]]]] = {
    ".jsonl": _jsonl,
    ".csv": partial(_table, strict=True),
    ".tsv": partial(_table, delimiter="\t", quoting=csv.QUOTE_NONE),
}


def _checked(example: Example, task: str) -> Example:
    """The example with the fields of its task alone, each of its type."""
    fields = FIELDS[task]
    kept: dict[str, Any] = {}
    for name in (*fields.required, *fields.optional):
        value = example.fields.get(name)
        if value is None or (value == "" and name in fields.optional):
            if name in fields.required:
                here = ", ".join(list(example.fields)[:9])
                raise example.error(name, f"it is missing; an example for {task} has {fields}, this one: {here}.")
            continue
        kept[name] = _typed(example, name, value)
    if task == "tag" and len(kept["words"]) != len(kept["labels"]):
        counts = f"{len(kept['labels'])} labels for {len(kept['words'])} words"
        raise example.error("labels", f"{counts}; give one for each.")
    if task == "qa":
        kept["answer_start"] = _answer_start(example, kept)
    return Example(example.place, kept)


def _typed(example: Example, name: str, value: Any) -> Any:
    if name in ("words", "labels"):
        items = value.split() if isinstance(value, str) else value
        if not isinstance(items, list) or not items or not all(isinstance(x, str | int) and str(x) for x in items):
            raise example.error(name, "it must be a list of texts, at least one and none empty.")
        return [str(item) for item in items]
    if name == "answer_start":
        try:
            return int(value)
        except (TypeError, ValueError):
            raise example.error(name, f"it must be a number of characters, not {value!r}.") from None
    if name == "label" and isinstance(value, int | float):
        return str(value)
    if not isinstance(value, str):
        raise example.error(name, f"it must be a text, not {value!r}.")
    if not value.strip() and name not in _MAY_BE_EMPTY:
        raise example.error(name, "it is empty.")
    return value


def _answer_start(example: Example, fields: dict[str, Any]) -> int:
    context, answer = fields["context"], fields["answer"]
    start = fields.get("answer_start", context.find(answer))
    if start < 0 or context[start : start + len(answer)] != answer:
        raise example.error("answer", "it does not stand in the context (at answer_start, where that is given).")
    return start
