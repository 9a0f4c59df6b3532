"""Labelled examples: the fields of each task, and checks that name file, line and field.

classify    text, label                 and text_pair, if two texts are compared
regression  text, label                 a number; and text_pair
multilabel  text, labels                any number of labels; and text_pair
tag         words, labels               lists of equal length; in a table separated by spaces
qa          question, context, answer   and answer_start, the character where the answer begins, if it occurs twice
seq2seq     source, target
instruct    prompt, response
chat        messages, response          the messages before the last of the assistant, and its text
dpo         prompt, chosen, rejected    the prompt a text or messages, and two responses to it
image       image, label                the path of a file
caption     image, text                 a text that says what the image shows
vqa         image, question, answer     a question about it
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastattn.errors import DataError
from fastattn.lm.generate.chat import checked_messages


@dataclass(frozen=True)
class Fields:
    """The fields of a task's examples.

    Attributes:
        inputs: what the model reads.
        targets: what it learns to answer; examples for prediction lack them.
        optional: further ones.
    """

    inputs: tuple[str, ...]
    targets: tuple[str, ...]
    optional: tuple[str, ...] = ()

    @property
    def required(self) -> tuple[str, ...]:
        return self.inputs + self.targets

    def __str__(self) -> str:
        return ", ".join(self.required) + "".join(f" and optionally {name}" for name in self.optional)


FIELDS = {
    "classify": Fields(("text",), ("label",), ("text_pair",)),
    "regression": Fields(("text",), ("label",), ("text_pair",)),
    "multilabel": Fields(("text",), ("labels",), ("text_pair",)),
    "tag": Fields(("words",), ("labels",)),
    "qa": Fields(("question", "context"), ("answer",), ("answer_start", "answers")),
    "seq2seq": Fields(("source",), ("target",)),
    "instruct": Fields(("prompt",), ("response",)),
    "chat": Fields(("messages",), ("response",)),
    "dpo": Fields(("prompt",), ("chosen", "rejected")),
    "image": Fields(("image",), ("label",)),
    "caption": Fields(("image",), ("text",)),
    "vqa": Fields(("image", "question"), ("answer",)),
}
_MAY_BE_EMPTY = {"text_pair", "target", "prompt", "answer"}


@dataclass(frozen=True)
class Example:
    """One example, checked.

    Attributes:
        place: file and line, for messages.
        fields: text by name; lists of words and labels, an int for "answer_start", a float for the label of
            "regression".
    """

    place: str
    fields: dict[str, Any]

    def error(self, field: str, problem: str) -> DataError:
        """A DataError that names file, line and field."""
        return DataError(f"{self.place}, field {field!r}: {problem}")


def located(example: Example, folder: Path) -> Example:
    """The example with the path of its image, which is relative to ``folder``."""
    given = example.fields.get("image")
    if not isinstance(given, str):
        return example
    return dataclasses.replace(example, fields=example.fields | {"image": str(folder / Path(given).expanduser())})


def checked(example: Example, task: str, *, labelled: bool = True) -> Example:
    """The example with the fields of its task alone, each of its type.

    Args:
        example: as it was read.
        task: a key of ``FIELDS``.
        labelled: it must have the targets of the task, too.

    Raises:
        DataError: a field is missing or wrong.
    """
    fields = FIELDS[task]
    kept: dict[str, Any] = {}
    needed = fields.required if labelled else fields.inputs
    for name in (*needed, *(fields.optional if labelled else set(fields.optional) & {"text_pair"})):
        value = example.fields.get(name)
        if value is None or (value == "" and name in fields.optional):
            if name in needed:
                here = ", ".join(map(str, list(example.fields)[:9]))
                todo = f"this one: {here}; choose another column with --field {name}=COLUMN"
                raise example.error(name, f"it is missing; an example for {task} has {fields}, {todo}.")
            continue
        kept[name] = _typed(example, task, name, value)
    if labelled and task == "tag" and len(kept["words"]) != len(kept["labels"]):
        counts = f"{len(kept['labels'])} labels for {len(kept['words'])} words"
        raise example.error("labels", f"{counts}; give one for each.")
    if labelled and task == "qa":
        kept["answer_start"] = _answer_start(example, kept)
    return Example(example.place, kept)


def _typed(example: Example, task: str, name: str, value: Any) -> Any:
    if name == "messages":
        return checked_messages(f"{example.place}, field 'messages'", value)
    if name == "prompt" and isinstance(value, list):
        return checked_messages(f"{example.place}, field 'prompt'", value)
    if name in ("words", "labels"):
        return _list_of_texts(example, task, name, value)
    if name == "answers":
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise example.error(name, "it must be a list of texts.")
        return value
    if name == "answer_start":
        return _number(example, name, value, int)
    if task == "regression" and name == "label":
        return _number(example, name, value, float)
    if name == "label" and isinstance(value, bool | int | float):
        return str(value)
    if name == "image" and not isinstance(value, str):
        raise example.error(name, f"it must be the path of a file, not of type {type(value).__name__}.")
    if not isinstance(value, str):
        raise example.error(name, f"it must be a text, not {value!r}.")
    if not value.strip() and name not in _MAY_BE_EMPTY:
        raise example.error(name, "it is empty.")
    return value


def _list_of_texts(example: Example, task: str, name: str, value: Any) -> list[str]:
    items = value.split() if isinstance(value, str) else value
    may_be_empty = task == "multilabel" and name == "labels"
    fits = isinstance(items, list) and all(isinstance(x, str | int) and str(x) for x in items)
    if not fits or not (items or may_be_empty):
        raise example.error(name, "it must be a list of texts, at least one and none empty.")
    return [str(item) for item in items]


def _number(example: Example, name: str, value: Any, kind: type[int] | type[float]) -> int | float:
    try:
        number = kind(value)
    except (TypeError, ValueError, OverflowError):
        raise example.error(name, f"it must be a number, not {value!r}.") from None
    if not math.isfinite(number):
        raise example.error(name, f"it must be a finite number, not {value!r}.")
    return number


def _answer_start(example: Example, fields: dict[str, Any]) -> int:
    """Where the answer begins; -1 for a question without one."""
    context, answer = fields["context"], fields["answer"]
    if answer == "":
        return -1
    start = fields.get("answer_start", context.find(answer))
    if start < 0 or context[start : start + len(answer)] != answer:
        raise example.error("answer", "it does not stand in the context (at answer_start, where that is given).")
    return start
