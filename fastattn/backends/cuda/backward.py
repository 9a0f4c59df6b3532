"""The backward pass: choice of kernels, their workspace, and their results as gradients.

One fused kernel computes dq, dk and dv, and sums dq by atomic additions, whose order is not fixed. It takes five
products instead of seven. Two kernels, one for dk and dv, one for dq, compute the same without atomics, with the same
bits every time. They serve under ``torch.use_deterministic_algorithms``, if only some gradients are needed, and for
head dims without a fused kernel.

A block sums dk and dv of some keys over all query heads that share them. Where K/V heads are few, that leaves
multiprocessors idle: then every query head has a block of its own, and a small kernel adds up their parts.

With terms (bias, ALiBi, mask, segments, dropout) the two kernels without atomics serve. The gradient of a bias takes
an fp32 number for each pair of every query head, which are added up where the bias is shared.
"""

from __future__ import annotations

import functools
import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastattn.backends.cuda import abi
from fastattn.backends.cuda.instances import DkdvConfig, dkdv_configs, select_dkdv
from fastattn.backends.cuda.terms import Terms, has_terms
from fastattn.problem import Grads, Inputs
from fastattn.spec import AttentionSpec, tile_range

# What a tile of keys costs besides its blocks of queries, in such blocks: to begin and end, and with parts in fp32 to
# store them, and to read them again in another kernel.
TILE_OVERHEAD, STORED_PARTS, READ_PARTS = 1, 2, 2


@dataclass(frozen=True)
class BackwardProblem:
    """The arguments of ``Backend.backward``."""

    dout: Tensor
    dlse: Tensor | None
    out: Tensor
    lse: Tensor
    lse_low: Tensor
    inputs: Inputs
    spec: AttentionSpec
    needs: tuple[str, ...]


def backward(
    problem: BackwardProblem, launch: Callable[[abi.Fields], None], multiprocessors: int, stream: int
) -> Grads:
    """The gradients that the problem needs, by the kernels that ``launch`` launches."""
    inputs, spec, needs = abi.readable(problem.inputs), problem.spec, problem.needs
    tensors: dict[str, Tensor | None] = {
        "out": abi.readable_rows(problem.out.contiguous()),
        "dout": abi.readable_rows(problem.dout),
        "lse": problem.lse.contiguous(),
        "lse_low": problem.lse_low.contiguous(),
        "dlse": None if problem.dlse is None else problem.dlse.float().contiguous(),
        **own_tensors(inputs, spec, needs, multiprocessors),
    }
    if inputs.q.numel():
        terms = Terms.of(inputs, spec)
        launch(abi.backward_fields(terms, spec, tensors, stream))
    return _as_grads(problem.inputs, tensors, needs)


def fused_columns(inputs: Inputs, spec: AttentionSpec, needs: Sequence[str]) -> int | None:
    """The columns of the sums for dq if one kernel computes everything; None if two do."""
    if not {"q", "k", "v"} <= set(needs) or torch.are_deterministic_algorithms_enabled():
        return None
    problem = inputs.q.shape[-1], inputs.v.shape[-1], spec.softcap is not None
    config = select_dkdv(_configs(), *problem, fused=True, terms=has_terms(inputs, spec))
    return None if config is None else config.d_qk


