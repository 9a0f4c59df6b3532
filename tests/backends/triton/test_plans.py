"""Triton's own launcher, compiled C code, over a recording driver: every form of our kernels, and calls by plans."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastattn.testing import simulated
from fastattn.testing.simulated.recording import RecordingDriver

pytest.importorskip("triton")
PROGRAM = Path(__file__).with_name("launches.py")
SUMS = ["sum_parts_kernel"] * 2  # of dk and dv: the keys of these calls are too few for a program each
BACKWARD = ["backward_preprocess_kernel", "backward_dkdv_kernel", *SUMS, "backward_dq_kernel"]
KERNELS = {
    "forward_kernel", *BACKWARD, "backward_dbias_kernel", "backward_dsinks_kernel", "used_keys_kernel",
    "segment_columns_kernel", "interval_tiles_kernel", "append_kernel", "turn_kernel", "decode_kernel",
    "combine_kernel",
}  # fmt: skip


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    if reason := simulated.unavailable_reason():
        pytest.skip(reason)
    RecordingDriver()  # compiled here, once for all
    answer = tmp_path_factory.mktemp("launches") / "answer.json"
    environment = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": str(PROGRAM.parents[3])}
    environment |= {"TMPDIR": str(answer.parent)}
    done = subprocess.run(
        [sys.executable, PROGRAM, answer], env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(answer.read_text(encoding="utf-8"))


def test_every_kernel_is_given_what_the_launch_code_gave(found):
    """Addresses and numbers, in order, on the current stream; and no rule of the driver is broken."""
    assert {kernel for form in found["forms"].values() for kernel in form["launches"]} == KERNELS
    right = {"arrived": True, "broken": "", "stream": True}
    wrong = {name: form for name, form in found["forms"].items() if not form.items() >= right.items()}
    assert wrong == {}


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
    assert found["planned"][way] == {"same": True, "launches": kernels}


def test_calls_that_no_plan_can_serve_have_none(found):
    """Arguments that share an address cannot be told apart, and a copy would be taken for the tensor it was made of."""
    assert found["shared"] and found["copied"]
