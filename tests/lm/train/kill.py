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
from fastattn.lm.models import PRESETS
from fastattn.lm.train import loop
from fastattn.lm.train.checkpoint import find_checkpoint, sorted_steps


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


def newest(out):
    return max((int(path.name[5:]) for path in sorted_steps(out / "checkpoints")), default=0)


def seconds_until(out, step):
    """How long it takes until there is a checkpoint of ``step`` or a later one."""
    began = time.monotonic()
    while newest(out) < step:
        assert time.monotonic() < began + 60, "the training process does not get on"
        time.sleep(0.002)
    return time.monotonic() - began


def kill(process):
    os.kill(process, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == -signal.SIGKILL, "it had ended before it was killed"


def check(out):
    """Whatever has the name of a checkpoint is a whole one; returns the newest step."""
    steps = sorted_steps(out / "checkpoints")
    for path in steps:
        assert load_file(path / "optimizer.safetensors")
    if steps:
        find_checkpoint(out).load_pretrained()
    return newest(out)


def run(texts, folder, kills, steps):
    PRESETS["tiny"] |= {"width": 32, "layers": 1, "heads": 2, "kv_heads": 1}
    loop.plot_losses = lambda *_: None  # which takes longer than the steps between kills
    source = random.Random()
    straight = start(texts, folder / "straight", steps)
    begins = seconds_until(folder / "straight", 1)
    finish(straight)
    out, reached = folder / "killed", [0]
    for number in range(kills):
        process = start(texts, out, steps)
        if number % 2:  # while it begins, or soon after
            time.sleep(source.uniform(0, begins))
        else:  # at work
            begins = seconds_until(out, reached[-1] + 1)
            seconds_until(out, reached[-1] + source.randint(1, steps // kills))
            time.sleep(source.uniform(0, 0.03))
        kill(process)
        reached.append(check(out))
    finish(start(texts, out, steps))
    print("killed at steps", *reached[1:])


if __name__ == "__main__":
    torch.set_num_threads(1)
    run(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
