"""The columns of well-known data sets, and the mapping from columns to the fields of a task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastattn.errors import DataError, input_error
from fastattn.lm.finetune.examples import FIELDS, Example
from fastattn.lm.finetune.records import Record
from fastattn.lm.generate.chat import checked_messages

Columns = dict[str, str]  # by field; "a.b" is column b of the object in column a
_PAIRS = (
    ("text", "text_pair"),
    ("sentence1", "sentence2"),  # MRPC, STS-B, RTE, WNLI, MNLI's files
    ("premise", "hypothesis"),  # MNLI, SNLI on the hub
    ("question1", "question2"),  # QQP
    ("question", "sentence"),  # QNLI
    ("#1 String", "#2 String"),  # MRPC's files
)
_TEXTS = ("text", "sentence", "review", "content")
_LABELS = ("label", "gold_label", "is_duplicate", "Quality", "sentiment")
_SCORES = ("label", "score", "similarity_score")
_TAGS = ("labels", "ner_tags", "pos_tags", "tags", "label")
_SUMMARIES = (("article", "highlights"), ("document", "summary"), ("dialogue", "summary"), ("text", "summary"))
_IMAGES = ("image", "file_name", "image_path", "path")
_TURN = "\n\nAssistant:"  # before a response in Anthropic's HH-RLHF, whose texts are whole conversations
UNLABELLED = {"-1", "-"}  # what test sets, and SNLI's files for examples without a majority, have in place of a label


def find_columns(record: Record, task: str, given: Mapping[str, str], *, labelled: bool = True) -> Columns:
    """The column of each field of a task, for a file whose first record is ``record``.

    Args:
        record: any of the file.
        task: a key of ``FIELDS``.
        given: columns that were chosen, by field.
        labelled: the targets of the task are wanted, too.

    Raises:
        InputError: ``given`` names a field that the task does not have.
    """
    fields = FIELDS[task]
    known = (*fields.required, *fields.optional)
    for name in given:
        if name not in known:
            raise input_error(f"--field {name}", given[name], ", ".join(known), f"These are the fields of {task}.")
    found: Columns = _inputs(record, task, labelled)
    if labelled:
        found |= _targets(record, task)
    found = {name: column for name, column in found.items() if name not in given}
    return found | dict(given)


def _inputs(record: Record, task: str, labelled: bool) -> Columns:
    if task in ("classify", "regression", "multilabel"):
        for first, second in _PAIRS:
            if first in record and second in record:
                return {"text": first, "text_pair": second}
        return _first("text", record, _TEXTS)
    if task in ("image", "caption", "vqa"):
        return _first("image", record, _IMAGES) | ({"question": "question"} if task == "vqa" else {})
    if task == "tag":
        return _first("words", record, ("words", "tokens") if labelled else ("words", "tokens", "text"))
    if task == "qa":
        return {"question": "question", "context": "context"}
    if task == "seq2seq":
        if isinstance(pair := record.get("translation"), Mapping) and len(pair) >= 2:
            return {"source": f"translation.{next(iter(pair))}"}
        return _first("source", record, ("source", *(first for first, second in _SUMMARIES if second in record)))
    if task == "chat":
        return _first("messages", record, ("messages", "conversations", "instruction", "prompt", "question"))
    if task == "dpo" and "prompt" not in record and "question" not in record:
        return {"prompt": "chosen"}  # which begins with it
    if "instruction" in record:
        return {"prompt": "instruction"}
    return _first("prompt", record, ("prompt", "question"))


def _targets(record: Record, task: str) -> Columns:
    if task in ("classify", "image"):
        return _first("label", record, _LABELS)
    if task == "caption":
        return _first("text", record, ("text", "caption"))
    if task == "vqa":
        return _first("answer", record, ("answer", "label"))
    if task == "regression":
        return _first("label", record, _SCORES)
    if task == "multilabel":
        return _first("labels", record, ("labels", "label"))
    if task == "tag":
        return _first("labels", record, _TAGS)
    if task == "qa":
        names = ("answer_start", "answers") if "answer" in record else ("answers",)
        return {"answer": "answer" if "answer" in record else "answers"} | {x: x for x in names if x in record}
    if task == "seq2seq":
        if isinstance(pair := record.get("translation"), Mapping) and len(pair) >= 2:
            return {"target": f"translation.{list(pair)[1]}"}
        return _first("target", record, ("target", *(second for first, second in _SUMMARIES if first in record)))
    if task == "dpo":
        return {"chosen": "chosen", "rejected": "rejected"}
    if task == "chat" and (column := _first("messages", record, ("messages", "conversations"))["messages"]) in record:
        return {"response": column}
    return _first("response", record, ("response", "output", "completion", "answer"))


def _first(field: str, record: Record, columns: Sequence[str]) -> Columns:
    return {field: next((column for column in columns if column in record), columns[0])}


def taken(place: str, record: Record, columns: Columns, names: Mapping[str, list[str]], task: str) -> Example:
    """The fields of a task from a record, not yet checked.

    Args:
        place: of the record.
        record: by column.
        columns: from ``find_columns``.
        names: of the classes in columns that hold their numbers.
        task: a key of ``FIELDS``.
    """
    fields = {field: _value(record, column, names) for field, column in columns.items()}
    if task == "qa" and isinstance(fields.get("answers"), Mapping):
        fields |= _answers(place, fields["answers"])
    if task == "instruct" and columns.get("prompt") == "instruction":
        fields["prompt"] = _alpaca(record)
    if task == "chat":
        fields |= _conversation(place, record, columns)
    if task == "dpo":
        fields |= _preference(place, fields)
    present = {field: value for field, value in fields.items() if value is not None}
    if len(present) < len(fields):  # the others, for the message about what is missing
        present |= {name: value for name, value in record.items() if name not in fields}
    return Example(place, present)


def _value(record: Record, column: str, names: Mapping[str, list[str]]) -> Any:
    value: Any = record.get(column)
    if value is None and "." in column:
        value = record
        for part in column.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
    if column in names:
        known = names[column]
        is_number = isinstance(value, int) and not isinstance(value, bool)
        if isinstance(value, list):
            return [known[x] if isinstance(x, int) and 0 <= x < len(known) else x for x in value]
        if is_number and 0 <= value < len(known):
            return known[value]
    return value


def _answers(place: str, answers: Mapping[str, Any]) -> Record:
    """Fields of a question from the hub's lists of answers, which are empty for one that has none."""
    texts, starts = answers.get("text"), answers.get("answer_start")
    if not isinstance(texts, list) or not isinstance(starts, list) or len(texts) != len(starts):
        raise DataError(f"{place}, field 'answers': it must have lists 'text' and 'answer_start' of equal length.")
    if not texts:
        return {"answer": "", "answers": [""], "answer_start": None}
    return {"answer": texts[0], "answer_start": starts[0], "answers": texts}


