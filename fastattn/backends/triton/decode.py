"""The decoding kernels: attention to a cache, in splits of the keys, and the combination of the splits."""

# mypy: disallow-untyped-defs=False
from __future__ import annotations

import triton
import triton.language as tl

from fastattn.backends.triton.operands import left_operand
from fastattn.backends.triton.pages import (
    away_in_tree,
    cached_rows,
    kept_in_tree,
    located,
    open_cache,
    row_pointers,
    within,
)
from fastattn.backends.triton.tile import (
    LOG2E,
    factor_of,
    finish,
    full_range,
    head_in,
    kept_tile,
    load_per_head,
    logarithm_of,
    number,
    softmax_end,
    softmax_step,
    tile_range,
)


@triton.jit
def decode_kernel(
    q, k, v, out, lse, lse_low, cache, terms, sizes, splits, F: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """``out`` and ``lse`` of ``BLOCK_M`` query rows of one key/value head, over one split of the keys they keep.

    The query heads of a group share the tile, and so each load of keys and values: with ``G = H_q // H_kv``, row ``r``
    is query row ``r // G`` of the group's head ``r % G``. Blocks of rows that share keys run next to each other.
    """
    BLOCK_QK: tl.constexpr = F.block_qk
    BLOCK_V: tl.constexpr = F.block_v
    group, blocks, split_count = number(sizes.group), number(splits.blocks), number(splits.splits)
    heads_kv = number(sizes.heads_q) // group
    pid = tl.program_id(0)
    split, of = pid // blocks % split_count, pid // blocks // split_count
    b, h_kv = of // heads_kv, of % heads_kv
    begin_q, band = open_cache(b, cache, terms, sizes, F)
    r0 = pid % blocks * BLOCK_M
    if r0 >= band.s_q * group:
        return

    r, d_qk, d_v = r0 + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_QK), tl.arange(0, BLOCK_V)
    i, h, i0 = r // group, h_kv * group + r % group, r0 // group
    i1 = tl.minimum((r0 + BLOCK_M - 1) // group + 1, band.s_q)
    is_row = i < band.s_q
    head = head_in(b, h[:, None], begin_q, 0, band, terms, sizes, F)
    at = row_pointers(q, b, begin_q + i, h, F.vector)[:, None] + d_qk[None, :].to(tl.int64) * number(q.stride_d)
    q_tile = tl.load(at, mask=is_row[:, None] & (d_qk < F.d_qk)[None, :], other=0.0)
    if F.upcast:
        q_tile = q_tile.to(tl.float32)
    factor = factor_of(head, F)
    acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    m, total = tl.full([BLOCK_M], float("-inf"), tl.float32), tl.zeros([BLOCK_M], tl.float32)

    if F.tree:  # rows count depths, which may be anywhere in the tree
        i0, i1 = i0 * 0, band.s_q
    low, high = tile_range(i0, i1, band, F.left, F.right)
    full_low, full_high = full_range(i0, i1, band, F.left, F.right)
    if F.tree:
        full_high = tl.minimum(full_high, band.diagonal)
    begin, end = low // BLOCK_N, tl.cdiv(high, BLOCK_N)
    if F.fixed:
        first = split * number(splits.tiles)
        begin, end = tl.maximum(begin, first), tl.minimum(end, first + number(splits.tiles))
    else:
        tiles_of_split = tl.cdiv(end - begin, split_count)
        begin += split * tiles_of_split
        end = tl.minimum(begin + tiles_of_split, end)
    for tile in tl.range(begin, end):
        j0 = tile * BLOCK_N
        j = j0 + tl.arange(0, BLOCK_N)
        valid = (j >= low) & (j < high)
        page, row = located(b, j, valid, cache, F)
        page = within(page, cache, F)
        k_tile = cached_rows(k, cache.k_scale, page, row, h_kv, valid, F.d_qk, BLOCK_QK, q_tile.dtype, F)
        raw = tl.dot(q_tile, tl.trans(k_tile), input_precision=F.precision)  # [BLOCK_M, BLOCK_N]
        if F.tree:
            away = away_in_tree(b, begin_q, i[:, None], j[None, :], band, cache)
            scores, _t = finish(raw, head, i[:, None], j[None, :], i0, j0, F, away)
            if (j0 < full_low) | (j0 + BLOCK_N > full_high):
                kept = kept_in_tree(b, begin_q, i[:, None], j[None, :], away, band, cache, F.left)
                scores = tl.where(kept, scores, float("-inf"))
        else:
            scores, _t = finish(raw, head, i[:, None], j[None, :], i0, j0, F)
            if (j0 < full_low) | (j0 + BLOCK_N > full_high):
                scores = tl.where(kept_tile(head, i[:, None], j[None, :], i0, j0, False, F), scores, float("-inf"))
        p, m, total, alpha = softmax_step(scores, factor, m, total)
        v_tile = cached_rows(v, cache.v_scale, page, row, h_kv, valid, F.d_v, BLOCK_V, q_tile.dtype, F)
        acc = tl.dot(left_operand(p, v_tile.dtype, F), v_tile, acc * alpha[:, None], input_precision=F.precision)

    sink = 0.0
    if F.sinks:  # the first split counts it
        sink = tl.where(split == 0, load_per_head(terms.sinks, b, h), float("-inf"))
    norm, logsumexp, low = softmax_end(m, total, sink, head.scale, F)
    at = row_pointers(out, b, begin_q + i, h, F.vector_out) + split.to(tl.int64) * number(splits.stride_out)
    result = (acc * norm[:, None]).to(at.dtype.element_ty)
    tl.store(at[:, None] + d_v[None, :], result, mask=is_row[:, None] & (d_v < F.d_v)[None, :])
    at = row_pointers(lse, b, begin_q + i, h, 1) + split.to(tl.int64) * number(splits.stride_lse)
    tl.store(at, logsumexp, mask=is_row)
    if lse_low is not None:
        at = row_pointers(lse_low, b, begin_q + i, h, 1) + split.to(tl.int64) * number(splits.stride_lse)
        tl.store(at, low, mask=is_row)


@triton.jit
def combine_kernel(
    partial_out, partial_lse, partial_low, out, lse, splits, rows, s_q, heads, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
):  # fmt: skip
    """``out`` and ``lse`` of one row, combined from its splits with weights from both parts of their ``lse``.

    Rows are counted over (sequence, query, head), the order of ``out``; ``lse`` is ``(B, H_q, s_q)``. Grid: rows.
    """
    splits, rows, s_q, heads = number(splits), number(rows), number(s_q), number(heads)
    n, d, first = tl.program_id(0), tl.arange(0, BLOCK_D), tl.arange(0, 1)
    acc = tl.zeros([BLOCK_D], tl.float32)
    top, top_low = tl.full([1], float("-inf"), tl.float32), tl.zeros([1], tl.float32)  # the largest lse so far
    total = tl.zeros([1], tl.float32)
    for begin in tl.range(0, splits, BLOCK_SPLITS):
        split = begin + tl.arange(0, BLOCK_SPLITS)
        at, is_split = split.to(tl.int64) * rows + n, split < splits
        of_split = tl.load(partial_lse + at, mask=is_split, other=float("-inf"))[None, :]  # [1, BLOCK_SPLITS]
        low = tl.load(partial_low + at, mask=is_split, other=0.0)[None, :]
        above = tl.maximum(top, tl.max(of_split, 1))
        finite = tl.where(above == float("-inf"), 0.0, above)
        above_low = tl.max(tl.where(of_split == above[:, None], low, float("-inf")), 1)
        above_low = tl.maximum(above_low, tl.where(top == above, top_low, float("-inf")))
        weight = tl.exp2(((of_split - finite[:, None]) + (low - above_low[:, None])) * LOG2E)
        alpha = tl.exp2(((top - finite) + (top_low - above_low)) * LOG2E)
        top, top_low, total = above, above_low, total * alpha + tl.sum(weight, 1)
        mask = is_split[:, None] & (d < D)[None, :]
        tile = tl.load(partial_out + at[:, None] * D + d[None, :], mask=mask, other=0.0)  # [BLOCK_SPLITS, BLOCK_D]
        acc = acc * alpha + tl.sum(tl.trans(weight) * tile, 0)

    is_empty = total == 0.0
    total = tl.where(is_empty, 1.0, total)
    logsumexp, _low = logarithm_of(tl.where(is_empty, 0.0, top), top_low, total)
    tl.store(out + n.to(tl.int64) * D + d, (acc / total).to(out.dtype.element_ty), mask=d < D)
    i, h = n // heads, n % heads
    at = (i // s_q * heads + h) * s_q + i % s_q + first
    tl.store(lse + at, tl.where(is_empty, float("-inf"), logsumexp))
