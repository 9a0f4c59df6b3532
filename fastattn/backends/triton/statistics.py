"""Statistics of the weights and their gradients; the formulas are those of ``backends/portable/statistics.py``.

``row_statistics_kernel`` walks twice over the tiles of its rows, since weights need the normaliser; the others take it
from ``Stats``, whose ``delta`` is the mean of the gradient of the weights:

    dp = dkey_sum - dentropy * (log p + 1)      delta = rowsum(p * dp)
    dt = p * (dp - delta), and dlargest_logit besides at the largest key

There are no atomics: one program computes each sum, in one order.
"""

# mypy: disallow-untyped-defs=False
from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from fastattn.backends.triton.backward import load_delta, load_lse, log2_probabilities
from fastattn.backends.triton.operands import left_operand, operand, product, whole
from fastattn.backends.triton.prescan import visited, visits_of
from fastattn.backends.triton.reductions import bias_tile, store_bias_tile, visit_of_tile
from fastattn.backends.triton.tile import (
    LOG2E,
    factor_of,
    finish,
    head_in,
    head_matrix,
    load_per_head,
    masked,
    number,
    open_band,
    open_head,
    row_offset,
    scheduled,
    softmax_end,
    softmax_step,
    store_rows,
    tile_range,
    tiles,
    transposed,
)

LN2 = tl.constexpr(0.6931471805599453)


class OfRows(NamedTuple):
    """A number for each query row, results or their gradients, strided like ``Stats``; None if not wanted."""

    entropy: Any
    largest_logit: Any
    largest_key: Any


class OfKeys(NamedTuple):
    """A number for each key and query head, ``(B, H_q, S_kv)``; packed ``(H_q, T_kv)`` with ``stride_b`` 0."""

    key_sum: Any
    key_max: Any
    stride_b: Any
    stride_h: Any


@triton.jit
def key_offset(keys, head):
    """Offset of the numbers that ``keys`` holds for the keys of a head."""
    return head.b.to(tl.int64) * number(keys.stride_b) + head.h.to(tl.int64) * number(keys.stride_h) + head.begin_kv


@triton.jit
def weight_gradients(log2_p, dentropy, dkey_sum):
    """The gradient of the weights themselves, as if they did not add up to 1."""
    return dkey_sum - dentropy * (log2_p * LN2 + 1.0)


@triton.jit
def logged_weights(raw, lse, low_log2, head, i, j, i0, j0, is_full, TRANSPOSED: tl.constexpr, F: tl.constexpr):
    """``(p, log2 p, t)`` of one tile; the logarithm is 0 where p is."""
    log2_p, t = log2_probabilities(raw, lse, low_log2, head, i, j, i0, j0, is_full, TRANSPOSED, F)
    p = tl.exp2(log2_p)
    return p, tl.where(p == 0.0, 0.0, log2_p), t


