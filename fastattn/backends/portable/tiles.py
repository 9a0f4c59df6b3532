"""A plan run in plain torch ops: online softmax over tiles of keys. Every feature, any device, any tile size.

For a block of query rows and each tile of keys, ``m`` being the largest score so far (Milakov & Gimelshein, "Online
normalizer calculation for softmax", 2018; Dao et al., "FlashAttention", 2022):

    m'    = max(m, rowmax(scores))           p = exp(scores - m')
    total = total * exp(m - m') + rowsum(p)  acc = acc * exp(m - m') + dropout(p) @ v

and in the end ``out = acc / total``, ``lse = m + log(total)``, in two parts. The backward pass computes ``p``
again from them; its formulas are those of the reference.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastattn import numerics
from fastattn.backends.base import Outputs
from fastattn.backends.portable import intervals, padded, plan, terms
from fastattn.backends.portable.plan import Block
from fastattn.numerics import NEVER
from fastattn.problem import Inputs
from fastattn.spec import AttentionSpec

# Rows and keys of a tile, and the scores that one step holds: few for a CPU's cache, many to fill an accelerator.
TILE = {"cpu": (256, 512), "other": (1024, 1024)}
MAX_SCORES = {"cpu": 1 << 20, "other": 1 << 25}


def forward(inputs: Inputs, spec: AttentionSpec) -> Outputs:
    """``(out, lse, lse_low)``, without the sinks."""
    if padded.is_needed(inputs, spec):
        return padded.forward(forward, inputs, spec)
    out = inputs.q.new_zeros(inputs.out_shape())
    lse = inputs.q.new_full(inputs.lse_shape(), NEVER, dtype=terms.compute_dtype(inputs))
    low = torch.zeros_like(lse)
    out_rows, lse_rows, low_rows = terms.dense(out), by_rows(lse), by_rows(low)
    for block in blocks(inputs, spec):
        acc, total, largest = _online(inputs, spec, block)
        weight = spec.dropout_scale / torch.where(total == 0, 1, total)
        terms.queries(out_rows, block).copy_(acc * weight)
        for rows, part in zip((lse_rows, low_rows), numerics.split_lse(largest, total), strict=True):
            terms.queries(rows, block).copy_(part)
    return out, lse, low


def by_rows(lse: Tensor) -> Tensor:
    """``(B, H, S)`` or packed ``(H, T)`` -> ``(B, S, H, 1)``."""
    return terms.dense(lse.transpose(-1, -2)[..., None])


def _online(inputs: Inputs, spec: AttentionSpec, block: Block) -> tuple[Tensor, Tensor, Tensor]:
    """``acc`` ``[b, H_q, M, D_v]``, ``total`` and ``largest`` ``[b, H_q, M, 1]`` of a block's query rows."""
    q = folded(terms.queries(inputs.q, block), inputs)
    rows = (block.size[0], inputs.heads_q, block.size[1])
    largest = q.new_full((*rows, 1), NEVER)
    total = q.new_zeros((*rows, 1))
    acc = q.new_zeros((*rows, inputs.v.shape[-1]))
    for tile, kept in walk(inputs, spec, block):
        scores, _ = finished_scores(q, inputs, spec, tile, kept)
        new = torch.maximum(largest, scores.amax(-1, keepdim=True))
        base = torch.where(new == NEVER, 0, new)
        p = scores.sub_(base).exp_()
        decay = torch.exp(largest - base)
        total = total * decay + p.sum(-1, keepdim=True)
        if spec.dropout_p > 0:
            p = torch.where(terms.survives(inputs, spec, tile), p, 0)
        v = computed(terms.keys(inputs.v, tile), inputs)
        acc = acc * decay + unfolded(product(fold_heads(p, inputs), v, fold_kept(kept, inputs, tile)), inputs)
        largest = new
    return acc, total, torch.where(largest == NEVER, 0, largest)


