"""The intervals of query rows, and what they keep of a tile; ``in_intervals`` transcribes that of ``spec.py``."""

# mypy: disallow-untyped-defs=False
from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

IN_A_LOOP = tl.constexpr(8)  # ``Flags.intervals`` of more ranges than are unrolled


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
    if F.intervals < IN_A_LOOP:
        for n in tl.static_range(F.intervals):
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
