"""The intervals of query rows, and what they keep of a tile; ``in_intervals`` transcribes that of ``spec.py``.

Also what ``prescan.py`` found about segments, as a kernel with any tile reads it.
"""

# mypy: disallow-untyped-defs=False
from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

IN_A_LOOP = tl.constexpr(8)  # ``Flags.intervals`` of more ranges than are unrolled


SEGMENT_BLOCK = tl.constexpr(64)  # rows, and columns, that prescan.py looks at together
SEGMENT_ROWS = tl.constexpr(128)  # its rows are padded to a multiple of this; no tile has more


class RowRanges(NamedTuple):
    """The ranges of the rows of one head of one sequence: ``count`` pairs for each row, rows ``stride`` apart."""

    ptr: Any
    stride: Any
    count: Any


@triton.jit
def range_of(ranges, i, s_q, n):
    """``(start, stop)`` of range ``n`` of rows ``i``, of the last row past it; an empty one past the last range."""
    at = ranges.ptr + tl.minimum(i, s_q - 1).to(tl.int64) * ranges.stride + 2 * n
    return tl.load(at, mask=n < ranges.count, other=0), tl.load(at + 1, mask=n < ranges.count, other=0)


@triton.jit
def in_intervals(ranges, i, j, s_q, F: tl.constexpr):
    """True where a range of row ``i`` holds key ``j``; unrolled, since a loop inside another stops its pipeline."""
    held = (i + j) < 0
    COUNT: tl.constexpr = F.intervals
    if COUNT < IN_A_LOOP:
        for n in tl.static_range(COUNT):
            start, stop = range_of(ranges, i, s_q, n)
            held = held | ((start <= j) & (j < stop))
    else:
        for n in tl.range(0, ranges.count):
            start, stop = range_of(ranges, i, s_q, n)
            held = held | ((start <= j) & (j < stop))
    return held


@triton.jit
def class_of(ranges, i, s_q, j0, j1):
    """``(meets, holds)``, 0 or 1: some row keeps a key of ``j0 .. j1``; one range of each row holds them all."""
    meets, holds = i * 0, i * 0
    for n in tl.range(0, ranges.count):
        start, stop = range_of(ranges, i, s_q, n)
        meets = tl.maximum(meets, (tl.maximum(start, j0) < tl.minimum(stop, j1)).to(tl.int32))
        holds = tl.maximum(holds, ((start <= j0) & (stop >= j1)).to(tl.int32))
    return tl.max(meets), tl.min(holds)


@triton.jit
def columns_of_segments(found, block, BLOCK: tl.constexpr):
    """``(first, full_first, full_last, last)`` of ``block``, from what ``segment_columns_kernel`` stored at ``found``.

    Only columns from ``first`` to before ``last`` may share a segment with a row of the block; those from
    ``full_first`` to before ``full_last`` share that of every row.
    """
    at = found + block * BLOCK // SEGMENT_BLOCK * 4
    first, full_first, full_last, last = tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3)
    for n in tl.static_range(1, BLOCK // SEGMENT_BLOCK):
        first, last = tl.minimum(first, tl.load(at + 4 * n)), tl.maximum(last, tl.load(at + 4 * n + 3))
        full_first = tl.maximum(full_first, tl.load(at + 4 * n + 1))
        full_last = tl.minimum(full_last, tl.load(at + 4 * n + 2))
    return first, full_first, full_last, last
