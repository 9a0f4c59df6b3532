"""The forward pass in e4m3, judged by bounds that follow from the roundings it may make.

The exact result is the formula in fp64 for the dequantized operands. A kernel rounds weights ``p <= 1`` to e4m3, by at
most ``p / 16`` or ``2^-18``, so ``out`` is off by at most ``sum w |v| / 16 + 2^-18 sum |v|``. Sums of products are in
fp32, on tensor cores with about 14 bits (DeepSeek-AI, "DeepSeek-V3 technical report", 2024, section 3.3.2), which
moves a score by at most ``2^-13 |scale| sum |q| |k|``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastattn import reference
from fastattn.backends import load
from fastattn.backends.base import Backend
from fastattn.problem import Inputs
from fastattn.quantized import Quantized, quantize
from fastattn.testing.inputs import Sample
from fastattn.testing.tolerance import Row, check_contract, poisoned

RELATIVE, ABSOLUTE = 2.0**-4, 2.0**-18  # of a weight's rounding
PRODUCTS = {"cuda": 2.0**-13, "cpu": 2.0**-20}  # of sums of products


def measure_fp8(backend: Backend | str, sample: Sample) -> list[Row]:
    """Judge ``out`` and ``lse``.

    Args:
        backend: a backend that declares "fp8", or its name.
        sample: from ``inputs.make``, neither packed nor with dropout.
    """
    backend, inputs = load(backend) if isinstance(backend, str) else backend, sample.inputs
    q, k, v = quantize(inputs.q), quantize(inputs.k), quantize(inputs.v, role="value")
    with poisoned():
        out, lse = backend.forward_fp8(q, k, v, inputs, sample.spec)
    check_contract("out", out, inputs.out_shape(), inputs.q.dtype, needs_contiguous=True)
    check_contract("lse", lse, inputs.lse_shape(), torch.float32, needs_contiguous=True)
    wide = _in_float64(inputs, q, k, v)
    exact, exact_lse, _ = reference.forward(wide, sample.spec)
    moved = PRODUCTS[inputs.q.device.type] * _most_of_scores(wide, sample)
    of_values, _, _ = reference.forward(wide.replace(v=wide.v.abs()), sample.spec)
    every = wide.v.abs().sum(1, keepdim=True).repeat_interleave(inputs.heads_q // inputs.heads_kv, 2)
    step = torch.finfo(out.dtype).eps
    bound = (RELATIVE + math.expm1(2 * moved)) * (1 + RELATIVE) * of_values + ABSOLUTE * every + step * exact.abs()
    return [_judged("out", out, exact, bound), _judged("lse", lse, exact_lse, moved + 2e-6 * (1 + exact_lse.abs()))]


def _in_float64(inputs: Inputs, *operands: Quantized) -> Inputs:
    q, k, v = (x.dequantize(torch.float64) for x in operands)
    bias, sinks = (None if x is None else x.double() for x in (inputs.bias, inputs.sinks))
    return inputs.replace(q=q, k=k, v=v, bias=bias, sinks=sinks)


def _most_of_scores(wide: Inputs, sample: Sample) -> float:
    """The largest ``|scale| sum |q| |k|``."""
    q, k = wide.q.abs().amax(1), wide.k.abs().amax(1)
    k = k.repeat_interleave(wide.heads_q // wide.heads_kv, 1)
    return float(abs(sample.spec.scale) * (q * k).sum(-1).max())


def _judged(name: str, found: Tensor, exact: Tensor, bound: Tensor) -> Row:
    """The element with the largest ratio of error to bound; equal infinities are no error."""
    error = torch.where(found.double() == exact, 0.0, (found.double() - exact).abs())
    at = int((error / bound).nan_to_num(math.inf).flatten().argmax())
    worst, most = float(error.flatten()[at]), float(bound.expand_as(error).flatten()[at])
    return Row(name, worst, 0.0, most, worst <= most)
