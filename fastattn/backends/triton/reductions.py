"""Sums over heads and sequences, each by one program in one order: ``dbias``, ``dsinks``, the parts of dk and dv."""

# mypy: disallow-untyped-defs=False
from __future__ import annotations

import triton
import triton.language as tl

from fastattn.backends.triton.backward import load_delta, load_lse, probabilities, score_gradients
from fastattn.backends.triton.ranges import class_of
from fastattn.backends.triton.tile import (
    LOG2E,
    dot_in_chunks,
    head_matrix,
    load_per_head,
    load_rows,
    number,
    open_head,
    row_offset,
    tiles,
)


@triton.jit
def bias_tile(sizes, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """``(b, row block, column block)`` of this program's tile, tiles by columns."""
    column_tiles = tl.cdiv(number(sizes.s_kv), BLOCK_N)
    tiles_of_head = tl.cdiv(number(sizes.s_q), BLOCK_M) * column_tiles
    first_b, tile = tl.program_id(0) // tiles_of_head, tl.program_id(0) % tiles_of_head
    return first_b, tile // column_tiles, tile % column_tiles


@triton.jit
def visit_of_tile(
    row_block, column_block, head, terms, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, F: tl.constexpr
):  # fmt: skip
    """``(low, high, is_visited, is_full)``: the columns that the band leaves, and whether the tile is visited."""
    low, high, begin, full_begin, full_end, end = tiles(
        row_block, head.b, head.band, terms, BLOCK_M, BLOCK_N, F.left, F.right, F
    )
    is_visited = (column_block >= begin) & (column_block < end)
    is_full = (column_block >= full_begin) & (column_block < full_end)
    if F.intervals:
        i, j0 = row_block * BLOCK_M + tl.arange(0, BLOCK_M), column_block * BLOCK_N
        j1 = tl.minimum(j0 + BLOCK_N, head.band.s_kv)
        meets, holds = class_of(head.ranges, i, head.band.s_q, j0, j1)
        is_visited, is_full = is_visited & (meets != 0), is_full & (holds != 0)
    return low, high, is_visited, is_full


@triton.jit
def store_bias_tile(
    tile, dbias, b, row_block, column_block, sizes, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    SUM_ROWS: tl.constexpr, SUM_COLUMNS: tl.constexpr,
):  # fmt: skip
    """Store a tile of ``dbias`` of this program's head, or its sums over rows or columns."""
    s_q, s_kv = number(sizes.s_q), number(sizes.s_kv)
    i, j = row_block * BLOCK_M + tl.arange(0, BLOCK_M), column_block * BLOCK_N + tl.arange(0, BLOCK_N)
    at = b.to(tl.int64) * number(dbias.stride_b) + tl.program_id(1).to(tl.int64) * number(dbias.stride_h)
    stride_q = number(dbias.stride_q)
    if SUM_ROWS and SUM_COLUMNS:
        tl.store(dbias.ptr + at + row_block.to(tl.int64) * stride_q + column_block, tl.sum(tile))
    elif SUM_ROWS:
        tl.store(dbias.ptr + at + row_block.to(tl.int64) * stride_q + j, tl.sum(tile, 0), mask=j < s_kv)
    elif SUM_COLUMNS:
        tl.store(dbias.ptr + at + i.to(tl.int64) * stride_q + column_block, tl.sum(tile, 1), mask=i < s_q)
    else:
        at = dbias.ptr + at + i[:, None].to(tl.int64) * stride_q + j[None, :]
        tl.store(at, tile, mask=(i < s_q)[:, None] & (j < s_kv)[None, :])


@triton.jit
def backward_dbias_kernel(
    q, k, v, dout, dbias, stats, terms, sizes, sequences, heads, F: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, IN_CHUNKS: tl.constexpr, SUM_ROWS: tl.constexpr, SUM_COLUMNS: tl.constexpr,
):  # fmt: skip
    """One tile of ``dbias``, summed over the sequences and heads that share it.

    ``dbias``, a ``Scores``, has no rows or columns that broadcast: if those of ``bias`` do, it holds the sums over the
    rows (or columns) of each tile, which are added afterwards. A program sums over ``sequences`` and ``heads``, one or
    all of them. Grid: ``(1|B times tiles, 1|H_q)``, tiles by columns.
    """
    BLOCK_QK: tl.constexpr = F.block_qk
    BLOCK_V: tl.constexpr = F.block_v
    first_b, row_block, column_block = bias_tile(sizes, BLOCK_M, BLOCK_N)
    i0, j0 = row_block * BLOCK_M, column_block * BLOCK_N
    sequences, heads = number(sequences), number(heads)
    i, j = i0 + tl.arange(0, BLOCK_M), j0 + tl.arange(0, BLOCK_N)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)

    for n in tl.range(0, sequences * heads):
        b, h = first_b + n // heads, tl.program_id(1) + n % heads
        head = open_head(b, h, terms, sizes, F)
        low, high, is_visited, is_full = visit_of_tile(row_block, column_block, head, terms, BLOCK_M, BLOCK_N, F)
        if is_visited:
            q_rows = head_matrix(q, b, h, head.begin_q, F.vector, F.contiguous)
            k_rows = head_matrix(k, b, head.h_kv, head.begin_kv, F.vector, F.contiguous)
            s_q = head.band.s_q
            if IN_CHUNKS:
                raw = dot_in_chunks(q_rows, i0, 0, s_q, k_rows, j0, low, high, F.d_qk, BLOCK_M, BLOCK_N, BLOCK_QK, F)
            else:
                q_tile = load_rows(q_rows, i0, 0, s_q, False, F.d_qk, BLOCK_M, BLOCK_QK, F.upcast)
                k_tile = load_rows(k_rows, j0, low, high, F.left, F.d_qk, BLOCK_N, BLOCK_QK, F.upcast)
                raw = tl.dot(q_tile, tl.trans(k_tile), input_precision=F.precision)  # [BLOCK_M, BLOCK_N]
            at = row_offset(stats, head)
            lse, low_log2 = load_lse(stats, at, i, s_q)
            p, spared, t = probabilities(
                raw, lse[:, None], low_log2[:, None], head, i[:, None], j[None, :], i0, j0, is_full, False, F, BLOCK_M,
                BLOCK_N,
            )  # fmt: skip
            dout_rows = head_matrix(dout, b, h, head.begin_q, F.vector, F.contiguous)
            v_rows = head_matrix(v, b, head.h_kv, head.begin_kv, F.vector, F.contiguous)
            if IN_CHUNKS:
                dp = dot_in_chunks(dout_rows, i0, 0, s_q, v_rows, j0, low, high, F.d_v, BLOCK_M, BLOCK_N, BLOCK_V, F)
            else:
                dout_tile = load_rows(dout_rows, i0, 0, s_q, False, F.d_v, BLOCK_M, BLOCK_V, F.upcast)
                v_tile = load_rows(v_rows, j0, low, high, F.left, F.d_v, BLOCK_N, BLOCK_V, F.upcast)
                dp = tl.dot(dout_tile, tl.trans(v_tile), input_precision=F.precision)
            of_delta = load_delta(stats, at, i, s_q)
            dt, _ds = score_gradients(p, spared, t, dp, of_delta[:, None], sizes.dropout_scale, F)
            acc += dt

    store_bias_tile(acc, dbias, first_b, row_block, column_block, sizes, BLOCK_M, BLOCK_N, SUM_ROWS, SUM_COLUMNS)


