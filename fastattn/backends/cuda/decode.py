"""Attention to a cache with the CUDA kernels: how many splits, the struct of params.h, the partial results.

``fastattn.kv_cache`` rotates queries by their positions, and stores new keys that are to be rotated, too; a kernel
stores the others.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fastattn import kv_cache
from fastattn.backends.base import QKV
from fastattn.backends.cuda import abi, terms
from fastattn.errors import input_error
from fastattn.kv_cache import CacheInputs
from fastattn.problem import Inputs
from fastattn.spec import AttentionSpec

TILE_ROWS = 64
ATOM_ROWS = 8  # of TMA's swizzle: boxes that are smaller are copied by threads instead
MOST_SPLITS = 128  # kMostSplits of csrc/common/params.h
FIXED_SPLITS = 16  # of batch-invariant calls: a sequence is cut by its own length, into splits of LEAST_KEYS or more
LEAST_KEYS = 256  # of a split: kLeastKeys of csrc/sm90/decode.h
# What else a split costs, in the time that a multiprocessor takes for one key: beginning it, and combining it all.
BLOCK_KEYS, COMBINE_KEYS = 192, 256


def attend(
    launch: Callable[[abi.Fields], None], inputs: CacheInputs, spec: AttentionSpec, multiprocessors: int, stream: int
) -> tuple[Tensor, Tensor]:
    """Append the new keys and values, and return ``(out, lse)``."""
    q = kv_cache.rotated_queries(inputs, spec)
    stores = is_stored_by_kernel(inputs)
    if not stores:
        kv_cache.append(inputs)
    step = Step.of(inputs.replace(q=q), spec, multiprocessors, stores)
    if step.rows:
        launch(step.fields(stream))
    out, lse = step.tensors["out"], step.tensors["lse"]
    assert out is not None and lse is not None
    return out, lse


def serves(inputs: Inputs, spec: AttentionSpec) -> bool:
    """Whether one tile has room for all queries of the heads that share a key head, and keys are to be read.

    Then these kernels read K and V once for the group, and divide the keys among multiprocessors. The forward kernel
    takes a tile of 128 or 192 rows for each head.
    """
    q, k = inputs.q, inputs.k
    is_dense = inputs.cu_seqlens_q is None and inputs.cu_seqlens_kv is None
    if not is_dense or spec.dropout_p or any(x is not None for name, x in inputs.tensors().items() if name not in QKV):
        return False
    is_like_a_cache = spec.anchor == "lower_right" or q.shape[1] == k.shape[1] or (spec.left is spec.right is None)
    return is_like_a_cache and 0 < q.shape[1] * (inputs.heads_q // inputs.heads_kv) <= TILE_ROWS and k.numel() > 0


def as_full_cache(inputs: Inputs) -> CacheInputs:
    """``k`` and ``v`` as caches of one page for each sequence, without a free position."""
    batch, s_kv = inputs.k.shape[:2]
    lengths = torch.full((batch,), s_kv, dtype=torch.int32, device=inputs.q.device)
    return CacheInputs(inputs.q, inputs.k, inputs.v, lengths, max_seqlen_q=inputs.q.shape[1])


def is_stored_by_kernel(inputs: CacheInputs) -> bool:
    """Whether there are new rows that a kernel can store: unchanged, and in the caches themselves."""
    caches = inputs.k_cache, inputs.v_cache
    is_plain = inputs.k is not None and inputs.k.numel() > 0 and inputs.q.numel() > 0 and inputs.rotary_cos is None
    return is_plain and not inputs.is_fp8 and all(abi.readable_rows(x) is x for x in caches)


@dataclass(frozen=True)
class Step:
    """Attention to a cache: tensors that kernels can read, and ``tensors`` that are made for them.

    ``stores`` says that a kernel stores the new keys and values first; else they are there already.
    """

    inputs: CacheInputs
    spec: AttentionSpec
    tensors: dict[str, Tensor | None]
    tiling: Tiling
    splits: int
    stores: bool

    @classmethod
    def of(cls, inputs: CacheInputs, spec: AttentionSpec, multiprocessors: int, stores: bool) -> Step:
        q, scale = abi.with_positive_scale(inputs.q, spec)
        spec = AttentionSpec(scale, spec.softcap, spec.left, spec.right, spec.anchor)
        inputs, tiling = readable(inputs.replace(q=q)), Tiling.of(inputs)
        splits = FIXED_SPLITS
        if not inputs.batch_invariant:
            splits = split_count(tiling.tiles * inputs.heads_kv, most_keys(inputs, spec, tiling), multiprocessors)

        def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=q.device)

        rows, columns = (splits, math.prod(q.shape[:-2]), inputs.heads_q), inputs.v_cache.shape[-1]
        tensors: dict[str, Tensor | None] = {
            "out": new(*inputs.out_shape(), dtype=q.dtype),
            "lse": new(*inputs.lse_shape()),
            "partial_out": new(*rows, columns) if splits > 1 else None,
            "partial_lse": new(*rows, 2) if splits > 1 else None,
            "depths": depths(inputs, spec),
        }
        return cls(inputs, spec, tensors, tiling, splits, stores)

    @property
    def rows(self) -> int:
        return math.prod(self.inputs.q.shape[:-2])

    def fields(self, stream: int) -> abi.Fields:
        fields = decode_fields(self.inputs, self.spec, self.tensors, self.tiling, self.splits, stream)
        return fields | _new_rows(self.inputs, self.stores)


@dataclass(frozen=True)
class Tiling:
    """The query heads and positions of a tile of 64 rows, and the number of ``tiles`` of each K/V head."""

    heads: int
    positions: int
    tiles: int

    @classmethod
    def of(cls, inputs: CacheInputs) -> Tiling:
        group = inputs.heads_q // inputs.heads_kv
        heads = min(group, TILE_ROWS)
        positions = TILE_ROWS // heads
        if inputs.is_packed:  # the lengths are not known here: each sequence may leave its last tile in part empty
            tiles = inputs.q.shape[0] // positions + inputs.batch
        else:
            tiles = inputs.batch * -(-inputs.q.shape[1] // positions)
        return cls(heads, positions, tiles * -(-group // heads))


@functools.lru_cache(maxsize=4096)
def split_count(tiles: int, keys: int, multiprocessors: int) -> int:
    """The number of parts of the keys that takes the least time.

    Tiles times splits run in waves, one block on each multiprocessor at a time.
    """

    def time(splits: int) -> float:
        waves = -(-tiles * splits // multiprocessors)
        return waves * (keys / splits + BLOCK_KEYS) + (COMBINE_KEYS if splits > 1 else 0)

    return min(range(1, min(MOST_SPLITS, max(1, keys // LEAST_KEYS)) + 1), key=time)


def most_keys(inputs: CacheInputs, spec: AttentionSpec, tiling: Tiling) -> int:
    """The most keys that the rows of a tile keep: what the host knows of the lengths."""
    if spec.left is None or spec.right is None:
        return inputs.capacity
    return min(inputs.capacity, spec.left + spec.right + tiling.positions)


def depths(inputs: CacheInputs, spec: AttentionSpec) -> Tensor | None:
    """The depths of new tokens in their tree, where a window or ALiBi counts positions along its paths."""
    if inputs.tree_mask is None or (spec.left is None and inputs.alibi_slopes is None):
        return None
    return kv_cache.tree_depths(inputs).int().contiguous()


def readable(inputs: CacheInputs) -> CacheInputs:
    """The tensors that kernels can read, which include the usual layouts of caches, and copies of the others.

    New rows that lie in a cache are copied, too: others may be stored in their place first.
    """
    k, v = (None if x is None else kv_cache.apart(abi.readable_rows(x), inputs) for x in (inputs.k, inputs.v))
    q, k_cache, v_cache = (abi.readable_rows(x) for x in (inputs.q, inputs.k_cache, inputs.v_cache))
    cu_seqlens_q = None if inputs.cu_seqlens_q is None else inputs.cu_seqlens_q.contiguous()
    return inputs.replace(
        q=q,
        k_cache=k_cache,
        v_cache=v_cache,
        k=k,
        v=v,
        cache_lengths=inputs.cache_lengths.contiguous(),
        block_table=None if inputs.block_table is None else inputs.block_table.contiguous(),
        cu_seqlens_q=cu_seqlens_q,
        sinks=None if inputs.sinks is None else inputs.sinks.float().contiguous(),
        alibi_slopes=None if inputs.alibi_slopes is None else inputs.alibi_slopes.float().contiguous(),
        bias=terms.readable_bias(inputs.bias, inputs.q.dtype),
        k_scale=None if inputs.k_scale is None else inputs.k_scale.contiguous(),
        v_scale=None if inputs.v_scale is None else inputs.v_scale.contiguous(),
        tree_mask=None if inputs.tree_mask is None else inputs.tree_mask.contiguous(),
    )


def decode_fields(
    inputs: CacheInputs,
    spec: AttentionSpec,
    tensors: dict[str, Tensor | None],
    tiling: Tiling,
    splits: int,
    stream: int,
) -> abi.Fields:
    """The fields of one call. ``inputs`` must be as ``readable`` leaves them; ``tensors`` are what kernels write."""
    q, table = inputs.q, inputs.block_table
    if max(inputs.capacity, q.shape[-3]) >= abi.UNBOUNDED:
        given = f"room for {inputs.capacity} positions"
        todo = "Positions in the CUDA kernels have 32 bits."
        raise input_error("k_cache", given, f"fewer than {abi.UNBOUNDED}", todo)
    has_one_page = table is None or table.shape[1] == 1
    box_rows = TILE_ROWS if has_one_page else math.gcd(inputs.page_size, TILE_ROWS)
    return {
        **abi.spec_fields(spec),
        **{name: abi.address(x) for name, x in tensors.items()},
        **{name: abi.address(getattr(inputs, name)) for name in _READ},
        **_strides("q", q, is_packed=inputs.is_packed),
        **_strides("k", inputs.k_cache),
        **_strides("v", inputs.v_cache),
        "version": abi.DECODE.version,
        "sinks_batch_stride": inputs.heads_q if inputs.sinks is not None and inputs.sinks.shape[0] > 1 else 0,
        "table_stride": 0 if table is None else table.stride(0),
        **_scale_strides(inputs),
        **_tree(inputs),
        **_terms(inputs),
        "dtype": int(q.dtype == torch.float16),
        "is_e4m3": int(inputs.is_fp8),
        "is_gathered": int(is_gathered(inputs, box_rows)),
        "batch": inputs.batch,
        "heads_q": inputs.heads_q,
        "heads_kv": inputs.heads_kv,
        "head_dim_qk": q.shape[-1],
        "head_dim_v": inputs.v_cache.shape[-1],
        "seqlen_q": q.shape[-3],
        "new_keys": 0 if inputs.k is None else -1 if inputs.is_packed else inputs.k.shape[1],
        "pages": inputs.k_cache.shape[0],
        "page_size": inputs.page_size,
        "capacity": kv_cache.most_positions(inputs),
        "box_rows": box_rows,
        "heads_per_tile": tiling.heads,
        "positions_per_tile": tiling.positions,
        "tiles": tiling.tiles,
        "splits": splits,
        "device": q.device.index or 0,
        "stream": stream,
    }


def is_gathered(inputs: CacheInputs, box_rows: int) -> bool:
    """Whether threads copy the rows of the cache: their kernels alone read e4m3, small boxes, ALiBi and bias.

    The blocks of a batch-invariant call are the same whatever its pages are.
    """
    has_terms = inputs.bias is not None or inputs.alibi_slopes is not None
    return inputs.is_fp8 or inputs.batch_invariant or has_terms or box_rows < ATOM_ROWS


def _new_rows(inputs: CacheInputs, stores: bool) -> abi.Fields:
    """The fields of new keys and values: addresses of those that a kernel stores."""
    found: abi.Fields = {}
    for name, x in (("new_k", inputs.k), ("new_v", inputs.v)):
        found[name] = abi.address(x if stores else None)
        strides = dict.fromkeys((f"{name}_{which}_stride" for which in ("batch", "row", "head")), 0)
        found |= strides if x is None else _strides(name, x, is_packed=inputs.is_packed)
    return found


def _scale_strides(inputs: CacheInputs) -> abi.Fields:
    scales = {"k_scale_stride": inputs.k_scale, "v_scale_stride": inputs.v_scale}
    return {name: 0 if x is None or x.shape[0] == 1 else inputs.heads_kv for name, x in scales.items()}


def _tree(inputs: CacheInputs) -> abi.Fields:
    """The fields of a tree of new tokens but for the depths, which are tensors of their own."""
    tree = inputs.tree_mask
    if tree is None:
        return {"tree": 0, "tree_words": 0, "shares_tree": 0}
    is_shared = not inputs.is_packed and tree.shape[0] == 1
    return {"tree": tree.data_ptr(), "tree_words": tree.shape[-1], "shares_tree": int(is_shared)}


def _terms(inputs: CacheInputs) -> abi.Fields:
    """The fields of ALiBi and bias but for their addresses."""
    slopes, bias = inputs.alibi_slopes, inputs.bias
    return {
        "slopes_batch_stride": 0 if slopes is None or slopes.shape[0] == 1 else inputs.heads_q,
        **terms.pair_strides("bias_strides", bias),
        "bias_is_float": int(bias is not None and bias.dtype == torch.float32),
    }


_READ = (
    "q", "k_cache", "v_cache", "sinks", "cache_lengths", "block_table", "cu_seqlens_q", "k_scale", "v_scale",
    "alibi_slopes", "bias",
)  # fmt: skip


def _strides(name: str, x: Tensor, is_packed: bool = False) -> abi.Fields:
    batch = 0 if is_packed else x.stride(0)
    return {f"{name}_batch_stride": batch, f"{name}_row_stride": x.stride(-3), f"{name}_head_stride": x.stride(-2)}
