"""Plans launch the same kernels as calls without a plan, by Triton's compiler and a driver that records launches."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
PROGRAM = Path(__file__).with_name("plans.py")
BACKWARD = ["backward_preprocess_kernel", "backward_dkdv_kernel", "backward_dq_kernel"]


@pytest.fixture(scope="module")
def found():
    environment = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": str(PROGRAM.parents[3])}
    done = subprocess.run([sys.executable, PROGRAM], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    ("way", "kernels"),
    [
        ("forward", ["forward_kernel"]),
        ("backward", BACKWARD),
        ("decode, paged=True", ["append_kernel", "decode_kernel", "combine_kernel"]),
        ("decode, paged=False", ["append_kernel", "decode_kernel", "combine_kernel"]),
    ],
)
def test_a_plan_launches_what_the_usual_way_does(found, way, kernels):
    assert found[way]["same"] and found[way]["launches"] == kernels


def test_calls_that_no_plan_can_serve_have_none(found):
    """Arguments that share an address cannot be told apart, and a copy would be taken for the tensor it was made of."""
    assert found["shared"] and found["copied"]
