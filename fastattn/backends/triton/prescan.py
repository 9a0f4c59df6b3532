"""Kernels that read masks, segments and intervals on the device: which tiles to visit, which keys some query keeps."""

# mypy: disallow-untyped-defs=False
from __future__ import annotations

import triton
import triton.language as tl

from fastattn.backends.triton.ranges import SEGMENT_BLOCK, SEGMENT_ROWS, class_of
from fastattn.backends.triton.tile import head_in, kept_tile, number, open_band, open_head, tiles, transposed

SCANNED = tl.constexpr(32)  # blocks of columns whose ids one step reads


@triton.jit
def segment_columns_kernel(ids_q, ids_kv, of_q, of_kv, s_q, s_kv):
    """For blocks of ``SEGMENT_BLOCK`` query rows the columns to visit, and for blocks of keys the rows to visit.

    Each block has ``(first, full_first, full_last, last)``, see ``columns_of_segments``. Grid: ``(B * blocks, 2)``,
    where ``blocks`` are those of the longer side.
    """
    s_q, s_kv = number(s_q), number(s_kv)
    blocks = tl.cdiv(tl.maximum(s_q, s_kv), SEGMENT_ROWS) * (SEGMENT_ROWS // SEGMENT_BLOCK)
    b, block = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks
    if tl.program_id(1) == 0:
        scan_segments(ids_q, ids_kv, of_q, b, block, s_q, s_kv)
    else:
        scan_segments(ids_kv, ids_q, of_kv, b, block, s_kv, s_q)


@triton.jit
def scan_segments(rows, columns, found, b, block, s_rows, s_columns):
    """One block of rows against all columns, ``SCANNED`` blocks of them in a step.

    Ids may come in any order. A block is visited if the ranges of ids overlap, and is full if both hold one id only;
    outside of ``first .. last`` no column is visited, and between ``full_first`` and ``full_last`` every one is full.
    For sorted ids, as packed documents have them, both ranges are exact to a block.
    """
    if block * SEGMENT_BLOCK < tl.cdiv(s_rows, SEGMENT_ROWS) * SEGMENT_ROWS:
        i = tl.minimum(block * SEGMENT_BLOCK + tl.arange(0, SEGMENT_BLOCK), s_rows - 1)
        ids = tl.load(rows.ptr + b * number(rows.stride_b) + i * number(rows.stride_s))
        least, most = tl.min(ids), tl.max(ids)
        n_tiles = tl.cdiv(s_columns, SEGMENT_BLOCK)
        begin, end, full_begin, full_end, full = n_tiles, n_tiles * 0, n_tiles, n_tiles * 0, n_tiles * 0
        for first in tl.range(0, n_tiles, SCANNED):
            t = first + tl.arange(0, SCANNED)
            j = tl.minimum(t[:, None] * SEGMENT_BLOCK + tl.arange(0, SEGMENT_BLOCK)[None, :], s_columns - 1)
            others = tl.load(columns.ptr + b * number(columns.stride_b) + j * number(columns.stride_s))
            least_other, most_other = tl.min(others, 1), tl.max(others, 1)
            is_tile = t < n_tiles
            overlaps = is_tile & (least_other <= most) & (most_other >= least)
            is_full = is_tile & (least == most) & (least_other == least) & (most_other == least)
            begin = tl.minimum(begin, tl.min(tl.where(overlaps, t, n_tiles)))
            end = tl.maximum(end, tl.max(tl.where(overlaps, t + 1, 0)))
            full_begin = tl.minimum(full_begin, tl.min(tl.where(is_full, t, n_tiles)))
            full_end = tl.maximum(full_end, tl.max(tl.where(is_full, t + 1, 0)))
            full += tl.sum(is_full.to(tl.int32))
        has_gaps = full_end - full_begin != full
        at = found.ptr + b * number(found.stride_b) + block * 4
        tl.store(at, begin * SEGMENT_BLOCK)
        tl.store(at + 1, tl.where(has_gaps, n_tiles, full_begin) * SEGMENT_BLOCK)
        tl.store(at + 2, tl.where(has_gaps, 0, full_end) * SEGMENT_BLOCK)
        tl.store(at + 3, end * SEGMENT_BLOCK)


@triton.jit
def interval_tiles_kernel(
    terms, sizes, heads, F: tl.constexpr, BLOCK: tl.constexpr, BLOCK_OTHER: tl.constexpr, BY_KEYS: tl.constexpr
):  # fmt: skip
    """For one block of query rows, or of keys, the list of tiles to visit: ``terms.visits``, see ``visited``.

    Those are visited that some row of a head keeps a key of; ``heads`` query heads share the list. A tile is full if
    one range of each row holds all its keys. Grid: ``(1|B times blocks, heads of the list)``.
    """
    blocks = tl.cdiv(number(sizes.s_kv) if BY_KEYS else number(sizes.s_q), BLOCK)
    b, block, h = tl.program_id(0) // blocks, tl.program_id(0) % blocks, tl.program_id(1)
    begin_q, begin_kv, band = open_band(b, terms, sizes, F)
    if BY_KEYS:
        _low, _high, begin, full_begin, full_end, end = tiles(
            block, b, transposed(band), terms, BLOCK, BLOCK_OTHER, F.right, F.left, F
        )  # fmt: skip
    else:
        _low, _high, begin, full_begin, full_end, end = tiles(
            block, b, band, terms, BLOCK, BLOCK_OTHER, F.left, F.right, F
        )
    at, _begin, _end = visits_of(block, b, h, begin, end, terms, F)
    count = begin * 0
    for tile in tl.range(begin, end):
        meets, holds = begin * 0, begin * 0 + 1
        for g in tl.range(0, number(heads)):
            head = head_in(b, h * number(heads) + g, begin_q, begin_kv, band, terms, sizes, F)
            if BY_KEYS:
                i, j0, j1 = tile * BLOCK_OTHER + tl.arange(0, BLOCK_OTHER), block * BLOCK, block * BLOCK + BLOCK
            else:
                i, j0, j1 = block * BLOCK + tl.arange(0, BLOCK), tile * BLOCK_OTHER, tile * BLOCK_OTHER + BLOCK_OTHER
            meets_one, holds_one = class_of(head.ranges, i, band.s_q, j0, tl.minimum(j1, band.s_kv))
            meets, holds = tl.maximum(meets, meets_one), tl.minimum(holds, holds_one)
        is_full = (holds != 0) & (tile >= full_begin) & (tile < full_end)
        tl.store(at + 1 + count, 2 * tile + is_full.to(tl.int32), mask=meets != 0)
        count += meets
    tl.store(at, count)


@triton.jit
def visits_of(block, b, h, begin, end, terms, F: tl.constexpr):
    """``(visits, begin, end)``: what a loop over the tiles of ``block`` counts, and a pointer for ``visited``.

    With intervals it counts the entries of a list; else the tiles from ``begin`` to ``end`` themselves.
    """
    if F.intervals:
        x = terms.visits
        at = x.ptr + b.to(tl.int64) * number(x.stride_b) + h.to(tl.int64) * number(x.stride_h)
        at += block.to(tl.int64) * number(x.stride_block)
        return at, begin * 0, tl.load(at)
    else:  # Triton compiles what follows a return
        return 0, begin, end


@triton.jit
def visited(n, visits, full_begin, full_end, F: tl.constexpr):
    """``(tile, is_full)`` of the n-th visit. A list holds their number, then ``2 * tile + is_full`` for each."""
    if F.intervals:
        entry = tl.load(visits + 1 + n)
        return entry >> 1, (entry & 1) != 0
    else:
        return n, (n >= full_begin) & (n < full_end)


@triton.jit
def used_keys_kernel(used, terms, sizes, heads, F: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """``used``, ``(B, S_kv, 1|H_kv)`` uint8, packed ``(T_kv, 1|H_kv)``: 1 where some query row keeps the key.

    Grid: ``(B * blocks, 1|H_kv)``.
    Each program reads ``heads`` query heads: those of the group, or one if all share the mask. It stops once all keys
    of its block are used, which for almost any mask is after the first tiles.
    """
    blocks = tl.cdiv(number(sizes.s_kv), BLOCK_N)
    b, block, h_kv = tl.program_id(0) // blocks, tl.program_id(0) % blocks, tl.program_id(1)
    group = number(heads)
    _begin_q, begin_kv, band = open_band(b, terms, sizes, F)
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
    at = used.ptr + b.to(tl.int64) * number(used.stride_b) + h_kv
    at += (begin_kv + j).to(tl.int64) * number(used.stride_s)
    tl.store(at, found.to(tl.uint8), mask=j < band.s_kv)
