"""One process writes a run, what can be checked is checked first, and a finished run stays as it is."""

import json
from pathlib import Path

import pytest

from fastattn.errors import DataError, InputError
from fastattn.files import only_writer
from fastattn.lm.finetune import FinetuneConfig
from fastattn.lm.train import OptimConfig, RunConfig, TrainConfig, find_checkpoint, pretrain, resumed_config
from fastattn.lm.train.run import run_folder


@pytest.fixture
def config(texts):
    train = {"steps": 2, "batch": 2, "eval_every": 2, "eval_rows": 2, "save_every": 2, "log_every": 1}
    return RunConfig(data=(str(texts),), vocab_size=300, length=16, **train)


def test_a_second_process_on_a_run_is_told_before_any_work(config, tmp_path):
    with only_writer(tmp_path / "run"), pytest.raises(DataError, match=r"Another process is writing .*run: wait"):
        pretrain(tmp_path / "run", config, show_progress=False)
    assert not (tmp_path / "run").exists()


def test_resuming_a_finished_run_adds_nothing_to_its_log(config, tmp_path):
    out = tmp_path / "run"
    first = pretrain(out, config, show_progress=False)
    before = (out / "log.jsonl").read_bytes()
    checkpoint = find_checkpoint(out)
    second = pretrain(out, resumed_config(checkpoint, {}), resume=checkpoint, show_progress=False)
    assert (out / "log.jsonl").read_bytes() == before
    assert second.progress.held_out_loss == first.progress.held_out_loss


def test_a_checkpoint_that_is_no_longer_the_newest_is_not_resumed(config, tmp_path):
    out = tmp_path / "run"
    pretrain(out, config, show_progress=False)
    old = find_checkpoint(out)
    longer = resumed_config(old, {"steps": 3})
    pretrain(out, longer, resume=old, show_progress=False)
    with pytest.raises(DataError, match="was continued by another process meanwhile"):
        pretrain(out, longer, resume=old, show_progress=False)


def test_a_run_in_the_current_folder_is_locked_too(tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()
    monkeypatch.chdir(tmp_path / "run")
    with run_folder(tmp_path / "run", TrainConfig(), None), pytest.raises(DataError, match="Another process"):
        run_folder(Path("."), TrainConfig(), None).__enter__()


@pytest.mark.parametrize(
    "config", [RunConfig(("a",), steps=7, lr=0.1), FinetuneConfig("classify", "a", preset="tiny", batch=3, lr=0.1)]
)
def test_settings_are_flat_and_those_of_earlier_checkpoints_are_read(config):
    flat = json.loads(json.dumps(config.to_dict()))
    assert type(config).from_dict(flat) == config and config.train.lr == 0.1 and config.train.batch == flat["batch"]
    optim = {name: flat[name] for name in OptimConfig.__dataclass_fields__}
    train = {name: flat[name] for name in TrainConfig.__dataclass_fields__ if name not in optim}
    own = {name: x for name, x in flat.items() if name not in (optim | train) or x is None}
    nested = own | {"train": train | {"steps": flat["steps"] or 1000, "optim": optim}}
    assert type(config).from_dict(nested) == config
    for field, value in {"lr": 0, "batch": 0, "steps": 0, "precision": "half"}.items():
        with pytest.raises(InputError, match=f"{field}: got"):
            config.changed({field: value})


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"preset": "huge"}, "preset: got 'huge'"),
        ({"objective": "next"}, "objective: got 'next'"),
        ({"vocab_size": 100}, "vocab_size: got 100; allowed: at least 258"),
        ({"held_out": 1.5}, "held_out: got 1.5"),
        ({"attention": "quick"}, "attention: got 'quick'"),
        ({"dropout": 2.0}, "dropout: got 2.0"),
        ({"window": -1}, "window: got -1"),
    ],
)
def test_settings_are_checked_when_they_are_made(fields, words):
    with pytest.raises(InputError, match=words):
        RunConfig(**fields)


def test_what_one_process_cannot_do_is_said_before_any_work(config, tmp_path):
    with pytest.raises(InputError, match="parallel: got 'fsdp' with one process"):
        pretrain(tmp_path / "run", config.changed({"parallel": "fsdp"}), show_progress=False)
    assert not (tmp_path / "run").exists()
