"""Kernels and operations on caches: locate and read rows, rotate new ones, round them to e4m3 and store them."""

# mypy: disallow-untyped-defs=False
from __future__ import annotations

import triton
import triton.language as tl

from fastattn.backends.triton.tile import Band, head_in, number, open_head, stride

E4M3_MAX = tl.constexpr(448.0)
E4M3_NAN = tl.constexpr(0x7F)


@triton.jit
def open_cache(b, cache, terms, sizes, F: tl.constexpr):
    """``(begin_q, band)`` of sequence ``b``, whose keys are those in the cache and the new ones."""
    if F.packed:
        begin_q = tl.load(terms.cu_seqlens_q + b)
        s_q = tl.load(terms.cu_seqlens_q + b + 1) - begin_q
    else:
        begin_q, s_q = b * 0, number(sizes.s_q)
    s_kv = tl.load(cache.lengths + b) + number(cache.new_rows) + number(cache.new_queries) * s_q
    s_kv = tl.minimum(s_kv, number(cache.capacity))
    return begin_q, Band(s_q, s_kv, s_kv - s_q, number(sizes.left), number(sizes.right))


@triton.jit
def open_rows(b, h, terms, sizes, F: tl.constexpr):
    """``tile.open_head``, also for a sequence whose keys lie in the cache ``terms.cache``."""
    if F.cached:
        begin_q, band = open_cache(b, terms.cache, terms, sizes, F)
        head = head_in(b, h, begin_q, b * 0, band, terms, sizes, F)
    else:  # Triton compiles what follows a return
        head = open_head(b, h, terms, sizes, F)
    return head


@triton.jit
def row_pointers(x, b, i, h, VECTOR: tl.constexpr):
    """Pointers to rows ``i`` of heads ``h`` of sequences (or pages) ``b`` of ``x``, as ``Bshd``."""
    at = x.ptr + b.to(tl.int64) * stride(x.stride_b, VECTOR) + i.to(tl.int64) * stride(x.stride_s, VECTOR)
    return at + h.to(tl.int64) * stride(x.stride_h, VECTOR)


