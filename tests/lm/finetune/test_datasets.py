"""Data sets in the form everyone has them: GLUE, SQuAD, CoNLL, summaries, translations, Alpaca, and columns by name."""

import json

import pyarrow
import pyarrow.parquet
import pytest

from fastattn.errors import DataError, InputError
from fastattn.lm.finetune.datasets import find_splits, read_dataset

SQUAD = {
    "context": "Ada wrote the first program. Ada lived in London.",
    "qas": [
        {"id": "1", "question": "Who?", "answers": [{"text": "Ada", "answer_start": n} for n in (29, 0)]},
        {"id": "2", "question": "When?", "answers": [], "is_impossible": True},
    ],
}  # fmt: skip
TEXT, PAIR = {"text": "a b", "label": "1"}, {"text": "a", "text_pair": "b", "label": "1"}
NUMBER = {"text": "a", "text_pair": "b", "label": 3.8}
FILES = {
    "SST-2": ("train.tsv", "sentence\tlabel\na b\t1\n", "classify", TEXT),
    "CoLA": ("train.tsv", "gj04\t1\t\ta b\nbc01\t0\t*\tb a\n", "classify", TEXT),
    "MRPC": ("train.tsv", "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\n1\t7\t8\ta\tb\n", "classify", PAIR),
    "QQP": ("train.tsv", "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n0\t1\t2\ta\tb\t1\n", "classify", PAIR),
    "STS-B": ("dev.tsv", "index\tgenre\tsentence1\tsentence2\tscore\n0\tx\ta\tb\t3.800\n", "regression", NUMBER),
    "MNLI": ("m.tsv", "index\tsentence1\tsentence2\tlabel1\tgold_label\n0\ta\tb\tx\t1\n", "classify", PAIR),
    "QNLI": ("train.tsv", "index\tquestion\tsentence\tlabel\n0\ta\tb\t1\n", "classify", PAIR),
    "RTE": ("train.tsv", "index\tsentence1\tsentence2\tlabel\n0\ta\tb\t1\n", "classify", PAIR),
    "WNLI": ("dev.tsv", "index\tsentence1\tsentence2\tlabel\n0\ta\tb\t1\n", "classify", PAIR),
    "whole STS-B": (
        "dev.tsv", "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore\n"
        "0\tx\ty\t2012\t1\tnone\tnone\ta\tb\t3.800\n", "regression", NUMBER,
    ),
    "whole MNLI": (
        "dev_matched.tsv",
        "index\tpromptID\tpairID\tgenre\tsentence1_binary_parse\tsentence2_binary_parse\tsentence1_parse\t"
        "sentence2_parse\tsentence1\tsentence2\tlabel1\tlabel2\tgold_label\n"
        '0\t1\t1n\tx\t( a )\t( b )\t(a)\t(b)\ta "so\tb\t0\t1\t1\n', "classify", PAIR | {"text": 'a "so'},
    ),
    "SNLI": ("x.jsonl", {"sentence1": "a", "sentence2": "b", "gold_label": "1"}, "classify", PAIR),
    "hub MNLI": ("x.jsonl", {"premise": "a", "hypothesis": "b", "label": 1}, "classify", PAIR),
    "emotions": ("x.jsonl", {"text": "a b", "labels": [3, 1]}, "multilabel", {"text": "a b", "labels": ["3", "1"]}),
    "hub SQuAD": (
        "x.jsonl",
        {"question": "q", "context": "a b", "answers": {"text": ["b"], "answer_start": [2]}}, "qa",
        {"question": "q", "context": "a b", "answer": "b", "answer_start": 2, "answers": ["b"]},
    ),
    "hub NER": (
        "x.json", {"tokens": ["a", "b"], "ner_tags": [0, 1]}, "tag", {"words": ["a", "b"], "labels": ["0", "1"]}
    ),
    "WMT": ("x.json", {"translation": {"en": "a", "de": "b"}}, "seq2seq", {"source": "a", "target": "b"}),
    "CNN": ("x.csv", "id,article,highlights\n1,a,b\n", "seq2seq", {"source": "a", "target": "b"}),
    "dialogues": ("x.json", [{"dialogue": "a", "summary": "b"}], "seq2seq", {"source": "a", "target": "b"}),
    "Alpaca": (
        "x.json", [{"instruction": "Add.", "input": "1 1", "output": "2"}], "instruct",
        {"prompt": "### Instruction:\nAdd.\n\n### Input:\n1 1\n\n### Response:\n", "response": "2"},
    ),
    "Alpaca without input": (
        "x.json", [{"instruction": "Hi.", "input": "", "output": "Ho"}], "instruct",
        {"prompt": "### Instruction:\nHi.\n\n### Response:\n", "response": "Ho"},
    ),
}  # fmt: skip


