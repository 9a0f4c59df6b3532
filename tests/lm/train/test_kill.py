"""kill -9 at random moments of real training runs; each time it resumes, and ends as if nothing had happened."""

import os
import subprocess
import sys
from pathlib import Path

import torch

from fastattn.lm.train.checkpoint import find_checkpoint
from fastattn.lm.train.log import Log

KILLS, STEPS = 12, 120


def test_kill_9_loses_nothing(texts, tmp_path):
    command = [sys.executable, str(Path(__file__).with_name("kill.py")), str(texts), str(tmp_path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(KILLS), str(STEPS)], env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-3000:]
    reached = [int(step) for step in done.stdout.split("killed at steps")[1].split()]
    assert len(reached) == KILLS and len(set(reached)) > KILLS // 4, (
        reached
    )  # they were killed at work, not at the start
    runs = [tmp_path / "straight", tmp_path / "killed"]
    ours, theirs = (find_checkpoint(out).load_pretrained().state_dict() for out in runs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    for name in ("loss", "held_out_loss", "grad_norm"):
        first, second = ([r[name] for r in Log(out / "log.jsonl").records() if name in r] for out in runs)
        assert first == second and len(first) >= STEPS // 20, name
