"""What every kernel does to a tile: where it lies, its loads, its mask, its scores, its dropout.

``keep``, ``tile_range`` and ``full_range`` are the transcription of the functions of those names in ``spec.py``,
and hold the only comparisons of positions; ``tests/kernels/test_mask_transcriptions.py`` enumerates them. Scores
are in units of ``log2``: ``exp2`` is what the hardware has. Row indices ``i`` and columns ``j`` are broadcastable
tiles, ``[BLOCK_M, 1]`` and ``[1, BLOCK_N]``, or the other way round in kernels whose tiles are transposed.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
PHILOX_ROUNDS = tl.constexpr(7)


class Head(NamedTuple):
    """One query head of one sequence: where it begins and its band. In a packed batch ``b`` is the sequence."""

    b: Any
    h: Any
    h_kv: Any
    begin_q: Any
    begin_kv: Any
    s_q: Any
    s_kv: Any
    diagonal: Any
    left: Any
    right: Any


@triton.jit
def number(coded):
    """The int that ``arguments.coded`` hid from specialisation."""
    return (coded - 3) >> 1


@triton.jit
def scheduled(schedule, LAST_FIRST: tl.constexpr):
    """``(block, head)`` of this program, ``head`` counting over batch and heads.

    Heads are taken ``heads_together`` at a time, as many as share the L2 cache. Among these the blocks with most
    work come first: of a causal mask, the last rows or the first columns.
    """
    blocks, heads = number(schedule.blocks), number(schedule.heads)
    together = number(schedule.heads_together)
    pid = tl.program_id(0)
    first = pid // (blocks * together) * together
    size = tl.minimum(together, heads - first)
    rest = pid % (blocks * together)
    block = rest // size
    if LAST_FIRST:
        block = blocks - 1 - block
    return block, first + rest % size


@triton.jit
def open_head(b, h, terms, sizes, F: tl.constexpr):
    """The ``Head`` for query head ``h`` of sequence ``b``."""
    if F.packed:
        begin_q, begin_kv = tl.load(terms.cu_seqlens_q + b), tl.load(terms.cu_seqlens_kv + b)
        s_q = tl.load(terms.cu_seqlens_q + b + 1) - begin_q
        s_kv = tl.load(terms.cu_seqlens_kv + b + 1) - begin_kv
    else:
        begin_q, begin_kv = 0, 0
        s_q, s_kv = number(sizes.s_q), number(sizes.s_kv)
    diagonal = number(sizes.lower_right) * (s_kv - s_q)
    left, right = number(sizes.left), number(sizes.right)
    return Head(b, h, h // number(sizes.group), begin_q, begin_kv, s_q, s_kv, diagonal, left, right)


@triton.jit
def transposed(head):
    """The head seen from its keys: rows and columns change places."""
    return Head(
        head.b, head.h, head.h_kv, head.begin_kv, head.begin_q, head.s_kv, head.s_q, -head.diagonal, head.right, head.left
    )  # fmt: skip


# --- positions ----------------------------------------------------------------------------------------------------


@triton.jit
def keep(i, j, head, BAND: tl.constexpr):
    """``spec.keep`` for non-negative ``i`` and ``j``."""
    kept = (i < head.s_q) & (j < head.s_kv)
    if BAND:
        offset = j - i - head.diagonal
        kept = kept & (offset >= -head.left) & (offset <= head.right)
    return kept


@triton.jit
def tile_range(i0, i1, head, BAND: tl.constexpr):
    """``spec.tile_range``."""
    begin, end = i0 * 0, i0 * 0 + head.s_kv
    if BAND:
        begin = tl.maximum(begin, i0 + head.diagonal - head.left)
        end = tl.minimum(end, i1 + head.diagonal + head.right)
    is_empty = (begin >= end) | (i0 >= i1)
    return tl.where(is_empty, 0, begin), tl.where(is_empty, 0, end)


@triton.jit
def full_range(i0, i1, head, BAND: tl.constexpr):
    """``spec.full_range``."""
    begin, end = i0 * 0, i0 * 0 + head.s_kv
    if BAND:
        begin = tl.maximum(begin, i1 - 1 + head.diagonal - head.left)
        end = tl.minimum(end, i0 + 1 + head.diagonal + head.right)
    is_empty = (begin >= end) | (i0 >= i1)
    return tl.where(is_empty, 0, begin), tl.where(is_empty, 0, end)


@triton.jit
def tiles(block, head, terms, BLOCK: tl.constexpr, BLOCK_OTHER: tl.constexpr, F: tl.constexpr):
    """The tiles that ``block``, of ``BLOCK`` rows, visits: ``(begin, full_begin, full_end, end)``.

    They are numbered in units of ``BLOCK_OTHER`` columns. Those from ``full_begin`` to ``full_end`` need no mask.
    """
    i0, i1 = block * BLOCK, tl.minimum(block * BLOCK + BLOCK, head.s_q)
    begin, end = tile_range(i0, i1, head, F.band)
    begin, end = begin // BLOCK_OTHER, tl.cdiv(end, BLOCK_OTHER)
    if F.mask:
        return begin, end, end, end
    full_begin, full_end = full_range(i0, i1, head, F.band)
    full_begin, full_end = tl.cdiv(full_begin, BLOCK_OTHER), full_end // BLOCK_OTHER
    if F.segments:
        found = terms.segment_tiles.ptr + head.b.to(tl.int64) * number(terms.segment_tiles.stride_b) + block * 4
        begin, end = tl.maximum(begin, tl.load(found)), tl.minimum(end, tl.load(found + 3))
        full_begin = tl.maximum(full_begin, tl.load(found + 1))
        full_end = tl.minimum(full_end, tl.load(found + 2))
        end = tl.maximum(begin, end)
    full_begin = tl.minimum(tl.maximum(full_begin, begin), end)
    full_end = tl.minimum(tl.maximum(full_end, full_begin), end)
    return begin, full_begin, full_end, end


@triton.jit
def count(begin, full_begin, full_end, end, MASKED: tl.constexpr):
    """How many tiles a phase has: the masked ones lie on both sides of the full ones."""
    full = full_end - full_begin
    if MASKED:
        return end - begin - full
    return full


@triton.jit
def nth(t, begin, full_begin, full_end, MASKED: tl.constexpr):
    """The number of the ``t``-th tile of a phase."""
    if MASKED:
        return tl.where(begin + t < full_begin, begin + t, begin + t + full_end - full_begin)
    return full_begin + t


# --- memory -------------------------------------------------------------------------------------------------------


@triton.jit
def rows_of(x, b, h, begin):
    """Pointer to the first row of a head: ``x`` as ``Rows`` of one sequence."""
    at = b.to(tl.int64) * number(x.stride_b) + h.to(tl.int64) * number(x.stride_h)
    return x.ptr + at + (begin + b * 0).to(tl.int64) * number(x.stride_s)


@triton.jit
def pointers(base, x, i0, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, F: tl.constexpr):
    """``[BLOCK, BLOCK_D]`` pointers to the rows from ``i0`` on. Offsets within a tile fit 32 bits, see launch.py."""
    stride_s = number(x.stride_s)
    if F.vector > 1:
        base, stride_s = tl.multiple_of(base, 16), tl.multiple_of(stride_s, 8)
    i, d = tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)
    if not F.contiguous:
        d = d * number(x.stride_d)
    return base + i0.to(tl.int64) * stride_s + i[:, None] * stride_s + d[None, :]


@triton.jit
def load_rows(
    base, x, i0, low, high, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr,
    F: tl.constexpr,
):  # fmt: skip
    """Rows ``i0 .. i0 + BLOCK`` as ``[BLOCK, BLOCK_D]``; if MASKED, zero outside ``low .. high``."""
    at = pointers(base, x, i0, D, BLOCK, BLOCK_D, F)
    i, d = i0 + tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)
    if MASKED:
        valid = ((i >= low) & (i < high))[:, None]
        if D < BLOCK_D:
            valid = valid & (d < D)[None, :]
        tile = tl.load(at, mask=valid, other=0.0)
    elif D < BLOCK_D:
        tile = tl.load(at, mask=(d < D)[None, :], other=0.0)
    else:
        tile = tl.load(at)
    return tile.to(tl.float32) if F.upcast else tile


@triton.jit
def store_rows(
    base, x, i0, high, tile, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, F: tl.constexpr
):  # fmt: skip
    """Store the rows of ``tile`` before ``high``; ``x`` is contiguous."""
    i, d = tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)
    stride_s = number(x.stride_s)
    if D % 8 == 0:
        base, stride_s = tl.multiple_of(base, 16), tl.multiple_of(stride_s, 8)
    at = base + i0.to(tl.int64) * stride_s + i[:, None] * stride_s + d[None, :]
    valid = (i0 + i < high)[:, None] & (d < D)[None, :]
    tl.store(at, tile.to(x.ptr.dtype.element_ty), mask=valid)


@triton.jit
def row_pointers(x, head, i):
    """Pointers to the numbers that ``x``, as ``PerRow``, has for rows ``i``."""
    at = head.b.to(tl.int64) * number(x.stride_b) + head.h.to(tl.int64) * number(x.stride_h)
    return x.ptr + at + head.begin_q + i


@triton.jit
def load_per_head(x, head):
    """The number that ``x``, as ``PerHead``, has for this head, in fp32."""
    return tl.load(x.ptr + head.b * number(x.stride_b) + head.h * number(x.stride_h)).to(tl.float32)


@triton.jit
def load_scores(x, head, i, j, i0, j0, VECTOR: tl.constexpr, MASKED: tl.constexpr):
    """The tile of ``x``, as ``Scores``, at rows ``i`` and columns ``j``, which begin at ``i0`` and ``j0``."""
    stride_b, stride_h, stride_q = number(x.stride_b), number(x.stride_h), number(x.stride_q)
    stride_kv, s_kv = number(x.stride_kv), head.s_kv
    row = tl.minimum(i, head.s_q - 1) - i0
    column = j - j0
    if VECTOR > 1:
        stride_b, stride_h = tl.multiple_of(stride_b, VECTOR), tl.multiple_of(stride_h, VECTOR)
        stride_q, s_kv = tl.multiple_of(stride_q, VECTOR), tl.multiple_of(s_kv, VECTOR)
        base = tl.multiple_of(x.ptr, 16) + j0
    else:
        base = x.ptr + j0.to(tl.int64) * stride_kv
        column = column * stride_kv
    base += head.b.to(tl.int64) * stride_b + head.h.to(tl.int64) * stride_h + i0.to(tl.int64) * stride_q
    at = base + row * stride_q + column
    if MASKED:
        return tl.load(at, mask=j < s_kv, other=0)
    return tl.load(at)


# --- scores -------------------------------------------------------------------------------------------------------


@triton.jit
def tanh(x, PRECISE: tl.constexpr):
    """``tanh(x)``; if PRECISE with a small relative error near 0 too, where the quotient cancels."""
    size = tl.abs(x)
    t = 1.0 - 2.0 / (tl.exp2(size * (2.0 * LOG2E)) + 1.0)
    t = tl.where(x < 0.0, -t, t)
    if PRECISE:
        y = x * x
        series = x + x * y * (-1.0 / 3.0 + y * (2.0 / 15.0 + y * (-17.0 / 315.0 + y * (62.0 / 2835.0))))
        t = tl.where(size < 0.25, series, t)
    return t


@triton.jit
def finish(raw, head, i, j, i0, j0, terms, sizes, MASKED: tl.constexpr, F: tl.constexpr):
    """``(scores, t)``: the finished scores before the mask, and ``t = tanh(...)`` of the softcap.

    If ``F.plain``, scaling is left to who takes the exponential: see ``factor_of``.
    """
    if F.plain:
        return raw, raw
    t = raw
    if F.softcap:
        t = tanh(raw * (sizes.scale / sizes.softcap), F.precise)
        scores = t * (sizes.softcap * LOG2E)
    else:
        scores = raw * (sizes.scale * LOG2E)
    if F.bias:
        scores += load_scores(terms.bias, head, i, j, i0, j0, F.bias, MASKED).to(tl.float32) * LOG2E
    if F.alibi:
        slope = load_per_head(terms.alibi_slopes, head) * LOG2E
        scores -= slope * tl.abs(j - i - head.diagonal).to(tl.float32)
    return scores, t


@triton.jit
def factor_of(sizes, F: tl.constexpr):
    """What finished scores must still be multiplied with."""
    if F.plain:
        return sizes.scale * LOG2E
    return 1.0


@triton.jit
def kept_tile(head, i, j, i0, j0, terms, F: tl.constexpr):
    """The whole of ``keep`` for a tile: band and lengths, boolean mask, segments."""
    kept = keep(i, j, head, F.band)
    if F.mask:
        kept = kept & (load_scores(terms.mask, head, i, j, i0, j0, F.mask, True) != 0)
    if F.segments:
        ids_q = terms.segment_ids_q.ptr + head.b.to(tl.int64) * number(terms.segment_ids_q.stride_b)
        ids_kv = terms.segment_ids_kv.ptr + head.b.to(tl.int64) * number(terms.segment_ids_kv.stride_b)
        of_q = tl.load(ids_q + i * number(terms.segment_ids_q.stride_s), mask=i < head.s_q, other=0)
        of_kv = tl.load(ids_kv + j * number(terms.segment_ids_kv.stride_s), mask=j < head.s_kv, other=0)
        kept = kept & (of_q == of_kv)
    return kept


@triton.jit
def zero_unused(tile, kept):
    """Keys or values ``tile`` with the rows zeroed whose column of ``kept`` is empty: they may hold NaN."""
    used = tl.max(kept.to(tl.int32), 0) > 0
    return tl.where(used[:, None], tile, 0.0)


@triton.jit
def softmax_step(scores, factor, m, l):
    """One step of online softmax: ``(p, m, l, alpha)``, ``alpha`` what to multiply earlier sums with.

    ``m`` is the running maximum of each row and ``l`` its running sum. While a row is empty, ``m`` is ``-inf``.
    """
    m_new = tl.maximum(m, tl.max(scores, 1) * factor)
    finite = tl.where(m_new == float("-inf"), 0.0, m_new)
    p = tl.exp2(scores * factor - finite[:, None])
    alpha = tl.exp2(m - finite)
    return p, m_new, l * alpha + tl.sum(p, 1), alpha


@triton.jit
def survivors(
    head, i0, j0, terms, sizes, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TRANSPOSED: tl.constexpr
):  # fmt: skip
    """True where dropout spares the element: ``rng.dropout_keep``, one Philox call for eight columns.

    Calls are numbered ``(j // 32) * 4 + (j % 8) // 2``; word ``(j % 32) // 8`` and its half ``j % 2`` belong to
    column ``j``. So the words come as ``[32s of columns, call, word, half]`` and only the middle two change places.
    """
    seed = tl.load(terms.rng_state)
    offset = (tl.load(terms.rng_state + 1) & 0xFFFFFFFF).to(tl.uint32)
    i, call = i0 + tl.arange(0, BLOCK_M), j0 // 8 + tl.arange(0, BLOCK_N // 8)
    threshold = number(sizes.dropout_threshold)
    of_head = head.b * number(sizes.heads_q) + head.h
    if TRANSPOSED:
        w0, w1, w2, w3 = tl.philox(seed, i[None, :], call[:, None], of_head, offset, n_rounds=PHILOX_ROUNDS)
        words = tl.join(tl.join(w0, w2), tl.join(w1, w3)).reshape(BLOCK_N // 32, 4, BLOCK_M, 4)
        spared = tl.join((words & 0xFFFF) >= threshold, (words >> 16) >= threshold)
        return tl.permute(spared, (0, 3, 1, 4, 2)).reshape(BLOCK_N, BLOCK_M)
    w0, w1, w2, w3 = tl.philox(seed, i[:, None], call[None, :], of_head, offset, n_rounds=PHILOX_ROUNDS)
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3)).reshape(BLOCK_M, BLOCK_N // 32, 4, 4)
    spared = tl.join((words & 0xFFFF) >= threshold, (words >> 16) >= threshold)
    return tl.permute(spared, (0, 1, 3, 2, 4)).reshape(BLOCK_M, BLOCK_N)
