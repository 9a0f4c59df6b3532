"""The Triton kernels through Triton's interpreter: the whole grid of cases against fp64, without a GPU."""

from __future__ import annotations

import pytest
import torch

from fastattn import testing
from fastattn.backends import load

pytest.importorskip("triton")

GRID = testing.grid((torch.float32, torch.float16, torch.bfloat16))


@pytest.mark.parametrize("case", GRID, ids=lambda case: case.id)
def test_grid(case: testing.Case) -> None:
    sample = testing.make(case)
    testing.assert_within(testing.measure(load("triton"), sample))
