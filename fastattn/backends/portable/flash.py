"""A plan run on torch's own flash kernel for the CPU, with an additive mask per block for features that it lacks.

The kernel (``aten::_scaled_dot_product_flash_attention_for_cpu``) has its own triangle, grouped heads, free strides but
for the last, and gives lse. It has no softcap, dropout, bias gradient or gradient of lse, takes one head dim for q, k
and v, divides by zero on empty tensors, and its lse of an empty row is 0.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from fastattn.backends.portable import intervals, plan, terms
from fastattn.backends.portable.plan import Block, Call
from fastattn.numerics import NEVER
from fastattn.problem import Inputs
from fastattn.spec import AttentionSpec
from fastattn.torch_internals import flash_on_cpu, flash_on_cpu_backward

# Elements of the largest temporaries: the mask of a call (32 MB in fp32), and the keys that its gradient is stored for.
MAX_MASK = 1 << 23
MAX_KEYS = 1 << 21


def serves(inputs: Inputs, spec: AttentionSpec, needs: Sequence[str] = ()) -> bool:
    """Whether the kernel can compute this problem, and the gradients named in ``needs``."""
    # the kernel scales after its triangle: -inf times a scale that is not positive would undo it
    is_plain = spec.softcap is None and spec.dropout_p == 0 and spec.scale > 0
    return inputs.q.device.type == "cpu" and is_plain and "bias" not in needs


def forward(inputs: Inputs, spec: AttentionSpec) -> tuple[Tensor, Tensor]:
    """``(out, lse)``, without the sinks."""
    width = max(inputs.q.shape[-1], inputs.v.shape[-1])
    q, k, v = (_operand(x, width) for x in (inputs.q, inputs.k, inputs.v))
    if (shape := _plain_shape(inputs, spec)) is not None:
        heads_first = (x.transpose(1, 2) for x in (q, k, v))
        out, lse = flash_on_cpu(*heads_first, 0.0, shape == "causal", scale=spec.scale)
        return out.transpose(1, 2)[..., : inputs.v.shape[-1]].contiguous(), lse.contiguous()
    out, lse = _no_results(inputs)
    for step in _steps(planned(inputs, spec), inputs, spec):
        call = step.call
        operands = _queries(q, call), _keys(k, call), _keys(v, call)
        out_part, lse_part = flash_on_cpu(*operands, 0.0, step.is_causal, attn_mask=step.mask, scale=spec.scale)
        _mark_empty_rows(lse_part, step, inputs, spec)
        _queries(terms.dense(out), call).copy_(out_part[..., : inputs.v.shape[-1]])
        _queries(_by_rows(lse), call).copy_(lse_part[..., None])
    return out, lse


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """One call: ``(out, lse)`` of ``[n, H, M, D]`` queries and ``[n, H, N, D]`` keys, ``mask`` added to the scores."""
    width, dim_v = max(q.shape[-1], v.shape[-1]), v.shape[-1]
    q, k, v = (x if x.shape[-1] == width else pad(x, (0, width - x.shape[-1])) for x in (q, k, v))
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    out, lse = flash_on_cpu(q, k, v, 0.0, False, attn_mask=mask, scale=scale)
    if mask is not None:
        lse = lse.masked_fill((mask == NEVER).all(-1), NEVER)
    return out[..., :dim_v], lse


def backward(
    dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, inputs: Inputs, spec: AttentionSpec
) -> tuple[Tensor, ...]:
    """``(dq, dk, dv)``. ``out`` and ``lse`` are the final ones, so sinks need nothing more here."""
    width = max(inputs.q.shape[-1], inputs.v.shape[-1])
    dout, out, lse = _operand(dout, width), _operand(out, width), _by_rows(lse)
    if dlse is not None:
        dout, out = _with_dlse(dout, out, _by_rows(dlse))
    q, k, v = (_operand(x, dout.shape[-1]) for x in (inputs.q, inputs.k, inputs.v))
    if (shape := _plain_shape(inputs, spec)) is not None:
        heads_first = (x.transpose(1, 2) for x in (dout, q, k, v, out))
        grads = flash_on_cpu_backward(
            *heads_first, lse[..., 0].transpose(1, 2), 0.0, shape == "causal", scale=spec.scale
        )
        return _like_inputs([x.transpose(1, 2) for x in grads], inputs)
    todo = planned(inputs, spec)
    if any(_has_data_mask(inputs, call.block) for call in todo):
        lse = torch.where(lse == NEVER, -NEVER, lse)  # empty rows: exp(scores - inf) = 0
    dq, dk, dv = _no_gradients(inputs, are_shared=len(todo) > 1)
    for step in _steps(todo, inputs, spec):
        call = step.call
        operands = _queries(dout, call), _queries(q, call), _keys(k, call), _keys(v, call), _queries(out, call)
        lse_part = _queries(lse, call)[..., 0]
        parts = flash_on_cpu_backward(*operands, lse_part, 0.0, step.is_causal, attn_mask=step.mask, scale=spec.scale)
        _queries(dq, call).copy_(parts[0][..., : dq.shape[-1]])
        _add_keys(dk, parts[1], call)
        _add_keys(dv, parts[2], call)
    return _like_inputs((dq, dk, dv), inputs)


# --- calls of the kernel ------------------------------------------------------------------------------------------


def _plain_shape(inputs: Inputs, spec: AttentionSpec) -> plan.Shape | None:
    """The shape of a problem that is one call without a mask; None if there is more to plan."""
    terms_of_scores = (inputs.segment_ids_q, inputs.intervals, inputs.alibi_slopes, inputs.mask, inputs.bias)
    if inputs.is_packed or inputs.batch == 0 or any(x is not None for x in terms_of_scores):
        return None
    return plan.shape_of_all(spec, inputs.q.shape[1], inputs.k.shape[1])


@dataclass(frozen=True)
class _Step:
    """A call with the additive mask of its block, if it needs one."""

    call: Call
    is_causal: bool
    mask: Tensor | None


def planned(inputs: Inputs, spec: AttentionSpec) -> list[Call]:
    """The calls of the kernel for a problem."""
    regions = plan.regions(inputs)
    has_data_mask = any(_has_data_mask(inputs, region) for region in regions)
    are_alike = not has_data_mask and (inputs.alibi_slopes is None or inputs.alibi_slopes.shape[0] == 1)
    per_row = _mask_elements_per_row(inputs, has_segments=any(not region.is_exact for region in regions))
    max_rows = max(32, MAX_MASK // per_row) if per_row else None
    if has_data_mask and max_rows is not None:
        max_rows = min(max_rows, plan.BAND_ROWS)  # so that what the mask leaves out can be skipped
    blocks = [block for region in regions for block in plan.cut(region, spec, max_rows)]
    if inputs.intervals is not None:
        narrowed = (intervals.narrow(block, inputs.intervals) for block in blocks)
        blocks = [block for block in narrowed if block is not None]
    if blocks and are_alike and 1 < blocks[0].size[0] < len(blocks):
        # fewer calls if the blocks of an entry make one than if the entries of a block do
        entries = range(*blocks[0].batch)
        blocks = [block.replace(batch=(b, b + 1), sequence=b) for b in entries for block in blocks]
    max_keys = MAX_KEYS // (inputs.heads_kv * inputs.k.shape[-1]) if are_alike else 0
    return plan.calls(blocks, spec, max_keys)


def _steps(todo: Sequence[Call], inputs: Inputs, spec: AttentionSpec) -> Iterator[_Step]:
    """Yield the steps, so that one mask exists at a time; blocks emptied by masks or segments are skipped."""
    for call in todo:
        block, shape = call.block, plan.shape(call.block, spec)
        kept = terms.kept(inputs, spec, block, with_band=shape == "band")
        if kept is not None and _has_data_mask(inputs, block):
            begin, end = _used_columns(kept, block)
            if begin == end:
                continue
            begin = 0 if shape == "causal" else begin  # the triangle begins in the corner
            block = block.replace(keys=(block.keys[0] + begin, block.keys[0] + end))
            kept = kept[..., begin:end] if kept.shape[-1] > 1 else kept
            call = Call(block)
        mask = _additive(kept, terms.bias(inputs, spec, block), terms.compute_dtype(inputs))
        yield _Step(call, shape == "causal", mask)


def _has_data_mask(inputs: Inputs, block: Block) -> bool:
    """Whether tensors decide which pairs are kept, so that more rows may be empty than the band empties."""
    return any(x is not None for x in (inputs.mask, inputs.bias, inputs.intervals)) or not block.is_exact


def _mask_elements_per_row(inputs: Inputs, has_segments: bool) -> int:
    """Elements of the additive mask for one query row; 0 if the rows share one."""
    sizes = [x.shape for x in (inputs.mask, inputs.bias, inputs.intervals) if x is not None and x.shape[2] > 1]
    batch, heads = max((s[0] for s in sizes), default=0), max((s[1] for s in sizes), default=0)
    if has_segments and inputs.segment_ids_q is not None and inputs.segment_ids_kv is not None:
        batch, heads = max(batch, inputs.segment_ids_q.shape[0], inputs.segment_ids_kv.shape[0]), max(heads, 1)
    if inputs.alibi_slopes is not None:
        batch, heads = max(batch, 1 if inputs.is_packed else inputs.alibi_slopes.shape[0]), inputs.heads_q
    return batch * heads * inputs.max_seqlen_kv


def _used_columns(kept: Tensor, block: Block) -> plan.Span:
    """The smallest span, counted from the block's first key, outside which nothing is kept."""
    used = kept.any(0).any(0).any(0).nonzero()[:, 0]
    if used.numel() == 0:
        return 0, 0
    return (int(used[0]), int(used[-1]) + 1) if kept.shape[-1] > 1 else (0, block.size[2])


