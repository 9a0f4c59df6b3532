"""Two processes train as one does, with DDP and FSDP2, and go on from each other's checkpoints."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastattn.errors import InputError
from fastattn.lm.train.checkpoint import find_checkpoint
from fastattn.lm.train.parallel import Ranks

PROGRAM = Path(__file__).with_name("ranks.py")
spec = importlib.util.spec_from_file_location("ranks", PROGRAM)
program = importlib.util.module_from_spec(spec)
spec.loader.exec_module(program)

TENSORS = {"model.safetensors", "optimizer.safetensors"}


@pytest.fixture(scope="module")
def folder(corpus, tmp_path_factory):
    """Where one process has trained, and then two."""
    folder = tmp_path_factory.mktemp("runs")
    program.train(corpus.folder, folder / "alone")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MPLBACKEND": "agg"}
    done = subprocess.run(
        [*command, str(PROGRAM), str(corpus.folder), str(folder)],
        env=environment, timeout=240, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


def same(ours, theirs):
    assert ours.keys() == theirs.keys() and len(ours) == 14
    for key, value in theirs.items():
        assert ours[key] == pytest.approx(value, rel=2e-5), key


@pytest.mark.parametrize("run", ["ddp", "ddp parts", "fsdp", "fsdp parts", "context", "context parts"])
def test_two_processes_learn_what_one_does(folder, run):
    same(program.losses(folder / run), program.losses(folder / "alone"))


def test_the_weights_agree(folder):
    alone, *others = (find_checkpoint(folder / run).load_pretrained().state_dict() for run in ("alone", "ddp", "fsdp"))
    for other in others:
        for name, tensor in alone.items():
            torch.testing.assert_close(other[name], tensor, atol=2e-5, rtol=1e-4)


def later(losses):
    return {key: value for key, value in losses.items() if key[1] > 3}


@pytest.mark.parametrize("run", ["alone, then ddp", "alone, then fsdp", "fsdp, then ddp"])
def test_two_go_on_where_others_stopped(folder, run):
    ours, theirs = later(program.losses(folder / run)), later(program.losses(folder / "alone"))
    assert ours.keys() == theirs.keys() and ours == pytest.approx(theirs, rel=2e-5)


@pytest.mark.parametrize("way", ["ddp", "fsdp"])
def test_one_goes_on_where_two_stopped(folder, corpus, way):
    ours = program.train(corpus.folder, folder / f"{way}, then alone", resume=program.half(folder / way))
    theirs = later(program.losses(folder / way))
    assert later(ours).keys() == theirs.keys() and later(ours) == pytest.approx(theirs, rel=2e-5)


def test_the_command_trains_in_two_processes_and_writes_once(folder):
    records = program.Log(folder / "command" / "log.jsonl").records()
    assert [record["step"] for record in records if "loss" in record] == [1, 2, 3, 4]
    files = {path.name for path in find_checkpoint(folder / "command").folder.iterdir()}
    assert files == TENSORS | {"tokenizer.json", "config.json", "trainer.json", "checksums.json"}


def test_fine_tuning_in_two_processes(folder):
    records = program.Log(folder / "finetuned" / "log.jsonl").records()
    assert [record["step"] for record in records if "loss" in record] == [1, 2, 3]
    assert "accuracy" in (folder / "finetuned" / "scores.json").read_text()


def test_processes_that_have_not_joined_are_refused(make_trainer, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match=r"WORLD_SIZE: got 2, of processes that have not joined; .*parallel\.joined"):
        make_trainer(tmp_path)


def test_refusals(make_trainer, tmp_path, monkeypatch):
    with pytest.raises(InputError, match="parallel: got 'fsdp' with one process"):
        make_trainer(tmp_path, parallel="fsdp")
    with pytest.raises(InputError, match="context_parallel: got 2; allowed: a divisor of the 1 processes"):
        make_trainer(tmp_path, context_parallel=2)
    monkeypatch.setattr("fastattn.lm.train.loop.ranks", lambda: Ranks(0, 2))
    with pytest.raises(InputError, match="compile: got True with context_parallel=2"):
        make_trainer(tmp_path, context_parallel=2, compile=True)
    monkeypatch.setattr("fastattn.lm.train.loop.ranks", lambda: Ranks(0, 3))
    with pytest.raises(InputError, match="batch: got 4; allowed: a multiple of the 3 processes"):
        make_trainer(tmp_path)
