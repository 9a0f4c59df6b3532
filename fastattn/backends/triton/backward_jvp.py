"""The Jacobian-vector product of the backward pass: how gradients move when inputs and ``dout`` move along tangents.

It serves double backward, forward over reverse and products with a Hessian alike. With the terms of ``backward.py`` and
``jvp.py``, ``z`` the factors of dropout and ``bend`` the tangent of the slope of softcap:

    p'  = p (t - lse')                       dp' = z (dout' v^T + dout v'^T)
    dt' = p' (dp - delta) + p (dp' - delta')         delta' = rowsum(dout' out + dout out') - dlse'
    ds' = slope dt' + bend dt                dbias' = dt'
    dq' = scale (ds' k + ds k')              dk' = scale (ds'^T q + ds^T q')
    dv' = (p' z)^T dout + (p z)^T dout'      dsink' = -sum p_sink ((sink' - lse') delta + delta')

``lse'`` and ``delta'`` are in a second ``Stats``, which has no ``low_log2``.
"""

# mypy: disallow-untyped-defs=False
from __future__ import annotations

import triton
import triton.language as tl

from fastattn.backends.triton.backward import load_delta, load_lse, probabilities
from fastattn.backends.triton.jvp import moved_products, moved_scores
from fastattn.backends.triton.operands import left_operand, operand, product, whole
from fastattn.backends.triton.prescan import visited, visits_of
from fastattn.backends.triton.reductions import bias_tile, store_bias_tile, visit_of_tile
from fastattn.backends.triton.tile import (
    LOG2E,
    head_in,
    head_matrix,
    load_per_head,
    load_rows,
    number,
    open_band,
    open_head,
    per_row,
    row_offset,
    scheduled,
    store_rows,
    tile_range,
    tiles,
    transposed,
)


@triton.jit
def row_products(a, b, head, i0, F: tl.constexpr, BLOCK_M: tl.constexpr):
    """The sums over the head dim of products of two tensors of query rows; ``b`` is contiguous."""
    a_rows = head_matrix(a, head.b, head.h, head.begin_q, F.vector, F.contiguous)
    b_rows = head_matrix(b, head.b, head.h, head.begin_q, F.vector_out, True)
    a_tile = load_rows(a_rows, i0, 0, head.band.s_q, False, F.d_v, BLOCK_M, F.block_v, F.upcast).to(tl.float32)
    b_tile = load_rows(b_rows, i0, 0, head.band.s_q, False, F.d_v, BLOCK_M, F.block_v, F.upcast).to(tl.float32)
    return tl.sum(a_tile * b_tile, 1)


