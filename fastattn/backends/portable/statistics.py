"""Statistics of the weights over the tiles of ``tiles``, in memory linear in the sequence length.

The first walk over the tiles of a block of query rows finds the largest scores and the normaliser, the second what
needs the weights. The gradient of the finished scores, and that of a sink, are

    dp    = -dentropy * (log p + 1) + dkey_sum                shift = rowsum(p * dp)
    dt    = p * (dp - shift) + dlargest at the largest key    dsink = -sum_i p_sink * shift

Boundaries of packed sequences are read, which on an accelerator waits for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastattn.backends.portable import terms, tiles
from fastattn.backends.portable.plan import Block
from fastattn.numerics import NEVER
from fastattn.problem import Grads, Inputs, Statistics, StatisticsGradient
from fastattn.spec import AttentionSpec


def forward(inputs: Inputs, spec: AttentionSpec) -> Statistics:
    """The statistics that the spec defines."""
    dtype, device = terms.compute_dtype(inputs), inputs.q.device
    entropy = torch.zeros(inputs.lse_shape(), dtype=dtype, device=device)
    largest, key = torch.full_like(entropy, NEVER), torch.full_like(entropy, -1, dtype=torch.long)
    key_sum = torch.zeros(inputs.key_shape(), dtype=dtype, device=device)
    found = Statistics(entropy, largest, key, key_sum, torch.zeros_like(key_sum))
    views = Statistics(*(tiles.by_rows(x) for x in found))
    for block in tiles.blocks(inputs, spec):
        rows = _Rows.of(inputs, spec, block)
        of_rows = torch.zeros_like(rows.largest)
        for tile, kept in tiles.walk(inputs, spec, block):
            p, log_p, _ = rows.weights(inputs, spec, tile, kept)
            of_rows -= _finite(p, log_p).sum(-1, keepdim=True)
            terms.keys(views.key_sum, tile).add_(p.sum(-2)[..., None])
            most = terms.keys(views.key_max, tile)
            most.copy_(torch.maximum(most, p.amax(-2)[..., None]))
        for view, part in (
            (views.entropy, of_rows),
            (views.largest_logit, rows.largest),
            (views.largest_key, rows.key),
        ):
            terms.queries(view, block).copy_(part)
    return found


def _finite(p: Tensor, log_p: Tensor) -> Tensor:
    """``p * log p``, 0 where p is."""
    return p * torch.where(p == 0, 0, log_p)


@dataclass(frozen=True)
class _Rows:
    """A block's query rows: ``q`` folded, the others ``[b, H_q, M, 1]``.

    Attributes:
        q: the queries.
        largest: the largest score of a key.
        key: its position; -1 in an empty row.
        base, log_total: ``exp((score - base) - log_total)`` is a weight; exact, as ``numerics`` says.
        sink: the weight of the sink; None without one.
    """

    q: Tensor
    largest: Tensor
    key: Tensor
    base: Tensor
    log_total: Tensor
    sink: Tensor | None

    @classmethod
    def of(cls, inputs: Inputs, spec: AttentionSpec, block: Block) -> _Rows:
        q = tiles.folded(terms.queries(inputs.q, block), inputs)
        shape = (block.size[0], inputs.heads_q, block.size[1], 1)
        largest, total = q.new_full(shape, NEVER), q.new_zeros(shape)
        key = torch.full(shape, -1, dtype=torch.long, device=q.device)
        for tile, kept in tiles.walk(inputs, spec, block):
            scores, _ = tiles.finished_scores(q, inputs, spec, tile, kept)
            found, at = scores.max(-1, keepdim=True)
            key = torch.where(found > largest, at + tile.keys[0], key)
            new = torch.maximum(largest, found)
            base = torch.where(new == NEVER, 0, new)
            total = total * torch.exp(largest - base) + scores.sub_(base).exp_().sum(-1, keepdim=True)
            largest = new
        base, sink = largest, None
        if inputs.sinks is not None:
            by_row = terms.by_row(inputs.sinks, inputs).expand(inputs.lse_shape())
            logit = terms.queries(tiles.by_rows(by_row), block)
            base = torch.maximum(largest, logit)
            finite = torch.where(base == NEVER, 0, base)
            total = total * torch.exp(torch.where(largest == NEVER, 0, largest) - finite) + torch.exp(logit - finite)
            sink = torch.exp(logit - finite) / torch.where(total == 0, 1, total)
        log_total = torch.where(total == 0, 1, total).log()
        return cls(q, largest, key, torch.where(base == NEVER, 0, base), log_total, sink)

    def weights(
        self, inputs: Inputs, spec: AttentionSpec, tile: Block, kept: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Weights, their logarithms and capped scores of a tile ``[b, H_q, M, N]``."""
        scores, capped = tiles.finished_scores(self.q, inputs, spec, tile, kept)
        log_p = scores.sub_(self.base).sub_(self.log_total)
        p = log_p.exp()
        return p if kept is None else p.masked_fill_(~kept, 0), log_p, capped


