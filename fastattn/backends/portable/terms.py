"""The terms of the scores besides ``q @ k^T``, for one block, and the steps that concern a whole problem.

Tensors are ``[b, H_q, M, N]``, with size 1 where they broadcast: ``b`` batch entries, ``M`` query and ``N`` key rows.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastattn import numerics, rng
from fastattn.backends.base import Outputs
from fastattn.backends.portable import intervals, plan
from fastattn.backends.portable.plan import Block
from fastattn.numerics import NEVER
from fastattn.problem import Inputs
from fastattn.spec import AttentionSpec, distance, keep

MODERATE = 1024.0  # up to here, in magnitude, lse alone is enough: rounding it moves a weight by 6e-5 of itself


def compute_dtype(inputs: Inputs) -> torch.dtype:
    """That of scores, sums and lse: fp32, or fp64 for fp64 inputs."""
    return torch.float64 if inputs.q.dtype == torch.float64 else torch.float32


def dense(x: Tensor) -> Tensor:
    """``(B, S, H, D)``, a packed batch being a batch of one."""
    return x if x.dim() == 4 else x[None]


def queries(x: Tensor, block: Block) -> Tensor:
    """The query rows of a block, of ``(B, S, H, D)`` or packed ``(T, H, D)``: ``[b, H, M, D]``."""
    return dense(x)[slice(*block.batch), block.q_begin : block.q_begin + block.size[1]].transpose(1, 2)


def keys(x: Tensor, block: Block) -> Tensor:
    """The key rows of a block: ``[b, H, N, D]``."""
    return dense(x)[slice(*block.batch), block.kv_begin : block.kv_begin + block.size[2]].transpose(1, 2)


def positions(block: Block, device: torch.device) -> tuple[Tensor, Tensor]:
    """``i`` ``[M, 1]`` and ``j`` ``[1, N]``."""
    i = torch.arange(*block.rows, device=device)[:, None]
    j = torch.arange(*block.keys, device=device)[None, :]
    return i, j


def window(x: Tensor, block: Block) -> Tensor:
    """The part of a bias or mask ``(1|B, 1|H_q, 1|S_q, 1|S_kv)`` that a block sees."""
    for dim, span in ((0, block.batch), (2, block.rows), (3, block.keys)):
        if x.shape[dim] > 1:
            x = x.narrow(dim, span[0], span[1] - span[0])
    return x


def kept(inputs: Inputs, spec: AttentionSpec, block: Block, with_band: bool = True) -> Tensor | None:
    """True where a pair is kept; None if every pair of the block is. ``with_band=False`` asks for the rest alone."""
    result: Tensor | None = None
    if with_band and plan.shape(block, spec) != "full":
        result = keep(spec, *positions(block, inputs.q.device), block.s_q, block.s_kv)[None, None]
    if not block.is_exact:
        assert inputs.segment_ids_q is not None and inputs.segment_ids_kv is not None
        of_q, of_kv = _entries(inputs.segment_ids_q, block), _entries(inputs.segment_ids_kv, block)
        same = of_q[:, None, slice(*block.rows), None] == of_kv[:, None, None, slice(*block.keys)]
        result = same if result is None else result & same
    if inputs.intervals is not None:
        held = intervals.kept(inputs.intervals, block)
        result = held if result is None else result if held is None else result & held
    if inputs.mask is not None:
        mask = window(inputs.mask, block)
        result = mask if result is None else result & mask
    return result


def bias(inputs: Inputs, spec: AttentionSpec, block: Block) -> Tensor | None:
    """Bias plus ALiBi in the dtype of the computation; None if there is neither."""
    dtype = compute_dtype(inputs)
    result = None if inputs.bias is None else window(inputs.bias, block).to(dtype)
    if inputs.alibi_slopes is None:
        return result
    slopes = _of_sequences(inputs.alibi_slopes, block).to(dtype)[:, :, None, None]
    away = distance(spec, *positions(block, inputs.q.device), block.s_q, block.s_kv).to(dtype)
    return -slopes * away if result is None else result - slopes * away


def survives(inputs: Inputs, spec: AttentionSpec, block: Block) -> Tensor:
    """True where dropout lets a weight live."""
    assert inputs.rng_state is not None
    device = inputs.q.device
    n = torch.arange(block.sequence, block.sequence + block.size[0], device=device)[:, None, None, None]
    h = torch.arange(inputs.heads_q, device=device)[None, :, None, None]
    i, _ = positions(block, device)
    head = rng.head_number(inputs.rng_state, n, h, inputs.heads_q)
    return rng.dropout_keep_columns(spec, inputs.rng_state, head, i, *block.keys)


def _entries(x: Tensor, block: Block) -> Tensor:
    """The batch entries of a block, of a tensor ``(1|B, ...)``."""
    return x[slice(*block.batch)] if x.shape[0] > 1 else x


def _of_sequences(x: Tensor, block: Block) -> Tensor:
    """The sequences of a block, of a tensor ``(1|N, H_q)``."""
    return x[block.sequence : block.sequence + block.size[0]] if x.shape[0] > 1 else x


def are_finite(inputs: Inputs) -> bool:
    """Whether q, k and v hold neither NaN nor infinity, in host memory: a sum of either is not finite."""
    operands = (inputs.q, inputs.k, inputs.v)
    return all(bool(x.sum(dtype=compute_dtype(inputs)).isfinite()) for x in operands)


def shrink_of_values(inputs: Inputs) -> float:
    """A power of two that values near the largest number are multiplied by, so that sums of them stay finite."""
    if inputs.q.device.type != "cpu" or inputs.v.numel() == 0 or inputs.v.dtype == torch.float16:
        return 1.0
    largest, limit = float(inputs.v.abs().max()), torch.finfo(compute_dtype(inputs)).max / inputs.k.shape[-3]
    return 2.0**-32 if limit < largest < math.inf else 1.0


def is_moderate(lse: Tensor) -> bool:
    """Whether ``lse_low`` may be taken for 0 in host memory."""
    return lse.numel() == 0 or bool((torch.where(lse == NEVER, 0, lse).abs() <= MODERATE).all())


def add_sinks(out: Tensor, lse: Tensor, lse_low: Tensor, inputs: Inputs) -> Outputs:
    """The results with the sink's column in the denominator."""
    assert inputs.sinks is not None
    logits = by_row(inputs.sinks, inputs).expand_as(lse)
    lse, lse_low, shares = numerics.merge_lse(torch.stack([lse, logits]), torch.stack([lse_low, torch.zeros_like(lse)]))
    return (out * shares[0].transpose(-1, -2)[..., None]).to(out.dtype), lse, lse_low


