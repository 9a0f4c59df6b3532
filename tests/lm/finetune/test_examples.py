"""Reading labelled examples: all formats, every task, and errors that name line and field."""

import csv
import json

import pytest

from fastattn.errors import DataError
from fastattn.lm.finetune.datasets import read_examples
from fastattn.lm.finetune.examples import FIELDS

GOOD = {
    "classify": {"text": "a good film", "text_pair": "is it?", "label": "yes"},
    "regression": {"text": "a good film", "text_pair": "is it?", "label": 4.5},
    "multilabel": {"text": "a good film", "labels": ["funny", "sad"]},
    "tag": {"words": ["Ada", "wrote"], "labels": ["person", "other"]},
    "qa": {"question": "Who?", "context": "It was Ada.", "answer": "Ada", "answer_start": 7},
    "seq2seq": {"source": "eins", "target": "one"},
    "instruct": {"prompt": "Say hi.\n", "response": "hi"},
    "dpo": {"prompt": "Say hi.", "chosen": "hi", "rejected": "no"},
    "image": {"image": "/of/a.png", "label": "cat"},
    "caption": {"image": "/of/a.png", "text": "a cat"},
    "vqa": {"image": "/of/a.png", "question": "what?", "answer": "a cat"},
}


def written(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


@pytest.mark.parametrize("task", sorted(FIELDS.keys() - {"chat"}))  # messages do not fit into a table
def test_all_formats_give_the_same(tmp_path, task):
    fields = GOOD[task]
    jsonl = read_examples(written(tmp_path / "a.jsonl", fields | {"other": 1}), task)
    columns = {name: " ".join(x) if isinstance(x, list) else str(x) for name, x in fields.items()}
    tsv, comma = tmp_path / "a.tsv", tmp_path / "a.csv"
    tsv.write_text("\t".join(columns) + "\n" + "\t".join(x.strip() for x in columns.values()) + "\n")
    with comma.open("w", newline="") as file:
        csv.writer(file).writerows([columns.keys(), columns.values()])
    assert jsonl[0].fields == fields
    assert [example.fields for example in read_examples(comma, task)] == [fields]
    assert [example.fields for example in read_examples(tsv, task)] == [
        {name: x.strip() if isinstance(x, str) else x for name, x in fields.items()}
    ]


def test_fields_of_a_csv_file_may_hold_commas_quotes_and_line_ends(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(b'\xef\xbb\xbftext,label\r\n"a ""good"" film,\r\nsay all",yes\r\nbad,no\r\n')
    found = read_examples(path, "classify")
    assert found[0].fields == {"text": 'a "good" film,\r\nsay all', "label": "yes"}
    assert found[1].place == f"{path}, line 4"


def test_a_place_has_file_and_line_and_blank_lines_count(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('\n{"text": "x", "label": 3}\n\n{"text": "y", "label": "b"}')
    found = read_examples(path, "classify")
    assert [example.place for example in found] == [f"{path}, line 2", f"{path}, line 4"]
    assert found[0].fields == {"text": "x", "label": "3"}


def test_an_answer_is_found_in_its_context(tmp_path):
    path = written(tmp_path / "a.jsonl", {"question": "Who?", "context": "Ada, of course", "answer": "Ada"})
    assert read_examples(path, "qa")[0].fields["answer_start"] == 0


@pytest.mark.parametrize(
    ("task", "record", "words"),
    [
        (
            "classify",
            {"text": "x"},
            r"line 2, field 'label': it is missing; .* has text, label.*, this one: text; .* --field label=COLUMN",
        ),
        ("classify", {"text": " ", "label": "a"}, "field 'text': it is empty"),
        ("classify", {"text": ["x"], "label": "a"}, "field 'text': it must be a text, not \\['x'\\]"),
        ("tag", {"words": ["a", "b"], "labels": ["x"]}, "field 'labels': 1 labels for 2 words"),
        ("tag", {"words": [], "labels": []}, "field 'words': it must be a list of texts"),
        ("qa", {"question": "q", "context": "c", "answer": "no"}, "field 'answer': it does not stand in the context"),
        ("qa", GOOD["qa"] | {"answer_start": 3}, "field 'answer': it does not stand in the context"),
        ("qa", GOOD["qa"] | {"answer_start": "x"}, "field 'answer_start': it must be a number"),
        ("seq2seq", {"source": None, "target": "x"}, "field 'source': it is missing"),
        ("instruct", {"prompt": "x", "response": ""}, "field 'response': it is empty"),
    ],
)
def test_wrong_fields(tmp_path, task, record, words):
    path = written(tmp_path / "a.jsonl", GOOD[task], record)
    with pytest.raises(DataError, match=words):
        read_examples(path, task)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", b'{"text": ', "line 1: not JSON"),
        ("a.jsonl", b"[1]", "line 1: not a JSON object"),
        ("a.jsonl", b"", "holds no examples: each has the fields text, label and optionally text_pair"),
        ("a.jsonl", b"\xff\xfe", "is not UTF-8"),
        ("a.tsv", b"text\tlabel\nx\n", "line 2: 1 columns, where the first line names 2"),
        ("a.tsv", b"text\tkind\nx\ty\n", "line 2, field 'label': it is missing"),
        ("a.csv", b'text,label\n"x,y\n', "line 2: unexpected end of data"),
        ("a.pdf", b"", "is not a file of examples by its name: use one of .jsonl, "),
    ],
)
def test_wrong_files(tmp_path, name, content, words):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=words):
        read_examples(path, "classify")


def test_a_missing_file(tmp_path):
    with pytest.raises(DataError, match="cannot be read"):
        read_examples(tmp_path / "no.jsonl", "classify")