@triton.jit
def located(b, j, valid, cache, F: tl.constexpr):
    """``(page, row)`` of positions ``j`` of sequence ``b``; the table is read only where ``valid``."""
    if F.paged:
        size = number(cache.page_size)
        entries = cache.block_table.ptr + b.to(tl.int64) * number(cache.block_table.stride_b)
        page = tl.load(entries + j // size * number(cache.block_table.stride_s), mask=valid, other=0)
        return page, j % size
    return b + j * 0, j


@triton.jit
def within(page, cache, F: tl.constexpr):
    """A page that the cache has: a table on a GPU is not checked before. A mask would cost more registers."""
    if F.paged:
        page = tl.maximum(tl.minimum(page, number(cache.pages) - 1), 0)
    return page


@triton.jit
def place_of(b, begin_q, i, valid, before, cache):
    """The position of query row (or new token) ``i`` of a sequence: in a tree ``before`` and its depth."""
    if cache.depths is not None:  # Triton compiles what follows a return, so there is no early one
        at = cache.depths.ptr + b.to(tl.int64) * number(cache.depths.stride_b) + begin_q + i
        place = before + tl.load(at, mask=valid, other=0)
    else:
        place = before + i
    return place


@triton.jit
def away_in_tree(b, begin_q, i, j, band, cache):
    """Distance of keys ``j`` from rows ``i`` in the paths of a tree."""
    new = j - band.diagonal
    is_new = (new >= 0) & (new < band.s_q)
    at_j = tl.where(is_new, place_of(b, begin_q, new, is_new, band.diagonal, cache), j)
    return at_j - place_of(b, begin_q, i, i < band.s_q, band.diagonal, cache)


@triton.jit
def kept_in_tree(b, begin_q, i, j, away, band, cache, LEFT: tl.constexpr):
    """Whether rows ``i`` see keys ``j``: those before the call, and the new ones whose bit is set."""
    new = tl.maximum(j - band.diagonal, 0)
    row = (begin_q + i).to(tl.int64) * number(cache.tree.stride_s)
    at = cache.tree.ptr + b.to(tl.int64) * number(cache.tree.stride_b) + row + new // 32
    word = tl.load(at, mask=(i < band.s_q) & (j >= band.diagonal) & (new < band.s_q), other=0)
    kept = (j < band.diagonal) | (((word >> (new % 32)) & 1) != 0)
    kept = kept & (i < band.s_q) & (j < band.s_kv)
    if LEFT:
        kept = kept & (away >= -band.left)
    return kept


@triton.jit
def cached_rows(
    x, scale, page, row, h, valid, D: tl.constexpr, BLOCK_D: tl.constexpr, DTYPE: tl.constexpr, F: tl.constexpr
):  # fmt: skip
    """The rows of head ``h`` as ``[BLOCK_N, BLOCK_D]`` in DTYPE, times their scale; zero where not ``valid``."""
    d = tl.arange(0, BLOCK_D)
    at = row_pointers(x, page, row, h, F.vector_cache)[:, None]
    at += d[None, :] if F.contiguous else d[None, :].to(tl.int64) * number(x.stride_d)
    tile = tl.load(at, mask=valid[:, None] & (d < D)[None, :], other=0)
    if F.fp8:
        tile = from_e4m3(tile)
        if scale is not None:
            tile *= load_scales(scale, page, h, valid)[:, None]
    return tile.to(DTYPE)


@triton.jit
def load_scales(scale, page, h, valid):
    """The scale of head ``h`` of each page, from ``scale``, a ``PerHead``."""
    at = scale.ptr + page.to(tl.int64) * number(scale.stride_b) + h * number(scale.stride_h)
    return tl.load(at, mask=valid, other=1.0)


@triton.jit
def from_e4m3(byte):
    """The fp32 value of an e4m3 byte, computed from its bits, since GPUs before sm_89 have no instruction for it.

    Its bits are read as fp16, which makes the exponent too small by 8.
    """
    magnitude = (byte & 0x7F).to(tl.uint16)
    half = (((byte & 0x80).to(tl.uint16) << 8) | (magnitude << 7)).to(tl.float16, bitcast=True)
    return tl.where(magnitude == E4M3_NAN, float("nan"), half.to(tl.float32) * 256.0)


@triton.jit
def to_e4m3(x):
    """The byte of the e4m3 number nearest to fp32 ``x``, clamped to 448 in magnitude; ties to even."""
    size = tl.minimum(tl.abs(x), E4M3_MAX)
    bits = size.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)  # exponents begin at 120 and keep 3 bits
    tiny = (((size + 16384.0) - 16384.0) * 512.0).to(tl.int32)  # below 2^-6: multiples of 2^-9, to which the sum rounds
    magnitude = tl.where(size < 0.015625, tiny, normal)
    magnitude = tl.where(x == x, magnitude, E4M3_NAN)
    sign = (x.to(tl.int32, bitcast=True) >> 24) & 0x80
    return (sign | magnitude).to(tl.uint8)