@triton.jit
def row_statistics_kernel(
    q, k, found, given, dkeys, stats, terms, sizes, schedule, F: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """``found``, an ``OfRows``, and ``Stats`` of ``BLOCK_M`` query rows of one head.

    With gradients ``given``, and ``dkeys`` of keys, ``delta`` is that of the file's head; else it is not written.
    """
    BLOCK_QK: tl.constexpr = F.block_qk
    block, of = scheduled(schedule, LAST_FIRST=F.right)
    heads_q = number(sizes.heads_q)
    head = open_head(of // heads_q, of % heads_q, terms, sizes, F)
    s_q = head.band.s_q
    i0 = block * BLOCK_M
    if i0 >= s_q:
        return

    k_rows = head_matrix(k, head.b, head.h_kv, head.begin_kv, F.vector, F.contiguous)
    q_rows = head_matrix(q, head.b, head.h, head.begin_q, F.vector, F.contiguous)
    q_at = operand(q_rows, i0, 0, s_q, False, F.d_qk, BLOCK_M, BLOCK_QK, F)
    i = i0 + tl.arange(0, BLOCK_M)
    factor = factor_of(head, F)
    m, total = tl.full([BLOCK_M], float("-inf"), tl.float32), tl.zeros([BLOCK_M], tl.float32)
    key = tl.full([BLOCK_M], -1, tl.int32)
    low, high, begin, full_begin, full_end, end = tiles(
        block, head.b, head.band, terms, BLOCK_M, BLOCK_N, F.left, F.right, F
    )
    visits, begin, end = visits_of(block, head.b, head.h, begin, end, terms, F)
    for n in tl.range(begin, end):
        tile, is_full = visited(n, visits, full_begin, full_end, F)
        j0 = tile * BLOCK_N
        j = j0 + tl.arange(0, BLOCK_N)
        k_at = operand(k_rows, j0, low, high, F.left, F.d_qk, BLOCK_N, BLOCK_QK, F)
        raw = product(q_at, k_at, F.d_qk, BLOCK_M, BLOCK_N, BLOCK_QK, F)
        scores, _t = finish(raw, head, i[:, None], j[None, :], i0, j0, F)
        scores = masked(scores, head, i[:, None], j[None, :], i0, j0, is_full, False, F)
        most = tl.max(scores, 1)
        place = tl.min(tl.where(scores == most[:, None], j[None, :], 0x7FFFFFFF), 1)
        key = tl.where(most > m, place, key)
        _p, m, total, _alpha = softmax_step(scores, factor, m, total)

    sink = load_per_head(terms.sinks, head.b, head.h) if F.sinks else 0.0
    _norm, lse, lse_low = softmax_end(m, total, sink, head.scale, F)
    lse, low_log2 = tl.where(lse == float("-inf"), float("inf"), lse), lse_low * LOG2E
    at = row_offset(stats, head) + i
    is_there = i < s_q
    tl.store(stats.lse + at, lse, mask=is_there)
    tl.store(stats.low_log2 + at, low_log2, mask=is_there)
    tl.store(found.largest_key + at, key.to(tl.int64), mask=is_there)
    if given is None:
        tl.store(found.largest_logit + at, m * head.scale if F.plain else m, mask=is_there)
        dentropy = 0.0
    else:
        dentropy = tl.load(given.entropy + at, mask=is_there, other=0.0)[:, None]
    sums = tl.zeros([BLOCK_M], tl.float32)
    for n in tl.range(begin, end):
        tile, is_full = visited(n, visits, full_begin, full_end, F)
        j0 = tile * BLOCK_N
        j = j0 + tl.arange(0, BLOCK_N)
        k_at = operand(k_rows, j0, low, high, F.left, F.d_qk, BLOCK_N, BLOCK_QK, F)
        raw = product(q_at, k_at, F.d_qk, BLOCK_M, BLOCK_N, BLOCK_QK, F)
        p, log2_p, _t = logged_weights(
            raw, lse[:, None], low_log2[:, None], head, i[:, None], j[None, :], i0, j0, is_full, False, F
        )
        if given is None:
            sums -= tl.sum(p * log2_p, 1) * LN2
        else:
            dkey = tl.load(dkeys.key_sum + key_offset(dkeys, head) + j, mask=j < head.band.s_kv, other=0.0)
            sums += tl.sum(p * weight_gradients(log2_p, dentropy, dkey[None, :]), 1)
    tl.store((found.entropy if given is None else stats.delta) + at, sums, mask=is_there)


@triton.jit
def key_statistics_kernel(
    q, k, found, stats, terms, sizes, schedule, F: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """``found``, an ``OfKeys``, of ``BLOCK_N`` keys as one query head sees them."""
    BLOCK_QK: tl.constexpr = F.block_qk
    block, of = scheduled(schedule, LAST_FIRST=False)
    heads_q = number(sizes.heads_q)
    head = open_head(of // heads_q, of % heads_q, terms, sizes, F)
    band = head.band
    j0 = block * BLOCK_N
    if j0 >= band.s_kv:
        return

    k_rows = head_matrix(k, head.b, head.h_kv, head.begin_kv, F.vector, F.contiguous)
    q_rows = head_matrix(q, head.b, head.h, head.begin_q, F.vector, F.contiguous)
    first, last = tile_range(j0 * 0, band.s_q, band, F.left, F.right)  # keys that no row keeps may hold NaN
    k_at = operand(k_rows, j0, first, last, F.left, F.d_qk, BLOCK_N, BLOCK_QK, F)
    j = j0 + tl.arange(0, BLOCK_N)
    at = row_offset(stats, head)
    sums, most = tl.zeros([BLOCK_N], tl.float32), tl.zeros([BLOCK_N], tl.float32)
    _low, _high, begin, full_begin, full_end, end = tiles(
        block, head.b, transposed(band), terms, BLOCK_N, BLOCK_M, F.right, F.left, F
    )  # fmt: skip
    visits, begin, end = visits_of(block, head.b, head.h_kv, begin, end, terms, F)
    for n in tl.range(begin, end):
        tile, is_full = visited(n, visits, full_begin, full_end, F)
        i0 = tile * BLOCK_M
        i = i0 + tl.arange(0, BLOCK_M)
        q_at = operand(q_rows, i0, 0, band.s_q, False, F.d_qk, BLOCK_M, BLOCK_QK, F)
        raw = product(k_at, q_at, F.d_qk, BLOCK_N, BLOCK_M, BLOCK_QK, F)  # [BLOCK_N, BLOCK_M]
        lse, low_log2 = load_lse(stats, at, i, band.s_q)
        p, _log, _t = logged_weights(
            raw, lse[None, :], low_log2[None, :], head, i[None, :], j[:, None], i0, j0, is_full, True, F
        )
        sums += tl.sum(p, 1)
        most = tl.maximum(most, tl.max(p, 1), propagate_nan=tl.PropagateNan.ALL)

    at = key_offset(found, head) + j
    tl.store(found.key_sum + at, sums, mask=j < band.s_kv)
    tl.store(found.key_max + at, most, mask=j < band.s_kv)


@triton.jit
def statistics_gradients(
    raw, rows, given, dkeys, stats, head, i, j, i0, j0, is_full, TRANSPOSED: tl.constexpr, F: tl.constexpr
):  # fmt: skip
    """``(dt, ds)`` of one tile; ``rows`` is the ``OfRows`` that holds ``largest_key``, ``given`` the gradients."""
    s_q, s_kv = head.band.s_q, head.band.s_kv
    at = row_offset(stats, head) + i
    lse, low_log2 = load_lse(stats, row_offset(stats, head), i, s_q)
    p, log2_p, t = logged_weights(raw, lse, low_log2, head, i, j, i0, j0, is_full, TRANSPOSED, F)
    dentropy = tl.load(given.entropy + at, mask=i < s_q, other=0.0)
    dlargest = tl.load(given.largest_logit + at, mask=i < s_q, other=0.0)
    key = tl.load(rows.largest_key + at, mask=i < s_q, other=-1).to(tl.int32)
    dkey = tl.load(dkeys.key_sum + key_offset(dkeys, head) + j, mask=j < s_kv, other=0.0)
    dp = weight_gradients(log2_p, dentropy, dkey)
    dt = p * (dp - load_delta(stats, row_offset(stats, head), i, s_q)) + tl.where(j == key, dlargest, 0.0)
    if F.softcap:
        return dt, dt * (1.0 - t * t)
    return dt, dt


@triton.jit
def statistics_dk_kernel(
    q, k, dk, rows, given, dkeys, stats, terms, sizes, schedule, F: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """``dk`` of ``BLOCK_N`` key rows of one key/value head, summed over the query heads that share it."""
    BLOCK_QK: tl.constexpr = F.block_qk
    block, of = scheduled(schedule, LAST_FIRST=False)
    group = number(sizes.group)
    heads_kv = number(sizes.heads_q) // group
    b, h_kv = of // heads_kv, of % heads_kv
    begin_q, begin_kv, band = open_band(b, terms, sizes, F)
    j0 = block * BLOCK_N
    if j0 >= band.s_kv:
        return

    k_rows = head_matrix(k, b, h_kv, begin_kv, F.vector, F.contiguous)
    first, last = tile_range(j0 * 0, band.s_q, band, F.left, F.right)  # keys that no row keeps may hold NaN
    k_at = operand(k_rows, j0, first, last, F.left, F.d_qk, BLOCK_N, BLOCK_QK, F)
    j = j0 + tl.arange(0, BLOCK_N)
    acc = tl.zeros([BLOCK_N, BLOCK_QK], tl.float32)
    _low, _high, begin, full_begin, full_end, end = tiles(
        block, b, transposed(band), terms, BLOCK_N, BLOCK_M, F.right, F.left, F
    )  # fmt: skip
    visits, begin, end = visits_of(block, b, h_kv, begin, end, terms, F)
    count = end - begin
    for n in tl.range(0, count * group):
        head = head_in(b, h_kv * group + n // count, begin_q, begin_kv, band, terms, sizes, F)
        q_rows = head_matrix(q, b, head.h, head.begin_q, F.vector, F.contiguous)
        tile, is_full = visited(begin + n % count, visits, full_begin, full_end, F)
        i0 = tile * BLOCK_M
        i = i0 + tl.arange(0, BLOCK_M)
        q_at = operand(q_rows, i0, 0, band.s_q, False, F.d_qk, BLOCK_M, BLOCK_QK, F)
        raw = product(k_at, q_at, F.d_qk, BLOCK_N, BLOCK_M, BLOCK_QK, F)  # [BLOCK_N, BLOCK_M]
        _dt, ds = statistics_gradients(
            raw, rows, given, dkeys, stats, head, i[None, :], j[:, None], i0, j0, is_full, True, F
        )
        q_tile = whole(q_at, False, F.d_qk, BLOCK_M, BLOCK_QK, F)
        acc = tl.dot(left_operand(ds, q_tile.dtype, F), q_tile, acc, input_precision=F.precision)

    _, begin_kv, _ = open_band(b, terms, sizes, F)  # recomputed, so that it occupies no register in the loop
    dk_rows = head_matrix(dk, b, h_kv, begin_kv, F.vector_out, True)
    store_rows(dk_rows, j0, band.s_kv, acc * sizes.scale, F.d_qk, BLOCK_N, BLOCK_QK)


@triton.jit
def statistics_dq_kernel(
    q, k, dq, rows, given, dkeys, stats, terms, sizes, schedule, F: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """``dq`` of ``BLOCK_M`` query rows of one head."""
    BLOCK_QK: tl.constexpr = F.block_qk
    block, of = scheduled(schedule, LAST_FIRST=F.right)
    heads_q = number(sizes.heads_q)
    head = open_head(of // heads_q, of % heads_q, terms, sizes, F)
    i0 = block * BLOCK_M
    if i0 >= head.band.s_q:
        return

    k_rows = head_matrix(k, head.b, head.h_kv, head.begin_kv, F.vector, F.contiguous)
    q_rows = head_matrix(q, head.b, head.h, head.begin_q, F.vector, F.contiguous)
    q_at = operand(q_rows, i0, 0, head.band.s_q, False, F.d_qk, BLOCK_M, BLOCK_QK, F)
    i = i0 + tl.arange(0, BLOCK_M)
    acc = tl.zeros([BLOCK_M, BLOCK_QK], tl.float32)
    low, high, begin, full_begin, full_end, end = tiles(
        block, head.b, head.band, terms, BLOCK_M, BLOCK_N, F.left, F.right, F
    )
    visits, begin, end = visits_of(block, head.b, head.h, begin, end, terms, F)
    for n in tl.range(begin, end):
        tile, is_full = visited(n, visits, full_begin, full_end, F)
        j0 = tile * BLOCK_N
        j = j0 + tl.arange(0, BLOCK_N)
        k_at = operand(k_rows, j0, low, high, F.left, F.d_qk, BLOCK_N, BLOCK_QK, F)
        raw = product(q_at, k_at, F.d_qk, BLOCK_M, BLOCK_N, BLOCK_QK, F)
        _dt, ds = statistics_gradients(
            raw, rows, given, dkeys, stats, head, i[:, None], j[None, :], i0, j0, is_full, False, F
        )
        k_tile = whole(k_at, F.left, F.d_qk, BLOCK_N, BLOCK_QK, F)
        acc = tl.dot(left_operand(ds, k_tile.dtype, F), k_tile, acc, input_precision=F.precision)

    dq_rows = head_matrix(dq, head.b, head.h, head.begin_q, F.vector_out, True)
    store_rows(dq_rows, i0, head.band.s_q, acc * sizes.scale, F.d_qk, BLOCK_M, BLOCK_QK)


@triton.jit
def statistics_dbias_kernel(
    q, k, dbias, rows, given, dkeys, stats, terms, sizes, sequences, heads, F: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, SUM_ROWS: tl.constexpr, SUM_COLUMNS: tl.constexpr,
):  # fmt: skip
    """One tile of ``dbias``, as ``backward_dbias_kernel`` has it."""
    BLOCK_QK: tl.constexpr = F.block_qk
    first_b, row_block, column_block = bias_tile(sizes, BLOCK_M, BLOCK_N)
    i0, j0 = row_block * BLOCK_M, column_block * BLOCK_N
    sequences, heads = number(sequences), number(heads)
    i, j = i0 + tl.arange(0, BLOCK_M), j0 + tl.arange(0, BLOCK_N)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for n in tl.range(0, sequences * heads):
        head = open_head(first_b + n // heads, tl.program_id(1) + n % heads, terms, sizes, F)
        low, high, is_visited, is_full = visit_of_tile(row_block, column_block, head, terms, BLOCK_M, BLOCK_N, F)
        if is_visited:
            q_rows = head_matrix(q, head.b, head.h, head.begin_q, F.vector, F.contiguous)
            k_rows = head_matrix(k, head.b, head.h_kv, head.begin_kv, F.vector, F.contiguous)
            q_at = operand(q_rows, i0, 0, head.band.s_q, False, F.d_qk, BLOCK_M, BLOCK_QK, F)
            k_at = operand(k_rows, j0, low, high, F.left, F.d_qk, BLOCK_N, BLOCK_QK, F)
            raw = product(q_at, k_at, F.d_qk, BLOCK_M, BLOCK_N, BLOCK_QK, F)
            dt, _ds = statistics_gradients(
                raw, rows, given, dkeys, stats, head, i[:, None], j[None, :], i0, j0, is_full, False, F
            )
            acc += dt
    store_bias_tile(acc, dbias, first_b, row_block, column_block, sizes, BLOCK_M, BLOCK_N, SUM_ROWS, SUM_COLUMNS)
