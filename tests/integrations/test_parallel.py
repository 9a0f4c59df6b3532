"""Ring, all-to-all and DTensor attention on 2, 3 and 4 gloo ranks against one process: ranks.py, run as a program."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
RANKS = Path(__file__).with_name("ranks.py")
EXPECTED = {  # at least so many checks on rank 0 whose names begin so
    "ring_attention": 78,
    "ulysses_attention": 78,
    "dropout draws": 3,
    "half precision": 3,
    "only what the band keeps": 3,
    "documents are balanced": 3,
    "memory of the rank's tokens": 3,
    "shard and unshard": 3,
    "wrong arguments": 3,
    "a model inside sharded": 3,
    "DTensor": 19,
    "inside torch's context_parallel": 1,
}


def test_every_check_on_every_rank(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(RANKS), str(tmp_path), "4"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    results = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(4)]
    wrong = [
        f"rank {rank}, {name}:\n{found}"
        for rank, by_name in enumerate(results)
        for name, found in by_name.items()
        if found != "ok"
    ]
    assert not wrong, "\n".join(wrong)
    for beginning, count in EXPECTED.items():
        ran = sum(name.startswith(beginning) for name in results[0])
        assert ran >= count, f"{ran} checks {beginning!r}"