@triton.jit
def append_kernel(
    k, v, k_cache, v_cache, cos, sin, cache, terms, sizes, F: tl.constexpr, ROTARY: tl.constexpr,
    INTERLEAVED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Append ``BLOCK`` new keys, rotated by their positions, and values to the cache of their sequence.

    Rows beyond its capacity, or of a page that it does not have, are dropped. Grid: ``(B * blocks, H_kv)``.
    """
    most = number(sizes.s_q) if F.packed else number(cache.new_rows)
    blocks = tl.cdiv(most, BLOCK)
    b, block, h = tl.program_id(0) // blocks, tl.program_id(0) % blocks, tl.program_id(1)
    begin, band = open_cache(b, cache, terms, sizes, F)
    rows = band.s_q if F.packed else most
    if block * BLOCK >= rows:
        return
    i = block * BLOCK + tl.arange(0, BLOCK)
    before = tl.load(cache.lengths + b)
    position = before + i
    valid = (i < rows) & (position < number(cache.capacity))
    page, row = located(b, position, valid, cache, F)
    valid = valid & (page == within(page, cache, F))
    place = place_of(b, begin, i, valid, before, cache)
    tile = turned_rows(k, b, begin + i, h, place, valid, cos, sin, F.d_qk, F.block_qk, ROTARY, INTERLEAVED)
    store_cached(k_cache, cache.k_scale, page, row, h, valid, tile, F.d_qk, F.block_qk, F)
    tile = turned_rows(v, b, begin + i, h, position, valid, cos, sin, F.d_v, F.block_v, 0, INTERLEAVED)
    store_cached(v_cache, cache.v_scale, page, row, h, valid, tile, F.d_v, F.block_v, F)


@triton.jit
def turn_kernel(
    q, turned, cos, sin, cache, terms, sizes, F: tl.constexpr, ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Write ``BLOCK`` query rows, rotated by their positions, to ``turned``. Grid: ``(B * blocks, H_q)``."""
    blocks = tl.cdiv(number(sizes.s_q), BLOCK)
    b, block, h = tl.program_id(0) // blocks, tl.program_id(0) % blocks, tl.program_id(1)
    begin, band = open_cache(b, cache, terms, sizes, F)
    i, d = block * BLOCK + tl.arange(0, BLOCK), tl.arange(0, F.block_qk)
    valid = i < band.s_q
    position = tl.maximum(place_of(b, begin, i, valid, band.diagonal, cache), 0)
    tile = turned_rows(q, b, begin + i, h, position, valid, cos, sin, F.d_qk, F.block_qk, ROTARY, INTERLEAVED)
    at = row_pointers(turned, b, begin + i, h, 1)[:, None] + d[None, :]
    tl.store(at, tile, mask=valid[:, None] & (d < F.d_qk)[None, :])


@triton.jit
def store_cached(
    x, scale, page, row, h, valid, tile, D: tl.constexpr, BLOCK_D: tl.constexpr, F: tl.constexpr
):  # fmt: skip
    """Store ``tile`` in the rows of head ``h`` of ``x``, divided by their scale if ``x`` is in e4m3."""
    if F.fp8:
        tile = tile.to(tl.float32)
        if scale is not None:
            tile /= load_scales(scale, page, h, valid)[:, None]
        tile = to_e4m3(tile)
    d = tl.arange(0, BLOCK_D)
    at = row_pointers(x, page, row, h, 1)[:, None] + d[None, :].to(tl.int64) * number(x.stride_d)
    tl.store(at, tile, mask=valid[:, None] & (d < D)[None, :])


@triton.jit
def turned_rows(
    x, b, i, h, position, valid, cos, sin, D: tl.constexpr, BLOCK_D: tl.constexpr, ROTARY: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """Rows ``i`` of head ``h``, their first ``2 * ROTARY`` dims rotated by ``position``: ``[BLOCK, BLOCK_D]``."""
    d = tl.arange(0, BLOCK_D)
    at, mask = row_pointers(x, b, i, h, 1)[:, None], valid[:, None] & (d < D)[None, :]
    tile = tl.load(at + d[None, :].to(tl.int64) * number(x.stride_d), mask=mask, other=0.0)
    if ROTARY:
        other, angle, sign = turned_with(d, ROTARY, INTERLEAVED)
        turned = mask & (d < 2 * ROTARY)[None, :]
        pair = tl.load(at + other[None, :].to(tl.int64) * number(x.stride_d), mask=turned, other=0.0).to(tl.float32)
        of_table = position[:, None].to(tl.int64) * ROTARY + angle[None, :]
        of_cos = tl.load(cos + of_table, mask=turned, other=1.0).to(tl.float32)
        of_sin = tl.load(sin + of_table, mask=turned, other=0.0).to(tl.float32)
        tile = (tile.to(tl.float32) * of_cos + pair * (of_sin * sign[None, :])).to(tile.dtype)
    return tile


@triton.jit
def turned_with(d, ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr):
    """``(other, angle, sign)`` for dims ``d``: ``x[d] * cos + sign * x[other] * sin`` rotates a pair by an angle."""
    if INTERLEAVED:
        is_first = d % 2 == 0
        other, angle = tl.where(is_first, d + 1, d - 1), d // 2
    else:
        is_first = d < ROTARY
        other, angle = tl.where(is_first, d + ROTARY, d - ROTARY), d % ROTARY
    return other, angle, tl.where(is_first, -1.0, 1.0)
