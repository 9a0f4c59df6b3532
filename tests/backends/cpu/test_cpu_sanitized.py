"""The kernels of the baseline under sanitizers, on a few random problems; ``make sanitize`` does the rest."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastattn.backends.cpu import build

ROOT = Path(__file__).parents[3]
SMALL = ("--seed", "27")  # 30 problems in a row of which none is large
CHECK = ROOT / "csrc" / "cpu" / "check" / "check.py"
try:
    build.find_compiler()
except build.BuildError as error:
    pytest.skip(str(error), allow_module_level=True)


@pytest.mark.parametrize("which", ["address,undefined", pytest.param("thread", marks=pytest.mark.slow)])
def test_no_sanitizer_complains(which):
    command = [sys.executable, str(CHECK), "--baseline", "--sanitize", which, "--cases", "30", *SMALL]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "baseline: 30 problems\n0 wrong" in done.stdout