def written(path, content):
    is_line = isinstance(content, dict)
    text = content if isinstance(content, str) else json.dumps(content) + "\n" * is_line
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("name", FILES)
def test_known_columns_need_no_conversion(name, tmp_path):
    file, content, task, fields = FILES[name]
    assert read_dataset(written(tmp_path / file, content), task).examples[0].fields == fields


def test_squad_1_and_2_as_they_are_published(tmp_path):
    content = {"version": "v2.0", "data": [{"title": "Ada", "paragraphs": [SQUAD]}]}
    found = read_dataset(written(tmp_path / "dev-v2.0.json", content), "qa").examples
    assert found[0].fields["answer_start"] == 29 and found[0].fields["answers"] == ["Ada", "Ada"]
    assert (found[1].fields["answer"], found[1].fields["answer_start"], found[1].fields["answers"]) == ("", -1, [""])
    content["data"][0]["paragraphs"][0] = {"context": "x"}
    with pytest.raises(DataError, match="item 1: not an article of SQuAD"):
        read_dataset(written(tmp_path / "bad.json", content), "qa")


def test_conll_files(tmp_path):
    text = "-DOCSTART- -X- -X- O\n\nEU NNP B-NP B-ORG\nrejects VBZ B-VP O\n\n# id 2\nPeter NNP B-NP B-PER\n"
    found = read_dataset(written(tmp_path / "eng.conll", text), "tag").examples
    assert [example.fields["labels"] for example in found] == [["B-ORG", "O"], ["B-PER"]]
    assert found[1].place.endswith("line 7")
    with pytest.raises(DataError, match="line 1: a word without a label"):
        read_dataset(written(tmp_path / "bad.conll", "EU\n"), "tag")


def test_two_files_of_translations(tmp_path):
    one, two = written(tmp_path / "a.en", "one\n\ntwo\n"), written(tmp_path / "a.de", "eins\n\nzwei\n")
    assert [x.fields["target"] for x in read_dataset([one, two], "seq2seq").examples] == ["eins", "zwei"]
    with pytest.raises(DataError, match=r"differ in length: .*a\.de ends before line 4"):
        read_dataset([written(tmp_path / "b.en", "1\n2\n3\n4\n"), two], "seq2seq")
    with pytest.raises(DataError, match="2 files for tag: give one"):
        read_dataset([one, two], "tag")


@pytest.fixture
def table():
    """Words and tags, with the names of the tags as ``datasets`` writes them."""
    features = {"tags": {"_type": "List", "feature": {"_type": "ClassLabel", "names": ["O", "B-x"]}}}
    facts = {"huggingface": json.dumps({"info": {"features": features}})}
    return pyarrow.table({"tokens": [["a", "b"]], "tags": [[0, 1]]}).replace_schema_metadata(facts)


def test_parquet_with_the_names_of_its_classes(table, tmp_path):
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet")
    found = read_dataset(tmp_path / "x.parquet", "tag")
    assert found.examples[0].fields == {"words": ["a", "b"], "labels": ["O", "B-x"]}
    (tmp_path / "bad.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match="missing or not a Parquet file"):
        read_dataset(tmp_path / "bad.parquet", "tag")


def test_a_folder_that_datasets_saved(table, tmp_path):
    with pyarrow.ipc.new_stream(str(tmp_path / "data-00000-of-00001.arrow"), table.schema) as stream:
        stream.write_table(table)
    (tmp_path / "state.json").write_text('{"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}')
    assert read_dataset(tmp_path, "tag").examples[0].fields["labels"] == ["O", "B-x"]
    (tmp_path / "data-00000-of-00001.arrow").write_bytes(b"")
    with pytest.raises(DataError, match="is not a whole data set"):
        read_dataset(tmp_path, "tag")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "loss.png").write_bytes(b"a plot, which is no data of this task")
    with pytest.raises(DataError, match="is a folder without a data set"):
        read_dataset(tmp_path / "run", "tag")


