"""Kernels that read masks and segments on the device: which tiles remain active, and which keys some query keeps."""

# mypy: disallow-untyped-defs=False
from __future__ import annotations

import triton
import triton.language as tl

from fastattn.backends.triton.tile import kept_tile, number, open_band, open_head, tiles, transposed


@triton.jit
def segment_tiles_kernel(rows, columns, found, s_rows, s_columns, BLOCK: tl.constexpr, BLOCK_OTHER: tl.constexpr):
    """For one block of rows the tiles of columns to visit, as ``(begin, full_begin, full_end, end)``.

    Ids may come in any order. A tile is visited if the ranges of ids overlap, and is full if both hold one id only;
    outside of ``begin .. end`` no tile is visited, and between ``full_begin`` and ``full_end`` every one is full.
    For sorted ids, as packed documents have them, both ranges are exact. Grid: ``(B * blocks,)``.
    """
    blocks = tl.cdiv(number(s_rows), BLOCK)
    b, block = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks
    s_rows, s_columns = number(s_rows), number(s_columns)
    i = tl.minimum(block * BLOCK + tl.arange(0, BLOCK), s_rows - 1)
    ids = tl.load(rows.ptr + b * number(rows.stride_b) + i * number(rows.stride_s))
    least, most = tl.min(ids), tl.max(ids)
    n_tiles = tl.cdiv(s_columns, BLOCK_OTHER)
    begin, end, full_begin, full_end, full = n_tiles, n_tiles * 0, n_tiles, n_tiles * 0, n_tiles * 0
    for t in tl.range(0, n_tiles):
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
    tl.store(at + 1, tl.where(has_gaps, n_tiles, full_begin))
    tl.store(at + 2, tl.where(has_gaps, 0, full_end))
    tl.store(at + 3, end)


@triton.jit
def used_keys_kernel(used, terms, sizes, heads, F: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """``used``, ``(B, S_kv, 1|H_kv)`` uint8: 1 where some query row keeps the key. Grid: ``(B * blocks, 1|H_kv)``.

    Each program reads ``heads`` query heads: those of the group, or one if all share the mask. It stops once all keys
    of its block are used, which for almost any mask is after the first tiles.
    """
    blocks = tl.cdiv(number(sizes.s_kv), BLOCK_N)
    b, block, h_kv = tl.program_id(0) // blocks, tl.program_id(0) % blocks, tl.program_id(1)
    group = number(heads)
    _begin_q, _begin_kv, band = open_band(b, terms, sizes, F)
    j0 = block * BLOCK_N
    j = j0 + tl.arange(0, BLOCK_N)
    found = (j >= band.s_kv).to(tl.int32)
    _low, _high, begin, _full_begin, _full_end, end = tiles(
        block, b, transposed(band), terms, BLOCK_N, BLOCK_M, F.right, F.left, F
    )  # fmt: skip
    for g in tl.range(0, group):
        head = open_head(b, h_kv * group + g, terms, sizes, F)
        tile = begin
        while (tile < end) & (tl.min(found) == 0):
            i0 = tile * BLOCK_M
            i = i0 + tl.arange(0, BLOCK_M)
            kept = kept_tile(head, i[None, :], j[:, None], i0, j0, True, F)
            found = tl.maximum(found, tl.max(kept.to(tl.int32), 1))
            tile += 1
    at = used.ptr + b.to(tl.int64) * number(used.stride_b) + j.to(tl.int64) * number(used.stride_s) + h_kv
    tl.store(at, found.to(tl.uint8), mask=j < band.s_kv)
