"""The backward kernels: ``delta``, then ``dk`` with ``dv``, and ``dq``.

There are no atomics: one program computes each sum, in one order. Each kernel recomputes the probabilities from both
parts of ``lse``. With ``z`` the factors of dropout and ``t`` the tanh of softcap:

    dv    = (p * z)^T dout
    dp    = z * (dout v^T)
    dt    = p * (dp - delta)                          gradient of the finished scores
    ds    = dt * (1 - t^2)                            if softcap
    dq    = scale * ds k          dk = scale * ds^T q

``delta`` is here ``rowsum(dout * out) - dlse``: the gradient of ``lse`` enters every formula that way.
"""

# mypy: disallow-untyped-defs=False
from __future__ import annotations

import triton
import triton.language as tl

from fastattn.backends.triton.operands import left_operand
from fastattn.backends.triton.prescan import visited, visits_of
from fastattn.backends.triton.tile import (
    LOG2E,
    dot_in_chunks,
    finish,
    head_in,
    head_matrix,
    load_rows,
    masked,
    number,
    open_band,
    open_head,
    per_row,
    row_offset,
    scheduled,
    store_rows,
    survivors,
    tile_range,
    tiles,
    transposed,
)


@triton.jit
def backward_preprocess_kernel(
    out, dout, dlse, lse, lse_low, stats, terms, sizes, schedule, F: tl.constexpr, BLOCK_M: tl.constexpr
):  # fmt: skip
    """The ``Stats`` of ``BLOCK_M`` query rows. An empty row gets an ``lse`` of ``+inf``, so that its p is 0."""
    block, of = scheduled(schedule, LAST_FIRST=False)
    heads_q = number(sizes.heads_q)
    head = open_head(of // heads_q, of % heads_q, terms, sizes, F)
    s_q = head.band.s_q
    i0 = block * BLOCK_M
    if i0 >= s_q:
        return
    i = i0 + tl.arange(0, BLOCK_M)
    out_rows = head_matrix(out, head.b, head.h, head.begin_q, F.vector, F.contiguous)
    dout_rows = head_matrix(dout, head.b, head.h, head.begin_q, F.vector, F.contiguous)
    out_tile = load_rows(out_rows, i0, 0, s_q, False, F.d_v, BLOCK_M, F.block_v, F.upcast).to(tl.float32)
    dout_tile = load_rows(dout_rows, i0, 0, s_q, False, F.d_v, BLOCK_M, F.block_v, F.upcast).to(tl.float32)
    total = tl.sum(out_tile * dout_tile, 1)
    if dlse is not None:
        total -= tl.load(per_row(dlse, head) + i, mask=i < s_q, other=0.0).to(tl.float32)
    of_lse = tl.load(per_row(lse, head) + i, mask=i < s_q, other=0.0)
    of_low = tl.load(per_row(lse_low, head) + i, mask=i < s_q, other=0.0)
    at = row_offset(stats, head) + i
    tl.store(stats.lse + at, tl.where(of_lse == float("-inf"), float("inf"), of_lse), mask=i < s_q)
    tl.store(stats.low_log2 + at, of_low * LOG2E, mask=i < s_q)
    tl.store(stats.delta + at, total, mask=i < s_q)


@triton.jit
def load_lse(stats, at, i, s_q):
    """``(lse, low_log2)`` of rows ``i`` of the head whose rows begin at ``at``; such that p is 0 past the last row."""
    lse = tl.load(stats.lse + at + i, mask=i < s_q, other=float("inf"))
    return lse, tl.load(stats.low_log2 + at + i, mask=i < s_q, other=0.0)


@triton.jit
def load_delta(stats, at, i, s_q):
    """``delta`` of rows ``i``."""
    return tl.load(stats.delta + at + i, mask=i < s_q, other=0.0)


@triton.jit
def log2_probabilities(
    raw, lse, low_log2, head, i, j, i0, j0, is_full, TRANSPOSED: tl.constexpr, F: tl.constexpr
):  # fmt: skip
    """``(log2 p, t)`` of one tile, from ``raw = q @ k^T`` or its transpose."""
    scores, t = finish(raw, head, i, j, i0, j0, F)
    scores = masked(scores, head, i, j, i0, j0, is_full, TRANSPOSED, F)
    # The product is not rounded: softmax_end does not round that of the largest score either.
    scores = tl.fma(scores, head.scale, -lse) if F.plain else scores - lse
    return scores * LOG2E - low_log2, t


@triton.jit
def probabilities(
    raw, lse, low_log2, head, i, j, i0, j0, is_full, TRANSPOSED: tl.constexpr, F: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """``(p, spared, t)`` of one tile, from ``raw = q @ k^T`` or its transpose; dropout keeps p where ``spared``."""
    log2_p, t = log2_probabilities(raw, lse, low_log2, head, i, j, i0, j0, is_full, TRANSPOSED, F)
    p = tl.exp2(log2_p)
    spared = p
    if F.dropout:
        spared = survivors(head, i0, j0, BLOCK_M, BLOCK_N, TRANSPOSED)
    return p, spared, t


@triton.jit
def score_gradients(p, spared, t, dp, of_delta, dropout_scale, F: tl.constexpr):
    """``(dt, ds)`` of one tile, from ``dp = dout @ v^T``."""
    if F.dropout:
        dp = tl.where(spared, dp * dropout_scale, 0.0)
    dt = p * (dp - of_delta)
    if F.softcap:
        return dt, dt * (1.0 - t * t)
    return dt, dt


@triton.jit
def backward_dkdv_kernel(
    q, k, v, dout, dk, dv, stats, terms, sizes, schedule, F: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr,
):  # fmt: skip
    """``dk`` and ``dv`` of ``BLOCK_N`` key rows of one key/value head, summed over the query heads that share it.

    With DK or DV alone it computes one of them, and leaves the memory of the other as it is.
    With ``schedule.parts`` each program sums a part of these heads: ``sizes.group`` of them, as if they were a group.
    ``dk`` and ``dv`` then have a head for each part.
    """
    BLOCK_QK: tl.constexpr = F.block_qk
    BLOCK_V: tl.constexpr = F.block_v
    block, of = scheduled(schedule, LAST_FIRST=False)
    group = number(sizes.group)
    heads_kv = number(sizes.heads_q) // group
    b, part = of // heads_kv, of % heads_kv
    h_kv = part
    if schedule.parts is not None:
        h_kv = part // number(schedule.parts)
    begin_q, begin_kv, band = open_band(b, terms, sizes, F)
    j0 = block * BLOCK_N
    if j0 >= band.s_kv:
        return

    k_rows, v_rows = (
        head_matrix(k, b, h_kv, begin_kv, F.vector, F.contiguous),
        head_matrix(v, b, h_kv, begin_kv, F.vector, F.contiguous),
    )
    first, last = tile_range(j0 * 0, band.s_q, band, F.left, F.right)  # keys that no row keeps may hold NaN
    if not F.in_chunks:
        k_tile = load_rows(k_rows, j0, first, last, F.left, F.d_qk, BLOCK_N, BLOCK_QK, F.upcast)
        if DK:
            v_tile = load_rows(v_rows, j0, first, last, F.left, F.d_v, BLOCK_N, BLOCK_V, F.upcast)
    j = j0 + tl.arange(0, BLOCK_N)
    if DK:
        dk_acc = tl.zeros([BLOCK_N, BLOCK_QK], tl.float32)
    if DV:
        dv_acc = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
    _low, _high, begin, full_begin, full_end, end = tiles(
        block, b, transposed(band), terms, BLOCK_N, BLOCK_M, F.right, F.left, F
    )  # fmt: skip
    # One loop, not one over heads around one over tiles: values of a head would occupy registers of the inner loop.
    visits, begin, end = visits_of(block, b, part, begin, end, terms, F)
    count = end - begin
    for n in tl.range(0, count * group):
        head = head_in(b, part * group + n // count, begin_q, begin_kv, band, terms, sizes, F)
        q_rows = head_matrix(q, b, head.h, head.begin_q, F.vector, F.contiguous)
        dout_rows = head_matrix(dout, b, head.h, head.begin_q, F.vector, F.contiguous)
        at = row_offset(stats, head)
        tile, is_full = visited(begin + n % count, visits, full_begin, full_end, F)
        i0 = tile * BLOCK_M
        i = i0 + tl.arange(0, BLOCK_M)
        if F.in_chunks:
            raw = dot_in_chunks(k_rows, j0, first, last, q_rows, i0, 0, band.s_q, F.d_qk, BLOCK_N, BLOCK_M, BLOCK_QK, F)
        else:
            q_tile = load_rows(q_rows, i0, 0, band.s_q, False, F.d_qk, BLOCK_M, BLOCK_QK, F.upcast)
            raw = tl.dot(k_tile, tl.trans(q_tile), input_precision=F.precision)  # [BLOCK_N, BLOCK_M]
        lse, low_log2 = load_lse(stats, at, i, band.s_q)
        p, spared, t = probabilities(
            raw, lse[None, :], low_log2[None, :], head, i[None, :], j[:, None], i0, j0, is_full, True, F, BLOCK_M,
            BLOCK_N,
        )  # fmt: skip
        if DK and F.in_chunks:
            dp = dot_in_chunks(v_rows, j0, first, last, dout_rows, i0, 0, band.s_q, F.d_v, BLOCK_N, BLOCK_M, BLOCK_V, F)
        if DV or not F.in_chunks:
            dout_tile = load_rows(dout_rows, i0, 0, band.s_q, False, F.d_v, BLOCK_M, BLOCK_V, F.upcast)
        if DV:
            p_dropped = tl.where(spared, p, 0.0) if F.dropout else p
            dv_acc = tl.dot(left_operand(p_dropped, dout_tile.dtype, F), dout_tile, dv_acc, input_precision=F.precision)
        if DK:
            if F.in_chunks:
                q_tile = load_rows(q_rows, i0, 0, band.s_q, False, F.d_qk, BLOCK_M, BLOCK_QK, F.upcast)
            else:
                dp = tl.dot(v_tile, tl.trans(dout_tile), input_precision=F.precision)
            of_delta = load_delta(stats, at, i, band.s_q)  # as late as possible: a thread holds many columns
            _dt, ds = score_gradients(p, spared, t, dp, of_delta[None, :], sizes.dropout_scale, F)
            dk_acc = tl.dot(left_operand(ds, q_tile.dtype, F), q_tile, dk_acc, input_precision=F.precision)

    _, begin_kv, _ = open_band(b, terms, sizes, F)  # recomputed, so that it occupies no register in the loop
    if DK:
        rows = head_matrix(dk, b, part, begin_kv, F.vector_out, True)
        store_rows(rows, j0, band.s_kv, dk_acc * sizes.scale, F.d_qk, BLOCK_N, BLOCK_QK)
    if DV:
        if F.dropout:
            dv_acc *= sizes.dropout_scale
        rows = head_matrix(dv, b, part, begin_kv, F.vector_out, True)
        store_rows(rows, j0, band.s_kv, dv_acc, F.d_v, BLOCK_N, BLOCK_V)


@triton.jit
def backward_dq_kernel(
    q, k, v, dout, dq, stats, terms, sizes, schedule, F: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """``dq`` of ``BLOCK_M`` query rows of one head."""
    BLOCK_QK: tl.constexpr = F.block_qk
    BLOCK_V: tl.constexpr = F.block_v
    block, of = scheduled(schedule, LAST_FIRST=F.right)
    heads_q = number(sizes.heads_q)
    head = open_head(of // heads_q, of % heads_q, terms, sizes, F)
    s_q = head.band.s_q
    i0 = block * BLOCK_M
    if i0 >= s_q:
        return

    k_rows = head_matrix(k, head.b, head.h_kv, head.begin_kv, F.vector, F.contiguous)
    v_rows = head_matrix(v, head.b, head.h_kv, head.begin_kv, F.vector, F.contiguous)
    q_rows = head_matrix(q, head.b, head.h, head.begin_q, F.vector, F.contiguous)
    dout_rows = head_matrix(dout, head.b, head.h, head.begin_q, F.vector, F.contiguous)
    if not F.in_chunks:
        q_tile = load_rows(q_rows, i0, 0, s_q, False, F.d_qk, BLOCK_M, BLOCK_QK, F.upcast)
        dout_tile = load_rows(dout_rows, i0, 0, s_q, False, F.d_v, BLOCK_M, BLOCK_V, F.upcast)
    i = i0 + tl.arange(0, BLOCK_M)
    at = row_offset(stats, head)
    lse, low_log2 = load_lse(stats, at, i, s_q)
    of_delta = load_delta(stats, at, i, s_q)
    dq_acc = tl.zeros([BLOCK_M, BLOCK_QK], tl.float32)
    low, high, begin, full_begin, full_end, end = tiles(
        block, head.b, head.band, terms, BLOCK_M, BLOCK_N, F.left, F.right, F
    )
    visits, begin, end = visits_of(block, head.b, head.h, begin, end, terms, F)
    for n in tl.range(begin, end):
        tile, is_full = visited(n, visits, full_begin, full_end, F)
        j0 = tile * BLOCK_N
        j = j0 + tl.arange(0, BLOCK_N)
        if F.in_chunks:
            raw = dot_in_chunks(q_rows, i0, 0, s_q, k_rows, j0, low, high, F.d_qk, BLOCK_M, BLOCK_N, BLOCK_QK, F)
        else:
            k_tile = load_rows(k_rows, j0, low, high, F.left, F.d_qk, BLOCK_N, BLOCK_QK, F.upcast)
            raw = tl.dot(q_tile, tl.trans(k_tile), input_precision=F.precision)  # [BLOCK_M, BLOCK_N]
        p, spared, t = probabilities(
            raw, lse[:, None], low_log2[:, None], head, i[:, None], j[None, :], i0, j0, is_full, False, F, BLOCK_M,
            BLOCK_N,
        )  # fmt: skip
        if F.in_chunks:
            dp = dot_in_chunks(dout_rows, i0, 0, s_q, v_rows, j0, low, high, F.d_v, BLOCK_M, BLOCK_N, BLOCK_V, F)
            k_tile = load_rows(k_rows, j0, low, high, F.left, F.d_qk, BLOCK_N, BLOCK_QK, F.upcast)
        else:
            v_tile = load_rows(v_rows, j0, low, high, F.left, F.d_v, BLOCK_N, BLOCK_V, F.upcast)
            dp = tl.dot(dout_tile, tl.trans(v_tile), input_precision=F.precision)
        _dt, ds = score_gradients(p, spared, t, dp, of_delta[:, None], sizes.dropout_scale, F)
        dq_acc = tl.dot(left_operand(ds, k_tile.dtype, F), k_tile, dq_acc, input_precision=F.precision)

    dq_rows = head_matrix(dq, head.b, head.h, head.begin_q, F.vector_out, True)
    store_rows(dq_rows, i0, s_q, dq_acc * sizes.scale, F.d_qk, BLOCK_M, BLOCK_QK)
