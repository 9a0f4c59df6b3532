"""Derivatives against finite differences, in fp64: reverse, forward, second order, and under vmap."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

import fastattn
from fastattn.backends import BACKENDS

EVERYWHERE = [name for name in BACKENDS if name in ("portable", "eager")]  # these serve fp64 on a CPU
STATE = torch.tensor([77, 1])


@pytest.fixture(autouse=True, params=EVERYWHERE)
def backend(request):
    with fastattn.use_backend(request.param):
        yield request.param


def leaf(*shape):
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


def dense_tensors():
    return leaf(2, 3, 2, 3), leaf(2, 4, 1, 3), leaf(2, 4, 1, 2), leaf(1, 2, 3, 4), leaf(2)


def every_term(q, k, v, bias, sinks):
    return fastattn.attention(
        q, k, v, causal=True, window=(2, 0), scale=0.7, softcap=2.0, bias=bias, sinks=sinks,
        mask=torch.tensor([True, False, True, True]), alibi_slopes=torch.tensor([0.3, 0.6]),
        segment_ids=(torch.tensor([[0, 0, 1]] * 2), torch.tensor([[0, 0, 1, 1]] * 2)),
        intervals=torch.tensor([[[0, 2], [3, 9]], [[0, 4], [2, 2]], [[2, 3], [-5, 1]]], dtype=torch.int32),
        dropout_p=0.25, rng_state=STATE, return_lse=True,
    )  # fmt: skip


CU_Q, CU_KV = (torch.tensor(values, dtype=torch.int32) for values in ([0, 2, 2, 5], [0, 3, 4, 6]))


PACKED_INTERVALS = torch.tensor([[[0, 2]], [[1, 3]], [[0, 1]], [[0, 2]], [[1, 2]]], dtype=torch.int32)


def packed_tensors():
    return leaf(5, 2, 3), leaf(6, 1, 3), leaf(6, 1, 2), leaf(3, 2)


def every_term_packed(q, k, v, sinks):
    return fastattn.attention_varlen(
        q, k, v, CU_Q, CU_KV, causal=True, window=(1, 0), softcap=3.0, sinks=sinks,
        alibi_slopes=torch.tensor([[0.1, 0.5], [0.2, 0.6], [0.4, 0.0]]), intervals=PACKED_INTERVALS,
        dropout_p=0.25, rng_state=STATE, return_lse=True,
    )  # fmt: skip


def empty_rows(q, k, v):
    """Causal with more queries than keys: the first row keeps nothing. Its lse, -inf, has no derivative."""
    return fastattn.attention(q, k, v, causal=True)


PROBLEMS = {
    "plain": (lambda q, k, v: fastattn.attention(q, k, v), (2, 3, 2, 3)),
    "every term": (every_term, dense_tensors),
    "every term, packed": (every_term_packed, packed_tensors),
    "empty rows": (empty_rows, lambda: (leaf(1, 4, 2, 3), leaf(1, 2, 2, 3), leaf(1, 2, 2, 3))),
    "torch's signature": (
        lambda q, k, v, mask: fastattn.scaled_dot_product_attention(q, k, v, mask),
        lambda: (leaf(2, 2, 3, 3), leaf(2, 2, 4, 3), leaf(2, 2, 4, 2), leaf(3, 4)),
    ),
}


def problem(name):
    function, tensors = PROBLEMS[name]
    return function, tensors() if callable(tensors) else tuple(leaf(*tensors) for _ in range(3))


@pytest.mark.parametrize("name", PROBLEMS)
def test_first_derivatives(name):
    function, tensors = problem(name)
    assert gradcheck(function, tensors, check_batched_grad=True)


@pytest.mark.parametrize("name", PROBLEMS)
def test_forward_mode(name):
    function, tensors = problem(name)
    assert gradcheck(function, tensors, check_forward_ad=True, check_backward_ad=False, check_batched_forward_grad=True)


@pytest.mark.parametrize("name", PROBLEMS)
def test_second_derivatives(name):
    function, tensors = problem(name)
    assert gradgradcheck(function, tensors, fast_mode=True)


def test_the_gradient_of_lse_alone():
    """Autograd hands dout=None over where only lse is used."""
    assert gradcheck(lambda *x: every_term(*x)[1], dense_tensors())


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (3,), (4,), (0, 3), (2, 4)])
def test_only_what_is_wanted(wanted):
    tensors = [x.detach().requires_grad_(n in wanted) for n, x in enumerate(dense_tensors())]
    assert gradcheck(every_term, tensors, fast_mode=True)
    sum(x.sum() for x in every_term(*tensors)).backward()
    assert [n for n, x in enumerate(tensors) if x.grad is not None] == list(wanted)
