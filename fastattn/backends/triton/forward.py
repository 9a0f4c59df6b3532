"""The forward kernel: online softmax over the tiles that the mask leaves active."""

# mypy: disallow-untyped-defs=False
from __future__ import annotations

import triton
import triton.language as tl

from fastattn.backends.triton.operands import left_operand
from fastattn.backends.triton.pages import cached_rows, located, open_rows, within
from fastattn.backends.triton.prescan import visited, visits_of
from fastattn.backends.triton.tile import (
    dot_in_chunks,
    factor_of,
    finish,
    head_matrix,
    load_per_head,
    load_rows,
    masked,
    number,
    per_row,
    scheduled,
    softmax_end,
    softmax_step,
    store_rows,
    survivors,
    tiles,
)


@triton.jit
def forward_kernel(
    q, k, v, out, lse, lse_low, terms, sizes, schedule, F: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """``out`` and both parts of ``lse`` of ``BLOCK_M`` query rows of one head, also of many new ones against a cache.

    All tiles run the same code except for one branch, uniform over the threads: a full tile skips the mask.
    """
    BLOCK_QK: tl.constexpr = F.block_qk
    BLOCK_V: tl.constexpr = F.block_v
    block, of = scheduled(schedule, LAST_FIRST=F.right)
    heads_q = number(sizes.heads_q)
    head = open_rows(of // heads_q, of % heads_q, terms, sizes, F)
    i0 = block * BLOCK_M
    if i0 >= head.band.s_q:
        return

    k_rows = head_matrix(k, head.b, head.h_kv, head.begin_kv, F.vector, F.contiguous)
    v_rows = head_matrix(v, head.b, head.h_kv, head.begin_kv, F.vector, F.contiguous)
    q_rows = head_matrix(q, head.b, head.h, head.begin_q, F.vector, F.contiguous)
    if not F.in_chunks:
        q_tile = load_rows(q_rows, i0, 0, head.band.s_q, False, F.d_qk, BLOCK_M, BLOCK_QK, F.upcast)
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
        if F.paged or F.fp8:
            valid = (j >= low) & (j < high)
            page, row = located(head.b, j, valid, terms.cache, F)
            page = within(page, terms.cache, F)
        if F.in_chunks:
            s_q = head.band.s_q
            raw = dot_in_chunks(q_rows, i0, 0, s_q, k_rows, j0, low, high, F.d_qk, BLOCK_M, BLOCK_N, BLOCK_QK, F)
        else:
            if F.paged or F.fp8:
                of_key = terms.cache.k_scale
                k_tile = cached_rows(k, of_key, page, row, head.h_kv, valid, F.d_qk, BLOCK_QK, q_tile.dtype, F)
            else:
                k_tile = load_rows(k_rows, j0, low, high, F.left, F.d_qk, BLOCK_N, BLOCK_QK, F.upcast)
            raw = tl.dot(q_tile, tl.trans(k_tile), input_precision=F.precision)  # [BLOCK_M, BLOCK_N]
        scores, _t = finish(raw, head, i[:, None], j[None, :], i0, j0, F)
        scores = masked(scores, head, i[:, None], j[None, :], i0, j0, is_full, False, F)
        p, m, total, alpha = softmax_step(scores, factor, m, total)
        if F.dropout:
            p = tl.where(survivors(head, i0, j0, BLOCK_M, BLOCK_N, False), p, 0.0)
        if F.paged or F.fp8:
            v_tile = cached_rows(v, terms.cache.v_scale, page, row, head.h_kv, valid, F.d_v, BLOCK_V, q_tile.dtype, F)
        else:
            v_tile = load_rows(v_rows, j0, low, high, F.left, F.d_v, BLOCK_N, BLOCK_V, F.upcast)
        acc = tl.dot(left_operand(p, v_tile.dtype, F), v_tile, acc * alpha[:, None], input_precision=F.precision)

    head = open_rows(head.b, head.h, terms, sizes, F)  # recomputed, so that it occupies no registers in the loop
    sink = load_per_head(terms.sinks, head.b, head.h) if F.sinks else 0.0
    norm, logsumexp, low = softmax_end(m, total, sink, head.scale, F)
    if F.dropout:
        norm *= sizes.dropout_scale
    out_rows = head_matrix(out, head.b, head.h, head.begin_q, F.vector_out, True)
    store_rows(out_rows, i0, head.band.s_q, acc * norm[:, None], F.d_v, BLOCK_M, BLOCK_V)
    tl.store(per_row(lse, head) + i, logsumexp, mask=i < head.band.s_q)
    tl.store(per_row(lse_low, head) + i, low, mask=i < head.band.s_q)
