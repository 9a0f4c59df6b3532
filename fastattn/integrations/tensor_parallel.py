"""Tensor parallel: sharding rules that let fastattn's operators run on DTensors, split by heads or by batch.

A model parallelised with ``parallelize_module`` passes plain local tensors to attention and does not need this. The
rules are for models whose activations stay DTensors.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch.distributed.tensor import Partial, Placement, Replicate, Shard
from torch.distributed.tensor.experimental import register_sharding

from fastattn import ops
from fastattn.problem import DIFFERENTIABLE, TENSORS

Placements = list[Placement | None]

# For each way to split, the dimension of each tensor that is split. A tensor of size 1 in it is replicated.
_BATCH = {
    "q": 0, "k": 0, "v": 0, "bias": 0, "mask": 0, "alibi_slopes": 0, "sinks": 0, "segment_ids_q": 0,
    "segment_ids_kv": 0, "intervals": 0, "out": 0, "lse": 0,
}  # fmt: skip
_HEADS = {
    "q": 2, "k": 2, "v": 2, "bias": 1, "mask": 1, "alibi_slopes": 1, "sinks": 1, "intervals": 1, "out": 2, "lse": 1
}  # fmt: skip
_HEADS_PACKED = {"q": 1, "k": 1, "v": 1, "alibi_slopes": 1, "sinks": 1, "intervals": 1, "out": 1, "lse": 0}


@functools.cache
def register_sharding_rules() -> None:
    """Register DTensor sharding rules for attention, forward and backward. May be called again.

    Batches split over any dimension of the mesh stay split, and so do heads if the size of the mesh divides the number
    of key/value heads. Anything else is gathered first, which is correct but takes memory: sequences split over ranks
    (``fastattn.integrations.context_parallel`` is for those), other numbers of heads, and dropout, whose elements
    are numbered over the whole batch. Every tensor argument must be a DTensor, ``rng_state`` too.

    Example:
        >>> from fastattn.integrations.tensor_parallel import register_sharding_rules
        >>> register_sharding_rules()
    """
    register_sharding(torch.ops.fastattn.forward.default)(_forward_rule)
    register_sharding(torch.ops.fastattn.backward.default)(_backward_rule)


def _forward_rule(*args: Any) -> list[tuple[Placements, Placements]]:
    """``(outputs, inputs)`` for each acceptable way to split ``fastattn::forward``."""
    flat = args[:-1]
    rules = []
    for split in _ways(flat):
        outputs: Placements = [_of("out", split), _of("lse", split), _of("lse", split)]
        rules.append((outputs, [*_of_inputs(flat, split), None]))
    return rules


def _backward_rule(dout: Any, dlse: Any, *args: Any) -> list[tuple[Placements, Placements]]:
    """``_forward_rule`` for ``fastattn::backward``; the gradient of a replicated tensor is a sum over the shards."""
    flat, needed = args[3:-1], args[-1]  # behind out, lse and lse_low
    rules = []
    for split in _ways(flat):
        of_out, of_lse = _of("out", split), _of("lse", split)
        inputs = _of_inputs(flat, split)
        outputs: Placements = []
        for name, is_needed in zip(DIFFERENTIABLE, needed, strict=True):
            placement = inputs[TENSORS.index(name)]
            is_shared = is_needed and bool(split) and isinstance(placement, Replicate)
            outputs.append(Partial() if is_shared else placement if is_needed else Replicate())
        results: Placements = [of_out, None if dlse is None else of_lse, of_out, of_lse, of_lse]
        rules.append((outputs, [*results, *inputs, None]))
    return rules


def _ways(flat: tuple[Any, ...]) -> list[dict[str, int]]:
    """The ways to split this problem: the dimension for each tensor, {} for not at all."""
    _, spec, _ = ops.unflatten(flat)
    q, k = flat[0], flat[1]
    is_packed = flat[TENSORS.index("cu_seqlens_q")] is not None
    ways: list[dict[str, int]] = [{}]
    if spec.dropout_p > 0:
        return ways
    if not is_packed:
        ways.append(_BATCH)
    if k.shape[-2] % q.mesh.size() == 0:  # then whole groups of query heads stay with their key/value head
        ways.append(_HEADS_PACKED if is_packed else _HEADS)
    return ways


def _of_inputs(flat: tuple[Any, ...], split: dict[str, int]) -> Placements:
    """A placement for each of the operators' common arguments; None for those that are not tensors."""
    placements: Placements = []
    for name, x in zip(TENSORS, flat, strict=False):
        is_shared = x is None or name not in split or x.shape[split[name]] == 1
        placements.append(None if x is None else Replicate() if is_shared else _of(name, split))
    return placements + [None] * (len(flat) - len(TENSORS))


def _of(name: str, split: dict[str, int]) -> Placement:
    return Shard(split[name]) if name in split else Replicate()
