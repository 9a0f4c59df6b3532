"""Rows whose scores share a huge offset: softmax does not depend on it, nor may a kernel, in either pass.

Much code pads with rows of -1e9 or finfo.min. Beside an offset of 1e8, ``lse`` in fp32 rounds away the logarithm of the
sum, and weights computed from it alone are wrong by a factor of the number of keys.
"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from fastattn.backends import load
from fastattn.backends.triton import launch_decode
from fastattn.kv_cache import CacheInputs
from fastattn.problem import Grads, Inputs
from fastattn.spec import AttentionSpec

S, D = 40, 16
OFFSETS = (torch.finfo(torch.float32).min, -1e9, 1e8, 3e4)
PAIRS = [("triton", "triton"), ("triton", "eager"), ("eager", "triton")]


def problem(seed: int = 0) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(1, S, 2, D, generator=generator) for _ in range(4))


def passes(
    pair: tuple[str, str], inputs: Inputs, spec: AttentionSpec, dout: torch.Tensor
) -> tuple[torch.Tensor, Grads]:
    out, lse, low = load(pair[0]).forward(inputs, spec)
    needs = ("q", "k", "v", "bias") if inputs.bias is not None else ("q", "k", "v")
    return out, load(pair[1]).backward(dout, None, out, lse, low, inputs, spec, needs)


def assert_is_mean(found: tuple[torch.Tensor, Grads], v: torch.Tensor, dout: torch.Tensor) -> None:
    """Every weight is 1 / S."""
    out, grads = found
    torch.testing.assert_close(out, v.mean(1, keepdim=True).expand_as(out), rtol=1e-4, atol=1e-5)
    assert grads.dv is not None
    torch.testing.assert_close(grads.dv, dout.mean(1, keepdim=True).expand_as(dout), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("pair", PAIRS, ids=" then ".join)
@pytest.mark.parametrize("offset", OFFSETS)
def test_a_row_of_one_bias(offset: float, pair: tuple[str, str]) -> None:
    """Beside such a bias scores round to it, or to few neighbours: q and k are 0, so that all are the same."""
    q, k, v, dout = problem()
    inputs = Inputs(q * 0, k * 0, v, bias=torch.full((1, 1, S, S), offset), max_seqlen_q=S, max_seqlen_kv=S)
    found = passes(pair, inputs, AttentionSpec(0.25), dout)
    assert_is_mean(found, v, dout)
    dbias = found[1].dbias
    assert dbias is not None and float(dbias.sum(-1).abs().max()) < 1e-4, "gradients of a row's scores sum to 0"


@pytest.mark.parametrize("pair", PAIRS[:1], ids=" then ".join)
@pytest.mark.parametrize("size", [1e2, 1e4, 1e5])
def test_equal_keys_with_huge_scores(size: float, pair: tuple[str, str]) -> None:
    """Scores to 1e10, out of q and k alone; a product rounded in one pass and not in the other would show."""
    q, k, v, dout = problem(1)
    k = k[:, :1].expand(k.shape)
    inputs = Inputs(q * size, k * size, v, max_seqlen_q=S, max_seqlen_kv=S)
    assert_is_mean(passes(pair, inputs, AttentionSpec(0.25), dout), v, dout)


@pytest.mark.parametrize("offset", [-1e9, 1e8])
def test_a_sink_beside_huge_scores(offset: float) -> None:
    """A sink of the same size is one more key of a row, whose value is 0."""
    q, k, v, dout = problem(2)
    bias, sinks = torch.full((1, 1, S, S), offset), torch.full((1, 2), offset)
    inputs = Inputs(q * 0, k * 0, v, bias=bias, sinks=sinks, max_seqlen_q=S, max_seqlen_kv=S)
    out, grads = passes(("triton", "triton"), inputs, AttentionSpec(0.25), dout)
    torch.testing.assert_close(out, (v.sum(1, keepdim=True) / (S + 1)).expand_as(out), rtol=1e-4, atol=1e-5)
    assert grads.dv is not None
    torch.testing.assert_close(grads.dv, (dout.sum(1, keepdim=True) / (S + 1)).expand_as(dout), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("splits", [1, 3, 40])
@pytest.mark.parametrize("offset", OFFSETS)
def test_splits_of_a_cache(offset: float, splits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Partial results of a different number of keys each are weighed by that number; 40 splits have empty ones."""
    monkeypatch.setattr(launch_decode, "splits", lambda *_: splits)
    q, k, v, _ = problem(3)
    lengths = torch.tensor([S - 3], dtype=torch.int32)
    inputs = CacheInputs(q[:, :1] * 0, k * 0, v, lengths, bias=torch.full((1, 1, 1, S), offset), max_seqlen_q=1)
    out, lse = load("triton").attend_to_cache(inputs, AttentionSpec(0.25, right=0))
    torch.testing.assert_close(out, v[:, : S - 3].mean(1, keepdim=True), rtol=1e-4, atol=1e-5)
    assert torch.isfinite(lse).all()