def test_columns_can_be_named(tmp_path):
    path = written(tmp_path / "x.jsonl", {"tweet": "hello", "meta": {"mood": "good"}})
    found = read_dataset(path, "classify", {"text": "tweet", "label": "meta.mood"})
    assert found.examples[0].fields == {"text": "hello", "label": "good"}
    with pytest.raises(InputError, match=r"--field word: got tweet; allowed: text, label, text_pair"):
        read_dataset(path, "classify", {"word": "tweet"})
    with pytest.raises(DataError, match="field 'text': it is missing"):
        read_dataset(path, "classify", {"text": "post", "label": "meta.mood"})


def test_what_was_read_is_told(tmp_path):
    path = written(tmp_path / "x.tsv", "sentence1\tsentence2\tgold_label\na\tb\tyes\na\tc\tyes\na\td\tno\na\te\t-\n")
    lines = read_dataset(path, "classify").summary().splitlines()
    assert lines[0].endswith("x.tsv: 3 examples; text = sentence1, text_pair = sentence2, label = gold_label")
    assert lines[1:] == [
        "  1 examples without a label were left out",
        "  2 classes: yes (2), no (1)",
        "  baseline: always 'yes' has an accuracy of 0.6667",
    ]
    numbers = written(tmp_path / "n.csv", "text,score\na,1\nb,4\n")
    assert read_dataset(numbers, "regression").summary().endswith("labels from 1 to 4, mean 2.5")


def test_inputs_for_prediction_need_no_labels_and_test_sets_say_that_they_have_none(tmp_path):
    path = written(tmp_path / "test.tsv", "index\tsentence\n0\ta b\n")
    assert read_dataset(path, "classify", labelled=False).examples[0].fields == {"text": "a b"}
    hidden = written(tmp_path / "test.jsonl", {"sentence": "a b", "label": -1})
    with pytest.raises(DataError, match=r"has no labels \(all are -1 or -\): it is a test set"):
        read_dataset(hidden, "classify")


def test_folders_with_splits(tmp_path):
    for name in ("train.tsv", "dev_matched.tsv", "dev_mismatched.tsv", "test_matched.tsv", "notes.md"):
        (tmp_path / name).touch()
    train, held_out = find_splits(tmp_path)
    assert [x.name for x in train] == ["train.tsv"]
    assert [x.name for (x,) in held_out] == ["dev_matched.tsv", "dev_mismatched.tsv"]
    assert find_splits(train[0]) == (train, [])
    (tmp_path / "train.csv").touch()
    with pytest.raises(DataError, match="should hold one training file"):
        find_splits(tmp_path)


def test_shards_of_splits_as_on_the_hub(tmp_path):
    for number, words in enumerate(("a b", "c d")):
        table = pyarrow.table({"sentence": [words], "label": [number]})
        pyarrow.parquet.write_table(table, tmp_path / f"train-0000{number}-of-00002.parquet")
    pyarrow.parquet.write_table(table, tmp_path / "validation-00000-of-00001.parquet")
    train, (held_out,) = find_splits(tmp_path)
    assert [x.fields["text"] for x in read_dataset(train, "classify").examples] == ["a b", "c d"]
    assert len(read_dataset(held_out, "classify").examples) == 1
    train[1].unlink()
    with pytest.raises(DataError, match=r"holds 1 of the 2 shards of train\.parquet"):
        find_splits(tmp_path)


def test_json_of_any_shape(tmp_path):
    for content, words in (("[1]", "item 1: not a JSON object"), ('{"a": 1\n}', "not a list"), ("[" * 99999, "nested")):
        with pytest.raises(DataError, match=words):
            read_dataset(written(tmp_path / "x.json", content), "classify")
