"""The plan: which rectangles of the score matrix are computed. Host arithmetic; ``spec`` compares positions.

A problem is a list of *regions* (a dense batch, each packed sequence, each pair of equal segments) that know nothing of
each other. A region is cut into *blocks*, so that rows which keep different keys fall into different ones, and each
block is as narrow as the band allows. Blocks that are copies of one another at equal spacing make one *call*.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fastattn.problem import Inputs
from fastattn.spec import AttentionSpec, diagonal, full_range, tile_range

# Query rows of a block under a band. Fewer waste less at the band's edges, but torch's kernel slows down below 192.
BAND_ROWS = 192
# A batch of so many entries with so few scores each is one call with a mask: a call for each segment takes longer.
SHORT_ENTRIES, SHORT_SCORES = 8, 128 * 128

Span = tuple[int, int]
# What the band does inside a block: nothing; the triangle ``j <= i``, counted from the block's corner; something else.
Shape = Literal["full", "causal", "band"]


@dataclass(frozen=True)
class Block:
    """Query rows times key rows of one sequence, or of several of a dense batch that are alike.

    Attributes:
        batch: entries of the first dimension of the tensors (a packed batch counts as one).
        rows: query positions ``i``, counted from the beginning of the sequence.
        keys: key positions ``j``.
        s_q, s_kv: lengths of the sequence.
        q_start, kv_start: where in the tensors position 0 lies.
        sequence: index of the sequence (of the first, if several).
        is_exact: whether the band alone decides what is kept, segments having been taken care of.
    """

    batch: Span
    rows: Span
    keys: Span
    s_q: int
    s_kv: int
    q_start: int = 0
    kv_start: int = 0
    sequence: int = 0
    is_exact: bool = True

    @property
    def size(self) -> tuple[int, int, int]:
        """Batch entries, query rows, key rows."""
        return (
            self.batch[1] - self.batch[0],
            self.rows[1] - self.rows[0],
            self.keys[1] - self.keys[0],
        )

    @property
    def q_begin(self) -> int:
        return self.q_start + self.rows[0]

    @property
    def kv_begin(self) -> int:
        return self.kv_start + self.keys[0]

    def replace(self, **changes: object) -> Block:
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Call:
    """``count`` copies of a block, each ``q_step`` query rows and ``kv_step`` key rows after the one before."""

    block: Block
    count: int = 1
    q_step: int = 0
    kv_step: int = 0


def regions(inputs: Inputs) -> list[Block]:
    """The independent parts of a problem. Reads boundaries and segments, so only where that is free: in host memory."""
    if inputs.is_packed:
        return list(_sequences(inputs))
    whole = whole_batch(inputs)
    if inputs.segment_ids_q is None or inputs.segment_ids_kv is None:
        return [whole]
    return list(_segments(whole, _shared(inputs.segment_ids_q), _shared(inputs.segment_ids_kv)))


def whole_batch(inputs: Inputs) -> Block:
    """All of a dense batch as one region."""
    s_q, s_kv = inputs.q.shape[1], inputs.k.shape[1]
    is_exact = inputs.segment_ids_q is None
    return Block((0, inputs.q.shape[0]), (0, s_q), (0, s_kv), s_q, s_kv, is_exact=is_exact)


def _sequences(inputs: Inputs) -> Iterable[Block]:
    of_q, of_kv = (list(itertools.pairwise(ends)) for ends in inputs.boundaries())
    for n, ((q0, q1), (k0, k1)) in enumerate(zip(of_q, of_kv, strict=True)):
        if q0 < q1 and k0 < k1:
            s_q, s_kv = q1 - q0, k1 - k0
            yield Block((0, 1), (0, s_q), (0, s_kv), s_q, s_kv, q0, k0, sequence=n)


def _shared(ids: Tensor) -> Tensor:
    """One row of ids if all rows are the same."""
    return ids[:1] if ids.shape[0] > 1 and bool((ids == ids[:1]).all()) else ids


def _segments(whole: Block, ids_q: Tensor, ids_kv: Tensor) -> Iterable[Block]:
    """The pairs of equal segments. Where the tokens of one are scattered, the whole row, to be compared."""
    if ids_q.shape[0] == ids_kv.shape[0] == 1:
        entries = [whole]
    elif whole.size[0] >= SHORT_ENTRIES and whole.size[1] * whole.size[2] <= SHORT_SCORES:
        yield whole
        return
    else:
        entries = [whole.replace(batch=(b, b + 1), sequence=b) for b in range(*whole.batch)]
    for entry in entries:
        of_q, of_kv = (_runs(ids[entry.batch[0] if ids.shape[0] > 1 else 0]) for ids in (ids_q, ids_kv))
        if of_q is None or of_kv is None:
            yield entry
            continue
        for segment, rows in of_q.items():
            if segment in of_kv:
                yield entry.replace(rows=rows, keys=of_kv[segment], is_exact=True)


def _runs(ids: Tensor) -> dict[int, Span] | None:
    """Begin and end of each segment; None if the tokens of one do not stand together."""
    values, counts = torch.unique_consecutive(ids, return_counts=True)
    ends = list(itertools.accumulate(counts.tolist(), initial=0))
    runs = dict(zip(values.tolist(), itertools.pairwise(ends), strict=True))
    return runs if len(runs) == len(values) else None


def narrow(block: Block, spec: AttentionSpec) -> Block | None:
    """``block`` without the outer rows and keys that the band leaves unused; None if nothing remains."""
    if not spec.has_band:
        return block if block.rows[0] < block.rows[1] and block.keys[0] < block.keys[1] else None
    keys = _common(block.keys, tile_range(spec, *block.rows, block.s_q, block.s_kv))
    rows = _common(block.rows, tile_range(spec.transposed(), *keys, block.s_kv, block.s_q))
    if rows[0] >= rows[1]:
        return None
    return block if (rows, keys) == (block.rows, block.keys) else block.replace(rows=rows, keys=keys)


def _common(a: Span, b: Span) -> Span:
    begin, end = max(a[0], b[0]), min(a[1], b[1])
    return (begin, end) if begin < end else (0, 0)


def shape(block: Block, spec: AttentionSpec) -> Shape:
    """The effect of the band inside ``block``."""
    if not spec.has_band:
        return "full"
    kept_by_all = full_range(spec, *block.rows, block.s_q, block.s_kv)
    if kept_by_all[0] <= block.keys[0] and block.keys[1] <= kept_by_all[1]:
        return "full"
    first, last = block.rows[0], block.rows[1] - 1
    first_row = tile_range(spec, first, first + 1, block.s_q, block.s_kv)
    last_row = tile_range(spec, last, last + 1, block.s_q, block.s_kv)
    begins_on_time = first_row[0] <= block.keys[0] and last_row[0] <= block.keys[0]
    return "causal" if begins_on_time and first_row[1] == block.keys[0] + 1 else "band"


@functools.lru_cache(maxsize=1024)
def shape_of_all(spec: AttentionSpec, s_q: int, s_kv: int) -> Shape | None:
    """The shape of a dense problem that one block holds, every row and key of it used; else None."""
    block = Block((0, 1), (0, s_q), (0, s_kv), s_q, s_kv)
    return shape(block, spec) if narrow(block, spec) is block and shape(block, spec) != "band" else None


def cut(region: Block, spec: AttentionSpec, max_rows: int | None = None) -> list[Block]:
    """The blocks of a region, of at most ``max_rows`` query rows: together they hold each kept pair exactly once."""
    block = narrow(region, spec)
    if block is None:
        return []
    step = BAND_ROWS if shape(block, spec) == "band" else block.size[1]
    if max_rows is not None:
        step = min(step, max_rows)
    if step >= block.size[1]:
        return [block]
    first, end = block.rows
    pieces = (block.replace(rows=(i, min(i + step, end))) for i in range(first, end, step))
    return [piece for piece in (narrow(piece, spec) for piece in pieces) if piece is not None]


def calls(blocks: Sequence[Block], spec: AttentionSpec, max_keys: int) -> list[Call]:
    """``blocks`` with runs of copies at equal spacing drawn together, up to ``max_keys`` key rows in a call."""
    merged: list[Call] = []
    last: Block | None = None
    for block in blocks:
        call = merged[-1] if merged else None
        is_full = call is not None and (call.count + 1) * block.size[2] > max_keys
        if call is None or last is None or is_full or not _is_next(call, last, block, spec):
            merged.append(Call(block))
        else:
            merged[-1] = Call(call.block, call.count + 1, *_steps(last, block))
        last = block
    return merged


def _is_next(call: Call, last: Block, block: Block, spec: AttentionSpec) -> bool:
    q_step, kv_step = _steps(last, block)
    if call.count > 1 and (q_step, kv_step) != (call.q_step, call.kv_step):
        return False
    is_copy = last.size == block.size and last.batch == block.batch and block.size[0] == 1
    return is_copy and q_step > 0 and kv_step > 0 and _pattern(last, spec) == _pattern(block, spec)


def _steps(last: Block, block: Block) -> tuple[int, int]:
    return block.q_begin - last.q_begin, block.kv_begin - last.kv_begin


def _pattern(block: Block, spec: AttentionSpec) -> tuple[Shape, int]:
    """Two blocks of one size are the same problem if these agree: their shape, and where their diagonal lies."""
    return shape(block, spec), block.keys[0] - block.rows[0] - diagonal(spec, block.s_q, block.s_kv)
