"""Which tiles hold pairs of the same segment: read from the ids on the device, so that nothing waits for them."""

from __future__ import annotations

import triton
import triton.language as tl

from fastattn.backends.triton.tile import number


@triton.jit
def segment_tiles_kernel(rows, columns, found, s_rows, s_columns, BLOCK: tl.constexpr, BLOCK_OTHER: tl.constexpr):
    """For one block of rows the tiles of columns to visit, as ``(begin, full_begin, full_end, end)``.

    Ids may come in any order. A tile is visited if the ranges of ids overlap, and is full if both hold one id only;
    outside of ``begin .. end`` no tile is visited, and between ``full_begin`` and ``full_end`` every one is full.
    For sorted ids, as packed documents have them, both ranges are exact.
    """
    block, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    s_rows, s_columns = number(s_rows), number(s_columns)
    i = tl.minimum(block * BLOCK + tl.arange(0, BLOCK), s_rows - 1)
    ids = tl.load(rows.ptr + b * number(rows.stride_b) + i * number(rows.stride_s))
    least, most = tl.min(ids), tl.max(ids)
    tiles = tl.cdiv(s_columns, BLOCK_OTHER)
    begin, end, full_begin, full_end, full = tiles, tiles * 0, tiles, tiles * 0, tiles * 0
    for t in range(0, tiles):
        j = tl.minimum(t * BLOCK_OTHER + tl.arange(0, BLOCK_OTHER), s_columns - 1)
        others = tl.load(columns.ptr + b * number(columns.stride_b) + j * number(columns.stride_s))
        least_other, most_other = tl.min(others), tl.max(others)
        overlaps = (least_other <= most) & (most_other >= least)
        is_full = (least == most) & (least_other == least) & (most_other == least)
        begin = tl.where(overlaps, tl.minimum(begin, t), begin)
        end = tl.where(overlaps, t + 1, end)
        full_begin = tl.where(is_full, tl.minimum(full_begin, t), full_begin)
        full_end = tl.where(is_full, t + 1, full_end)
        full += is_full.to(tl.int32)
    has_gaps = full_end - full_begin != full
    at = found.ptr + b * number(found.stride_b) + block * 4
    tl.store(at, begin)
    tl.store(at + 1, tl.where(has_gaps, tiles, full_begin))
    tl.store(at + 2, tl.where(has_gaps, 0, full_end))
    tl.store(at + 3, end)
