"""Operations on tiles that all kernels share: schedule, loads, mask, scores, softmax, dropout.

``keep``, ``tile_range`` and ``full_range`` are the transcription of the functions of those names in ``spec.py``, and
hold the only comparisons of positions; ``tests/backends/triton/test_mask_transcriptions.py`` enumerates them. Scores
are in base e as in the spec. The maximum of a row is subtracted before they are scaled to base 2, the base of the
hardware's exponential, so that no offset shared by a row is rounded into the difference. Row indices ``i``
and columns ``j`` are broadcastable tiles, ``[BLOCK_M, 1]`` and ``[1, BLOCK_N]``, or the other way round in kernels
whose tiles are transposed.
"""

# mypy: disallow-untyped-defs=False
from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from fastattn.backends.triton.ranges import RowRanges, columns_of_segments, in_intervals

LOG2E = tl.constexpr(1.4426950408889634)
PHILOX_ROUNDS = tl.constexpr(7)


class Band(NamedTuple):
    """The positional half of ``keep``: the lengths and the band of one sequence."""

    s_q: Any
    s_kv: Any
    diagonal: Any
    left: Any
    right: Any


class HeadMatrix(NamedTuple):
    """The rows of one head of one sequence: ``arguments.Bshd`` from its first row on."""

    ptr: Any
    stride_s: Any
    stride_d: Any


class ScoreMatrix(NamedTuple):
    """A bias or mask of one head of one sequence."""

    ptr: Any
    stride_q: Any
    stride_kv: Any


class Head(NamedTuple):
    """One query head of one sequence with its part of each optional term; 0 for terms not in use.

    In a packed batch ``b`` is the sequence. ``dropout_head`` is the head's number in ``rng.py``.
    """

    b: Any
    h: Any
    h_kv: Any
    begin_q: Any
    begin_kv: Any
    band: Any
    scale: Any
    softcap: Any
    bias: Any
    mask: Any
    slope: Any
    ids_q: Any
    ids_kv: Any
    ranges: Any
    seed: Any
    offset: Any
    dropout_head: Any
    threshold: Any


@triton.jit
def number(coded):
    """The inverse of ``arguments.coded``."""
    return (coded - 3) >> 1


@triton.jit
def stride(coded, VECTOR: tl.constexpr):
    """``number(coded)`` of a multiple of VECTOR, written so that the compiler can use that."""
    if VECTOR > 1:
        return (coded - 3) // (2 * VECTOR) * VECTOR
    return number(coded)


