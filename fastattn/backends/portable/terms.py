"""What enters the scores besides ``q @ k^T``, for one block; and the steps that concern a whole problem.

Tensors are ``[b, H_q, M, N]``, with size 1 where they broadcast: ``b`` batch entries, ``M`` query and ``N`` key rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn import rng
from fastattn.backends.portable import plan
from fastattn.backends.portable.plan import Block
from fastattn.kv_cache import CacheInputs
from fastattn.problem import Inputs
from fastattn.spec import AttentionSpec, distance, keep

NEVER = float("-inf")


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
    return rng.dropout_keep_columns(spec, inputs.rng_state, n * inputs.heads_q + h, i, *block.keys)


def _entries(x: Tensor, block: Block) -> Tensor:
    """The batch entries of a block, of a tensor ``(1|B, ...)``."""
    return x[slice(*block.batch)] if x.shape[0] > 1 else x


def _of_sequences(x: Tensor, block: Block) -> Tensor:
    """The sequences of a block, of a tensor ``(1|N, H_q)``."""
    return x[block.sequence : block.sequence + block.size[0]] if x.shape[0] > 1 else x


def without_unused_keys(inputs: Inputs, spec: AttentionSpec) -> Inputs:
    """``inputs`` with zeros in the key and value rows that no query keeps: they may hold NaN, and ``0 * NaN`` is NaN.

    Bands and boundaries need none of this, for the plan leaves such rows out. In host memory it is done only where
    something is not finite; elsewhere finding out would wait for the device.
    """
    if inputs.mask is None and inputs.segment_ids_q is None:
        return inputs
    on_host = inputs.q.device.type == "cpu"
    if on_host and all(bool(x.sum(dtype=compute_dtype(inputs)).isfinite()) for x in (inputs.k, inputs.v)):
        return inputs
    used = _used_keys(inputs, spec)[..., None]
    return inputs.replace(k=torch.where(used, inputs.k, 0), v=torch.where(used, inputs.v, 0))


def _used_keys(inputs: Inputs, spec: AttentionSpec) -> Tensor:
    """``(B, S_kv, H_kv)``: True where some query of some head keeps the key."""
    by_head = inputs.heads_q if inputs.mask is not None and inputs.mask.shape[1] > 1 else 1
    used = torch.zeros(inputs.batch, by_head, inputs.k.shape[1], dtype=torch.bool, device=inputs.q.device)
    for block in plan.cut(plan.whole_batch(inputs), spec, max_rows=plan.BAND_ROWS):
        part = used[:, :, slice(*block.keys)]
        here = kept(inputs, spec, block)
        part |= True if here is None else here.any(2)
    if by_head > 1:
        used = used.unflatten(1, (inputs.heads_kv, -1)).any(2)
    return used.transpose(1, 2)


def add_sinks(out: Tensor, lse: Tensor, inputs: Inputs | CacheInputs) -> tuple[Tensor, Tensor]:
    """``out`` and ``lse`` with the sink's column in the denominator."""
    logits = _sinks_by_row(inputs, lse)
    total = torch.logaddexp(lse, logits)
    shrink = torch.where(lse == NEVER, 0, torch.exp(lse - total))
    return (out * shrink.transpose(-1, -2)[..., None]).to(out.dtype), total


def sink_gradient(dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, inputs: Inputs) -> Tensor:
    """``dsink = sum_i p_sink * (dlse - delta)``."""
    assert inputs.sinks is not None
    shift = (dout.to(lse.dtype) * out).sum(-1).transpose(-1, -2)
    if dlse is not None:
        shift = shift - dlse
    weight = torch.where(lse == NEVER, 0, torch.exp(_sinks_by_row(inputs, lse) - lse))
    rows = -weight * shift  # [B, H_q, S_q] or [H_q, T_q]
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


def _sinks_by_row(inputs: Inputs | CacheInputs, lse: Tensor) -> Tensor:
    """The sink of each row, broadcasting to the shape of ``lse``."""
    assert inputs.sinks is not None
    sinks = inputs.sinks.to(lse.dtype)
    if not inputs.is_packed:
        return sinks[:, :, None]
    if sinks.shape[0] == 1:
        return sinks[0, :, None]
    assert inputs.cu_seqlens_q is not None
    lengths = inputs.cu_seqlens_q.diff()
    return torch.repeat_interleave(sinks, lengths, dim=0, output_size=inputs.q.shape[0]).transpose(0, 1)
