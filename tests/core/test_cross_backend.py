"""Forward on one backend, backward on another: all define out and lse alike."""

import pytest
import torch

import fastattn
from fastattn.backends import BACKENDS, load
from fastattn.problem import Problem
from fastattn.testing import assert_within, grid, make, measure

CASES = grid([torch.float32], quick=True)  # the strictest bounds


def turns():
    """Each backend once forward and once backward in every case; over the cases, every pair in turn."""
    others = len(BACKENDS) - 1
    for turn, case in enumerate(CASES):
        for at, forward in enumerate(BACKENDS):
            backward = BACKENDS[(at + 1 + turn % others) % len(BACKENDS)]
            yield pytest.param(case, forward, backward, id=f"{case.id}-{forward}->{backward}")


@pytest.mark.parametrize(("case", "forward", "backward"), list(turns()))
def test_one_forward_and_another_backward(case, forward, backward):
    sample = make(case, seed=1)
    problem = Problem.of(sample.inputs, sample.spec, needs_grad=True)
    for name in (forward, backward):
        if reasons := load(name).unsupported_reasons(problem):
            pytest.skip(f"{name}: {'; '.join(reasons)}")
    assert_within(measure(forward, sample, backward))


@pytest.mark.parametrize("name", BACKENDS)
def test_backends_drop_the_same_elements(name):
    """With v the identity, out shows which weights survived."""
    q, k = torch.randn(2, 48, 4, 32), torch.randn(2, 40, 2, 32)
    v = torch.eye(40).expand(2, 2, 40, 40).transpose(1, 2)
    state = torch.tensor([123456789012, 3])
    if reasons := load(name).unsupported_reasons(fastattn.explain(q, k, v, dropout_p=0.4).problem):
        pytest.skip("; ".join(reasons))
    found, expected = (
        fastattn.attention(q, k, v, dropout_p=0.4, rng_state=state, backend=backend) for backend in (name, "eager")
    )
    assert torch.equal(found == 0, expected == 0)
    assert 0.3 < float((expected == 0).float().mean()) < 0.5
