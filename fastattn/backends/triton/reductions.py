"""The gradients that sum over heads and sequences: ``dbias`` and ``dsinks``. One program owns each sum, in one order."""

from __future__ import annotations

import triton
import triton.language as tl

from fastattn.backends.triton.backward import load_statistics, score_gradient
from fastattn.backends.triton.tile import (
    LOG2E,
    load_per_head,
    load_rows,
    number,
    open_band,
    open_head,
    per_row,
    rows_of,
    tile_range,
)


@triton.jit
def dbias_kernel(
    q, k, v, dout, dbias, lse, delta, terms, sizes, batch, F: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, SUM_ROWS: tl.constexpr, SUM_COLUMNS: tl.constexpr,
):  # fmt: skip
    """One tile of ``dbias``, summed over the sequences and heads that share it.

    ``dbias``, as ``Scores``, has no rows or columns that broadcast: where ``bias`` has, it holds the sums over the
    rows (or columns) of each tile, which are added up afterwards. Grid: ``(tiles, 1|H_q, 1|B)``, tiles by columns.
    """
    column_tiles = tl.cdiv(number(sizes.s_kv), BLOCK_N)
    row_block, column_block = tl.program_id(0) // column_tiles, tl.program_id(0) % column_tiles
    i0, j0 = row_block * BLOCK_M, column_block * BLOCK_N
    heads = tl.where(tl.num_programs(1) == 1, number(sizes.heads_q), 1)
    sequences = tl.where(tl.num_programs(2) == 1, number(batch), 1)
    i, j = i0 + tl.arange(0, BLOCK_M), j0 + tl.arange(0, BLOCK_N)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)

    _, _, band = open_band(tl.program_id(2), terms, sizes, F)
    s_q, s_kv = band.s_q, band.s_kv
    low, high = tile_range(i0, tl.minimum(i0 + BLOCK_M, s_q), band, F.band)
    is_used = (j0 < high) & (j0 + BLOCK_N > low)
    for n in tl.range(0, tl.where(is_used, sequences * heads, 0)):
        b, h = tl.program_id(2) + n // heads, tl.program_id(1) + n % heads
        head = open_head(b, h, terms, sizes, F)
        q_rows, dout_rows = rows_of(q, b, h, head.begin_q, F.vector, F.contiguous), rows_of(dout, b, h, head.begin_q, F.vector, F.contiguous)
        k_rows, v_rows = rows_of(k, b, head.h_kv, head.begin_kv, F.vector, F.contiguous), rows_of(v, b, head.h_kv, head.begin_kv, F.vector, F.contiguous)
        q_tile = load_rows(q_rows, i0, 0, s_q, F.d_qk, BLOCK_M, F.block_qk, True, F.upcast)
        k_tile = load_rows(k_rows, j0, 0, s_kv, F.d_qk, BLOCK_N, F.block_qk, True, F.upcast)
        raw = tl.dot(q_tile, tl.trans(k_tile), input_precision=F.precision)  # [BLOCK_M, BLOCK_N]
        dout_tile = load_rows(dout_rows, i0, 0, s_q, F.d_v, BLOCK_M, F.block_v, True, F.upcast)
        v_tile = load_rows(v_rows, j0, 0, s_kv, F.d_v, BLOCK_N, F.block_v, True, F.upcast)
        dp = tl.dot(dout_tile, tl.trans(v_tile), input_precision=F.precision)
        of_lse, of_delta = load_statistics(per_row(lse, head), per_row(delta, head), i, 0, s_q, True)
        _p, dt, _ds, _kept = score_gradient(
            raw, dp, of_lse[:, None], of_delta[:, None], head, i[:, None], j[None, :], i0, j0, sizes.dropout_scale,
            True, False, F, BLOCK_M, BLOCK_N,
        )  # fmt: skip
        acc += dt

    at = tl.program_id(2).to(tl.int64) * number(dbias.stride_b) + tl.program_id(1).to(tl.int64) * number(dbias.stride_h)
    stride_q = number(dbias.stride_q)
    if SUM_ROWS and SUM_COLUMNS:
        tl.store(dbias.ptr + at + row_block.to(tl.int64) * stride_q + column_block, tl.sum(acc))
    elif SUM_ROWS:
        tl.store(dbias.ptr + at + row_block.to(tl.int64) * stride_q + j, tl.sum(acc, 0), mask=j < s_kv)
    elif SUM_COLUMNS:
        tl.store(dbias.ptr + at + i.to(tl.int64) * stride_q + column_block, tl.sum(acc, 1), mask=i < s_q)
    else:
        at = dbias.ptr + at + i[:, None].to(tl.int64) * stride_q + j[None, :]
        tl.store(at, acc, mask=(i < s_q)[:, None] & (j < s_kv)[None, :])


@triton.jit
def dsinks_kernel(lse, delta, dsinks, terms, sizes, F: tl.constexpr, BLOCK: tl.constexpr):
    """``dsinks`` of one head of one sequence: ``-sum_i p_sink * delta``. Grid: ``(H_q, B)``."""
    head = open_head(tl.program_id(1), tl.program_id(0), terms, sizes, F)
    s_q, lse_rows, delta_rows = head.band.s_q, per_row(lse, head), per_row(delta, head)
    sink = load_per_head(terms.sinks, head.b, head.h) * LOG2E
    total = tl.zeros([BLOCK], tl.float32)
    for n in tl.range(0, tl.cdiv(s_q, BLOCK)):
        i = n * BLOCK + tl.arange(0, BLOCK)
        of_lse = tl.load(lse_rows + i, mask=i < s_q, other=0.0) * LOG2E
        of_delta = tl.load(delta_rows + i, mask=i < s_q, other=0.0)
        # a sink of -inf takes no part, also in a row that keeps nothing else
        total -= tl.where(sink == float("-inf"), 0.0, tl.exp2(sink - of_lse)) * of_delta
    tl.store(dsinks.ptr + head.b * number(dsinks.stride_b) + head.h * number(dsinks.stride_h), tl.sum(total))