@triton.jit
def backward_jvp_preprocess_kernel(
    out, dout, out_moved, dout_moved, lse_moved, dlse_moved, stats, terms, sizes, schedule, F: tl.constexpr,
    BLOCK_M: tl.constexpr,
):  # fmt: skip
    """``lse'`` and ``delta'`` of ``BLOCK_M`` query rows, into ``stats``."""
    block, of = scheduled(schedule, LAST_FIRST=False)
    heads_q = number(sizes.heads_q)
    head = open_head(of // heads_q, of % heads_q, terms, sizes, F)
    i0 = block * BLOCK_M
    if i0 >= head.band.s_q:
        return
    i = i0 + tl.arange(0, BLOCK_M)
    is_there = i < head.band.s_q
    total = row_products(dout, out_moved, head, i0, F, BLOCK_M)
    if dout_moved is not None:
        total += row_products(dout_moved, out, head, i0, F, BLOCK_M)
    if dlse_moved is not None:
        total -= tl.load(per_row(dlse_moved, head) + i, mask=is_there, other=0.0).to(tl.float32)
    at = row_offset(stats, head) + i
    tl.store(stats.lse + at, tl.load(per_row(lse_moved, head) + i, mask=is_there, other=0.0), mask=is_there)
    tl.store(stats.delta + at, total, mask=is_there)


@triton.jit
def load_moved_lse(stats, at, i, s_q):
    """``lse'`` of rows ``i``."""
    return tl.load(stats.lse + at + i, mask=i < s_q, other=0.0)


@triton.jit
def moved_gradients(
    raw, raw_moved, dp, dp_moved, bias, stats, moving, head, i, j, i0, j0, is_full, dropout_scale,
    TRANSPOSED: tl.constexpr, F: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """``(p z, p' z, dt', ds, ds')`` of one tile, from products and their tangents."""
    s_q, at = head.band.s_q, row_offset(stats, head)
    lse, low_log2 = load_lse(stats, at, i, s_q)
    p, spared, tanh = probabilities(
        raw, lse, low_log2, head, i, j, i0, j0, is_full, TRANSPOSED, F, BLOCK_M, BLOCK_N
    )  # fmt: skip
    t, bend = moved_scores(raw_moved, tanh, bias, head, i, j, i0, j0, F)
    p_moved = tl.where(p == 0.0, 0.0, p * (t - load_moved_lse(moving, at, i, s_q)))  # t of others may be anything
    if F.dropout:
        dp, dp_moved = tl.where(spared, dp * dropout_scale, 0.0), tl.where(spared, dp_moved * dropout_scale, 0.0)
    apart = dp - load_delta(stats, at, i, s_q)
    dt_moved = p_moved * apart + p * (dp_moved - load_delta(moving, at, i, s_q))
    ds, ds_moved = p * apart, dt_moved
    if F.softcap:
        slope = 1.0 - tanh * tanh
        ds_moved = slope * dt_moved + tl.where(p == 0.0, 0.0, bend * ds)
        ds *= slope
    if F.dropout:
        p, p_moved = tl.where(spared, p, 0.0), tl.where(spared, p_moved, 0.0)
    return p, p_moved, dt_moved, ds, ds_moved


@triton.jit
def backward_jvp_dkdv_kernel(
    q, k, v, dout, moved, dk, dv, stats, moving, terms, sizes, schedule, F: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """``dk'`` and ``dv'``, or one of them, of ``BLOCK_N`` key rows, summed over the query heads that share them."""
    BLOCK_QK: tl.constexpr = F.block_qk
    BLOCK_V: tl.constexpr = F.block_v
    MOVES_Q: tl.constexpr = moved.q is not None
    MOVES_K: tl.constexpr = moved.k is not None
    MOVES_V: tl.constexpr = moved.v is not None
    MOVES_DOUT: tl.constexpr = moved.dout is not None
    block, of = scheduled(schedule, LAST_FIRST=False)
    group = number(sizes.group)
    heads_kv = number(sizes.heads_q) // group
    b, h_kv = of // heads_kv, of % heads_kv
    begin_q, begin_kv, band = open_band(b, terms, sizes, F)
    j0 = block * BLOCK_N
    if j0 >= band.s_kv:
        return

    first, last = tile_range(j0 * 0, band.s_q, band, F.left, F.right)  # keys that no row keeps may hold NaN
    k_rows = head_matrix(k, b, h_kv, begin_kv, F.vector, F.contiguous)
    v_rows = head_matrix(v, b, h_kv, begin_kv, F.vector, F.contiguous)
    k_at = operand(k_rows, j0, first, last, F.left, F.d_qk, BLOCK_N, BLOCK_QK, F)
    v_at = operand(v_rows, j0, first, last, F.left, F.d_v, BLOCK_N, BLOCK_V, F)
    k_moved, v_moved = k_at, v_at
    if MOVES_K:
        k_rows = head_matrix(moved.k, b, h_kv, begin_kv, F.vector, F.contiguous)
        k_moved = operand(k_rows, j0, first, last, F.left, F.d_qk, BLOCK_N, BLOCK_QK, F)
    if MOVES_V:
        v_rows = head_matrix(moved.v, b, h_kv, begin_kv, F.vector, F.contiguous)
        v_moved = operand(v_rows, j0, first, last, F.left, F.d_v, BLOCK_N, BLOCK_V, F)
    j = j0 + tl.arange(0, BLOCK_N)
    dk_acc = tl.zeros([BLOCK_N, BLOCK_QK], tl.float32)
    dv_acc = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
    _low, _high, begin, full_begin, full_end, end = tiles(
        block, b, transposed(band), terms, BLOCK_N, BLOCK_M, F.right, F.left, F
    )  # fmt: skip
    visits, begin, end = visits_of(block, b, h_kv, begin, end, terms, F)
    count = end - begin
    for n in tl.range(0, count * group):
        head = head_in(b, h_kv * group + n // count, begin_q, begin_kv, band, terms, sizes, F)
        tile, is_full = visited(begin + n % count, visits, full_begin, full_end, F)
        i0 = tile * BLOCK_M
        i = i0 + tl.arange(0, BLOCK_M)
        q_rows = head_matrix(q, b, head.h, head.begin_q, F.vector, F.contiguous)
        dout_rows = head_matrix(dout, b, head.h, head.begin_q, F.vector, F.contiguous)
        q_at = operand(q_rows, i0, 0, band.s_q, False, F.d_qk, BLOCK_M, BLOCK_QK, F)
        dout_at = operand(dout_rows, i0, 0, band.s_q, False, F.d_v, BLOCK_M, BLOCK_V, F)
        q_moved, dout_moved = q_at, dout_at
        if MOVES_Q:
            q_rows = head_matrix(moved.q, b, head.h, head.begin_q, F.vector, F.contiguous)
            q_moved = operand(q_rows, i0, 0, band.s_q, False, F.d_qk, BLOCK_M, BLOCK_QK, F)
        if MOVES_DOUT:
            dout_rows = head_matrix(moved.dout, b, head.h, head.begin_q, F.vector, F.contiguous)
            dout_moved = operand(dout_rows, i0, 0, band.s_q, False, F.d_v, BLOCK_M, BLOCK_V, F)
        raw = product(k_at, q_at, F.d_qk, BLOCK_N, BLOCK_M, BLOCK_QK, F)  # [BLOCK_N, BLOCK_M]
        dp = product(v_at, dout_at, F.d_v, BLOCK_N, BLOCK_M, BLOCK_V, F)
        raw_moved = moved_products(
            k_at, q_at, k_moved, q_moved, MOVES_K, MOVES_Q, F.d_qk, BLOCK_N, BLOCK_M, BLOCK_QK, F
        )
        dp_moved = moved_products(
            v_at, dout_at, v_moved, dout_moved, MOVES_V, MOVES_DOUT, F.d_v, BLOCK_N, BLOCK_M, BLOCK_V, F
        )
        p, p_moved, _dt, ds, ds_moved = moved_gradients(
            raw, raw_moved, dp, dp_moved, moved.bias, stats, moving, head, i[None, :], j[:, None], i0, j0, is_full,
            sizes.dropout_scale, True, F, BLOCK_M, BLOCK_N,
        )  # fmt: skip
        if dv is not None:
            dout_tile = whole(dout_at, False, F.d_v, BLOCK_M, BLOCK_V, F)
            dv_acc = tl.dot(left_operand(p_moved, dout_tile.dtype, F), dout_tile, dv_acc, input_precision=F.precision)
            if MOVES_DOUT:
                dout_tile = whole(dout_moved, False, F.d_v, BLOCK_M, BLOCK_V, F)
                dv_acc = tl.dot(left_operand(p, dout_tile.dtype, F), dout_tile, dv_acc, input_precision=F.precision)
        if dk is not None:
            q_tile = whole(q_at, False, F.d_qk, BLOCK_M, BLOCK_QK, F)
            dk_acc = tl.dot(left_operand(ds_moved, q_tile.dtype, F), q_tile, dk_acc, input_precision=F.precision)
            if MOVES_Q:
                q_tile = whole(q_moved, False, F.d_qk, BLOCK_M, BLOCK_QK, F)
                dk_acc = tl.dot(left_operand(ds, q_tile.dtype, F), q_tile, dk_acc, input_precision=F.precision)

    _, begin_kv, _ = open_band(b, terms, sizes, F)  # recomputed, so that it occupies no register in the loop
    if dk is not None:
        dk_rows = head_matrix(dk, b, h_kv, begin_kv, F.vector_out, True)
        store_rows(dk_rows, j0, band.s_kv, dk_acc * sizes.scale, F.d_qk, BLOCK_N, BLOCK_QK)
    if dv is not None:
        if F.dropout:
            dv_acc *= sizes.dropout_scale
        dv_rows = head_matrix(dv, b, h_kv, begin_kv, F.vector_out, True)
        store_rows(dv_rows, j0, band.s_kv, dv_acc, F.d_v, BLOCK_N, BLOCK_V)


@triton.jit
def moving_tile(
    q, k, v, dout, moved, i0, j0, low, high, head, F: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """``(q k^T, its tangent, dout v^T, its tangent, k, k')`` of one tile, ``[BLOCK_M, BLOCK_N]``; keys as operands."""
    BLOCK_QK: tl.constexpr = F.block_qk
    BLOCK_V: tl.constexpr = F.block_v
    MOVES_Q: tl.constexpr = moved.q is not None
    MOVES_K: tl.constexpr = moved.k is not None
    MOVES_V: tl.constexpr = moved.v is not None
    MOVES_DOUT: tl.constexpr = moved.dout is not None
    s_q = head.band.s_q
    k_rows = head_matrix(k, head.b, head.h_kv, head.begin_kv, F.vector, F.contiguous)
    v_rows = head_matrix(v, head.b, head.h_kv, head.begin_kv, F.vector, F.contiguous)
    q_rows = head_matrix(q, head.b, head.h, head.begin_q, F.vector, F.contiguous)
    dout_rows = head_matrix(dout, head.b, head.h, head.begin_q, F.vector, F.contiguous)
    q_at = operand(q_rows, i0, 0, s_q, False, F.d_qk, BLOCK_M, BLOCK_QK, F)
    k_at = operand(k_rows, j0, low, high, F.left, F.d_qk, BLOCK_N, BLOCK_QK, F)
    dout_at = operand(dout_rows, i0, 0, s_q, False, F.d_v, BLOCK_M, BLOCK_V, F)
    v_at = operand(v_rows, j0, low, high, F.left, F.d_v, BLOCK_N, BLOCK_V, F)
    q_moved, k_moved, dout_moved, v_moved = q_at, k_at, dout_at, v_at
    if MOVES_Q:
        q_rows = head_matrix(moved.q, head.b, head.h, head.begin_q, F.vector, F.contiguous)
        q_moved = operand(q_rows, i0, 0, s_q, False, F.d_qk, BLOCK_M, BLOCK_QK, F)
    if MOVES_K:
        k_rows = head_matrix(moved.k, head.b, head.h_kv, head.begin_kv, F.vector, F.contiguous)
        k_moved = operand(k_rows, j0, low, high, F.left, F.d_qk, BLOCK_N, BLOCK_QK, F)
    if MOVES_V:
        v_rows = head_matrix(moved.v, head.b, head.h_kv, head.begin_kv, F.vector, F.contiguous)
        v_moved = operand(v_rows, j0, low, high, F.left, F.d_v, BLOCK_N, BLOCK_V, F)
    if MOVES_DOUT:
        dout_rows = head_matrix(moved.dout, head.b, head.h, head.begin_q, F.vector, F.contiguous)
        dout_moved = operand(dout_rows, i0, 0, s_q, False, F.d_v, BLOCK_M, BLOCK_V, F)
    raw = product(q_at, k_at, F.d_qk, BLOCK_M, BLOCK_N, BLOCK_QK, F)
    raw_moved = moved_products(q_at, k_at, q_moved, k_moved, MOVES_Q, MOVES_K, F.d_qk, BLOCK_M, BLOCK_N, BLOCK_QK, F)
    dp = product(dout_at, v_at, F.d_v, BLOCK_M, BLOCK_N, BLOCK_V, F)
    dp_moved = moved_products(
        dout_at, v_at, dout_moved, v_moved, MOVES_DOUT, MOVES_V, F.d_v, BLOCK_M, BLOCK_N, BLOCK_V, F
    )
    return raw, raw_moved, dp, dp_moved, k_at, k_moved


@triton.jit
def backward_jvp_dq_kernel(
    q, k, v, dout, moved, dq, stats, moving, terms, sizes, schedule, F: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """``dq'`` of ``BLOCK_M`` query rows of one head."""
    BLOCK_QK: tl.constexpr = F.block_qk
    block, of = scheduled(schedule, LAST_FIRST=F.right)
    heads_q = number(sizes.heads_q)
    head = open_head(of // heads_q, of % heads_q, terms, sizes, F)
    i0 = block * BLOCK_M
    if i0 >= head.band.s_q:
        return

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
        raw, raw_moved, dp, dp_moved, k_at, k_moved = moving_tile(
            q, k, v, dout, moved, i0, j0, low, high, head, F, BLOCK_M, BLOCK_N
        )  # fmt: skip
        _p, _p_moved, _dt, ds, ds_moved = moved_gradients(
            raw, raw_moved, dp, dp_moved, moved.bias, stats, moving, head, i[:, None], j[None, :], i0, j0, is_full,
            sizes.dropout_scale, False, F, BLOCK_M, BLOCK_N,
        )  # fmt: skip
        k_tile = whole(k_at, F.left, F.d_qk, BLOCK_N, BLOCK_QK, F)
        acc = tl.dot(left_operand(ds_moved, k_tile.dtype, F), k_tile, acc, input_precision=F.precision)
        if moved.k is not None:
            k_tile = whole(k_moved, F.left, F.d_qk, BLOCK_N, BLOCK_QK, F)
            acc = tl.dot(left_operand(ds, k_tile.dtype, F), k_tile, acc, input_precision=F.precision)

    dq_rows = head_matrix(dq, head.b, head.h, head.begin_q, F.vector_out, True)
    store_rows(dq_rows, i0, head.band.s_q, acc * sizes.scale, F.d_qk, BLOCK_M, BLOCK_QK)


@triton.jit
def backward_jvp_dbias_kernel(
    q, k, v, dout, moved, dbias, stats, moving, terms, sizes, sequences, heads, F: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, SUM_ROWS: tl.constexpr, SUM_COLUMNS: tl.constexpr,
):  # fmt: skip
    """One tile of ``dbias'``, as ``backward_dbias_kernel`` has it."""
    first_b, row_block, column_block = bias_tile(sizes, BLOCK_M, BLOCK_N)
    i0, j0 = row_block * BLOCK_M, column_block * BLOCK_N
    sequences, heads = number(sequences), number(heads)
    i, j = i0 + tl.arange(0, BLOCK_M), j0 + tl.arange(0, BLOCK_N)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for n in tl.range(0, sequences * heads):
        head = open_head(first_b + n // heads, tl.program_id(1) + n % heads, terms, sizes, F)
        low, high, is_visited, is_full = visit_of_tile(row_block, column_block, head, terms, BLOCK_M, BLOCK_N, F)
        if is_visited:
            raw, raw_moved, dp, dp_moved, _k, _k_moved = moving_tile(
                q, k, v, dout, moved, i0, j0, low, high, head, F, BLOCK_M, BLOCK_N
            )  # fmt: skip
            _p, _p_moved, dt_moved, _ds, _ds_moved = moved_gradients(
                raw, raw_moved, dp, dp_moved, moved.bias, stats, moving, head, i[:, None], j[None, :], i0, j0, is_full,
                sizes.dropout_scale, False, F, BLOCK_M, BLOCK_N,
            )  # fmt: skip
            acc += dt_moved
    store_bias_tile(acc, dbias, first_b, row_block, column_block, sizes, BLOCK_M, BLOCK_N, SUM_ROWS, SUM_COLUMNS)


@triton.jit
def backward_jvp_dsinks_kernel(
    stats, moving, sinks_moved, dsinks, terms, sizes, F: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """``dsinks'`` of one head of one sequence. Grid: ``(B, H_q)``."""
    head = open_head(tl.program_id(0), tl.program_id(1), terms, sizes, F)
    s_q, at = head.band.s_q, row_offset(stats, head)
    sink = load_per_head(terms.sinks, head.b, head.h)
    sink_moved = 0.0 if sinks_moved is None else load_per_head(sinks_moved, head.b, head.h)
    total = tl.zeros([BLOCK], tl.float32)
    for n in tl.range(0, tl.cdiv(s_q, BLOCK)):
        i = n * BLOCK + tl.arange(0, BLOCK)
        lse, low_log2 = load_lse(stats, at, i, s_q)
        apart = (sink_moved - load_moved_lse(moving, at, i, s_q)) * load_delta(stats, at, i, s_q)
        total -= tl.exp2((sink - lse) * LOG2E - low_log2) * (apart + load_delta(moving, at, i, s_q))
    tl.store(dsinks.ptr + head.b * number(dsinks.stride_b) + head.h * number(dsinks.stride_h), tl.sum(total))
