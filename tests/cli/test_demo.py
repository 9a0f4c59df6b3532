"""The demo end to end on a small text: its report, figures and plots, and that it overwrites no folder of others.

Other tests check the tables; here ``verify`` and ``speed_table`` are shortened, and the number of steps does not depend
on the clock.
"""

import json
import signal
from types import SimpleNamespace

import pytest
import torch

from fastattn.cli import demo, main
from fastattn.lm.train import RunConfig, Trainer


@pytest.fixture
def short(monkeypatch):
    """Stand-ins with the interface of the two reports."""
    from fastattn.measure import speed
    from fastattn.testing import verify

    found = SimpleNamespace(ok=True, table=lambda: "the table", to_dict=lambda: {"ok": found.ok})
    found.plot = lambda path: path.write_bytes(b"png")
    monkeypatch.setattr(verify, "verify", lambda device, quick: found)
    monkeypatch.setattr(speed, "speed_table", lambda device, quick: found)
    monkeypatch.setattr(demo, "_fitting_config", lambda folder, args, target: few_steps(args.data))
    return found


def few_steps(data):
    flags = {"steps": 40, "batch": 4, "eval_every": 20, "log_every": 5}
    return RunConfig(tuple(data), vocab_size=300, length=32).changed(flags)


@pytest.fixture
def texts(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(30):
        (folder / f"{number}.py").write_text(f"def name_{number}(x):\n    return x + {number}\n" * 40)
    return folder


def run(texts, out, *flags):
    return main(["demo", "--data", str(texts), "--out", str(out), "--device", "cpu", "--quiet", *flags])


def test_the_whole_demo(short, texts, tmp_path, capsys):
    out = tmp_path / "report"
    assert run(texts, out) == 0
    report = (out / "report.md").read_text()
    for part in ("This machine", "Numerics against fp64", "Speed and memory", "Training", "What it writes"):
        assert f"## {part}" in report
    assert "unigram entropy" in report and "the table" in report and "![loss](loss.png)" in report
    figures = json.loads((out / "report.json").read_text())
    training = figures["training"]
    held_out = training["held-out loss (nats per token)"]
    assert held_out < training["unigram entropy of the held-out text (nats per token)"]
    assert set(figures["samples"]) == set(demo.PROMPTS) and figures["info"]["versions"]["torch"]
    assert (out / "loss.png").read_bytes()[:4] == b"\x89PNG" and (out / "speed.png").exists()
    assert f"Held-out loss {held_out:.3f}" in capsys.readouterr().out
    short.ok = False
    assert run(texts, out) == 1  # again into the same folder, and now the numerics are wrong


def test_a_folder_of_someone_else_is_left_alone(short, texts, tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    assert run(texts, tmp_path / "mine") == 2
    assert "was not made by fastattn demo: choose another --out" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]
    (tmp_path / "file").touch()
    assert run(texts, tmp_path / "file") == 2


def test_the_steps_fill_the_time(texts, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 6)
    seconds = {1: 0.9, 2: 0.7, 4: 0.5, 6: 0.6}
    tried = []
    monkeypatch.setattr(torch, "set_num_threads", tried.append)
    monkeypatch.setattr(Trainer, "seconds_per_step", lambda self: seconds[tried[-1]])
    args = SimpleNamespace(data=[str(texts)], minutes=2.0, quiet=True)
    config = demo._fitting_config(tmp_path, args, torch.device("cpu"))
    assert config.train.steps == 240 and config.train.max_minutes == 3.0
    assert config.train.eval_every == config.train.save_every == 30
    assert tried == [1, 2, 4, 6, 4]


def test_ctrl_c_ends_the_demo(short, texts, tmp_path, monkeypatch):
    real = Trainer._train_step

    def step(self, number, rate=None):
        signal.raise_signal(signal.SIGINT)
        return real(self, number)

    monkeypatch.setattr(Trainer, "_train_step", step)
    assert run(texts, tmp_path / "out") == 130


def test_bad_minutes(texts, tmp_path, capsys):
    assert run(texts, tmp_path / "out", "--minutes", "0") == 2
    assert "--minutes: got 0.0" in capsys.readouterr().err


def test_no_matplotlib_is_no_failure(short, texts, tmp_path, monkeypatch):
    def plot(path):
        raise ModuleNotFoundError("No module named 'matplotlib'", name="matplotlib")

    short.plot = plot
    assert run(texts, tmp_path / "out") == 0
    assert "pip install 'fastattn[bench]'" in (tmp_path / "out" / "report.md").read_text()
