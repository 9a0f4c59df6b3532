"""Every backend on the whole grid, forward and backward, under the one tolerance rule.

Triton's interpreter walks it in ``tests/backends/triton/test_interpreter.py``.
"""

import os

import pytest
import torch

from fastattn.backends import BACKENDS, load
from fastattn.problem import Problem
from fastattn.testing import assert_within, grid, make, measure

GRID = grid()
COMPLETE = ("portable", "eager")  # those that serve every case
HERE = [name for name in BACKENDS if name != "triton" or os.environ.get("TRITON_INTERPRET") != "1"]


def why_not(name, sample):
    return load(name).unsupported_reasons(Problem.of(sample.inputs, sample.spec, needs_grad=True))


@pytest.mark.parametrize("name", HERE)
@pytest.mark.parametrize("case", GRID, ids=lambda case: case.id)
def test_within_tolerance(name, case):
    sample = make(case)
    if reasons := why_not(name, sample):
        pytest.skip("; ".join(reasons))
    assert_within(measure(name, sample))


@pytest.mark.parametrize("name", [name for name in BACKENDS if name in COMPLETE])
def test_nothing_is_skipped(name):
    assert [case.id for case in GRID if why_not(name, make(case))] == []


@pytest.mark.gpu
@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("case", GRID, ids=lambda case: case.id)
def test_within_tolerance_on_a_gpu(name, case):
    sample = make(case, device="cuda")
    if reasons := why_not(name, sample):
        pytest.skip("; ".join(reasons))
    assert_within(measure(name, sample))


def test_the_grid_is_what_it_says():
    ids = [case.id for case in GRID]
    assert len(set(ids)) == len(ids)
    assert 60 <= len(grid([torch.float32])) <= 110
    assert all(max(case.S_q, case.S_kv) <= 128 for case in GRID)
    quick = grid(quick=True)
    assert {case.dtype for case in quick} == {case.dtype for case in GRID}
    assert {case.id for case in quick} < set(ids)


@pytest.mark.parametrize("case", grid(quick=True), ids=lambda case: case.id)
def test_samples_are_seeded(case):
    first, again, other = make(case, seed=3), make(case, seed=3), make(case, seed=4)
    assert torch.equal(first.dout, again.dout) and first.dout.stride() == again.dout.stride()
    assert first.spec == again.spec and first.needs == again.needs
    for name in ("q", "k", "v", "bias", "mask", "sinks"):
        one, two = getattr(first.inputs, name), getattr(again.inputs, name)
        assert one is two is None or (one.stride() == two.stride() and one.equal(two)) or name in ("k", "v")
    assert first.dout.numel() == 0 or not torch.equal(first.dout, other.dout)