def backward(
    dout: Tensor,
    dlse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    lse_low: Tensor,
    inputs: Inputs,
    spec: AttentionSpec,
    needs: Sequence[str],
) -> tuple[Tensor | None, ...]:
    """``(dq, dk, dv, dbias)``, None where not needed. ``out`` and ``lse`` are the final ones, sinks included."""
    if padded.is_needed(inputs, spec):
        return padded.backward(backward, dout, dlse, out, lse, lse_low, inputs, spec, needs=needs)
    sums = {
        name: torch.zeros(x.shape, dtype=terms.compute_dtype(inputs), device=x.device)
        for name, x in (("q", inputs.q), ("k", inputs.k), ("v", inputs.v), ("bias", inputs.bias))
        if name in needs and x is not None
    }
    lse, low = by_rows(lse), by_rows(lse_low)
    lse = torch.where(lse == NEVER, 0, lse)  # an empty row: exp(-inf - 0) = 0
    shift = (dout.to(lse.dtype) * out).sum(-1, keepdim=True)  # delta - dlse
    if dlse is not None:
        shift = shift - dlse.transpose(-1, -2)[..., None]
    for block in blocks(inputs, spec):
        q, dout_rows = (folded(terms.queries(x, block), inputs) for x in (inputs.q, dout))
        rows = _Rows(q, dout_rows, *(terms.queries(x, block) for x in (lse, low, shift)))
        _accumulate(sums, rows, inputs, spec, block)
    names = ("q", "k", "v", "bias")
    return tuple(sums[name].to(getattr(inputs, name).dtype) if name in sums else None for name in names)


@dataclass(frozen=True)
class _Rows:
    """The query rows of a block in the backward pass: ``[b, H_kv, G * M, D]`` and ``[b, H_q, M, 1]``."""

    q: Tensor
    dout: Tensor
    lse: Tensor
    lse_low: Tensor
    shift: Tensor  # delta - dlse


def _accumulate(sums: dict[str, Tensor], rows: _Rows, inputs: Inputs, spec: AttentionSpec, block: Block) -> None:
    """Add to ``sums`` what a block's query rows contribute to the gradients."""
    q, dout = rows.q, rows.dout
    for tile, kept in walk(inputs, spec, block):
        scores, capped = finished_scores(q, inputs, spec, tile, kept)
        v = computed(terms.keys(inputs.v, tile), inputs)
        p = scores.sub_(rows.lse).sub_(rows.lse_low).exp_()
        if kept is not None:
            p.masked_fill_(~kept, 0)  # in a row whose lse is NaN, exp(-inf - lse) is NaN too
        dt = unfolded(dout @ v.transpose(-1, -2), inputs)
        alive = terms.survives(inputs, spec, tile) if spec.dropout_p > 0 else None
        if alive is not None:
            dt = torch.where(alive, dt * spec.dropout_scale, 0)
        dt = dt.sub_(rows.shift).mul_(p)
        dt = dt if kept is None else torch.where(kept, dt, 0)
        folded = fold_kept(kept, inputs, tile)
        columns = None if folded is None else folded.mT
        if "v" in sums:
            dropped = p if alive is None else torch.where(alive, p * spec.dropout_scale, 0)
            terms.keys(sums["v"], tile).add_(product(fold_heads(dropped, inputs).mT, dout, columns))
        add_score_gradient(sums, dt, (q, capped, kept), inputs, spec, tile)


def add_score_gradient(
    sums: dict[str, Tensor],
    dt: Tensor,
    of_tile: tuple[Tensor, Tensor | None, Tensor | None],
    inputs: Inputs,
    spec: AttentionSpec,
    tile: Block,
) -> None:
    """Add what the gradient of a tile's finished scores contributes; ``of_tile`` are q, capped scores, what is kept."""
    q, capped, kept = of_tile
    folded = fold_kept(kept, inputs, tile)
    if "bias" in sums:
        part = terms.window(sums["bias"], tile)
        part += dt.sum_to_size(part.shape)
    if capped is not None and spec.softcap is not None:
        dt = dt * (1 - (capped / spec.softcap) ** 2)
        dt = dt if kept is None else torch.where(kept, dt, 0)
    ds = fold_heads(dt, inputs)
    if "q" in sums:
        k = computed(terms.keys(inputs.k, tile), inputs)
        terms.queries(sums["q"], tile).add_(unfolded(product(ds, k, folded), inputs), alpha=spec.scale)
    if "k" in sums:
        columns = None if folded is None else folded.mT
        terms.keys(sums["k"], tile).add_(product(ds.mT, q, columns), alpha=spec.scale)


# --- what is computed ---------------------------------------------------------------------------------------------


