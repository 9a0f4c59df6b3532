"""Plans: a pass described once for all calls of its kind; a later call allocates, fills addresses in and launches.

The struct of a pass, except its addresses and its stream, depends on the kind of the call alone (``fastattn/plan.py``):
shapes, strides, dtypes, device, alignment, flags. So do the kernels that serve it and its tensor maps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastattn import kv_cache
from fastattn.backends.base import Run
from fastattn.backends.cuda import abi, backward, decode
from fastattn.kv_cache import CacheInputs
from fastattn.problem import Inputs
from fastattn.spec import AttentionSpec
from fastattn.torch_internals import current_raw_stream

Prepare = Callable[[abi.Abi, abi.Fields], abi.Launch]
QKV = ("q", "k", "v")


def forward(prepare: Prepare, inputs: Inputs, spec: AttentionSpec, *, keep: bool) -> Run | None:
    """The run of a forward pass; None if a tensor has to be copied or scaled first."""
    ready, positive = abi.prepared(inputs, spec)
    if any(getattr(ready, name) is not getattr(inputs, name) for name in QKV):
        return None
    results = abi.results(inputs)
    launch = prepare(abi.FORWARD, abi.forward_fields(ready, positive, results, stream=0))
    made: dict[str, Tensor | None] = dict(zip(("out", "lse", "lse_low"), results, strict=True))
    return _run(abi.FORWARD, launch, QKV, made, tuple(made) if keep else ("out",))


def backward_pass(prepare: Prepare, inputs: Inputs, spec: AttentionSpec, dout: Tensor) -> Run | None:
    """The run of a backward pass; None if a tensor has to be copied first, or there is no pair of a query and a key."""
    ready, (out, lse, lse_low) = abi.readable(inputs), abi.results(inputs)
    dout = torch.empty_strided(dout.shape, dout.stride(), dtype=dout.dtype, device=out.device)
    is_ready = all(getattr(ready, name) is getattr(inputs, name) for name in QKV)
    if not (is_ready and inputs.q.numel() and inputs.k.numel()) or abi.readable_rows(dout) is not dout:
        return None
    given: dict[str, Tensor | None] = {"dout": dout, "out": out, "lse": lse, "lse_low": lse_low}
    made = backward.own_tensors(inputs, spec, QKV)
    launch = prepare(abi.BACKWARD, abi.backward_fields(inputs, spec, {**given, **made, "dlse": None}, stream=0))
    return _run(abi.BACKWARD, launch, (*given, *QKV), made, ("dq", "dk", "dv"))


def for_cache(prepare: Prepare, inputs: CacheInputs, spec: AttentionSpec, multiprocessors: int) -> Run | None:
    """The run of attention to a cache; None if a tensor has to be copied or scaled first, or there is no query."""
    step = decode.Step.of(inputs, spec, multiprocessors)
    names = ("q", "k_cache", "v_cache", "cache_lengths", "block_table")
    if any(getattr(step.inputs, name) is not getattr(inputs, name) for name in names) or not step.rows:
        return None
    launch, longest = prepare(abi.DECODE, step.fields(stream=0)), inputs.max_seqlen_q
    run = _run(abi.DECODE, launch, names, step.tensors, ("out", "lse"))

    def attend(*tensors: Any) -> tuple[Tensor, ...]:
        q, k_cache, v_cache, cache_lengths, k, v, block_table = tensors
        if k is not None:
            kv_cache.append(CacheInputs(q, k_cache, v_cache, cache_lengths, k, v, block_table, max_seqlen_q=longest))
        return run(q, k_cache, v_cache, cache_lengths, block_table)

    return attend


def _run(
    struct: abi.Abi,
    launch: abi.Launch,
    given: Sequence[str],
    made: Mapping[str, Tensor | None],
    results: Sequence[str],
) -> Run:
    """A run of tensors named ``given`` that allocates tensors like ``made`` and returns those named ``results``."""
    models = {name: x for name, x in made.items() if x is not None}
    device = models[results[0]].device
    makers = [(x.shape, x.dtype) for x in models.values()]
    names = [*given, *models]
    order = [names.index(name) if name in names else len(names) for name in struct.addresses]
    returned = [names.index(name) for name in results]

    def run(*tensors: Tensor | None) -> tuple[Tensor, ...]:
        if device.type == "cuda" and torch.cuda.current_device() != device.index:
            with torch.cuda.device(device):
                return run(*tensors)
        every = [*tensors, *(torch.empty(shape, dtype=dtype, device=device) for shape, dtype in makers)]
        addresses = [0 if x is None else x.data_ptr() for x in every]
        addresses.append(0)  # of what there is not
        launch([addresses[n] for n in order], current_raw_stream(device))
        return tuple(every[n] for n in returned)  # type: ignore[misc]

    return run
