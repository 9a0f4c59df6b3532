"""The way of a call: by the plan of its kind, if there is one; else checks, the operator, and a plan for the next."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from fastattn import ops, plain, plan
from fastattn.arguments import with_rng_state
from fastattn.autograd import attend, attend_as_planned, needs_gradient
from fastattn.backends.base import Run
from fastattn.dispatch import check_name, requested
from fastattn.kv_cache import CACHE_TENSORS, CacheInputs, check_cache_inputs
from fastattn.plan import Plan
from fastattn.problem import TENSORS, Inputs, check_inputs
from fastattn.spec import AttentionSpec
from fastattn.storage import check_storages

Result = Tensor | tuple[Tensor, Tensor]


def by_plan(found: Plan, q: Tensor, k: Tensor, v: Tensor, with_lse: bool) -> Result:
    """``out``, or ``(out, lse)``, in the layout of the call."""
    ops.refuse_context_parallel()
    return attend_as_planned(found, q, k, v, with_lse)


def serve(
    inputs: Inputs,
    spec: AttentionSpec,
    backend: str | None,
    *,
    kind: Hashable | None = None,
    heads_first: bool = False,
    with_lse: bool = False,
) -> tuple[Tensor, Tensor]:
    """``(out, lse)`` in the internal layout.

    Leaves a plan for the ``kind`` of the call, whose tensors were ``heads_first``, and which may give lse ``with_lse``.
    """
    ops.refuse_context_parallel()
    check_name(backend)
    backend = requested(backend)
    inputs = with_rng_state(inputs, spec)
    check_inputs(inputs, spec)
    if plain.is_wanted():
        return plain.attend(inputs, spec)
    if kind is not None and not plan.is_known(kind):
        found = _planned(inputs, spec, backend, heads_first, with_lse)
        plan.remember(kind, found, (inputs.q, inputs.k, inputs.v))
        if found is not None:
            check_storages(TENSORS, (inputs.q, inputs.k, inputs.v))  # as the operator does
            return _first_by_plan(found, inputs, with_lse)
    return attend(inputs, spec, backend)


def _first_by_plan(found: Plan, inputs: Inputs, with_lse: bool) -> tuple[Tensor, Tensor]:
    """The first call of a kind like all others: activation checkpointing compares what each of two calls saved.

    Without lse its place is taken by ``out``, as nobody asked for it.
    """
    q, k, v = (x.transpose(1, 2) if found.heads_first else x for x in (inputs.q, inputs.k, inputs.v))
    results = by_plan(found, q, k, v, with_lse)
    out, lse = results if isinstance(results, tuple) else (results, results)
    return out.transpose(1, 2) if found.heads_first else out, lse


def _planned(
    inputs: Inputs, spec: AttentionSpec, backend: str | None, heads_first: bool, with_lse: bool
) -> Plan | None:
    needs_grad, qkv = needs_gradient(inputs), (inputs.q, inputs.k, inputs.v)
    if not plan.is_plain(qkv) or (needs_grad and not all(x.requires_grad for x in qkv)):
        return None
    found = ops.prepared(inputs, spec, backend, needs_grad=needs_grad, with_lse=with_lse, heads_first=heads_first)
    return None if found is None else Plan(*found, ops.flatten(inputs, spec, backend)[len(TENSORS) :], heads_first)


def cache_by_plan(run: Run, tensors: Sequence[Tensor | None]) -> tuple[Tensor, Tensor]:
    """``(out, lse)`` of attention to a cache."""
    ops.refuse_context_parallel()
    out, lse = run(*tensors)
    return out, lse


def serve_cache(
    inputs: CacheInputs, spec: AttentionSpec, backend: str | None, kind: Hashable | None = None
) -> tuple[Tensor, Tensor]:
    """``(out, lse)`` of attention to a cache. Leaves a plan for the ``kind`` of the call."""
    check_name(backend)
    check_cache_inputs(inputs, spec)
    backend = requested(backend)
    with torch.no_grad():
        results = ops.attend_to_cache(inputs, spec, backend)
    if kind is not None and not plan.is_known(kind):
        tensors = [getattr(inputs, name) for name in CACHE_TENSORS[:7]]  # those that a run is given
        made = ops.prepared_for_cache(inputs, spec, backend) if plan.is_plain(tensors) else None
        plan.remember(kind, made, tensors)
    return results