@triton.jit
def scheduled(schedule, LAST_FIRST: tl.constexpr):
    """``(block, head)`` of this program, ``head`` counting over batch and heads.

    Heads are taken ``heads_together`` at a time, as many as fit into the L2 cache. Among these the blocks with most
    work come first: under a causal mask, the last rows or the first columns.
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
def open_band(b, terms, sizes, F: tl.constexpr):
    """``(begin_q, begin_kv, band)`` of sequence ``b``."""
    if F.packed:
        begin_q, begin_kv = tl.load(terms.cu_seqlens_q + b), tl.load(terms.cu_seqlens_kv + b)
        s_q = tl.load(terms.cu_seqlens_q + b + 1) - begin_q
        s_kv = tl.load(terms.cu_seqlens_kv + b + 1) - begin_kv
    else:
        begin_q, begin_kv = b * 0, b * 0
        s_q, s_kv = number(sizes.s_q), number(sizes.s_kv)
    diagonal = number(sizes.lower_right) * (s_kv - s_q)
    return begin_q, begin_kv, Band(s_q, s_kv, diagonal, number(sizes.left), number(sizes.right))


@triton.jit
def open_head(b, h, terms, sizes, F: tl.constexpr):
    """The ``Head`` for query head ``h`` of sequence ``b``."""
    begin_q, begin_kv, band = open_band(b, terms, sizes, F)
    return head_in(b, h, begin_q, begin_kv, band, terms, sizes, F)


@triton.jit
def head_in(b, h, begin_q, begin_kv, band, terms, sizes, F: tl.constexpr):
    """The ``Head`` for query head ``h`` of a sequence whose band is known; ``h`` may be a column of heads."""
    bias, mask, slope, ids_q, ids_kv, ranges = 0, 0, 0, 0, 0, 0
    seed, offset, dropout_head, threshold = 0, 0, 0, 0
    if F.bias:
        bias = score_matrix(terms.bias, b, h, F.bias)
    if F.mask:
        mask = score_matrix(terms.mask, b, h, F.mask)
    if F.alibi:
        slope = load_per_head(terms.alibi_slopes, b, h)
    if F.segments:
        ids_q, ids_kv = tokens_of(terms.segment_ids_q, b), tokens_of(terms.segment_ids_kv, b)
    if F.intervals:
        x = terms.intervals
        ptr = x.ptr + b.to(tl.int64) * number(x.stride_b) + h.to(tl.int64) * number(x.stride_h)
        ptr += begin_q.to(tl.int64) * number(x.stride_s)
        ranges = RowRanges(ptr, number(x.stride_s), number(x.count))  # type: ignore[assignment]
    if F.dropout:
        seed = tl.load(terms.rng_state)
        offset = (tl.load(terms.rng_state + 1) & 0xFFFFFFFF).to(tl.uint32)
        dropout_head = b * number(sizes.heads_q) + h
        threshold = number(sizes.dropout_threshold)
    return Head(
        b, h, h // number(sizes.group), begin_q, begin_kv, band, sizes.scale, sizes.softcap, bias, mask, slope, ids_q,
        ids_kv, ranges, seed, offset, dropout_head, threshold,
    )  # fmt: skip


# --- positions ----------------------------------------------------------------------------------------------------


@triton.jit
def keep(i, j, band, LEFT: tl.constexpr, RIGHT: tl.constexpr):
    """``spec.keep`` for non-negative ``i`` and ``j``: all but two comparisons are made once for each row."""
    end = band.s_kv
    if RIGHT:
        end = tl.minimum(i + (band.diagonal + band.right + 1), end)
    kept = j < tl.where(i < band.s_q, end, 0)
    if LEFT:
        kept = kept & (j >= i + (band.diagonal - band.left))
    return kept


@triton.jit
def transposed(band):
    """The band seen from the keys: rows and columns change places."""
    return Band(band.s_kv, band.s_q, -band.diagonal, band.right, band.left)


@triton.jit
def tile_range(i0, i1, band, LEFT: tl.constexpr, RIGHT: tl.constexpr):
    """``spec.tile_range``."""
    begin, end = i0 * 0, i0 * 0 + band.s_kv
    if LEFT:
        begin = tl.maximum(begin, i0 + band.diagonal - band.left)
    if RIGHT:
        end = tl.minimum(end, i1 + band.diagonal + band.right)
    is_empty = (begin >= end) | (i0 >= i1)
    return tl.where(is_empty, 0, begin), tl.where(is_empty, 0, end)


@triton.jit
def full_range(i0, i1, band, LEFT: tl.constexpr, RIGHT: tl.constexpr):
    """``spec.full_range``."""
    begin, end = i0 * 0, i0 * 0 + band.s_kv
    if LEFT:
        begin = tl.maximum(begin, i1 - 1 + band.diagonal - band.left)
    if RIGHT:
        end = tl.minimum(end, i0 + 1 + band.diagonal + band.right)
    is_empty = (begin >= end) | (i0 >= i1)
    return tl.where(is_empty, 0, begin), tl.where(is_empty, 0, end)


@triton.jit
def tiles(
    block, b, band, terms, BLOCK: tl.constexpr, BLOCK_OTHER: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
    F: tl.constexpr,
):  # fmt: skip
    """The tiles that ``block``, of ``BLOCK`` rows, visits: ``(low, high, begin, full_begin, full_end, end)``.

    ``low .. high`` are the columns that the band leaves to any of the rows. The rest are numbers of tiles of
    ``BLOCK_OTHER`` columns: of those visited, the ones from ``full_begin`` to ``full_end`` need no mask.
    """
    i0, i1 = block * BLOCK, tl.minimum(block * BLOCK + BLOCK, band.s_q)
    low, high = tile_range(i0, i1, band, LEFT, RIGHT)
    begin, end = low // BLOCK_OTHER, tl.cdiv(high, BLOCK_OTHER)
    if F.mask:
        return low, high, begin, end, end, end
    full_begin, full_end = full_range(i0, i1, band, LEFT, RIGHT)
    full_begin, full_end = tl.cdiv(full_begin, BLOCK_OTHER), full_end // BLOCK_OTHER
    if F.segments:
        found = terms.segment_columns.ptr + b.to(tl.int64) * number(terms.segment_columns.stride_b)
        first, full_first, full_last, last = columns_of_segments(found, block, BLOCK)
        begin, end = tl.maximum(begin, first // BLOCK_OTHER), tl.minimum(end, tl.cdiv(last, BLOCK_OTHER))
        full_begin = tl.maximum(full_begin, tl.cdiv(full_first, BLOCK_OTHER))
        full_end = tl.minimum(full_end, full_last // BLOCK_OTHER)
        end = tl.maximum(begin, end)
    full_begin = tl.minimum(tl.maximum(full_begin, begin), end)
    full_end = tl.minimum(tl.maximum(full_end, full_begin), end)
    return low, high, begin, full_begin, full_end, end


# --- memory -------------------------------------------------------------------------------------------------------


@triton.jit
def head_matrix(x, b, h, begin, VECTOR: tl.constexpr, CONTIGUOUS: tl.constexpr):
    """The rows of head ``h`` of sequence ``b``, which begins at row ``begin`` of a packed batch."""
    stride_s = stride(x.stride_s, VECTOR)
    ptr = x.ptr + b.to(tl.int64) * stride(x.stride_b, VECTOR) + h.to(tl.int64) * stride(x.stride_h, VECTOR)
    ptr += begin.to(tl.int64) * stride_s
    if CONTIGUOUS:
        return HeadMatrix(ptr, stride_s, 1)
    return HeadMatrix(ptr, stride_s, number(x.stride_d))


@triton.jit
def pointers(rows, i0, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """``[BLOCK, BLOCK_D]`` pointers to the rows from ``i0`` on. Offsets within a tile fit 32 bits, see launch.py."""
    i, d = tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)
    return rows.ptr + i0.to(tl.int64) * rows.stride_s + (i[:, None] * rows.stride_s + d[None, :] * rows.stride_d)


@triton.jit
def load_rows(
    rows, i0, low, high, HAS_LOW: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """Rows ``i0 .. i0 + BLOCK`` as ``[BLOCK, BLOCK_D]``, zero outside ``low .. high``; without HAS_LOW low is 0."""
    at = pointers(rows, i0, BLOCK, BLOCK_D)
    i, d = i0 + tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)
    valid = (i < high)[:, None]
    if HAS_LOW:
        valid = valid & (i >= low)[:, None]
    if D < BLOCK_D:
        valid = valid & (d < D)[None, :]
    tile = tl.load(at, mask=valid, other=0.0)
    return tile.to(tl.float32) if UPCAST else tile


@triton.jit
def load_chunk(rows, i0, low, high, d0, D: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr):
    """Elements ``d0 .. d0 + CHUNK`` of rows ``i0 .. i0 + BLOCK``, zero outside ``low .. high`` and past D."""
    of_chunk = HeadMatrix(rows.ptr + d0 * rows.stride_d, rows.stride_s, rows.stride_d)
    i, d = i0 + tl.arange(0, BLOCK), d0 + tl.arange(0, CHUNK)
    valid = ((i >= low) & (i < high))[:, None] & (d < D)[None, :]
    return tl.load(pointers(of_chunk, i0, BLOCK, CHUNK), mask=valid, other=0.0)


@triton.jit
def dot_in_chunks(
    a_rows, i0, low, high, b_rows, j0, b_low, b_high, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, F: tl.constexpr,
):  # fmt: skip
    """``a @ b^T`` of the rows from ``i0`` of ``a``, zero outside ``low .. high``, and from ``j0`` of ``b``, likewise.

    The product runs over the head dim in steps: without tensor cores a thread multiplies from its registers, and these
    do not hold whole rows.
    """
    CHUNK: tl.constexpr = min(BLOCK_D, 16 if F.precision == "tf32" else 32)
    product = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for d in tl.range(0, BLOCK_D, CHUNK):  # a run-time loop: unrolled, all steps would be loaded at once
        a = load_chunk(a_rows, i0, low, high, d, D, BLOCK_M, CHUNK)
        b = load_chunk(b_rows, j0, b_low, b_high, d, D, BLOCK_N, CHUNK)
        product = tl.dot(a, tl.trans(b), product, input_precision=F.precision)
    return product


@triton.jit
def store_rows(rows, i0, high, tile, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """Store the rows of ``tile`` before ``high``."""
    i, d = i0 + tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)
    at = pointers(rows, i0, BLOCK, BLOCK_D)
    tl.store(at, tile.to(at.dtype.element_ty), mask=(i < high)[:, None] & (d < D)[None, :])


@triton.jit
def row_offset(x, head):
    """Offset of the numbers that ``x``, as ``PerRow``, holds for the rows of a head."""
    return head.b.to(tl.int64) * number(x.stride_b) + head.h.to(tl.int64) * number(x.stride_h) + head.begin_q


@triton.jit
def per_row(x, head):
    """Pointer to the number that ``x``, as ``PerRow``, has for the first row."""
    return x.ptr + row_offset(x, head)


@triton.jit
def load_per_head(x, b, h):
    """The number that ``x``, as ``PerHead``, has for a head, in fp32."""
    return tl.load(x.ptr + b * number(x.stride_b) + h * number(x.stride_h)).to(tl.float32)


@triton.jit
def tokens_of(x, b):
    """``x``, as ``PerToken``, of sequence ``b``."""
    return HeadMatrix(x.ptr + b.to(tl.int64) * number(x.stride_b), number(x.stride_s), 0)


@triton.jit
def score_matrix(x, b, h, VECTOR: tl.constexpr):
    """``x``, as ``Scores``, of one head."""
    ptr = x.ptr + b.to(tl.int64) * stride(x.stride_b, VECTOR) + h.to(tl.int64) * stride(x.stride_h, VECTOR)
    if VECTOR > 1:
        return ScoreMatrix(ptr, stride(x.stride_q, VECTOR), 1)
    return ScoreMatrix(ptr, number(x.stride_q), number(x.stride_kv))


@triton.jit
def load_scores(x, band, i, j, i0, j0, VECTOR: tl.constexpr):
    """The tile of ``x`` at rows ``i`` and columns ``j``, which begin at ``i0`` and ``j0`` and may end past the last."""
    at = x.ptr + (i0.to(tl.int64) * x.stride_q + j0.to(tl.int64) * x.stride_kv)
    at += (tl.minimum(i, band.s_q - 1) - i0) * x.stride_q + (j - j0) * x.stride_kv
    return tl.load(at, mask=j < band.s_kv // VECTOR * VECTOR, other=0)  # VECTOR divides s_kv


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
def finish(raw, head, i, j, i0, j0, F: tl.constexpr, away=None):
    """``(scores, t)``: the finished scores before the mask, and ``t = tanh(...)`` of the softcap.

    If ``F.plain``, the scores still lack the factor ``scale``: see ``factor_of``. ``away`` are the distances from the
    diagonal where they do not follow from ``i`` and ``j``.
    """
    if F.plain:
        return raw, raw
    t = raw
    if F.softcap:
        t = tanh(raw * (head.scale / head.softcap), F.precise)
        scores = t * head.softcap
    else:
        scores = raw * head.scale
    if F.bias:
        scores += load_scores(head.bias, head.band, i, j, i0, j0, F.bias).to(tl.float32)
    if F.alibi:
        if away is None:
            away = j - i - head.band.diagonal
        scores -= head.slope * tl.abs(away).to(tl.float32)
    return scores, t


@triton.jit
def factor_of(head, F: tl.constexpr):
    """The factor between differences of finished scores and exponents of 2."""
    if F.plain:
        return head.scale * LOG2E
    return LOG2E


@triton.jit
def kept_tile(head, i, j, i0, j0, TRANSPOSED: tl.constexpr, F: tl.constexpr):
    """The whole of ``keep`` for a tile: band and lengths, boolean mask, segments, intervals."""
    if not TRANSPOSED:
        kept = keep(i, j, head.band, F.left, F.right)
    else:  # transposed, so that the work of keep once for each row is done once for each row of the tile
        kept = keep(j, i, transposed(head.band), F.right, F.left)
    if F.mask:
        kept = kept & (load_scores(head.mask, head.band, i, j, i0, j0, F.mask) != 0)
    if F.segments:
        of_q = tl.load(head.ids_q.ptr + i * head.ids_q.stride_s, mask=i < head.band.s_q, other=0)
        of_kv = tl.load(head.ids_kv.ptr + j * head.ids_kv.stride_s, mask=j < head.band.s_kv, other=0)
        kept = kept & (of_q == of_kv)
    if F.intervals:
        kept = kept & in_intervals(head.ranges, i, j, head.band.s_q, F)
    return kept


@triton.jit
def masked(scores, head, i, j, i0, j0, is_full, TRANSPOSED: tl.constexpr, F: tl.constexpr):
    """``scores``, but ``-inf`` where ``keep`` is false; ``is_full`` says that it is true in the whole tile.

    With a mask no tile is full, so there is no branch. A branch would keep loads of the mask out of the pipeline, and
    make the compiler draw dropout, which follows it, in the operand layout of a product without tensor cores, where
    each thread holds whole rows.
    """
    if F.mask:  # noqa: SIM114 - the other condition is one of run time
        scores = tl.where(kept_tile(head, i, j, i0, j0, TRANSPOSED, F), scores, float("-inf"))
    elif not is_full:
        scores = tl.where(kept_tile(head, i, j, i0, j0, TRANSPOSED, F), scores, float("-inf"))
    return scores


@triton.jit
def softmax_step(scores, factor, m, total):
    """One step of online softmax: ``(p, m, total, alpha)``, where ``alpha`` is the factor on earlier sums.

    ``m`` is the running maximum of each row and ``total`` its running sum. While a row is empty, ``m`` is ``-inf``.
    """
    m_new = tl.maximum(m, tl.max(scores, 1))
    finite = tl.where(m_new == float("-inf"), 0.0, m_new)
    p = tl.exp2((scores - finite[:, None]) * factor)
    alpha = tl.exp2((m - finite) * factor)
    return p, m_new, total * alpha + tl.sum(p, 1), alpha


@triton.jit
def softmax_end(m, total, sink, scale, F: tl.constexpr):
    """``(norm, lse, lse_low)`` of finished rows: the factor for accumulated sums, and the two parts of the logarithm.

    ``m`` and ``total`` are those of the keys alone; ``sink`` is a further score, -inf for none, unused without
    ``F.sinks``.
    """
    is_empty = m == float("-inf")
    top = tl.where(is_empty, 0.0, m)
    rest = tl.zeros_like(top)
    if F.plain:  # the largest score is top + rest, which its product with the scale rounds to top
        m = top
        top = m * scale
        rest = tl.fma(m, scale, -top)
    shrink = 1.0
    if F.sinks:
        sink += tl.zeros_like(top)
        is_sink = (sink > top) | (is_empty & (sink > float("-inf")))
        of_sink, of_keys = tl.exp2((sink - top - rest) * LOG2E), tl.exp2((top - sink + rest) * LOG2E)
        shrink = tl.where(is_sink, tl.where(is_empty, 0.0, of_keys), 1.0)
        total = total * shrink + tl.where(is_sink, 1.0, of_sink)
        top, rest = tl.where(is_sink, sink, top), tl.where(is_sink, 0.0, rest)
        is_empty = is_empty & (sink == float("-inf"))
    total = tl.where(is_empty, 1.0, total)
    lse, lse_low = logarithm_of(top, rest, total)
    return shrink / total, tl.where(is_empty, float("-inf"), lse), tl.where(is_empty, 0.0, lse_low)


@triton.jit
def logarithm_of(top, rest, total):
    """``(lse, lse_low)``: the fp32 number nearest to ``top + rest + log(total)``, and its rounding error."""
    small = rest + tl.log(total)
    lse = top + small
    return lse, (top - lse) + small


@triton.jit
def survivors(head, i0, j0, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TRANSPOSED: tl.constexpr):
    """True where dropout keeps the element: ``rng.dropout_keep``, with one Philox call for eight columns.

    Calls are numbered ``(j // 32) * 4 + (j % 8) // 2``; word ``(j % 32) // 8`` and its half ``j % 2`` belong to
    column ``j``. So the words come as ``[32s of columns, call, word, half]`` and only the middle two change places.
    """
    first_call = j0 // 32 * 4
    i, call = i0 + tl.arange(0, BLOCK_M)[:, None], first_call + tl.arange(0, max(BLOCK_N // 8, 4))[None, :]
    w0, w1, w2, w3 = tl.philox(head.seed, i, call, head.dropout_head, head.offset, n_rounds=PHILOX_ROUNDS)
    if BLOCK_N == 16:  # half of the words belong to these columns
        is_second = j0 % 32 == 16
        words = tl.join(tl.where(is_second, w2, w0), tl.where(is_second, w3, w1)).reshape(BLOCK_M, 1, 4, 2)
    else:
        words = tl.join(tl.join(w0, w2), tl.join(w1, w3)).reshape(BLOCK_M, BLOCK_N // 32, 4, 4)
    spared = tl.join((words & 0xFFFF) >= head.threshold, (words >> 16) >= head.threshold)
    spared = tl.permute(spared, (0, 1, 3, 2, 4)).reshape(BLOCK_M, BLOCK_N)
    return tl.trans(spared) if TRANSPOSED else spared
