"""Attention to a cache of keys and values: its tensors (``CacheInputs``), their checks, and the place of each position.

``spec.py`` has the definition. Implementations in torch ops share the steps here: rotating queries and new keys by
their positions, storing new keys and values, reading stored ones. None of them waits for a device.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from fastattn import layout
from fastattn.errors import input_error
from fastattn.problem import (
    FLOATS,
    PROMPT_ROWS,
    Problem,
    arch_of,
    check_devices,
    check_heads,
    check_per_head,
    check_scale_and_softcap,
)
from fastattn.rotary import apply_rotary
from fastattn.spec import AttentionSpec, diagonal, page_and_row, tile_range
from fastattn.trees import WORD, Tree, bits_of, check_words

FP8 = torch.float8_e4m3fn


@dataclass(frozen=True)
class CacheInputs:
    """The tensors of one call. ``1|X`` is a size of X, or 1 that broadcasts; P is the number of pages.

    Attributes:
        q: ``(B, S_q, H_q, D_qk)``, or ``(T_q, H_q, D_qk)`` if packed.
        k_cache: ``(P, page_size, H_kv, D_qk)``, in the dtype of q, or e4m3.
        v_cache: ``(P, page_size, H_kv, D_v)``, likewise.
        cache_lengths: ``(B,)`` int32: positions filled before the call.
        k: new keys ``(B, S_new, H_kv, D_qk)``, packed like q ``(T_q, H_kv, D_qk)``; None adds nothing.
        v: new values, likewise.
        block_table: ``(B, max_pages)`` int32, the pages of each sequence in order; None: ``b`` owns page ``b``.
        cu_seqlens_q: ``(B + 1,)`` int32 if q is packed.
        rotary_cos: ``(S_rotary, D_rotary / 2)``, floating, by position.
        rotary_sin: likewise.
        k_scale: ``(1|P, H_kv)`` fp32, for e4m3 caches.
        v_scale: likewise.
        bias: ``(1|B, 1|H_q, 1|S_q, 1|S_bias)``, floating, by absolute position of the key; dense q only.
        alibi_slopes: ``(1|B, H_q)`` floating.
        sinks: ``(1|B, H_q)`` floating.
        tree_mask: ``(1|B, S_q, W)`` int32, packed ``(T_q, W)``: the new tokens that each new token sees.
        max_seqlen_q: longest query sequence (dense: ``S_q``).
        rotary_interleaved: rotary pairs are neighbours, not half of ``D_rotary`` apart.
        batch_invariant: the bits of a sequence's results depend on its own tensors alone.
    """

    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    cache_lengths: Tensor
    k: Tensor | None = None
    v: Tensor | None = None
    block_table: Tensor | None = None
    cu_seqlens_q: Tensor | None = None
    rotary_cos: Tensor | None = None
    rotary_sin: Tensor | None = None
    k_scale: Tensor | None = None
    v_scale: Tensor | None = None
    bias: Tensor | None = None
    alibi_slopes: Tensor | None = None
    sinks: Tensor | None = None
    tree_mask: Tensor | None = None
    max_seqlen_q: int = 0
    rotary_interleaved: bool = False
    batch_invariant: bool = False

    @property
    def is_packed(self) -> bool:
        return self.cu_seqlens_q is not None

    @property
    def is_fp8(self) -> bool:
        return self.k_cache.dtype == FP8

    @property
    def batch(self) -> int:
        return self.cache_lengths.shape[0]

    @property
    def heads_q(self) -> int:
        return self.q.shape[-2]

    @property
    def heads_kv(self) -> int:
        return self.k_cache.shape[-2]

    @property
    def page_size(self) -> int:
        return self.k_cache.shape[1]

    @property
    def capacity(self) -> int:
        """The most positions a sequence may have."""
        return self.page_size * (1 if self.block_table is None else self.block_table.shape[1])

    def out_shape(self) -> tuple[int, ...]:
        return (*self.q.shape[:-1], self.v_cache.shape[-1])

    def lse_shape(self) -> tuple[int, ...]:
        """``(B, H_q, S_q)``, or ``(H_q, T_q)`` if packed."""
        if self.is_packed:
            return (self.q.shape[1], self.q.shape[0])
        return (self.q.shape[0], self.q.shape[2], self.q.shape[1])

    def query_lengths(self) -> Tensor | int:
        """``s_q`` of each sequence."""
        return self.q.shape[1] if self.cu_seqlens_q is None else self.cu_seqlens_q.diff()

    def new_lengths(self) -> Tensor | int:
        """``s_new`` of each sequence."""
        if self.k is None:
            return 0
        return self.k.shape[1] if self.cu_seqlens_q is None else self.cu_seqlens_q.diff()

    def host_lengths(self) -> tuple[list[int], list[int]]:
        """``s_q`` and ``s_kv`` of each sequence as host ints. Waits for the device if they are on one."""
        s_q, s_new = (x.tolist() if isinstance(x, Tensor) else [x] * self.batch for x in self._query_and_new())
        before = self.cache_lengths.tolist()
        return s_q, [have + new for have, new in zip(before, s_new, strict=True)]

    def _query_and_new(self) -> tuple[Tensor | int, Tensor | int]:
        return self.query_lengths(), self.new_lengths()

    def replace(self, **changes: object) -> CacheInputs:
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]


# The fields of CacheInputs in order: tensors, then host values.
_FIELDS = tuple(f.name for f in dataclasses.fields(CacheInputs))
CACHE_TENSORS, CACHE_SCALARS = _FIELDS[:-3], _FIELDS[-3:]


def facts_of(inputs: CacheInputs, spec: AttentionSpec) -> Problem:
    """The facts that backends base their reasons on."""
    q = inputs.q
    return Problem(
        device=q.device.type,
        arch=arch_of(q.device),
        dtype=q.dtype,
        head_dim_qk=q.shape[-1],
        head_dim_v=inputs.v_cache.shape[-1],
        group=inputs.heads_q // inputs.heads_kv,
        features=frozenset(_used(inputs, spec)),
        deterministic=torch.are_deterministic_algorithms_enabled(),
        page_size=0 if inputs.block_table is None else inputs.page_size,
    )


def _used(inputs: CacheInputs, spec: AttentionSpec) -> list[str]:
    """The members of ``problem.FEATURES`` and ``problem.CACHE_FEATURES`` that the call needs."""
    q, k_cache, v_cache = inputs.q, inputs.k_cache, inputs.v_cache
    operands = (q, k_cache, v_cache) if inputs.k is None else (q, k_cache, v_cache, inputs.k, inputs.v)
    used = (
        ("cache", True),
        ("band", spec.has_band),
        ("softcap", spec.softcap is not None),
        ("bias", inputs.bias is not None),
        ("alibi", inputs.alibi_slopes is not None),
        ("sinks", inputs.sinks is not None),
        ("packed", inputs.cu_seqlens_q is not None),
        ("gqa", q.shape[-2] != k_cache.shape[-2]),
        ("mixed head dims", q.shape[-1] != v_cache.shape[-1]),
        ("strided head dim", any(x is not None and x.stride(-1) != 1 and x.shape[-1] > 1 for x in operands)),
        ("append", inputs.k is not None),
        ("paged cache", inputs.block_table is not None),
        ("rotary", inputs.rotary_cos is not None),
        ("fp8 cache", k_cache.dtype == FP8),
        ("prompt", inputs.max_seqlen_q > PROMPT_ROWS),
        ("tree", inputs.tree_mask is not None),
        ("batch invariant", inputs.batch_invariant),
    )
    return [name for name, is_used in used if is_used]


# --- steps --------------------------------------------------------------------------------------------------------


def rows_of(inputs: CacheInputs, sequence: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
    """``(page, row)`` of each position of each sequence, so that ``cache[page, row]`` is its ``(H_kv, D)``."""
    if inputs.block_table is None:
        return torch.broadcast_tensors(sequence, position)
    entry, row = page_and_row(position, inputs.page_size)
    return inputs.block_table[sequence, entry].long(), row


def packed_positions(inputs: CacheInputs) -> tuple[Tensor, Tensor]:
    """For each row of a packed q ``(T_q,)``: its sequence, and its index ``i`` there."""
    assert inputs.cu_seqlens_q is not None
    ends = inputs.cu_seqlens_q[1:].contiguous()
    t = torch.arange(inputs.q.shape[0], device=ends.device)
    sequence = torch.searchsorted(ends, t, right=True).clamp_(max=max(0, inputs.batch - 1))
    return sequence, t - inputs.cu_seqlens_q[sequence]


def tree_of(inputs: CacheInputs) -> Tree:
    """The trees of a call with a ``tree_mask``. Bits of tokens that a sequence does not have are ignored."""
    assert inputs.tree_mask is not None
    longest, device = inputs.max_seqlen_q, inputs.q.device
    bits = bits_of(inputs.tree_mask, longest)
    if inputs.cu_seqlens_q is not None:
        i, lengths = torch.arange(longest, device=device), inputs.cu_seqlens_q.diff()[:, None]
        rows = (inputs.cu_seqlens_q[:-1, None] + i).clamp(max=bits.shape[0]).long()  # at most the row that is added
        bits = torch.cat((bits, bits.new_zeros(1, longest)))[rows] & (i < lengths)[:, None] & (i < lengths)[..., None]
    return Tree.of(bits, inputs.cache_lengths)


def tree_depths(inputs: CacheInputs) -> Tensor:
    """The depth of each new token in its tree, ``(B, S_q)``, packed ``(T_q,)``."""
    depths = tree_of(inputs).depths
    return depths[packed_positions(inputs)] if inputs.is_packed else depths


def rotated_queries(inputs: CacheInputs, spec: AttentionSpec) -> Tensor:
    """q, each row rotated by the position of its diagonal, or by 0 if that is negative."""
    if inputs.rotary_cos is None:
        return inputs.q
    s_q, s_new = inputs._query_and_new()
    first = diagonal(spec, s_q, inputs.cache_lengths + s_new)
    if inputs.is_packed:
        sequence, i = packed_positions(inputs)
        first = first[sequence]
    else:
        first, i = first[:, None], torch.arange(inputs.q.shape[1], device=inputs.q.device)
    at = first + (i if inputs.tree_mask is None else tree_depths(inputs))
    return _rotated(inputs.q, at.clamp(min=0), inputs)


def append(inputs: CacheInputs) -> None:
    """Write the new keys, rotated by their positions, and the new values into the caches, in place."""
    if inputs.k is None or inputs.v is None:
        return
    new_keys, new_values = apart(inputs.k, inputs), apart(inputs.v, inputs)
    if (begin := _common_length(inputs)) is not None:
        rows = slice(begin, begin + new_keys.shape[1])  # a copy into a slice takes less host time than an index
        inputs.k_cache[:, rows] = new_keys
        inputs.v_cache[:, rows] = new_values
        return
    if inputs.is_packed:
        sequence, i = packed_positions(inputs)
    else:
        sequence = torch.arange(inputs.batch, device=inputs.q.device)[:, None]
        i = torch.arange(new_keys.shape[1], device=inputs.q.device)
    at = inputs.cache_lengths[sequence] + i
    places = at if inputs.tree_mask is None else at - i + tree_depths(inputs)
    k = new_keys if inputs.rotary_cos is None else _rotated(new_keys, places, inputs)
    page, row = rows_of(inputs, sequence, at.long())
    inputs.k_cache[page, row] = _stored(k, inputs.k_cache.dtype, inputs.k_scale, page)
    inputs.v_cache[page, row] = _stored(new_values, inputs.v_cache.dtype, inputs.v_scale, page)


def apart(x: Tensor, inputs: CacheInputs) -> Tensor:
    """``x``, copied if it is a view of a cache, so that storing other rows first cannot change it."""
    caches = (inputs.k_cache.untyped_storage().data_ptr(), inputs.v_cache.untyped_storage().data_ptr())
    return x.clone() if x.untyped_storage().data_ptr() in caches else x


def _common_length(inputs: CacheInputs) -> int | None:
    """The common length of a contiguous cache in host memory, if there is one and new rows are stored unchanged."""
    is_known = inputs.cache_lengths.device.type == "cpu" and not inputs.is_packed and inputs.block_table is None
    if not is_known or inputs.rotary_cos is not None or inputs.is_fp8:
        return None
    lengths = set(inputs.cache_lengths.tolist())
    return lengths.pop() if len(lengths) == 1 else None


def read(cache: Tensor, scale: Tensor | None, page: Tensor, row: Tensor, dtype: torch.dtype) -> Tensor:
    """The stored rows ``(..., H_kv, D)`` in ``dtype``, times their scales."""
    x = cache[page, row].to(dtype)
    return x if scale is None else x * _scale_of(scale, page).to(dtype)


def _rotated(x: Tensor, at: Tensor, inputs: CacheInputs) -> Tensor:
    assert inputs.rotary_cos is not None and inputs.rotary_sin is not None
    dtype = torch.promote_types(torch.promote_types(x.dtype, inputs.rotary_cos.dtype), torch.float32)
    cos, sin = (table[at].to(dtype) for table in (inputs.rotary_cos, inputs.rotary_sin))
    return apply_rotary(x, cos, sin, inputs.rotary_interleaved)


def _stored(x: Tensor, dtype: torch.dtype, scale: Tensor | None, page: Tensor) -> Tensor:
    if dtype != FP8:
        return x
    x = x.float()
    if scale is not None:
        x = x / _scale_of(scale, page)
    limit = torch.finfo(FP8).max
    return x.clamp(-limit, limit).to(FP8)


def _scale_of(scale: Tensor, page: Tensor) -> Tensor:
    """``(..., H_kv, 1)``."""
    return (scale[0] if scale.shape[0] == 1 else scale[page])[..., None]


# --- checks -------------------------------------------------------------------------------------------------------


def check_cache_inputs(inputs: CacheInputs, spec: AttentionSpec) -> None:
    """Raise InputError unless the tensors fit together. Reads no values, so it never waits for a device."""
    _check_caches(inputs)
    _check_lengths(inputs)
    _check_new(inputs)
    check_scale_and_softcap(spec)
    if inputs.rotary_cos is not None or inputs.rotary_sin is not None:
        _check_rotary(inputs)
    _check_scales(inputs)
    if inputs.bias is not None:
        _check_bias(inputs)
    check_per_head(inputs.alibi_slopes, inputs.sinks, inputs.batch, inputs.heads_q)
    if inputs.tree_mask is not None:
        _check_tree(inputs, inputs.tree_mask, spec)
    check_devices({name: getattr(inputs, name) for name in CACHE_TENSORS}, inputs.q.device)
    _check_no_gradient(inputs)


def _check_caches(inputs: CacheInputs) -> None:
    q, k_cache, v_cache = inputs.q, inputs.k_cache, inputs.v_cache
    if q.dtype not in FLOATS:
        raise input_error("q", q.dtype, "float16, bfloat16, float32 or float64", "Convert it with .to(...).")
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        if cache.dtype not in (q.dtype, FP8) or cache.dtype != k_cache.dtype:
            todo = "Both caches share one dtype; make them with that of the model."
            raise input_error(name, cache.dtype, f"{q.dtype}, the dtype of q, or {FP8}, for both", todo)
        if 0 in cache.shape[1:]:
            raise input_error(name, f"shape {tuple(cache.shape)}", "at least one row and one head", "Check the view.")
    check_heads(q, k_cache, v_cache, "k_cache", "v_cache")


def _check_lengths(inputs: CacheInputs) -> None:
    lengths, table, q = inputs.cache_lengths, inputs.block_table, inputs.q
    batch = inputs.batch if inputs.is_packed else q.shape[0]
    if inputs.cu_seqlens_q is not None:
        layout.check_cu_seqlens("cu_seqlens_q", inputs.cu_seqlens_q, q.device)
        batch = inputs.cu_seqlens_q.shape[0] - 1
    if lengths.dtype != torch.int32:
        raise input_error("cache_lengths", lengths.dtype, "torch.int32", "Convert it with .int().")
    if lengths.shape != (batch,):
        todo = "One number for each sequence."
        raise input_error("cache_lengths", f"shape {tuple(lengths.shape)}", f"(B,) = ({batch},)", todo)
    if table is None:
        if inputs.k_cache.shape[0] != batch:
            todo = "Without block_table sequence b lies in row b; pass a (B, 1) block_table to name other rows."
            raise input_error("k_cache", f"{inputs.k_cache.shape[0]} rows", f"{batch}, one for each sequence", todo)
        return
    if table.dtype != torch.int32:
        raise input_error("block_table", table.dtype, "torch.int32", "Convert it with .int().")
    if table.dim() != 2 or table.shape[0] != batch or table.shape[1] < 1:
        given, allowed = f"shape {tuple(table.shape)}", f"(B, max_pages) = ({batch}, at least 1)"
        raise input_error("block_table", given, allowed, "One row of page numbers for each sequence.")


def _check_new(inputs: CacheInputs) -> None:
    k, v, q = inputs.k, inputs.v, inputs.q
    if (k is None) != (v is None):
        raise input_error("k, v", "one of the two", "both or neither", "They are appended together.")
    if k is None or v is None:
        return
    for name, cache in (("k_cache", inputs.k_cache), ("v_cache", inputs.v_cache)):
        if any(step == 0 and size > 1 for size, step in zip(cache.shape, cache.stride(), strict=True)):
            allowed = "a cache whose rows lie apart, where new ones are stored"
            raise input_error(name, "an expanded tensor", allowed, "Copy it with .contiguous().")
    rows = (q.shape[0],) if inputs.is_packed else (q.shape[0], k.shape[1] if k.dim() == 4 else 1)
    for name, x, cache in (("k", k, inputs.k_cache), ("v", v, inputs.v_cache)):
        expected = (*rows, *cache.shape[2:])
        if x.shape != expected or x.dtype != q.dtype:
            allowed = f"{expected}, {q.dtype}: " + (
                "a row for each of q" if inputs.is_packed else "(B, S_new, H_kv, D)"
            )
            raise input_error(name, f"shape {tuple(x.shape)}, {x.dtype}", allowed, "It is stored as the cache has it.")
    if not inputs.is_packed and k.shape[1] > inputs.capacity:
        given, allowed = f"{k.shape[1]} new tokens", f"at most {inputs.capacity}, what the cache holds"
        raise input_error("k", given, allowed, "Make the cache longer.")


def _check_rotary(inputs: CacheInputs) -> None:
    cos, sin = inputs.rotary_cos, inputs.rotary_sin
    if cos is None or sin is None:
        raise input_error("rotary_cos, rotary_sin", "one of the two", "both or neither", "Pass both tables.")
    for name, table in (("rotary_cos", cos), ("rotary_sin", sin)):
        is_table = table.dim() == 2 and table.dtype in FLOATS and table.shape == cos.shape
        if not is_table or not 0 < 2 * table.shape[1] <= inputs.q.shape[-1]:
            given = f"shape {tuple(table.shape)}, {table.dtype}"
            allowed = f"(S_rotary, D_rotary / 2) with D_rotary <= {inputs.q.shape[-1]}, floating, one shape for both"
            raise input_error(name, given, allowed, "See fastattn.nn.rotary.rotary_tables.")
        if table.shape[0] < inputs.capacity:
            given, allowed = f"{table.shape[0]} positions", f"at least {inputs.capacity}, what the cache holds"
            raise input_error(name, given, allowed, "Compute the tables for every position of the cache.")


def _check_scales(inputs: CacheInputs) -> None:
    for name, scale in (("k_scale", inputs.k_scale), ("v_scale", inputs.v_scale)):
        if scale is None:
            continue
        if not inputs.is_fp8:
            todo = "Scales belong to e4m3 caches."
            raise input_error(name, "a tensor", f"None with a cache of {inputs.k_cache.dtype}", todo)
        pages, heads = inputs.k_cache.shape[0], inputs.heads_kv
        fits = scale.dim() == 2 and scale.shape[1] == heads and (scale.shape[0] == 1 or scale.shape[0] == pages)
        if not fits or scale.dtype != torch.float32:
            given = f"shape {tuple(scale.shape)}, {scale.dtype}"
            allowed = f"(H_kv,) = ({heads},) or (P, H_kv) = ({pages}, {heads}), torch.float32"
            raise input_error(name, given, allowed, "One for each head, or for each page and head.")


def _check_bias(inputs: CacheInputs) -> None:
    bias, q = inputs.bias, inputs.q
    assert bias is not None
    if inputs.is_packed:
        raise input_error("bias", "a tensor", "None with packed queries", "Pass dense q, or alibi_slopes.")
    if bias.dtype not in FLOATS:
        raise input_error("bias", bias.dtype, "float16, bfloat16, float32 or float64", "Convert it with .float().")
    shared = (q.shape[0], inputs.heads_q, q.shape[1])
    fits = bias.dim() == 4 and all(size == 1 or size == full for size, full in zip(bias.shape, shared, strict=False))
    if not fits or bias.shape[3] < 1:
        allowed = f"a shape that broadcasts to (B, H_q, S_q, S_bias) = {(*shared, 'S_bias')}"
        raise input_error("bias", f"shape {tuple(bias.shape)}", allowed, "S_bias counts the cache's positions from 0.")


def _check_tree(inputs: CacheInputs, tree: Tensor, spec: AttentionSpec) -> None:
    if inputs.k is None or (not inputs.is_packed and inputs.k.shape[1] != inputs.q.shape[1]):
        given = "nothing" if inputs.k is None else f"{inputs.k.shape[1]} new tokens for {inputs.q.shape[1]} queries"
        raise input_error("k", f"{given} with a tree_mask", "a new token for each query", "The tree is made of them.")
    if spec.right != 0:
        todo = "Its bits say which later tokens are seen."
        raise input_error("tree_mask", "a tensor with causal=False", "None, or causal=True", todo)
    rows = (inputs.q.shape[0],) if inputs.is_packed else inputs.q.shape[:2]
    check_words(tree, (*rows, -(-inputs.max_seqlen_q // WORD)))


def _check_no_gradient(inputs: CacheInputs) -> None:
    if not torch.is_grad_enabled():
        return
    for name in CACHE_TENSORS:
        x = getattr(inputs, name)
        if x is not None and x.requires_grad:
            todo = "Decode under torch.no_grad(); train with fastattn.attention."
            raise input_error(name, "a tensor that requires grad", "one that does not: there is no gradient", todo)


def most_positions(inputs: CacheInputs) -> int:
    """The most positions that a sequence may have: the capacity of the cache, or the length of a shorter bias."""
    if inputs.bias is None or inputs.bias.shape[3] == 1:
        return inputs.capacity
    return min(inputs.capacity, inputs.bias.shape[3])


def check_cache_values(inputs: CacheInputs, spec: AttentionSpec) -> None:
    """Check the values of lengths and page numbers, for tensors in host memory."""
    if inputs.cu_seqlens_q is not None:
        boundaries = inputs.cu_seqlens_q.tolist()
        layout.check_cu_seqlens_values("cu_seqlens_q", boundaries, inputs.q.shape[0], inputs.max_seqlen_q)
    s_q, s_kv = inputs.host_lengths()
    limit = most_positions(inputs)
    before = inputs.cache_lengths.tolist()
    for b, (have, after) in enumerate(zip(before, s_kv, strict=True)):
        if have < 0 or after > limit:
            new = after - have
            given = f"{have} for sequence {b}" + (f" with {new} new tokens" if new else "")
            allowed = f"0 to {limit - new}, what leaves room for them in {limit}"
            raise input_error("cache_lengths", given, allowed, "Make the cache (and the bias) longer.")
    if inputs.block_table is not None:
        _check_pages(inputs.block_table, inputs, spec, (before, s_q, s_kv))


def _check_pages(
    table: Tensor, inputs: CacheInputs, spec: AttentionSpec, lengths: tuple[list[int], list[int], list[int]]
) -> None:
    lows, highs = [], []
    for have, s_q, s_kv in zip(*lengths, strict=True):
        begin, end = tile_range(spec, 0, s_q, s_q, s_kv)
        if have < s_kv:  # new tokens are written whether or not they are read
            begin, end = (min(begin, have), s_kv) if begin < end else (have, s_kv)
        lows.append(begin // inputs.page_size)
        highs.append(-(-end // inputs.page_size))
    last = max(highs, default=0)
    if last <= 0:
        return
    lowest, highest = table[:, :last].aminmax() if min(lows) == 0 and len(set(highs)) == 1 else (None, None)
    pages = inputs.k_cache.shape[0]
    if lowest is not None and highest is not None and int(lowest) >= 0 and int(highest) < pages:
        return  # the usual case: every entry looked at is in use
    entry, entries = torch.arange(last), table[:, :last]
    low, high = torch.tensor(lows)[:, None], torch.tensor(highs)[:, None]
    wrong = ((entries < 0) | (entries >= pages)) & (entry >= low) & (entry < high)
    if bool(wrong.any()):
        b, n = wrong.nonzero()[0].tolist()
        given, allowed = f"page {int(entries[b, n])} at [{b}, {n}]", f"0 to {pages - 1}" if pages else "no page at all"
        raise input_error("block_table", given, allowed, f"Sequence {b} has {lengths[2][b]} positions, all in pages.")
