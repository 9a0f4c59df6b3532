"""Small texts, small corpora and small models for the tests of training."""

import dataclasses
import random

import pytest
import torch

from fastattn.lm.data import find_files
from fastattn.lm.models import Decoder, TransformerConfig
from fastattn.lm.train.data import PackedRows
from fastattn.lm.train.loop import Trainer
from fastattn.lm.train.prepare import prepare
from fastattn.lm.train.settings import TrainConfig
from fastattn.lm.train.tasks import next_token_loss

WORDS = ("alpha", "beta", "for x in rows:\n", "    return", "naïve", "→ 日本", "0x1F", "(a, b)", "\n", "gamma")


def make_texts(folder, count=24, seed=0):
    """``count`` files of different lengths, some below folders."""
    source = random.Random(seed)
    for number in range(count):
        path = folder / ("sub" if number % 3 == 0 else ".") / f"file{number:02d}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(" ".join(source.choices(WORDS, k=source.randint(5, 200))), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def texts(tmp_path_factory):
    return make_texts(tmp_path_factory.mktemp("texts"))


@pytest.fixture(scope="session")
def corpus(texts, tmp_path_factory):
    files = find_files([str(texts)])
    return prepare(files, tmp_path_factory.mktemp("corpora"), vocab_size=300, held_out=0.2, progress=False)


@pytest.fixture
def make_trainer(corpus):
    """A function that makes a trainer of a tiny model in a folder, its settings changed by keywords."""

    def make(folder, dropout=0.1, loss=next_token_loss, evaluate=None, **changes):
        train = TrainConfig(steps=10, batch=4, eval_every=5, eval_rows=4, save_every=5, log_every=1)
        config = TransformerConfig(
            corpus.facts.vocab_size, width=16, layers=1, heads=2, kv_heads=1, max_length=16, dropout=dropout
        )
        torch.manual_seed(1)
        rows = PackedRows(corpus.split("train"), 16, seed=0), PackedRows(corpus.split("held_out"), 16)
        return Trainer(
            Decoder(config), corpus.tokenizer(), rows, dataclasses.replace(train, **changes), folder,
            loss=loss, evaluate=evaluate, show_progress=False,
        )  # fmt: skip

    return make
