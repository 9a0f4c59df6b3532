"""The forward kernel for operands in e4m3: ``forward.py`` with scales, and weights rounded to e4m3 as well."""

# mypy: disallow-untyped-defs=False
from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from fastattn.backends.triton.operands import left_operand
from fastattn.backends.triton.pages import to_e4m3
from fastattn.backends.triton.prescan import visited, visits_of
from fastattn.backends.triton.tile import (
    factor_of,
    finish,
    head_matrix,
    load_per_head,
    load_rows,
    masked,
    number,
    open_head,
    per_row,
    scheduled,
    softmax_end,
    softmax_step,
    store_rows,
    tiles,
)

# Weights are at most 1. Times 256 they use the range of e4m3: those above 2^-14 keep four significant bits.
WEIGHTS = tl.constexpr(256.0)


class Scales(NamedTuple):
    """The scales of q, k and v, each as ``PerRow`` with blocks for rows."""

    q: Any
    k: Any
    v: Any


@triton.jit
def scale_of(x, b, h, row, ROWS: tl.constexpr):
    """The scale of the block of head ``h`` that holds ``row``."""
    at = x.ptr + b.to(tl.int64) * number(x.stride_b) + h.to(tl.int64) * number(x.stride_h)
    return tl.load(at + row // ROWS)


@triton.jit
def load_columns(
    rows, j0, low, high, HAS_LOW: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr
):
    """``load_rows`` of values that lie transposed in memory, as ``[BLOCK_D, BLOCK]``."""
    d, j = tl.arange(0, BLOCK_D), j0 + tl.arange(0, BLOCK)
    valid = (j < high)[None, :]
    if HAS_LOW:
        valid = valid & (j >= low)[None, :]
    if D < BLOCK_D:
        valid = valid & (d < D)[:, None]
    return tl.load(rows.ptr + (d[:, None] * rows.stride_d + j[None, :]), mask=valid, other=0.0)


@triton.jit
def forward_fp8_kernel(
    q, k, v, scales, out, lse, lse_low, terms, sizes, schedule, F: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, ROWS: tl.constexpr, BY_BITS: tl.constexpr,
):  # fmt: skip
    """``out`` and both parts of ``lse`` of ``BLOCK_M`` query rows of one head. Blocks of ROWS rows share a scale.

    BY_BITS rounds weights without the instruction, which Triton's interpreter gets wrong where rounding carries.

    The product of weights and values starts at zero for each tile and is added in fp32: tensor cores add products of
    e4m3 with fewer bits.
    """
    BLOCK_QK: tl.constexpr = F.block_qk
    BLOCK_V: tl.constexpr = F.block_v
    block, of = scheduled(schedule, LAST_FIRST=F.right)
    heads_q = number(sizes.heads_q)
    head = open_head(of // heads_q, of % heads_q, terms, sizes, F)
    i0 = block * BLOCK_M
    if i0 >= head.band.s_q:
        return

    q_rows = head_matrix(q, head.b, head.h, head.begin_q, F.vector, True)
    k_rows = head_matrix(k, head.b, head.h_kv, head.begin_kv, F.vector, True)
    v_rows = head_matrix(v, head.b, head.h_kv, head.begin_kv, 1, False)
    q_tile = load_rows(q_rows, i0, 0, head.band.s_q, False, F.d_qk, BLOCK_M, BLOCK_QK, False)
    of_q = scale_of(scales.q, head.b, head.h, i0, ROWS)
    i = i0 + tl.arange(0, BLOCK_M)
    factor = factor_of(head, F)
    acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    m, total = tl.full([BLOCK_M], float("-inf"), tl.float32), tl.zeros([BLOCK_M], tl.float32)

    low, high, begin, full_begin, full_end, end = tiles(
        block, head.b, head.band, terms, BLOCK_M, BLOCK_N, F.left, F.right, F
    )
    visits, begin, end = visits_of(block, head.b, head.h, begin, end, terms, F)
    for n in tl.range(begin, end):
        tile, is_full = visited(n, visits, full_begin, full_end, F)
        j0 = tile * BLOCK_N
        j = j0 + tl.arange(0, BLOCK_N)
        k_tile = load_rows(k_rows, j0, low, high, F.left, F.d_qk, BLOCK_N, BLOCK_QK, False)
        raw = tl.dot(q_tile, tl.trans(k_tile)) * (of_q * scale_of(scales.k, head.b, head.h_kv, j0, ROWS))
        scores, _t = finish(raw, head, i[:, None], j[None, :], i0, j0, F)
        scores = masked(scores, head, i[:, None], j[None, :], i0, j0, is_full, False, F)
        p, m, total, alpha = softmax_step(scores, factor, m, total)
        columns = load_columns(v_rows, j0, low, high, F.left, F.d_v, BLOCK_N, BLOCK_V)
        of_v = scale_of(scales.v, head.b, head.h_kv, j0, ROWS) * (1.0 / WEIGHTS)
        if BY_BITS:  # noqa: SIM108 - Triton compiles both sides of an expression
            weights = to_e4m3(p * WEIGHTS).to(tl.float8e4nv, bitcast=True)
        else:
            weights = (p * WEIGHTS).to(tl.float8e4nv)
        acc = acc * alpha[:, None] + tl.dot(left_operand(weights, tl.float8e4nv, F), tl.trans(columns)) * of_v

    head = open_head(head.b, head.h, terms, sizes, F)  # recomputed, so that it occupies no registers in the loop
    sink = load_per_head(terms.sinks, head.b, head.h) if F.sinks else 0.0
    norm, logsumexp, low = softmax_end(m, total, sink, head.scale, F)
    out_rows = head_matrix(out, head.b, head.h, head.begin_q, F.vector_out, True)
    store_rows(out_rows, i0, head.band.s_q, acc * norm[:, None], F.d_v, BLOCK_M, BLOCK_V)
    tl.store(per_row(lse, head) + i, logsumexp, mask=i < head.band.s_q)
    tl.store(per_row(lse_low, head) + i, low, mask=i < head.band.s_q)
