"""kill -9 at random moments of a real training process; each time it resumes, and ends as if nothing had happened."""

import os
import random
import signal
import subprocess
import sys
import time

import torch
from safetensors.torch import load_file

from fastattn.train.checkpoint import find_checkpoint, sorted_steps
from fastattn.train.log import Log

KILLS = 3
STEPS = 60
FLAGS = ["--steps", str(STEPS), "--save-every", "1", "--batch", "2", "--length", "16", "--vocab-size", "300"]
FLAGS += [
    "--log-every",
    "1",
    "--eval-every",
    "20",
    "--eval-rows",
    "2",
    "--dropout",
    "0.1",
    "--device",
    "cpu",
    "--quiet",
]


def start(texts, out, *more):
    command = [sys.executable, "-m", "fastattn", "train", "--data", str(texts), "--out", str(out), *FLAGS, *more]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for_step(process, out, step):
    deadline = time.monotonic() + 120
    while max((int(path.name[-8:]) for path in sorted_steps(out / "checkpoints")), default=0) < step:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "the training process does not get on"
        time.sleep(0.002)


def finish(process):
    output, _ = process.communicate(timeout=180)
    assert process.returncode == 0, output


def test_kill_9_loses_nothing(texts, tmp_path):
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    uninterrupted = start(texts, straight)
    source = random.Random(os.getpid())
    for kill in range(KILLS):
        process = start(texts, killed, *(["--resume"] if kill else []))
        wait_for_step(process, killed, 1 + kill * STEPS // (KILLS + 1))
        time.sleep(source.uniform(0, 0.3))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL, "it had ended before it was killed"
        for path in sorted_steps(killed / "checkpoints"):  # whatever has the name of a checkpoint is one
            assert load_file(path / "optimizer.safetensors")
        find_checkpoint(killed).load_model()
    finish(start(texts, killed, "--resume"))
    finish(uninterrupted)
    ours, theirs = (find_checkpoint(out).load_model().state_dict() for out in (straight, killed))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    losses = [[r["loss"] for r in Log(out / "log.jsonl").records() if "loss" in r] for out in (straight, killed)]
    assert losses[0] == losses[1] and len(losses[0]) == STEPS
