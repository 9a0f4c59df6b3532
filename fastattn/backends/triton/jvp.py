"""The Jacobian-vector product of the forward pass: how ``out`` and ``lse`` move when the inputs move along tangents.

``lse`` is known, so the weights p are, and one pass over the tiles is enough. With z the factors of dropout:

    t    = slope * scale * (q' k^T + q k'^T) + bias'          slope: the derivative of softcap, 1 without
    lse' = sum p t + p_sink sink'
    out' = sum p z (t v + v') - lse' out
"""

# mypy: disallow-untyped-defs=False
from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from fastattn.backends.triton.backward import probabilities
from fastattn.backends.triton.operands import left_operand, operand, product
from fastattn.backends.triton.prescan import visited, visits_of
from fastattn.backends.triton.tile import (
    LOG2E,
    head_matrix,
    load_per_head,
    load_rows,
    load_scores,
    number,
    open_head,
    per_row,
    scheduled,
    score_matrix,
    store_rows,
    tiles,
)


class Moved(NamedTuple):
    """The tangents of the inputs and of ``dout``, described as these are; None where one stands still."""

    q: Any
    k: Any
    v: Any
    bias: Any
    sinks: Any
    dout: Any = None


@triton.jit
def moved_scores(moved, tanh, bias, head, i, j, i0, j0, F: tl.constexpr):
    """``(t, bend)``: the tangents of finished scores and of the slope of softcap, from that of their products.

    ``tanh`` is that of the softcap; ``bias`` is the tangent of the bias or None.
    """
    t = moved * head.scale
    bend = t
    if F.softcap:
        t *= 1.0 - tanh * tanh
        bend = -2.0 * tanh * t / head.softcap
    if bias is not None:
        t += load_scores(score_matrix(bias, head.b, head.h, 1), head.band, i, j, i0, j0, 1).to(tl.float32)
    return t, bend


@triton.jit
def moved_products(
    a, b, a_moved, b_moved, MOVES_A: tl.constexpr, MOVES_B: tl.constexpr, D: tl.constexpr, BLOCK_A: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr, F: tl.constexpr,
):  # fmt: skip
    """``a' b^T + a b'^T``, ``[BLOCK_A, BLOCK_B]``; zeros if neither moves."""
    found = tl.zeros([BLOCK_A, BLOCK_B], tl.float32)
    if MOVES_A:
        found += product(a_moved, b, D, BLOCK_A, BLOCK_B, BLOCK_D, F)
    if MOVES_B:
        found += product(a, b_moved, D, BLOCK_A, BLOCK_B, BLOCK_D, F)
    return found


@triton.jit
def jvp_kernel(
    q, k, v, moved, out, lse, lse_low, out_moved, lse_moved, terms, sizes, schedule, F: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """``out_moved`` and ``lse_moved`` of ``BLOCK_M`` query rows of one head."""
    BLOCK_QK: tl.constexpr = F.block_qk
    BLOCK_V: tl.constexpr = F.block_v
    MOVES_Q: tl.constexpr = moved.q is not None
    MOVES_K: tl.constexpr = moved.k is not None
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
    q_at = operand(q_rows, i0, 0, s_q, False, F.d_qk, BLOCK_M, BLOCK_QK, F)
    q_moved = q_at
    if MOVES_Q:
        q_moved_rows = head_matrix(moved.q, head.b, head.h, head.begin_q, F.vector, F.contiguous)
        q_moved = operand(q_moved_rows, i0, 0, s_q, False, F.d_qk, BLOCK_M, BLOCK_QK, F)
    i = i0 + tl.arange(0, BLOCK_M)
    row_lse = tl.load(per_row(lse, head) + i, mask=i < s_q, other=float("-inf"))
    row_lse = tl.where(row_lse == float("-inf"), float("inf"), row_lse)  # such that weights of empty rows are 0
    low_log2 = tl.load(per_row(lse_low, head) + i, mask=i < s_q, other=0.0) * LOG2E
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
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
        k_moved = k_at
        if MOVES_K:
            k_moved_rows = head_matrix(moved.k, head.b, head.h_kv, head.begin_kv, F.vector, F.contiguous)
            k_moved = operand(k_moved_rows, j0, low, high, F.left, F.d_qk, BLOCK_N, BLOCK_QK, F)
        raw_moved = moved_products(
            q_at, k_at, q_moved, k_moved, MOVES_Q, MOVES_K, F.d_qk, BLOCK_M, BLOCK_N, BLOCK_QK, F
        )
        p, spared, tanh = probabilities(
            raw, row_lse[:, None], low_log2[:, None], head, i[:, None], j[None, :], i0, j0, is_full, False, F, BLOCK_M,
            BLOCK_N,
        )  # fmt: skip
        t, _bend = moved_scores(raw_moved, tanh, moved.bias, head, i[:, None], j[None, :], i0, j0, F)
        w = tl.where(p == 0.0, 0.0, p * t)  # what is not kept may move along anything
        total += tl.sum(w, 1)
        if F.dropout:
            w, p = tl.where(spared, w, 0.0), tl.where(spared, p, 0.0)
        v_tile = load_rows(v_rows, j0, low, high, F.left, F.d_v, BLOCK_N, BLOCK_V, F.upcast)
        acc = tl.dot(left_operand(w, v_tile.dtype, F), v_tile, acc, input_precision=F.precision)
        if moved.v is not None:
            v_moved_rows = head_matrix(moved.v, head.b, head.h_kv, head.begin_kv, F.vector, F.contiguous)
            v_moved_tile = load_rows(v_moved_rows, j0, low, high, F.left, F.d_v, BLOCK_N, BLOCK_V, F.upcast)
            acc = tl.dot(left_operand(p, v_moved_tile.dtype, F), v_moved_tile, acc, input_precision=F.precision)

    if moved.sinks is not None:
        sink = load_per_head(terms.sinks, head.b, head.h)
        total += tl.exp2((sink - row_lse) * LOG2E - low_log2) * load_per_head(moved.sinks, head.b, head.h)
    if F.dropout:
        acc *= sizes.dropout_scale
    out_rows = head_matrix(out, head.b, head.h, head.begin_q, F.vector_out, True)
    acc -= load_rows(out_rows, i0, 0, s_q, False, F.d_v, BLOCK_M, BLOCK_V, F.upcast).to(tl.float32) * total[:, None]
    moved_rows = head_matrix(out_moved, head.b, head.h, head.begin_q, F.vector_out, True)
    store_rows(moved_rows, i0, s_q, acc, F.d_v, BLOCK_M, BLOCK_V)
    tl.store(per_row(lse_moved, head) + i, total, mask=i < s_q)
