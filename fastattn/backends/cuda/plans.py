"""Plans: a pass described once for all calls of its kind; a later call allocates, fills addresses in and launches.

The struct of a pass, except its addresses and its stream, depends on the kind of the call alone (``fastattn/plan.py``):
shapes, strides, dtypes, device, alignment, flags. So do the kernels that serve it and its tensor maps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from fastattn.backends import driver
from fastattn.backends.base import QKV, Run
from fastattn.backends.cuda import abi, backward, counters, decode
from fastattn.kv_cache import CacheInputs
from fastattn.problem import Inputs
from fastattn.spec import AttentionSpec
from fastattn.storage import extent, model
from fastattn.torch_internals import current_device, current_raw_stream

Prepare = Callable[[abi.Abi, abi.Fields], driver.Launch]
General = Callable[[CacheInputs, AttentionSpec], tuple[Tensor, Tensor]]
IN_LAYOUT = ("out", "dq", "dk", "dv")


def forward(
    prepare: Prepare, inputs: Inputs, spec: AttentionSpec, multiprocessors: int, *, keep: bool, heads_first: bool
) -> Run | None:
    """The run of a forward pass; None if a tensor has to be copied or scaled first."""
    if not keep and decode.serves(inputs, spec):
        found = _few_queries(prepare, inputs, spec, multiprocessors, heads_first=heads_first)
        if found is not None:
            return found
    ready, positive = abi.prepared(inputs, spec)
    if any(getattr(ready, name) is not getattr(inputs, name) for name in QKV):
        return None
    results = abi.results(inputs)
    launch = prepare(abi.FORWARD, abi.forward_fields(ready, positive, results, stream=0))
    made: dict[str, Tensor | None] = dict(zip(("out", "lse", "lse_low"), results, strict=True))
    results_named = tuple(made) if keep else ("out",)
    return _run(abi.FORWARD, launch, QKV, made, results_named, heads_first, counters.draws(inputs, spec))


def _few_queries(
    prepare: Prepare, inputs: Inputs, spec: AttentionSpec, multiprocessors: int, *, heads_first: bool
) -> Run | None:
    """The same by the kernels for caches, of which ``k`` and ``v`` are full ones: without a step for the lengths."""
    cache = decode.as_full_cache(inputs)
    step = decode.Step.of(cache, spec, multiprocessors, stores=False)
    names = ("q", "k_cache", "v_cache")
    if any(getattr(step.inputs, name) is not getattr(cache, name) for name in names):
        return None
    launch = prepare(abi.DECODE, step.fields(stream=0) | {"cache_lengths": 0})
    return _run(abi.DECODE, launch, names, step.tensors, ("out",), heads_first)


def backward_pass(
    prepare: Prepare, inputs: Inputs, spec: AttentionSpec, dout: Tensor, multiprocessors: int, *, heads_first: bool
) -> Run | None:
    """The run of a backward pass; None if a tensor has to be copied first, or there is no pair of a query and a key."""
    ready, (out, lse, lse_low) = abi.readable(inputs), abi.results(inputs)
    dout = torch.empty_strided(dout.shape, dout.stride(), dtype=dout.dtype, device=out.device)
    is_ready = all(getattr(ready, name) is getattr(inputs, name) for name in QKV)
    if not (is_ready and inputs.q.numel() and inputs.k.numel()) or abi.readable_rows(dout) is not dout:
        return None
    given: dict[str, Tensor | None] = {"dout": dout, "out": out, "lse": lse, "lse_low": lse_low}
    made = backward.own_tensors(inputs, spec, QKV, multiprocessors)
    launch = prepare(abi.BACKWARD, abi.backward_fields(inputs, spec, {**given, **made, "dlse": None}, stream=0))
    return _run(abi.BACKWARD, launch, (*given, *QKV), made, ("dq", "dk", "dv"), heads_first)


def for_cache(
    prepare: Prepare, inputs: CacheInputs, spec: AttentionSpec, multiprocessors: int, general: General
) -> Run | None:
    """The run of attention to a cache; None if a tensor has to be copied or scaled first, or there is no query.

    ``general`` serves calls whose new rows lie in a cache.
    """
    step = decode.Step.of(inputs, spec, multiprocessors, decode.is_stored_by_kernel(inputs))
    names = ("q", "k_cache", "v_cache", "cache_lengths", "k", "v", "block_table")
    is_ready = all(getattr(step.inputs, name) is getattr(inputs, name) for name in names)
    if not is_ready or not step.rows or (inputs.k is not None and not step.stores):
        return None
    launch, longest = prepare(abi.DECODE, step.fields(stream=0)), inputs.max_seqlen_q
    fields = [{"k": "new_k", "v": "new_v"}.get(name, name) for name in names]
    run = _run(abi.DECODE, launch, fields, step.tensors, ("out", "lse"))
    if inputs.k is None or inputs.v is None:
        return run
    bytes_of_caches, bytes_of_new = (
        [extent(x) for x in pair] for pair in ((inputs.k_cache, inputs.v_cache), (inputs.k, inputs.v))
    )

    def of(q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, *others: Tensor | None) -> CacheInputs:
        k, v, table = others
        return CacheInputs(q, k_cache, v_cache, lengths, k, v, table, max_seqlen_q=longest)

    def attend(*tensors: Any) -> tuple[Tensor, ...]:
        caches, new = tensors[1:3], tensors[4:6]
        for cache, cache_bytes in zip(caches, bytes_of_caches):  # noqa: B905  two each, and strict costs time
            begin = cache.data_ptr()
            for x, size in zip(new, bytes_of_new):  # noqa: B905
                if begin - size < x.data_ptr() < begin + cache_bytes:
                    return general(of(*tensors), spec)
        return run(*tensors)

    return attend


def _run(
    struct: abi.Abi,
    launch: driver.Launch,
    given: Sequence[str],
    made: Mapping[str, Tensor | None],
    results: Sequence[str],
    heads_first: bool = False,
    draws: bool = False,
) -> Run:
    """A run of tensors named ``given`` that allocates tensors like ``made`` and returns those named ``results``.

    With ``heads_first`` the dimensions 1 and 2 of results in the layout of q are exchanged. A kernel that ``draws``
    gets the counter of its stream.
    """
    models = {
        name: model(tuple(x.shape), x.dtype, x.device, heads_first and name in IN_LAYOUT)
        for name, x in made.items()
        if x is not None
    }
    device, new, make = models[results[0]].device, torch.empty_like, tuple(models.values())
    names = [*given, *models, "counter"]
    ordered = itemgetter(*(names.index(name) if name in names else len(names) for name in struct.addresses))
    returned = itemgetter(*map(names.index, results)) if len(results) > 1 else lambda every: (every[len(given)],)

    is_cuda, index = device.type == "cuda", device.index

    def run(*tensors: Tensor | None) -> tuple[Tensor, ...]:
        if is_cuda and current_device() != index:
            with torch.cuda.device(device):
                return run(*tensors)
        every = (*tensors, *[new(x) for x in make])
        stream = current_raw_stream(device)
        addresses = [0 if x is None else x.data_ptr() for x in every]
        counter = counters.of_stream(device, stream) if draws else None
        addresses += (0 if counter is None else counter.data_ptr(), 0)  # the last of what there is not
        launch(ordered(addresses), stream)
        return returned(every)

    return run