def blocks(inputs: Inputs, spec: AttentionSpec) -> Iterator[Block]:
    """The blocks of query rows, each as wide as the band allows, of few enough batch entries for one step."""
    rows, keys = TILE["cpu" if inputs.q.device.type == "cpu" else "other"]
    for region in _regions(inputs):
        for block in plan.cut(region, spec, max_rows=rows):
            _, m, n = block.size
            entries = max(1, _max_scores(inputs) // (inputs.heads_q * m * min(n, keys)))
            begin, end = block.batch
            for b in range(begin, end, entries):
                yield block.replace(batch=(b, min(b + entries, end)), sequence=block.sequence + b - begin)


def _regions(inputs: Inputs) -> list[Block]:
    if inputs.segment_ids_q is not None and inputs.q.device.type != "cpu":
        return [plan.whole_batch(inputs)]  # reading the segments would wait for the device: compare them instead
    return plan.regions(inputs)


def _max_scores(inputs: Inputs) -> int:
    return MAX_SCORES["cpu" if inputs.q.device.type == "cpu" else "other"]


def walk(inputs: Inputs, spec: AttentionSpec, block: Block) -> Iterator[tuple[Block, Tensor | None]]:
    """The tiles of a block with what they keep; in host memory without those that masks and the like leave empty."""
    b, m, _ = block.size
    _, keys = TILE["cpu" if inputs.q.device.type == "cpu" else "other"]
    step = min(keys, max(64, _max_scores(inputs) // (b * inputs.heads_q * m)))
    for j in range(*block.keys, step):
        tile = block.replace(keys=(j, min(j + step, block.keys[1])))
        is_readable = inputs.q.device.type == "cpu"
        if is_readable and inputs.intervals is not None and not intervals.meets(inputs.intervals, tile):
            continue
        kept = _kept(inputs, spec, tile)
        is_data = inputs.mask is not None or inputs.intervals is not None or not block.is_exact
        if kept is not None and is_data and is_readable and not bool(kept.any()):
            continue
        yield tile, kept


def _kept(inputs: Inputs, spec: AttentionSpec, tile: Block) -> Tensor | None:
    """``terms.kept`` and a bias of -inf, which an additive mask says by itself."""
    kept = terms.kept(inputs, spec, tile)
    if inputs.bias is None:
        return kept
    finite = terms.window(inputs.bias, tile) != NEVER
    return finite if kept is None else kept & finite


def finished_scores(
    q: Tensor, inputs: Inputs, spec: AttentionSpec, tile: Block, kept: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """The finished scores ``[b, H_q, M, N]``, and the capped ones if there is a softcap."""
    k = computed(terms.keys(inputs.k, tile), inputs)
    scores = unfolded(q @ k.transpose(-1, -2), inputs).mul_(spec.scale)
    capped = None
    if spec.softcap is not None:
        capped = scores.div_(spec.softcap).tanh_().mul_(spec.softcap)
        scores = capped.clone()
    bias = terms.bias(inputs, spec, tile)
    if bias is not None:
        scores += bias
    return (scores if kept is None else scores.masked_fill_(~kept, NEVER)), capped


# --- heads: the query heads of a group are folded into the rows, so that K and V need no copies -----------------------


def computed(x: Tensor, inputs: Inputs) -> Tensor:
    return x.to(terms.compute_dtype(inputs))


def folded(x: Tensor, inputs: Inputs) -> Tensor:
    """``[b, H_q, M, D]`` -> ``[b, H_kv, G * M, D]`` in the dtype of the computation."""
    return fold_heads(computed(x, inputs), inputs)


def fold_heads(x: Tensor, inputs: Inputs) -> Tensor:
    return x.unflatten(1, (inputs.heads_kv, -1)).flatten(2, 3)


def fold_kept(kept: Tensor | None, inputs: Inputs, tile: Block) -> Tensor | None:
    """``[b, 1|H_q, 1|M, N]`` -> ``[b, H_kv, G * M, N]``."""
    return None if kept is None else fold_heads(kept.expand(-1, inputs.heads_q, tile.size[1], -1), inputs)


def product(weights: Tensor, x: Tensor, kept: Tensor | None) -> Tensor:
    return weights @ x if kept is None else numerics.kept_product(weights, x, kept)


def unfolded(x: Tensor, inputs: Inputs) -> Tensor:
    """``[b, H_kv, G * M, D]`` -> ``[b, H_q, M, D]``."""
    return x.unflatten(2, (inputs.heads_q // inputs.heads_kv, -1)).flatten(1, 2)
