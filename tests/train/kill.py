"""Trains through many kills, for test_kill.py: every run is a fork of this process, so that none imports torch again.

python kill.py TEXTS FOLDER KILLS STEPS
"""

import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

from fastattn.cli import main
from fastattn.models import PRESETS
from fastattn.train import loop
from fastattn.train.checkpoint import find_checkpoint, sorted_steps


def start(texts, out, steps):
    """``fastattn train``, resuming if it can, in a process of its own."""
    process = os.fork()
    if process:
        return process
    flags = {"--steps": steps, "--save-every": 2, "--batch": 2, "--length": 16, "--vocab-size": 300, "--dropout": 0.1}
    flags |= {"--log-every": 1, "--eval-every": 20, "--eval-rows": 2, "--device": "cpu"}
    command = ["train", "--data", texts, "--out", out, "--quiet", *(x for pair in flags.items() for x in pair)]
    resume = ["--resume"] if sorted_steps(out / "checkpoints") else []
    os._exit(main([*map(str, command), *resume]))


def finish(process):
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0


def seconds_to_first_checkpoint(out):
    began = time.monotonic()
    while not sorted_steps(out / "checkpoints"):
        time.sleep(0.002)
    return time.monotonic() - began


def kill(process, seconds):
    time.sleep(seconds)
    os.kill(process, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == -signal.SIGKILL, "it had ended before it was killed"


def check(out):
    """Whatever has the name of a checkpoint is a whole one; returns the newest step."""
    steps = sorted_steps(out / "checkpoints")
    for path in steps:
        assert load_file(path / "optimizer.safetensors")
    if steps:
        find_checkpoint(out).load_model()
    return int(steps[-1].name[5:]) if steps else 0


def run(texts, folder, kills, steps):
    PRESETS["tiny"] |= {"width": 32, "layers": 1, "heads": 2, "kv_heads": 1}
    loop.plot_losses = lambda *_: None  # which takes longer than the steps between kills
    source = random.Random()
    straight = start(texts, folder / "straight", steps)
    begins = seconds_to_first_checkpoint(folder / "straight")
    finish(straight)
    reached = [0]
    for _ in range(kills):
        longest = 2.5 if reached[-1] < 0.7 * steps else 0.8  # so that it does not end before the last kill
        kill(start(texts, folder / "killed", steps), source.uniform(0, longest * begins))
        reached.append(check(folder / "killed"))
    finish(start(texts, folder / "killed", steps))
    print("killed at steps", *reached[1:])


if __name__ == "__main__":
    torch.set_num_threads(1)
    run(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
