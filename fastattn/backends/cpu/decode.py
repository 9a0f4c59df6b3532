"""Attention to a cache by the C++ kernel: its struct and tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn import kv_cache
from fastattn.backends.base import Run
from fastattn.backends.cpu import threads
from fastattn.backends.cpu.library import FIXED_PART, VARIABLE_PART, VERSION, Library
from fastattn.errors import input_error
from fastattn.kv_cache import CacheInputs
from fastattn.problem import Problem
from fastattn.spec import AttentionSpec

UNBOUNDED = 1 << 29  # for a side of the band that has no limit, or a wider one: more than any length
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, kv_cache.FP8: 3}  # Dtype of csrc/cpu/params.h
NO_STRIDES = (0, 0, 0)
MAX_HEAD_DIM = 512


def reasons(problem: Problem) -> list[str]:
    """The reasons against calls with a cache that do not hold for calls without one."""
    missing = {"strided head dim"} if "batch invariant" in problem.features else {"prompt", "strided head dim"}
    found = [f"no {feature}" for feature in sorted(missing & problem.features)]
    if problem.dtype not in DTYPES:
        found.append(f"dtype {problem.dtype} with a cache (has float32, bfloat16, float16)")
    if max(problem.head_dim_qk, problem.head_dim_v) > MAX_HEAD_DIM:
        dims = f"{problem.head_dim_qk}/{problem.head_dim_v}"
        found.append(f"head dim {dims} with a cache (at most {MAX_HEAD_DIM})")
    return found


def attend(
    library: Library, inputs: CacheInputs, spec: AttentionSpec, machine: int | None = None
) -> tuple[Tensor, Tensor]:
    """Append, then ``(out, lse)``."""
    given = inputs
    if inputs.rotary_cos is not None or inputs.is_fp8:  # what is appended is not stored as it is
        kv_cache.check_cache_values(inputs, spec)
        kv_cache.append(inputs)
        inputs = inputs.replace(q=kv_cache.rotated_queries(inputs, spec))
    is_stored = inputs is not given
    inputs, depths = _readable(inputs), _depths(inputs, spec)
    q = inputs.q
    out = torch.empty(inputs.out_shape(), dtype=q.dtype, device=q.device)
    lse = torch.empty(inputs.lse_shape(), dtype=torch.float32, device=q.device)
    variable = VARIABLE_PART.pack(
        VERSION, threads.count(), library.machine if machine is None else machine,
        q.data_ptr(), inputs.k_cache.data_ptr(), inputs.v_cache.data_ptr(), out.data_ptr(), lse.data_ptr(),
        inputs.cache_lengths.data_ptr(), _address(inputs.block_table), _address(inputs.cu_seqlens_q),
        _address(inputs.k_scale), _address(inputs.v_scale), _address(inputs.bias), _address(inputs.alibi_slopes),
        _address(inputs.sinks), _address(None if is_stored else inputs.k), _address(None if is_stored else inputs.v),
        _address(inputs.tree_mask), _address(depths),
    )  # fmt: skip
    if not library.decode(variable + _fixed(inputs, spec)):
        _raise_wrong_values(given, spec)
    return out, lse


def prepared(library: Library, inputs: CacheInputs, spec: AttentionSpec) -> Run | None:
    """``attend`` for calls like this one, where tensors are passed as they are."""
    if inputs.is_fp8 or inputs.rotary_cos is not None or _readable(inputs) is not inputs:
        return None
    fixed, dtype, device = _fixed(inputs, spec), inputs.q.dtype, inputs.q.device
    out_shape, lse_shape, max_seqlen_q = inputs.out_shape(), inputs.lse_shape(), inputs.max_seqlen_q

    def run(
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        lengths: Tensor,
        k: Tensor | None,
        v: Tensor | None,
        table: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        out = torch.empty(out_shape, dtype=dtype, device=device)
        lse = torch.empty(lse_shape, dtype=torch.float32, device=device)
        variable = VARIABLE_PART.pack(
            VERSION, threads.count(), library.machine, q.data_ptr(), k_cache.data_ptr(), v_cache.data_ptr(),
            out.data_ptr(), lse.data_ptr(), lengths.data_ptr(), 0 if table is None else table.data_ptr(),
            0, 0, 0, 0, 0, 0, 0 if k is None else k.data_ptr(), 0 if v is None else v.data_ptr(), 0, 0,
        )  # fmt: skip
        if not library.decode(variable + fixed):
            again = CacheInputs(q, k_cache, v_cache, lengths, k, v, table, max_seqlen_q=max_seqlen_q)
            _raise_wrong_values(again, spec)
        return out, lse

    return run


def _raise_wrong_values(inputs: CacheInputs, spec: AttentionSpec) -> None:
    kv_cache.check_cache_values(inputs, spec)
    raise RuntimeError("the lengths or the block table of this call changed while it ran")


def _depths(inputs: CacheInputs, spec: AttentionSpec) -> Tensor | None:
    """The depths of new tokens in their trees, where a term counts positions."""
    if inputs.tree_mask is None or (spec.left is None and inputs.alibi_slopes is None):
        return None
    return kv_cache.tree_depths(inputs).int().contiguous()


def _readable(inputs: CacheInputs) -> CacheInputs:
    """With tensors as the kernel reads them: rows contiguous, numbers beside the caches in fp32. They live in it."""
    changes = {}
    for name, dtype in (
        ("cache_lengths", None), ("block_table", None), ("cu_seqlens_q", None), ("k_scale", None), ("v_scale", None),
        ("alibi_slopes", torch.float32), ("sinks", torch.float32), ("bias", torch.float32), ("tree_mask", None),
    ):  # fmt: skip
        x: Tensor | None = getattr(inputs, name)
        if x is None:
            continue
        read = x if dtype is None or x.dtype == dtype else x.to(dtype)
        is_apart = read.stride(-1) != 1 and read.shape[-1] > 1
        if name != "bias" and (is_apart or name == "tree_mask"):  # a bias broadcasts by its strides
            read = read.contiguous()
        if read is not x:
            changes[name] = read
    return inputs.replace(**changes) if changes else inputs


def _fixed(inputs: CacheInputs, spec: AttentionSpec) -> bytes:
    """The part of the struct that calls with tensors of the same kind share."""
    positions = kv_cache.most_positions(inputs)
    if positions >= UNBOUNDED:
        given, allowed = f"{positions} positions", f"fewer than {UNBOUNDED}"
        raise input_error("k_cache", given, allowed, "The kernel counts in 32 bits.")
    if (rows := inputs.max_seqlen_q * inputs.heads_q) >= UNBOUNDED:
        given, allowed = f"{rows} rows of all heads in a sequence", f"fewer than {UNBOUNDED}"
        raise input_error("q", given, allowed, "The kernel counts in 32 bits.")
    q, k, v, is_packed = inputs.q, inputs.k_cache, inputs.v_cache, inputs.is_packed
    rows_new = 0 if inputs.k is None else -1 if is_packed else inputs.k.shape[1]  # -1: as many as query rows
    return FIXED_PART.pack(
        *_strides(q, is_packed), *_strides(k), *_strides(v), *_strides(inputs.k, is_packed),
        *_strides(inputs.v, is_packed),
        _step(inputs.block_table), _step(inputs.k_scale), _step(inputs.v_scale), *_steps(inputs.bias),
        _step(inputs.alibi_slopes), _step(inputs.sinks), *_tree_steps(inputs.tree_mask, q), inputs.batch_invariant,
        DTYPES[q.dtype], DTYPES[k.dtype], inputs.batch, q.shape[-2], k.shape[2], q.shape[-1], v.shape[3],
        q.shape[-3], rows_new, inputs.max_seqlen_q, k.shape[0], k.shape[1], positions,
        _side(spec.left), _side(spec.right), spec.scale, spec.softcap or 0.0,
    )  # fmt: skip


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _strides(x: Tensor | None, is_packed: bool = False) -> tuple[int, ...]:
    """Of the batch, the row and the head."""
    if x is None:
        return NO_STRIDES
    return (0, *x.stride()[:2]) if is_packed else x.stride()[:3]


def _step(x: Tensor | None) -> int:
    """From row to row of ``(1|n, m)``; 0 where all share one."""
    return 0 if x is None or x.shape[0] == 1 else x.stride(0)


def _steps(bias: Tensor | None) -> tuple[int, ...]:
    if bias is None:
        return (0, 0, 0, 0)
    return tuple(0 if size == 1 else step for size, step in zip(bias.shape, bias.stride(), strict=True))


def _tree_steps(tree: Tensor | None, q: Tensor) -> tuple[int, int, int]:
    """Of the words from batch to batch and from row to row, and of the depths from batch to batch."""
    if tree is None:
        return NO_STRIDES
    return 0 if tree.shape[0] == 1 else tree.stride(0), tree.stride(-2), q.shape[-3]


def _side(limit: int | None) -> int:
    return UNBOUNDED if limit is None else min(limit, UNBOUNDED)