def has_parts(inputs: Inputs, spec: AttentionSpec, config: DkdvConfig, multiprocessors: int) -> bool:
    """Whether dk and dv are done earlier if every query head has blocks of its own; for a dense batch."""
    if inputs.is_packed or inputs.heads_q == inputs.heads_kv:
        return False
    sizes = (inputs.q.shape[-3], inputs.k.shape[-3], inputs.batch * inputs.heads_kv, inputs.heads_q // inputs.heads_kv)
    band = AttentionSpec(1.0, left=spec.left, right=spec.right, anchor=spec.anchor)
    return ends_earlier_with_parts(band, sizes, config.block_m, config.block_n, multiprocessors)


@functools.lru_cache(1024)
def ends_earlier_with_parts(
    spec: AttentionSpec, sizes: tuple[int, int, int, int], block_m: int, block_n: int, multiprocessors: int
) -> bool:
    """The choice by makespan. ``sizes``: rows of queries, of keys, K/V heads of the whole batch, heads of a group."""
    s_q, s_kv, heads, group = sizes
    blocks = -(-s_kv // block_n)
    if blocks * heads >= 4 * multiprocessors:  # enough for all
        return False
    turned = AttentionSpec(1.0, left=spec.right, right=spec.left, anchor=spec.anchor)
    ranges = [tile_range(turned, n * block_n, min(s_kv, (n + 1) * block_n), s_kv, s_q) for n in range(blocks)]
    lengths = [-(-end // block_m) - begin // block_m if begin < end else 0 for begin, end in ranges]
    together = [group * length + TILE_OVERHEAD for length in lengths for _ in range(heads)]
    apart = [length + TILE_OVERHEAD + STORED_PARTS + READ_PARTS for length in lengths for _ in range(heads * group)]
    return _makespan(apart, multiprocessors) < _makespan(together, multiprocessors)


def _makespan(tiles: Sequence[int], multiprocessors: int) -> int:
    """When the last of ``tiles`` ends if each begins, in order, where one has ended."""
    free = [0] * multiprocessors
    for tile in tiles:
        heapq.heapreplace(free, free[0] + tile)
    return max(free)


_configs = functools.cache(dkdv_configs)


def _results(inputs: Inputs, needs: Sequence[str]) -> dict[str, Tensor | None]:
    """The outputs of the kernels. dk and dv come together; if a side has no rows, the other side's gradients are 0."""
    q, k, v = inputs.q, inputs.k, inputs.v
    has_pairs = q.numel() > 0 and k.numel() > 0
    dsinks = None
    if inputs.sinks is not None and "sinks" in needs:  # of each sequence; _as_grads adds up what they share
        dsinks = torch.zeros(inputs.batch, inputs.heads_q, dtype=torch.float32, device=q.device)

    def like(x: Tensor) -> Tensor | None:
        return torch.empty(x.shape, dtype=x.dtype, device=x.device) if has_pairs else None

    of_keys, wants_bias = "k" in needs or "v" in needs, inputs.bias is not None and "bias" in needs
    of_pairs = (inputs.batch, inputs.heads_q, q.shape[-3], k.shape[-3])
    return {
        "dq": like(q) if "q" in needs or wants_bias else None,  # the kernel for dq computes that of the bias, too
        "dk": like(k) if of_keys else None,
        "dv": like(v) if of_keys else None,
        "dsinks": dsinks,
        "dbias": torch.zeros(of_pairs, dtype=torch.float32, device=q.device) if wants_bias and has_pairs else None,
    }


def own_tensors(
    inputs: Inputs, spec: AttentionSpec, needs: Sequence[str], multiprocessors: int
) -> dict[str, Tensor | None]:
    """All that the kernels write: gradients; both parts of lse, and delta, of every padded row; sums for dq, dk, dv."""
    q = inputs.q
    rows = (1 if inputs.is_packed else inputs.batch, inputs.heads_q, abi.padded_rows(inputs, q.shape[-3]))
    lse_parts = torch.empty(*rows, 2, dtype=torch.float32, device=q.device)
    delta = torch.empty(rows, dtype=torch.float32, device=q.device)
    columns = fused_columns(inputs, spec, needs) if q.numel() > 0 and inputs.k.numel() > 0 else None
    sums = None if columns is None else torch.empty(*rows, columns, dtype=torch.float32, device=q.device)
    made = {**_results(inputs, needs), "lse_parts": lse_parts, "delta": delta, "dq_sums": sums}
    return {**made, **_parts(inputs, spec, columns is not None, made["dk"] is not None, multiprocessors)}


def _parts(
    inputs: Inputs, spec: AttentionSpec, is_fused: bool, has_keys: bool, multiprocessors: int
) -> dict[str, Tensor | None]:
    """Sums of dk and dv for every query head and padded row of keys; None where a block sums over a group."""
    d_qk, d_v = inputs.q.shape[-1], inputs.v.shape[-1]
    problem = d_qk, d_v, spec.softcap is not None, is_fused, has_terms(inputs, spec)
    config = select_dkdv(_configs(), *problem) if has_keys else None
    if config is None or not has_parts(inputs, spec, config, multiprocessors):
        return {"dk_parts": None, "dv_parts": None}
    rows = (inputs.batch, inputs.heads_q, abi.padded_rows(inputs, inputs.k.shape[-3]))

    def sums(columns: int) -> Tensor:
        return torch.empty(*rows, columns, dtype=torch.float32, device=inputs.q.device)

    return {"dk_parts": sums(config.d_qk), "dv_parts": sums(config.d_v)}


def _as_grads(inputs: Inputs, tensors: dict[str, Tensor | None], needs: Sequence[str]) -> Grads:
    def of(name: str) -> Tensor | None:
        found = tensors[f"d{name}"]
        x = getattr(inputs, name)
        return None if name not in needs else torch.zeros_like(x) if found is None else found

    dsinks = tensors["dsinks"]
    if dsinks is not None and inputs.sinks is not None:
        dsinks = (dsinks.sum(0, keepdim=True) if inputs.sinks.shape[0] == 1 else dsinks).to(inputs.sinks.dtype)
    dbias, bias = tensors["dbias"], inputs.bias
    if bias is not None and "bias" in needs:
        shared = [n for n, size in enumerate(bias.shape) if size == 1]
        summed = torch.zeros_like(bias) if dbias is None else dbias.sum(shared, keepdim=True) if shared else dbias
        dbias = summed.to(bias.dtype)
    return Grads(dq=of("q"), dk=of("k"), dv=of("v"), dbias=dbias, dsinks=dsinks)
