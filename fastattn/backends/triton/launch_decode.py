"""The host side of decoding: describes a call on a cache to the kernels and launches them.

Nothing here reads a length or a block table: sizes known to the host bound them, so a call can be captured in a CUDA
graph and replayed at other lengths.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import triton
from torch import Tensor

from fastattn import kv_cache
from fastattn.backends.triton import arguments, launch
from fastattn.backends.triton.arguments import (
    Bshd,
    Cache,
    Flags,
    PerHead,
    PerRow,
    PerToken,
    Scores,
    Sizes,
    Splits,
    Terms,
    coded,
)
from fastattn.backends.triton.configs import Config
from fastattn.backends.triton.decode import combine_kernel, decode_kernel
from fastattn.backends.triton.forward import forward_kernel
from fastattn.backends.triton.pages import append_kernel, turn_kernel
from fastattn.backends.triton.plans import device_of, launched
from fastattn.errors import input_error
from fastattn.kv_cache import CacheInputs
from fastattn.spec import AttentionSpec

BLOCK = 16  # rows that one program rotates or stores
COMBINED_SPLITS = 32  # splits that one step of the combination reads
FIXED_KEYS = 1024  # of a split of a batch-invariant call
PROMPT_ROWS = 128  # of a head, from which the forward kernel serves: its tallest tile
LEAST_TILES = 4  # tiles of keys in a split; with fewer, combining the splits is estimated to cost more than it saves


def attend_to_cache(inputs: CacheInputs, spec: AttentionSpec, config: Config | None = None) -> tuple[Tensor, Tensor]:
    """Append the new keys and values, if any, and return ``(out, lse)``.

    ``config`` overrides that of the table for the decoding kernel, and chooses that.
    """
    if inputs.capacity >= arguments.UNBOUNDED:
        todo = "Make the cache shorter."
        raise input_error("k_cache", f"a capacity of {inputs.capacity} positions", "less than 2^29", todo)
    out = torch.empty(inputs.out_shape(), dtype=inputs.q.dtype, device=inputs.q.device)
    lse = torch.empty(inputs.lse_shape(), dtype=torch.float32, device=inputs.q.device)
    with device_of(out):
        if inputs.k is not None and inputs.v is not None and inputs.k.numel():
            _append(inputs, spec, inputs.k, inputs.v)
        if lse.numel():
            turned = inputs if inputs.rotary_cos is None else inputs.replace(q=_turned_queries(inputs, spec))
            if config is None and is_prompt(inputs):
                attend_as_prompt(turned, spec, out, lse)
            else:
                _decode(turned, spec, out, lse, config)
    return out, lse


def _append(inputs: CacheInputs, spec: AttentionSpec, k: Tensor, v: Tensor) -> None:
    blocks = triton.cdiv(inputs.max_seqlen_q if inputs.is_packed else k.shape[1], BLOCK)
    caches = (Bshd.of(_bytes(inputs.k_cache)), Bshd.of(_bytes(inputs.v_cache)))
    grid = (inputs.batch * blocks, inputs.heads_kv)
    launched(append_kernel, grid)(Bshd.of(k), Bshd.of(v), *caches, **_placing(inputs, spec))


def _turned_queries(inputs: CacheInputs, spec: AttentionSpec) -> Tensor:
    q = torch.empty(inputs.q.shape, dtype=inputs.q.dtype, device=inputs.q.device)
    blocks = triton.cdiv(inputs.max_seqlen_q, BLOCK)
    grid = (inputs.batch * blocks, inputs.heads_q)
    launched(turn_kernel, grid)(Bshd.of(inputs.q), Bshd.of(q), **_placing(inputs, spec))
    return q


def _placing(inputs: CacheInputs, spec: AttentionSpec) -> dict[str, Any]:
    """The arguments that the kernels share which rotate and store rows."""
    cos, sin = inputs.rotary_cos, inputs.rotary_sin
    d_qk, d_v = inputs.q.shape[-1], inputs.v_cache.shape[-1]
    return {
        "cos": None if cos is None else cos.contiguous(),
        "sin": None if sin is None else sin.contiguous(),
        "cache": _cache(inputs, spec),
        "terms": _terms(inputs),
        "sizes": _sizes(inputs, spec),
        "F": Flags(
            d_qk=d_qk,
            d_v=d_v,
            block_qk=triton.next_power_of_2(d_qk),
            block_v=triton.next_power_of_2(d_v),
            packed=inputs.is_packed,
            paged=inputs.block_table is not None,
            fp8=inputs.is_fp8,
        ),
        "ROTARY": 0 if cos is None else cos.shape[1],
        "INTERLEAVED": inputs.rotary_interleaved,
        "BLOCK": BLOCK,
        **launch.ALWAYS,
    }


def is_prompt(inputs: CacheInputs) -> bool:
    """Whether the forward kernel serves: the rows of a head fill its tiles, and these fill the device without splits.

    It has tensor cores to itself there, while decoding kernels are chosen for few rows and long caches.
    """
    if inputs.tree_mask is not None or inputs.batch_invariant or inputs.q.dtype == torch.float32:
        return False
    programs = inputs.batch * inputs.heads_q * (inputs.max_seqlen_q // PROMPT_ROWS)
    return programs >= launch.processors(inputs.q.device)


def attend_as_prompt(
    inputs: CacheInputs, spec: AttentionSpec, out: Tensor, lse: Tensor, config: Config | None = None
) -> None:
    """Attend by the forward kernel, which reads the cache where it lies."""
    rows = _cache_rows(inputs)
    flags = dataclasses.replace(_flags(inputs, spec, rows), cached=True)
    config = config or launch.config_of(out.device, "forward", flags)
    cache = inputs.k_cache
    of_head = inputs.capacity * (cache.shape[-1] + inputs.v_cache.shape[-1]) * cache.element_size()
    grid, schedule = launch.schedule_of(
        triton.cdiv(inputs.max_seqlen_q, config.block_m), inputs.batch * inputs.heads_q,
        inputs.heads_q // inputs.heads_kv, of_head, out.device,
    )  # fmt: skip
    launched(forward_kernel, grid)(
        *rows,
        Bshd.of(out),
        PerRow.of(lse),
        PerRow.of(torch.empty(lse.shape, dtype=torch.float32, device=lse.device)),
        _terms(inputs)._replace(cache=_cache(inputs, spec)),
        _sizes(inputs, spec),
        schedule,
        **launch.compiled(out.device, flags, config),
    )


def _cache_rows(inputs: CacheInputs) -> tuple[Bshd, Bshd, Bshd]:
    return Bshd.of(inputs.q), Bshd.of(_bytes(inputs.k_cache)), Bshd.of(_bytes(inputs.v_cache))


def _flags(inputs: CacheInputs, spec: AttentionSpec, rows: tuple[Bshd, Bshd, Bshd]) -> Flags:
    most = 16 if inputs.is_fp8 else 8  # elements of 16 bytes, the widest load
    return dataclasses.replace(
        launch.flags_of(inputs, spec, rows),
        paged=inputs.block_table is not None,
        fp8=inputs.is_fp8,
        vector_cache=min(x.vector(most) for x in rows[1:]),
    )


def _decode(inputs: CacheInputs, spec: AttentionSpec, out: Tensor, lse: Tensor, config: Config | None) -> None:
    """Attend, in as many splits as it takes to occupy the device, and combine them if there are several."""
    q, k, v = _cache_rows(inputs)
    is_tree, fixed = inputs.tree_mask is not None, inputs.batch_invariant
    paged = dataclasses.replace(_flags(inputs, spec, (q, k, v)), tree=is_tree, fixed=fixed)
    flags = dataclasses.replace(paged, paged=False)
    rows = inputs.max_seqlen_q * (inputs.heads_q // inputs.heads_kv)
    # a batch-invariant call has the same tiles whatever its rows and pages are
    config = config or launch.config_of(out.device, "decode", flags if inputs.batch_invariant else paged)
    block_m = config.block_m
    if not inputs.batch_invariant:
        block_m = min(block_m, max(16, triton.next_power_of_2(rows)))
    blocks = triton.cdiv(rows, block_m)
    programs = inputs.batch * inputs.heads_kv * blocks
    tiles, count = 0, splits(programs, _reach(inputs, spec), config.block_n, launch.processors(out.device))
    if inputs.batch_invariant:
        tiles, count = FIXED_KEYS // config.block_n, triton.cdiv(inputs.capacity, FIXED_KEYS)
    is_split = count > 1 or inputs.batch_invariant
    partial_out, partial_lse, partial_low = out, lse.transpose(-1, -2), None
    if is_split:
        partial_out = torch.empty(count, *out.shape, dtype=torch.float32, device=out.device)
        partial_lse, partial_low = torch.empty(2, count, *out.shape[:-1], dtype=torch.float32, device=out.device)
    first, lse_of_first = (partial_out[0], partial_lse[0]) if is_split else (partial_out, partial_lse)
    launched(decode_kernel, (programs * count,))(
        q,
        k,
        v,
        Bshd.of(first),
        Bshd.of(lse_of_first.unsqueeze(-1)),
        None if partial_low is None else Bshd.of(partial_low[0].unsqueeze(-1)),
        _cache(inputs, spec),
        _terms(inputs),
        _sizes(inputs, spec),
        Splits(coded(blocks), coded(count), coded(tiles), coded(out.numel()), coded(lse.numel())),
        **launch.compiled(out.device, paged, config._replace(block_m=block_m)),
    )
    if is_split:
        s_q = inputs.q.shape[-3]
        launched(combine_kernel, (lse.numel(),))(
            partial_out, partial_lse, partial_low, out, lse, coded(count), coded(lse.numel()), coded(s_q),
            coded(inputs.heads_q), D=flags.d_v, BLOCK_D=flags.block_v, BLOCK_SPLITS=COMBINED_SPLITS, **launch.ALWAYS,
        )  # fmt: skip


def splits(programs: int, reach: int, block_n: int, on: int) -> int:
    """The number of splits of the keys that gives each of ``on`` processors two programs, if there are enough keys.

    Args:
        programs: the number of programs without splits.
        reach: the most keys that one of them may have to visit.
        block_n: keys of a tile.
        on: processors of the device.
    """
    return max(1, min(2 * on // programs, reach // (LEAST_TILES * block_n)))


# --- description --------------------------------------------------------------------------------------------------


def _reach(inputs: CacheInputs, spec: AttentionSpec) -> int:
    """The most keys that the rows of one sequence may keep."""
    if spec.left is None:
        return inputs.capacity
    return min(inputs.capacity, inputs.max_seqlen_q + spec.left + (spec.right or 0))


def _bytes(cache: Tensor) -> Tensor:
    """An e4m3 cache as bytes: kernels convert it themselves."""
    return cache.view(torch.uint8) if cache.element_size() == 1 else cache


def _cache(inputs: CacheInputs, spec: AttentionSpec) -> Cache:
    tree, depths = _tree(inputs, spec)
    new = 0 if inputs.k is None or inputs.is_packed else inputs.k.shape[1]
    return Cache(
        lengths=inputs.cache_lengths,
        new_rows=coded(new),
        new_queries=coded(int(inputs.k is not None and inputs.is_packed)),
        capacity=coded(inputs.capacity if inputs.k_cache.shape[0] else 0),
        page_size=coded(inputs.page_size),
        pages=coded(inputs.k_cache.shape[0]),
        block_table=None if inputs.block_table is None else PerToken.of(inputs.block_table),
        k_scale=None if inputs.k_scale is None else PerHead.of(inputs.k_scale),
        v_scale=None if inputs.v_scale is None else PerHead.of(inputs.v_scale),
        tree=tree,
        depths=depths,
    )


def _tree(inputs: CacheInputs, spec: AttentionSpec) -> tuple[PerToken | None, PerToken | None]:
    """The words of a tree mask, and the depths of its tokens where a term counts positions."""
    if inputs.tree_mask is None:
        return None, None
    words = inputs.tree_mask.contiguous()
    step = 0 if inputs.is_packed or words.shape[0] == 1 else words.stride(0)
    tree = PerToken(words, coded(step), coded(words.shape[-1]))
    if spec.left is None and inputs.alibi_slopes is None and inputs.rotary_cos is None:
        return tree, None
    depths = kv_cache.tree_depths(inputs).int().contiguous()
    return tree, PerToken(depths, coded(0 if inputs.is_packed else depths.stride(0)), coded(1))


def _terms(inputs: CacheInputs) -> Terms:
    return Terms(
        bias=None if inputs.bias is None else Scores.of(inputs.bias),
        alibi_slopes=None if inputs.alibi_slopes is None else PerHead.of(inputs.alibi_slopes),
        sinks=None if inputs.sinks is None else PerHead.of(inputs.sinks),
        cu_seqlens_q=inputs.cu_seqlens_q,
    )


def _sizes(inputs: CacheInputs, spec: AttentionSpec) -> Sizes:
    return launch.sizes_of(spec, inputs.max_seqlen_q, inputs.capacity, inputs.heads_q, inputs.heads_kv)
