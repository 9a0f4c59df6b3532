"""Hostile files end in a sentence, in seconds, within a gigabyte of memory."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MOST_SECONDS, MOST_MEBIBYTES = 10, 1024


def test_hostile_files_end_in_a_sentence(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(Path(__file__).with_name("hostile.py")), str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(results) >= 60
    assert [result for result in results if result[1] != "refused"] == []
    assert max(seconds for *_, seconds, _ in results) < MOST_SECONDS
    assert max(mebibytes for *_, mebibytes in results) < MOST_MEBIBYTES