def _conversation(place: str, record: Record, columns: Columns) -> Record:
    """The messages before the assistant's last, which is the response, and after which nothing is learned.

    Without a response to learn, as for prediction, all messages up to the user's last.
    """
    column = columns["messages"]
    if column not in record:
        return {}
    given = record[column]
    if column == "instruction" and record.get("input"):
        given = f"{given}\n\n{record['input']}"
    messages = checked_messages(f"{place}, field 'messages'", given)
    is_of_messages = columns.get("response") == column
    roles = [message["role"] for message in messages]
    last = "assistant" if is_of_messages else "user"
    if last not in roles:
        return {"messages": messages, "response": None}
    end = len(roles) - roles[::-1].index(last)
    if is_of_messages:
        return {"messages": messages[: end - 1], "response": messages[end - 1]["content"]}
    return {"messages": messages[:end]}


def _preference(place: str, fields: Record) -> Record:
    """The prompt and two responses of pairs of texts or conversations with a common beginning."""
    chosen, rejected = fields.get("chosen"), fields.get("rejected")
    if isinstance(chosen, list) and isinstance(rejected, list):
        pair = [checked_messages(f"{place}, field {name!r}", fields[name]) for name in ("chosen", "rejected")]
        if pair[0][:-1] != pair[1][:-1] or {messages[-1]["role"] for messages in pair} != {"assistant"}:
            raise DataError(f"{place}: the conversations must differ in their last message alone, the assistant's.")
        prompt = pair[0][:-1] or fields.get("prompt")
        return {"prompt": prompt, "chosen": pair[0][-1]["content"], "rejected": pair[1][-1]["content"]}
    if fields.get("prompt") is not chosen or not isinstance(chosen, str) or not isinstance(rejected, str):
        return {}
    length = next((n for n, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), len(chosen))
    shared = chosen[:length]
    end = shared.rfind(_TURN) + len(_TURN) if _TURN in shared else shared.rfind(" ") + 1
    return {"prompt": chosen[:end], "chosen": chosen[end:], "rejected": rejected[end:]}


def _alpaca(record: Record) -> str:
    """The prompt of Alpaca's data (Taori et al., 2023), and of Dolly's, whose input is called context."""
    instruction = str(record.get("instruction") or "")
    context = str(record.get("input") or record.get("context") or "")
    about = f"\n\n### Input:\n{context}" if context else ""
    return f"### Instruction:\n{instruction}{about}\n\n### Response:\n"