def backward(gradient: StatisticsGradient, inputs: Inputs, spec: AttentionSpec, needs: Sequence[str]) -> Grads:
    """The gradients of the inputs named in ``needs``."""
    dtype = terms.compute_dtype(inputs)
    sums = {
        name: torch.zeros(x.shape, dtype=dtype, device=x.device)
        for name, x in (("q", inputs.q), ("k", inputs.k), ("bias", inputs.bias))
        if name in needs and x is not None
    }
    rows_of_sink = torch.zeros(inputs.lse_shape(), dtype=dtype, device=inputs.q.device)
    given = (gradient.entropy, gradient.largest_logit, gradient.key_sum)
    of_entropy, of_largest, of_keys = (None if x is None else tiles.by_rows(x) for x in given)
    for block in tiles.blocks(inputs, spec):
        rows = _Rows.of(inputs, spec, block)
        entropy, largest = (None if x is None else terms.queries(x, block) for x in (of_entropy, of_largest))
        moves = _Gradient(rows, entropy, largest, of_keys, inputs, spec)
        shift = moves.shift(block)
        for tile, kept in tiles.walk(inputs, spec, block) if sums else ():
            dt, capped = moves.of_scores(shift, tile, kept)
            tiles.add_score_gradient(sums, dt, (rows.q, capped, kept), inputs, spec, tile)
        if rows.sink is not None:
            terms.queries(tiles.by_rows(rows_of_sink), block).copy_(-rows.sink * shift)
    found = {f"d{name}": x.to(getattr(inputs, name).dtype) for name, x in sums.items()}
    has_sinks = inputs.sinks is not None and "sinks" in needs
    return Grads(**found, dsinks=terms.sum_by_sink(rows_of_sink, inputs) if has_sinks else None)


@dataclass(frozen=True)
class _Gradient:
    """Gradients of the statistics of a block: of rows ``[b, H_q, M, 1]``, and of all keys."""

    rows: _Rows
    of_entropy: Tensor | None
    of_largest: Tensor | None
    of_keys: Tensor | None
    inputs: Inputs
    spec: AttentionSpec

    def of_weights(self, p: Tensor, log_p: Tensor, tile: Block) -> Tensor:
        """The gradient of the weights themselves, as if they did not add up to 1."""
        found = torch.zeros_like(log_p)
        if self.of_entropy is not None:
            found -= self.of_entropy * (torch.where(p == 0, 0, log_p) + 1)  # log_p may be as large as finfo.max
        if self.of_keys is not None:
            found += terms.keys(self.of_keys, tile).transpose(-1, -2)
        return found

    def shift(self, block: Block) -> Tensor:
        """The mean over the weights of their gradient: what softmax takes off it."""
        shift = torch.zeros_like(self.rows.largest)
        if self.of_entropy is None and self.of_keys is None:
            return shift
        for tile, kept in tiles.walk(self.inputs, self.spec, block):
            p, log_p, _ = self.rows.weights(self.inputs, self.spec, tile, kept)
            shift += (p * self.of_weights(p, log_p, tile)).sum(-1, keepdim=True)
        return shift

    def of_scores(self, shift: Tensor, tile: Block, kept: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The gradient of the finished scores of a tile, and its capped scores."""
        p, log_p, capped = self.rows.weights(self.inputs, self.spec, tile, kept)
        dt = p * (self.of_weights(p, log_p, tile) - shift)
        if self.of_largest is not None:
            _, j = terms.positions(tile, p.device)
            dt = dt + torch.where(j == self.rows.key, self.of_largest, 0)
        return (dt if kept is None else dt.masked_fill(~kept, 0)), capped
