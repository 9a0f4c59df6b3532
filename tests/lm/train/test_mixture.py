"""Mixtures keep their weights, read every corpus in order, and resume to the bit; by command from files and corpora."""

from collections import Counter

import pytest
import torch
from safetensors.torch import load_file

from fastattn.cli import main
from fastattn.errors import InputError
from fastattn.lm.data import find_files
from fastattn.lm.train.data import PackedRows
from fastattn.lm.train.mixture import MixedRows, Mixture, of_folders, split_weights
from fastattn.lm.train.prepare import prepare
from fastattn.lm.train.pretrain import RunConfig


@pytest.mark.parametrize("parts", [(0.7, 0.3), (0.5, 0.25, 0.25), (0.995, 0.005)])
def test_parts_are_kept_in_every_block_and_no_row_is_left_out(corpus, parts):
    file = corpus.split("train")
    mixed = MixedRows([PackedRows(file, 8, 0) for _ in parts], parts, seed=3)
    places = [mixed.place(index) for index in range(5 * mixed.block)]
    for number, part in enumerate(parts):
        assert [row for corpus, row in places if corpus == number] == list(range(sum(c == number for c, _ in places)))
        for block in range(5):
            count = sum(corpus == number for corpus, _ in places[block * mixed.block : (block + 1) * mixed.block])
            assert abs(count - part * mixed.block) < 2
    again = MixedRows(mixed.packed, parts, seed=3)
    assert [again.place(index) for index in (mixed.block + 7, 3, 4 * mixed.block)] == [
        places[index] for index in (mixed.block + 7, 3, 4 * mixed.block)
    ]
    other = MixedRows(mixed.packed, parts, seed=4)
    assert [other.place(index) for index in range(mixed.block)] != places[: mixed.block]


def test_batches_are_the_rows_of_the_corpora(corpus):
    packed = [PackedRows(corpus.split(name), 8, 0) for name in ("train", "held_out")]
    mixed = MixedRows(packed, (0.5, 0.5), seed=0)
    batch = mixed.batch(2, 4)
    for row, index in enumerate(range(8, 12)):
        number, place = mixed.place(index)
        assert (batch.tokens[row].numpy() == packed[number].row(place)[0]).all()
    assert sum(len(part.tokens) for part in mixed.sample(10, 4)) == 10


@pytest.fixture(scope="module")
def books_and_code(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixed")
    for name, words in (("books", "once upon a time there was "), ("code", "return x + 1 if x else 0 ")):
        (folder / name).mkdir()
        for number in range(6):
            (folder / name / f"{number}.txt").write_text(f"{name} {number}: " + words * (3 + number))
    return folder


SMALL = [
    "--warmup",
    "0",
    "--final-lr",
    "1",
    "--batch",
    "4",
    "--length",
    "16",
    "--eval-rows",
    "4",
    "--log-every",
    "1",
    "--save-every",
    "3",
    "--quiet",
]


def test_the_command_trains_on_a_mixture_and_resumes_to_the_bit(books_and_code, tmp_path, capsys):
    data = [f"{books_and_code / 'books'}:0.7", f"{books_and_code / 'code'}:0.3"]
    run = ["train", "--vocab-size", "300", "--dropout", "0.1", "--device", "cpu", *SMALL, "--data", *data]
    assert main([*run, "--out", str(tmp_path / "straight"), "--steps", "6"]) == 0
    assert main([*run, "--out", str(tmp_path / "parts"), "--steps", "3"]) == 0
    resume = ["train", "--out", str(tmp_path / "parts"), "--resume", "--steps", "6", "--quiet", "--device", "cpu"]
    assert main(resume) == 0
    folders = [tmp_path / name / "checkpoints" / "step-00000006" for name in ("straight", "parts")]
    straight, parts = (load_file(folder / "model.safetensors") for folder in folders)
    assert all(torch.equal(tensor, parts[name]) for name, tensor in straight.items())
    assert main([*run[:-2], f"{data[0]}", str(books_and_code / "code"), "--out", str(tmp_path / "x")]) == 2
    assert "code without a weight" in capsys.readouterr().err


def test_corpora_that_were_prepared(books_and_code, tmp_path):
    files = {name: find_files([str(books_and_code / name)]) for name in ("books", "code")}
    first = prepare(files["books"], tmp_path, vocab_size=300, progress=False)
    second = prepare(files["code"], tmp_path, tokenizer=first.folder, progress=False)
    third = prepare(files["code"], tmp_path, vocab_size=290, progress=False)
    mixture = of_folders([f"{first.folder}:3", f"{second.folder}:1"])
    assert mixture.parts == (0.75, 0.25)
    assert mixture.facts.documents["train"] == sum(c.facts.documents["train"] for c in (first, second))
    assert mixture.facts.fingerprint not in (
        first.facts.fingerprint,
        of_folders([str(first.folder), str(second.folder)]).facts.fingerprint,
    )
    alone = [Mixture((corpus,)).unigram_entropy() for corpus in (first, second)]
    assert mixture.unigram_entropy() > min(alone)
    rows = mixture.rows("train", 8, seed=0)
    counts = Counter(rows.place(index)[0] for index in range(rows.block))
    assert counts == {0: 192, 1: 64}
    with pytest.raises(Exception, match=f"has another tokenizer than .*: prepare it with --tokenizer {first.folder}"):
        Mixture((first, third), (1.0, 1.0))


def test_weights(tmp_path):
    (tmp_path / "a:0.5").write_text("a file of this very name")
    assert split_weights([str(tmp_path / "a:0.5"), "hf:imdb:train"], "data")[1] is None
    assert split_weights(["hf:imdb:0.25", "b:1"], "data") == (["hf:imdb", "b"], [0.25, 1.0])
    with pytest.raises(InputError, match="data: got b:0; allowed: positive weights"):
        RunConfig(data=("a:1", "b:0"))
