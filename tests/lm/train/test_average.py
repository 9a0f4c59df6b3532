"""Averages of checkpoints, and the search for a learning rate."""

import contextlib
import json

import pytest
import torch
from safetensors.torch import load_file

from fastattn.cli import main
from fastattn.errors import DataError, InputError
from fastattn.lm.train import find_checkpoint
from fastattn.lm.train.average import average_checkpoints, find_checkpoints
from fastattn.lm.train.checkpoint import Checkpoint, sorted_steps
from fastattn.lm.train.learning_rate import find_rate


def test_the_mean_of_the_newest(make_trainer, tmp_path, capsys):
    make_trainer(tmp_path / "run", steps=8, save_every=2, keep=4).run()
    steps = sorted_steps(tmp_path / "run" / "checkpoints")
    out = tmp_path / "mean"
    command = ["average", "--checkpoint", str(tmp_path / "run"), "--last", "3", "--out", str(out)]
    assert main(command) == 0 and str(steps[-3]) in capsys.readouterr().out
    stored = [load_file(path / "model.safetensors") for path in steps[-3:]]
    mean = find_checkpoint(out).load_pretrained().state_dict()
    for name, tensor in mean.items():
        expected = torch.stack([weights[name].double() for weights in stored]).mean(0).float()
        torch.testing.assert_close(tensor, expected, rtol=1e-7, atol=1e-9)
    assert find_checkpoint(out).damage() is None
    assert main(command) == 2 and "exists: choose another --out" in capsys.readouterr().err
    with pytest.raises(DataError, match=r"optimizer\.safetensors is missing"):
        make_trainer(tmp_path / "again").resume(find_checkpoint(out))


def test_what_has_no_average(make_trainer, tmp_path):
    for name, dropout in (("a", 0.1), ("b", 0.2)):
        make_trainer(tmp_path / name, dropout=dropout, steps=1, keep=1).run()
    found = [find_checkpoint(tmp_path / name) for name in ("a", "b")]
    with pytest.raises(DataError, match="1 checkpoint, where an average needs two: train with --keep 5"):
        find_checkpoints([tmp_path / "a"], 5)
    assert find_checkpoints([tmp_path / "a", tmp_path / "b"], 5) == found
    with pytest.raises(DataError, match="different models"):
        average_checkpoints(found, tmp_path / "c")
    with pytest.raises(InputError, match="last: got 1"):
        find_checkpoints([tmp_path], 1)
    assert isinstance(found[0], Checkpoint) and not (tmp_path / "c").exists()


def test_a_learning_rate_is_found_that_learns_and_a_larger_one_diverges(make_trainer, tmp_path):
    found = find_rate(make_trainer(tmp_path / "search", dropout=0.0), lowest=1e-5, highest=100.0, show_progress=False)
    assert json.loads((tmp_path / "search" / "lr.json").read_text())["suggestion"] == found.suggestion
    assert (tmp_path / "search" / "lr.png").stat().st_size > 5000
    assert 1e-4 < found.suggestion <= found.highest < 10
    ends = []
    for rate in (found.suggestion / 100, found.suggestion, 100.0):
        options = {"dropout": 0.0, "steps": 30, "eval_every": 30, "save_every": 30, "lr": rate}
        trainer = make_trainer(tmp_path / f"{rate}", **options)
        with contextlib.suppress(FloatingPointError):
            ends.append(trainer.run().held_out_loss)
    assert ends[1] < ends[0] - 0.5 and ends[1] < (*ends, float("inf"))[2]


def test_the_command_and_refusals(texts, tmp_path, capsys, make_trainer):
    command = ["train", "--data", str(texts), "--out", str(tmp_path), "--length", "8", "--batch", "2", "--quiet"]
    assert main([*command, "--vocab-size", "300", "--device", "cpu", "--find-lr"]) == 0
    assert "suggested --lr" in capsys.readouterr().out and not (tmp_path / "checkpoints").exists()
    trainer = make_trainer(tmp_path / "x")
    with pytest.raises(InputError, match="lowest and highest: got 1 and 0"):
        find_rate(trainer, lowest=1, highest=0)
    with pytest.raises(InputError, match="steps: got 5"):
        find_rate(trainer, steps=5)
    with pytest.raises(DataError, match="fell at no learning rate"):
        find_rate(trainer, lowest=50.0, highest=100.0, steps=20, show_progress=False)
