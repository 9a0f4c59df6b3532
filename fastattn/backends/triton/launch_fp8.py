"""The host side of the forward pass in e4m3."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from fastattn.backends.triton.arguments import Bshd, PerRow
from fastattn.backends.triton.derived_configs import config_of
from fastattn.backends.triton.forward_fp8 import Scales, forward_fp8_kernel
from fastattn.backends.triton.launch import INTERPRETED, Call, compiled
from fastattn.backends.triton.plans import device_of, launched
from fastattn.problem import Inputs
from fastattn.quantized import BLOCK, Quantized, is_transposed, transposed
from fastattn.spec import AttentionSpec


def forward(q: Quantized, k: Quantized, v: Quantized, inputs: Inputs, spec: AttentionSpec) -> tuple[Tensor, Tensor]:
    """``(out, lse)``; ``inputs`` has the other tensors, and q, k and v of the right shapes and of the dtype of out."""
    out = torch.empty(inputs.out_shape(), dtype=inputs.q.dtype, device=inputs.q.device)
    lse, low = (torch.empty(inputs.lse_shape(), dtype=torch.float32, device=out.device) for _ in range(2))
    if lse.numel() == 0:
        return out, lse
    with device_of(out):
        call = call_of(inputs.replace(q=q.values, k=k.values, v=v.values), spec)
        config = config_of(call, "forward_fp8", bits=8)
        grid, schedule = call.schedule(inputs.max_seqlen_q, config.block_m, inputs.batch * inputs.heads_q)
        launched(forward_fp8_kernel, grid)(
            call.q, call.k, call.v, Scales(*(PerRow.of(x.scales) for x in (q, k, v))), Bshd.of(out), PerRow.of(lse),
            PerRow.of(low), call.with_tiles("q", config.block_m, config.block_n), call.sizes, schedule,
            ROWS=BLOCK, BY_BITS=INTERPRETED, **compiled(out.device, call.flags, config),
        )  # fmt: skip
    return out, lse


def call_of(inputs: Inputs, spec: AttentionSpec) -> Call:
    """The call with rows of q and k contiguous, and values transposed."""
    call = Call.of(inputs, spec)
    q, k = (Bshd.of(x.ptr if x.ptr.stride(-1) == 1 else x.ptr.contiguous()) for x in (call.q, call.k))
    values = call.v.ptr
    v = Bshd.of(values if is_transposed(values) else transposed(values))
    vector = min(x.vector() for x in (q, k))
    return dataclasses.replace(call, q=q, k=k, v=v, flags=dataclasses.replace(call.flags, vector=vector))
