"""Jacobian-vector products of both passes over the tiles of ``tiles``, in memory linear in the sequence length.

The inputs move along tangents, written ``x'``. The results of the forward pass are known, so weights are computed
again from lse, and one pass over the tiles is enough. With ``p`` the weights, ``z`` dropout's factors and ``c`` the
capped scores:

    t     = slope * scale * (q' k^T + q k'^T) + bias'          tangent of the scores; slope = 1 - (c / softcap)^2
    lse'  = rowsum(p * t) + p_sink * sink'
    out'  = (p * z * t) v + (p * z) v' - lse' * out

The backward pass moves likewise. ``dt``, ``ds`` and ``shift = delta - dlse`` are those of the reference:

    p'     = p * (t - lse')                                    dp' = z * (dout' v^T + dout v'^T)
    shift' = rowsum(dout' * out + dout * out') - dlse'
    dt'    = p' * (dp - shift) + p * (dp' - shift')
    ds'    = slope * dt' - 2 c c' / softcap^2 * dt
    dq'    = scale * (ds' k + ds k')                           dk' = scale * (ds'^T q + ds^T q')
    dv'    = (p' * z)^T dout + (p * z)^T dout'                 dbias' = dt'
    dsink' = -sum_i p_sink * ((sink' - lse') * shift + shift')
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastattn.backends.portable import padded, terms, tiles
from fastattn.backends.portable.plan import Block
from fastattn.numerics import NEVER
from fastattn.problem import Grads, Inputs, Rows, Tangents
from fastattn.spec import AttentionSpec


def jvp(tangents: Tangents, results: Rows, inputs: Inputs, spec: AttentionSpec) -> tuple[Tensor, Tensor]:
    """The tangents of out and lse."""
    if padded.is_needed(inputs, spec):
        return padded.jvp(jvp, tangents, results, inputs, spec)
    assert results.out is not None and results.lse is not None and results.lse_low is not None
    out_moved = torch.zeros_like(results.out, memory_format=torch.contiguous_format)
    lse_moved = torch.zeros_like(results.lse, memory_format=torch.contiguous_format)
    if inputs.sinks is not None and tangents.sinks is not None:
        lse_moved += terms.sink_weights(results.lse, results.lse_low, inputs) * terms.by_row(tangents.sinks, inputs)
    rows_of_out, rows_of_lse = terms.dense(out_moved), tiles.by_rows(lse_moved)
    lse, low = tiles.by_rows(results.lse), tiles.by_rows(results.lse_low)
    for block in tiles.blocks(inputs, spec):
        moving = _Moving.of(tangents, inputs, spec, block)
        normaliser = [terms.queries(x, block) for x in (lse, low)]
        out, total = _moved_rows(moving, normaliser, block)
        of_lse = terms.queries(rows_of_lse, block)
        of_lse += total
        out -= of_lse * terms.queries(results.out, block)
        terms.queries(rows_of_out, block).copy_(out)
    return out_moved, lse_moved  # rows of no block keep no key: a sink alone moves them


@dataclass(frozen=True)
class _Moving:
    """A block of query rows with its tangent: ``q`` ``[b, H_kv, G * M, D]``, and ``[q', q]`` side by side."""

    q: Tensor
    pair: Tensor | None
    tangents: Tangents
    inputs: Inputs
    spec: AttentionSpec

    @classmethod
    def of(cls, tangents: Tangents, inputs: Inputs, spec: AttentionSpec, block: Block) -> _Moving:
        q = tiles.folded(terms.queries(inputs.q, block), inputs)
        parts = [] if tangents.q is None else [tiles.folded(terms.queries(tangents.q, block), inputs)]
        parts += [] if tangents.k is None else [q]
        return cls(q, torch.cat(parts, -1) if parts else None, tangents, inputs, spec)

    def scores(self, lses: Sequence[Tensor], tile: Block, kept: Tensor | None) -> _Scores:
        """The weights, which lse and lse_low make of the scores, and what moves them."""
        inputs, spec = self.inputs, self.spec
        scores, capped = tiles.finished_scores(self.q, inputs, spec, tile, kept)
        lse, low = lses
        p = scores.sub_(torch.where(lse == NEVER, 0, lse)).sub_(low).exp_()
        moved = slope = bend = None
        if self.pair is not None:
            keys = [] if self.tangents.q is None else [tiles.computed(terms.keys(inputs.k, tile), inputs)]
            keys += [] if self.tangents.k is None else [tiles.computed(terms.keys(self.tangents.k, tile), inputs)]
            moved = tiles.unfolded(self.pair @ torch.cat(keys, -1).transpose(-1, -2), inputs).mul_(spec.scale)
        if capped is not None and spec.softcap is not None:
            slope = 1 - (capped / spec.softcap) ** 2
            if moved is not None:
                moved = moved.mul_(slope)
                bend = (moved * capped).mul_(-2 / spec.softcap**2)
        if self.tangents.bias is not None:
            bias = terms.window(self.tangents.bias, tile).to(p.dtype)
            moved = bias.expand_as(p) if moved is None else moved.add_(bias)
        if kept is not None:
            p = p.masked_fill_(~kept, 0)  # in a row that is NaN they are not 0 by themselves
            moved, slope, bend = (None if x is None else x.masked_fill(~kept, 0) for x in (moved, slope, bend))
        return _Scores(p, moved, slope, bend)


@dataclass(frozen=True)
class _Scores:
    """Of a tile ``[b, H_q, M, N]``.

    Attributes:
        p: the weights before dropout.
        moved: tangent of the finished scores; None is zero.
        slope: derivative of softcap; None without it.
        bend: tangent of ``slope``.
    """

    p: Tensor
    moved: Tensor | None
    slope: Tensor | None
    bend: Tensor | None


def _moved_rows(moving: _Moving, lses: Sequence[Tensor], block: Block) -> tuple[Tensor, Tensor]:
    """``(p z t) v + (p z) v'`` and ``rowsum(p t)`` of a block's rows."""
    inputs, spec, tangents = moving.inputs, moving.spec, moving.tangents
    rows = (block.size[0], inputs.heads_q, block.size[1])
    out, total = moving.q.new_zeros((*rows, inputs.v.shape[-1])), moving.q.new_zeros((*rows, 1))
    for tile, kept in tiles.walk(inputs, spec, block):
        scores = moving.scores(lses, tile, kept)
        weights, folded = dropped(scores.p, inputs, spec, tile), tiles.fold_kept(kept, inputs, tile)
        sides = [(weights, tangents.v)] if tangents.v is not None else []
        if scores.moved is not None:
            total += (scores.p * scores.moved).sum(-1, keepdim=True)
            sides.append((weights * scores.moved, inputs.v))
        for side, values in sides:
            v = tiles.computed(terms.keys(values, tile), inputs)
            out += tiles.unfolded(tiles.product(tiles.fold_heads(side, inputs), v, folded), inputs)
    return out, total


def dropped(x: Tensor, inputs: Inputs, spec: AttentionSpec, tile: Block) -> Tensor:
    """``x`` times dropout's factors."""
    if spec.dropout_p == 0:
        return x
    return torch.where(terms.survives(inputs, spec, tile), x * spec.dropout_scale, 0)


# --- the backward pass ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Gradients:
    """Of a block's rows: ``dout`` and its tangent ``[b, H_kv, G * M, D_v]``, the others ``[b, H_q, M, 1]``."""

    dout: Tensor
    dout_moved: Tensor | None
    lses: Sequence[Tensor]
    lse_moved: Tensor
    shift: Tensor
    shift_moved: Tensor


def backward_jvp(
    rows: Rows, moved: Rows, tangents: Tangents, inputs: Inputs, spec: AttentionSpec, needs: Sequence[str]
) -> Grads:
    """The tangents of the gradients named in ``needs``."""
    if padded.is_needed(inputs, spec):
        return padded.backward_jvp(backward_jvp, rows, moved, tangents, inputs, spec, needs=needs)
    assert rows.dout is not None and rows.lse is not None and rows.lse_low is not None
    sums = {
        name: torch.zeros(x.shape, dtype=terms.compute_dtype(inputs), device=x.device)
        for name, x in (("q", inputs.q), ("k", inputs.k), ("v", inputs.v), ("bias", inputs.bias))
        if name in needs and x is not None
    }
    shift, shift_moved = _shifts(rows, moved)
    lse_moved = torch.zeros_like(rows.lse) if moved.lse is None else moved.lse
    by_row = [tiles.by_rows(x) for x in (rows.lse, rows.lse_low, lse_moved, shift, shift_moved)]
    for block in tiles.blocks(inputs, spec) if sums else ():
        given = (None if x is None else tiles.folded(terms.queries(x, block), inputs) for x in (rows.dout, moved.dout))
        dout, dout_moved = given
        lse, low, *others = (terms.queries(x, block) for x in by_row)
        assert dout is not None
        of_block = _Gradients(dout, dout_moved, (lse, low), *others)
        _accumulate(sums, of_block, _Moving.of(tangents, inputs, spec, block), block)
    found = {f"d{name}": x.to(getattr(inputs, name).dtype) for name, x in sums.items()}
    if inputs.sinks is None or "sinks" not in needs:
        return Grads(**found)
    weight = terms.sink_weights(rows.lse, rows.lse_low, inputs)
    sink_moved = 0 if tangents.sinks is None else terms.by_row(tangents.sinks, inputs)
    dsinks = terms.sum_by_sink(-weight * ((sink_moved - lse_moved) * shift + shift_moved), inputs)
    return Grads(**found, dsinks=dsinks)


def _shifts(rows: Rows, moved: Rows) -> tuple[Tensor, Tensor]:
    """``delta - dlse`` and its tangent, shaped like lse."""
    assert rows.out is not None and rows.lse is not None and rows.dout is not None
    dtype = rows.lse.dtype
    shift = (rows.dout.to(dtype) * rows.out).sum(-1).transpose(-1, -2)
    shift = shift if rows.dlse is None else shift - rows.dlse
    shift_moved = torch.zeros_like(shift)
    for dout, out in ((moved.dout, rows.out), (rows.dout, moved.out)):
        if dout is not None and out is not None:
            shift_moved = shift_moved + (dout.to(dtype) * out).sum(-1).transpose(-1, -2)
    return shift, shift_moved if moved.dlse is None else shift_moved - moved.dlse


def _accumulate(sums: dict[str, Tensor], rows: _Gradients, moving: _Moving, block: Block) -> None:
    """Add to ``sums`` what a block's query rows contribute to the tangents of the gradients."""
    inputs, spec = moving.inputs, moving.spec
    for tile, kept in tiles.walk(inputs, spec, block):
        scores, folded = moving.scores(rows.lses, tile, kept), tiles.fold_kept(kept, inputs, tile)
        p = scores.p
        p_moved = p * (-rows.lse_moved if scores.moved is None else scores.moved - rows.lse_moved)
        dp, dp_moved = _weight_gradients(rows, moving, tile)
        dt = (dp - rows.shift).mul_(p)
        dt_moved = (dp - rows.shift).mul_(p_moved)
        dt_moved += p * (-rows.shift_moved if dp_moved is None else dp_moved - rows.shift_moved)
        if kept is not None:
            dt, dt_moved = (x.masked_fill(~kept, 0) for x in (dt, dt_moved))
        if "v" in sums:
            sides = [(p_moved, rows.dout)] + ([] if rows.dout_moved is None else [(p, rows.dout_moved)])
            for side, dout in sides:
                weights = tiles.fold_heads(dropped(side, inputs, spec, tile), inputs)
                terms.keys(sums["v"], tile).add_(tiles.product(weights.mT, dout, None if folded is None else folded.mT))
        if "bias" in sums:
            part = terms.window(sums["bias"], tile)
            part += dt_moved.sum_to_size(part.shape)
        if scores.slope is not None:
            dt_moved = dt_moved * scores.slope
            dt_moved = dt_moved if scores.bend is None else dt_moved + dt * scores.bend
            dt = dt * scores.slope
        _add_products(sums, (dt, dt_moved), moving, tile, folded)


def _weight_gradients(rows: _Gradients, moving: _Moving, tile: Block) -> tuple[Tensor, Tensor | None]:
    """``dp`` after dropout's factors, and its tangent."""
    inputs, spec, tangents = moving.inputs, moving.spec, moving.tangents
    v = tiles.computed(terms.keys(inputs.v, tile), inputs)
    dp = dropped(tiles.unfolded(rows.dout @ v.transpose(-1, -2), inputs), inputs, spec, tile)
    sides = [] if rows.dout_moved is None else [(rows.dout_moved, v)]
    if tangents.v is not None:
        sides.append((rows.dout, tiles.computed(terms.keys(tangents.v, tile), inputs)))
    if not sides:
        return dp, None
    moved = torch.cat([dout for dout, _ in sides], -1) @ torch.cat([x for _, x in sides], -1).transpose(-1, -2)
    return dp, dropped(tiles.unfolded(moved, inputs), inputs, spec, tile)


def _add_products(
    sums: dict[str, Tensor], gradients: tuple[Tensor, Tensor], moving: _Moving, tile: Block, kept: Tensor | None
) -> None:
    """``scale * (ds' k + ds k')`` to dq', ``scale * (ds'^T q + ds^T q')`` to dk'."""
    inputs, tangents, scale = moving.inputs, moving.tangents, moving.spec.scale
    ds, ds_moved = (tiles.fold_heads(x, inputs) for x in gradients)
    if "q" in sums:
        for side, keys in ((ds_moved, inputs.k), (ds, tangents.k)):
            if keys is not None:
                k = tiles.computed(terms.keys(keys, tile), inputs)
                product = tiles.unfolded(tiles.product(side, k, kept), inputs)
                terms.queries(sums["q"], tile).add_(product, alpha=scale)
    if "k" in sums:
        columns = None if kept is None else kept.mT
        for side, queries in ((ds_moved, inputs.q), (ds, tangents.q)):
            if queries is not None:
                q = tiles.folded(terms.queries(queries, tile), inputs)
                terms.keys(sums["k"], tile).add_(tiles.product(side.mT, q, columns), alpha=scale)
