"""The path of a call: the plan of its kind if there is one; else checks, the operator, and a plan for the next call."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling
from torch.nn import functional

from fastattn import ops, plain, plan
from fastattn.arguments import with_rng_state
from fastattn.autograd import apply_planned, attend, lses, needs_gradient
from fastattn.backends.base import Run
from fastattn.dispatch import check_name, requested
from fastattn.kv_cache import CACHE_TENSORS, CacheInputs, check_cache_inputs
from fastattn.plan import Plan
from fastattn.problem import MORE, TENSORS, Inputs, check_inputs
from fastattn.spec import AttentionSpec
from fastattn.storage import check_storages

Result = Tensor | tuple[Tensor, Tensor]


def by_plan(found: Plan, q: Tensor, k: Tensor, v: Tensor, with_lse: bool, more: Sequence[Tensor | None] = ()) -> Result:
    """``out``, or ``(out, lse)``, in the layout of the call; differentiable like ``attend`` in reverse mode."""
    if functional.scaled_dot_product_attention is not ops.last_plain:
        ops.refuse_context_parallel()
    if found.backward is not None:
        return apply_planned(q, k, v, found, with_lse, *more)
    results = found.forward(q, k, v, *more)
    return (results[0], lses(results[1:])[0]) if with_lse else results[0]


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

    Stores a plan for the ``kind`` of the call. ``heads_first`` says that its tensors are ``(B, H, S, D)``, ``with_lse``
    that it returns lse.
    """
    check_name(backend)
    inputs = with_rng_state(inputs, spec)
    if is_dynamo_compiling():  # what is asked for here Dynamo asks for at each call; the operator asks it anyway
        check_inputs(inputs, spec)
        return attend(inputs, spec, backend, with_lse)
    ops.refuse_context_parallel()
    check_inputs(inputs, spec)
    backend = requested(backend)
    if plain.is_wanted():
        return plain.attend(inputs, spec)
    if kind is not None and not plan.is_known(kind):
        found = planned(inputs, spec, backend, heads_first, with_lse)
        more = more_of(inputs)
        plan.remember(kind, found, (inputs.q, inputs.k, inputs.v, *more))
        if found is not None:
            check_storages(TENSORS, (inputs.q, inputs.k, inputs.v, *more))  # as the operator does
            if inputs.is_packed:
                inputs.boundaries()
            return _first_by_plan(found, inputs, with_lse)
    return attend(inputs, spec, backend, with_lse)


def more_of(inputs: Inputs) -> tuple[Tensor | None, ...]:
    """The arguments of a prepared run after q, k and v; () if all of them are None."""
    more = tuple(getattr(inputs, name) for name in MORE)
    return more if any(x is not None for x in more) else ()


def _first_by_plan(found: Plan, inputs: Inputs, with_lse: bool) -> tuple[Tensor, Tensor]:
    """Serve the first call of a kind by its plan too: activation checkpointing compares what two equal calls save.

    Without lse the second result is ``out`` again, which no caller reads.
    """
    q, k, v = (x.transpose(1, 2) if found.heads_first else x for x in (inputs.q, inputs.k, inputs.v))
    results = by_plan(found, q, k, v, with_lse, more_of(inputs))
    out, lse = results if isinstance(results, tuple) else (results, results)
    return out.transpose(1, 2) if found.heads_first else out, lse


def planned(
    inputs: Inputs, spec: AttentionSpec, backend: str | None, heads_first: bool = False, with_lse: bool = False
) -> Plan | None:
    """The plan of calls like this one; None if there is none."""
    needs_grad, qkv = needs_gradient(inputs), (inputs.q, inputs.k, inputs.v)
    if not plan.is_plain((*qkv, *more_of(inputs))) or (needs_grad and not all(x.requires_grad for x in qkv)):
        return None
    found = ops.prepared(inputs, spec, backend, needs_grad=needs_grad, with_lse=with_lse, heads_first=heads_first)
    if found is None:
        return None
    scalars = ops.flatten(inputs, spec, backend)[len(TENSORS) :]
    wanted = ops.gradients_of_more(inputs)
    places = tuple(3 + wanted.index(name) if name in wanted else None for name in MORE) if more_of(inputs) else ()
    return Plan(*found, scalars, torch.are_deterministic_algorithms_enabled(), heads_first, places)


def cache_by_plan(run: Run, tensors: Sequence[Tensor | None]) -> tuple[Tensor, Tensor]:
    """``(out, lse)`` of attention to a cache."""
    ops.refuse_context_parallel()
    out, lse = run(*tensors)
    return out, lse


def serve_cache(
    inputs: CacheInputs, spec: AttentionSpec, backend: str | None, kind: Hashable | None = None
) -> tuple[Tensor, Tensor]:
    """``(out, lse)`` of attention to a cache. Stores a plan for the ``kind`` of the call."""
    check_name(backend)
    check_cache_inputs(inputs, spec)
    backend = requested(backend)
    with torch.no_grad():
        results = ops.attend_to_cache(inputs, spec, backend)
    if kind is not None and not plan.is_known(kind):
        tensors = [getattr(inputs, name) for name in CACHE_TENSORS[:7]]  # the arguments of a run
        made = ops.prepared_for_cache(inputs, spec, backend) if plan.is_plain(tensors) else None
        plan.remember(kind, made, tensors)
    return results