@triton.jit
def backward_dsinks_kernel(stats, dsinks, terms, sizes, F: tl.constexpr, BLOCK: tl.constexpr):
    """``dsinks`` of one head of one sequence: ``-sum_i p_sink * delta``. Grid: ``(B, H_q)``."""
    head = open_head(tl.program_id(0), tl.program_id(1), terms, sizes, F)
    s_q, at = head.band.s_q, row_offset(stats, head)
    sink = load_per_head(terms.sinks, head.b, head.h)
    total = tl.zeros([BLOCK], tl.float32)
    for n in tl.range(0, tl.cdiv(s_q, BLOCK)):
        i = n * BLOCK + tl.arange(0, BLOCK)
        lse, low_log2 = load_lse(stats, at, i, s_q)
        total -= tl.exp2((sink - lse) * LOG2E - low_log2) * load_delta(stats, at, i, s_q)
    tl.store(dsinks.ptr + head.b * number(dsinks.stride_b) + head.h * number(dsinks.stride_h), tl.sum(total))


@triton.jit
def sum_parts_kernel(partial, total, parts, count, D: tl.constexpr, BLOCK: tl.constexpr):
    """``total``, ``count`` numbers in rows of ``D``: the sums of ``partial``, ``parts`` rows for each, in order."""
    parts, count = number(parts), number(count)
    n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    at = partial + n // D * D * parts + n % D
    acc = tl.zeros([BLOCK], tl.float32)
    for part in tl.range(0, parts):
        acc += tl.load(at + part * D, mask=n < count, other=0.0)
    tl.store(total + n, acc.to(total.dtype.element_ty), mask=n < count)