def _additive(kept: Tensor | None, bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    if kept is not None:
        zeros = torch.zeros((), dtype=dtype) if bias is None else bias
        bias = torch.where(kept, zeros, NEVER)
    if bias is not None and bias.stride(-1) not in (0, 1):
        bias = bias.contiguous()
    return bias


def _mark_empty_rows(lse: Tensor, step: _Step, inputs: Inputs, spec: AttentionSpec) -> None:
    """Turn the lse of empty rows, for which the kernel returns 0, into -inf. Other rows may have an lse of 0 too."""
    if step.mask is None or not _has_data_mask(inputs, step.call.block) or not bool((lse == 0).any()):
        return
    block = step.call.block
    kept = terms.kept(inputs, spec, block)
    mask = step.mask if kept is None else torch.where(kept, step.mask, NEVER)
    lse.masked_fill_((mask == NEVER).all(-1), NEVER)


# --- views and sums -----------------------------------------------------------------------------------------------


def _operand(x: Tensor, width: int) -> Tensor:
    """``x`` as a dense ``(B, S, H, width)`` whose rows BLAS can address, filled up with zeros."""
    x = terms.dense(x)
    if x.shape[-1] < width:
        x = pad(x, (0, width - x.shape[-1]))  # in torch's channels-last order, if that is how x looks
    is_addressable = x.stride(-1) == 1 and (x.stride(1) >= width or x.shape[1] == 1)
    return x if is_addressable else x.contiguous()


def _by_rows(lse: Tensor) -> Tensor:
    """``(B, H, S)`` or packed ``(H, T)`` -> ``(B, S, H, 1)``."""
    return (lse if lse.dim() == 3 else lse[None]).transpose(1, 2)[..., None]


def _queries(x: Tensor, call: Call) -> Tensor:
    """The query rows of a call: ``(B, S, H, D)`` -> ``(n, H, M, D)``."""
    return _windows(x, call.block.batch, call.block.q_begin, call.block.size[1], call.count, call.q_step)


def _keys(x: Tensor, call: Call) -> Tensor:
    """The key rows of a call: ``(B, S, H, D)`` -> ``(n, H, N, D)``."""
    return _windows(x, call.block.batch, call.block.kv_begin, call.block.size[2], call.count, call.kv_step)


def _windows(x: Tensor, batch: plan.Span, begin: int, size: int, count: int, step: int) -> Tensor:
    """Views of ``size`` rows from ``begin`` on, and for ``count > 1`` their copies, which then stand for the batch."""
    if count == 1:
        return x[batch[0] : batch[1], begin : begin + size].transpose(1, 2)
    rows = x[batch[0], begin : begin + (count - 1) * step + size]
    return rows.unfold(0, size, step).transpose(-1, -2)


def _add_keys(total: Tensor, part: Tensor, call: Call) -> None:
    """Add the gradients of a call's keys, whose copies may overlap, in slices that do not."""
    block, size = call.block, call.block.size[2]
    part = part[..., : total.shape[-1]]
    stride = call.kv_step if call.count > 1 else size
    for begin in range(0, size, stride):
        rows = min(stride, size - begin)
        view = _windows(total, block.batch, block.kv_begin + begin, rows, call.count, call.kv_step)
        view += part[:, :, begin : begin + rows]


def _with_dlse(dout: Tensor, out: Tensor, dlse: Tensor) -> tuple[Tensor, Tensor]:
    """``dout`` and ``out`` with extra columns that make their row sums ``delta - dlse``, as the formula has it.

    Half dtypes hold dlse in three columns, so that nothing of it is rounded off.
    """
    columns, rest = [], -dlse
    for _ in range(1 if dlse.dtype == dout.dtype else 3):
        columns.append(rest.to(dout.dtype))
        rest = rest - columns[-1].to(rest.dtype)
    ones = dout.new_ones(()).expand(*dout.shape[:-1], len(columns))
    return torch.cat([dout, ones], dim=-1), torch.cat([out, *columns], dim=-1)


def _no_results(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """``out`` and ``lse`` of empty rows."""
    lse = inputs.q.new_full(inputs.lse_shape(), NEVER, dtype=terms.compute_dtype(inputs))
    return inputs.q.new_zeros(inputs.out_shape()), lse


def _no_gradients(inputs: Inputs, are_shared: bool) -> tuple[Tensor, ...]:
    """Zeros for dq, and for dk and dv, in which several calls add up if ``are_shared``."""
    dtype = terms.compute_dtype(inputs) if are_shared else inputs.q.dtype
    q, k, v = (terms.dense(x) for x in (inputs.q, inputs.k, inputs.v))
    return q.new_zeros(q.shape), k.new_zeros(k.shape, dtype=dtype), v.new_zeros(v.shape, dtype=dtype)


def _like_inputs(grads: Sequence[Tensor], inputs: Inputs) -> tuple[Tensor, ...]:
    """Gradients ``(B, S, H, width)`` in the shape and dtype of q, k and v."""
    likes = (inputs.q, inputs.k, inputs.v)
    return tuple(x[..., : y.shape[-1]].to(y.dtype).reshape(y.shape) for x, y in zip(grads, likes, strict=True))