def sink_gradient(
    dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, lse_low: Tensor, inputs: Inputs
) -> Tensor:
    """``dsink = sum_i p_sink * (dlse - delta)``."""
    assert inputs.sinks is not None
    shift = (dout.to(lse.dtype) * out).sum(-1).transpose(-1, -2)
    if dlse is not None:
        shift = shift - dlse
    return sum_by_sink(-sink_weights(lse, lse_low, inputs) * shift, inputs)


def sink_weights(lse: Tensor, lse_low: Tensor, inputs: Inputs) -> Tensor:
    """The weight of the sink in each row, shaped like ``lse``."""
    assert inputs.sinks is not None
    return torch.where(lse == NEVER, 0, torch.exp((by_row(inputs.sinks, inputs) - lse) - lse_low))


def sum_by_sink(rows: Tensor, inputs: Inputs) -> Tensor:
    """The sum over the rows, shaped like lse, that share a sink, shaped like the sinks."""
    assert inputs.sinks is not None
    if not inputs.is_packed:
        by_sequence = rows.sum(-1)
    elif inputs.sinks.shape[0] > 1:
        assert inputs.cu_seqlens_q is not None
        ends = inputs.cu_seqlens_q.long()
        by_sequence = torch.segment_reduce(
            rows.transpose(0, 1).contiguous(), "sum", offsets=ends, initial=0, unsafe=True
        )
    else:
        by_sequence = rows.sum(-1)[None]
    shared = inputs.sinks.shape[0] == 1
    return (by_sequence.sum(0, keepdim=True) if shared else by_sequence).to(inputs.sinks.dtype)


def by_row(sinks: Tensor, inputs: Inputs) -> Tensor:
    """A number of each head, and perhaps sequence, for each row, broadcasting to the shape of lse."""
    sinks = sinks.to(compute_dtype(inputs))
    if not inputs.is_packed:
        return sinks[:, :, None]
    if sinks.shape[0] == 1:
        return sinks[0, :, None]
    assert inputs.cu_seqlens_q is not None
    lengths = inputs.cu_seqlens_q.diff()
    return torch.repeat_interleave(sinks, lengths, dim=0, output_size=inputs.q.shape[0]).transpose(0, 1)
