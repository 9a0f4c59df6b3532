"""The forward kernel: online softmax over the tiles that the mask leaves."""

from __future__ import annotations

import triton
import triton.language as tl

from fastattn.backends.triton.tile import (
    LN2,
    LOG2E,
    count,
    factor_of,
    finish,
    kept_tile,
    load_per_head,
    load_rows,
    nth,
    number,
    open_head,
    row_pointers,
    rows_of,
    scheduled,
    softmax_step,
    store_rows,
    survivors,
    tile_range,
    tiles,
    zero_unused,
)


@triton.jit
def forward_kernel(
    q, k, v, out, lse, terms, sizes, schedule, F: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """``out`` and ``lse`` of ``BLOCK_M`` query rows of one head.

    Masked tiles come first, then full ones: the order of tiles does not matter to online softmax, and a loop body
    of its own keeps the second kind free of mask arithmetic.
    """
    block, of = scheduled(schedule, LAST_FIRST=F.band)
    heads_q = number(sizes.heads_q)
    head = open_head(of // heads_q, of % heads_q, terms, sizes, F)
    i0 = block * BLOCK_M
    if i0 >= head.s_q:
        return

    q_rows = rows_of(q, head.b, head.h, head.begin_q)
    k_rows = rows_of(k, head.b, head.h_kv, head.begin_kv)
    v_rows = rows_of(v, head.b, head.h_kv, head.begin_kv)
    q_tile = load_rows(q_rows, q, i0, 0, head.s_q, F.d_qk, BLOCK_M, F.block_qk, True, F)
    i = i0 + tl.arange(0, BLOCK_M)
    factor = factor_of(sizes, F)
    acc = tl.zeros([BLOCK_M, F.block_v], tl.float32)
    if F.sinks:  # the sink is where the running sum begins
        m = tl.zeros([BLOCK_M], tl.float32) + load_per_head(terms.sinks, head) * LOG2E
        l = tl.where(m == float("-inf"), 0.0, 1.0)
    else:
        m = tl.full([BLOCK_M], float("-inf"), tl.float32)
        l = tl.zeros([BLOCK_M], tl.float32)

    low, high = tile_range(i0, tl.minimum(i0 + BLOCK_M, head.s_q), head, F.band)
    begin, full_begin, full_end, end = tiles(block, head, terms, BLOCK_M, BLOCK_N, F)
    for PHASE in tl.static_range(F.phases):
        MASKED: tl.constexpr = PHASE == 0
        for t in tl.range(0, count(begin, full_begin, full_end, end, MASKED)):
            j0 = nth(t, begin, full_begin, full_end, MASKED) * BLOCK_N
            j = j0 + tl.arange(0, BLOCK_N)
            k_tile = load_rows(k_rows, k, j0, low, high, F.d_qk, BLOCK_N, F.block_qk, MASKED, F)
            raw = tl.dot(q_tile, tl.trans(k_tile), input_precision=F.precision)  # [BLOCK_M, BLOCK_N]
            scores, _ = finish(raw, head, i[:, None], j[None, :], i0, j0, terms, sizes, MASKED, F)
            if MASKED:
                kept = kept_tile(head, i[:, None], j[None, :], i0, j0, terms, F)
                scores = tl.where(kept, scores, float("-inf"))
            p, m, l, alpha = softmax_step(scores, factor, m, l)
            if F.dropout:
                p = tl.where(survivors(head, i0, j0, terms, sizes, BLOCK_M, BLOCK_N, False), p, 0.0)
            v_tile = load_rows(v_rows, v, j0, low, high, F.d_v, BLOCK_N, F.block_v, MASKED, F)
            if MASKED and F.scattered:
                v_tile = zero_unused(v_tile, kept)
            acc = tl.dot(p.to(v_tile.dtype), v_tile, acc * alpha[:, None], input_precision=F.precision)

    is_empty = l == 0.0
    norm = 1.0 / tl.where(is_empty, 1.0, l)
    if F.dropout:
        norm *= sizes.dropout_scale
    acc = acc * norm[:, None]
    total = tl.where(is_empty, float("-inf"), m * LN2 + tl.log(tl.where(is_empty, 1.0, l)))
    store_rows(rows_of(out, head.b, head.h, head.begin_q), out, i0, head.s_q, acc, F.d_v, BLOCK_M, F.block_v, F)
    tl.store(row_pointers(lse, head, i), total, mask=i < head.s_q)
