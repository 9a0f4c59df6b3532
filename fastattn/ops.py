"""The operators in torch.library: schemas, implementations and fakes. The only file that touches torch.library.

Two operators, ``fastattn::forward`` and ``fastattn::backward``, serve every problem: their arguments are the fields of
``Inputs`` and ``AttentionSpec`` in order, followed by the name of a backend or None. The backend is chosen inside, so
a compiled graph holds one opaque node whatever the choice. ``fastattn::jvp`` and ``fastattn::backward_jvp`` are their
Jacobian-vector products: rows come first, then their tangents and those of the inputs. Two more do the same for
``CacheInputs``:
``fastattn::attend_to_cache`` reads caches, ``fastattn::extend_cache`` also writes new keys and values into them.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastattn import plan, state
from fastattn.backends.base import QKV, Backend, Outputs, Run
from fastattn.dispatch import reasons, requested, select, wants_batch_invariance
from fastattn.errors import UnsupportedError, input_error
from fastattn.kv_cache import CACHE_SCALARS, CACHE_TENSORS, CacheInputs, check_cache_values, facts_of
from fastattn.problem import (
    DERIVATIVE_FEATURES,
    DIFFERENTIABLE,
    STATISTICS_FEATURES,
    TENSORS,
    Grads,
    Inputs,
    Problem,
    Rows,
    Statistics,
    StatisticsGradient,
    Tangents,
)
from fastattn.reference import lse_dtype
from fastattn.spec import AttentionSpec
from fastattn.storage import check_storages, model
from fastattn.torch_internals import autocast_dtype

_ARGUMENTS = """
    Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? mask, Tensor? alibi_slopes, Tensor? sinks,
    Tensor? segment_ids_q, Tensor? segment_ids_kv, Tensor? intervals, Tensor? cu_seqlens_q, Tensor? cu_seqlens_kv,
    Tensor? rng_state, SymInt max_seqlen_q, SymInt max_seqlen_kv,
    float scale, float? softcap, SymInt? left, SymInt? right, str anchor, float dropout_p, str? backend
"""
_LIBRARY = torch.library.Library("fastattn", "DEF")
_LIBRARY.define(f"forward({_ARGUMENTS}, bool needs_grad) -> (Tensor out, Tensor lse, Tensor lse_low)")
_LIBRARY.define(
    f"backward(Tensor dout, Tensor? dlse, Tensor out, Tensor lse, Tensor lse_low, {_ARGUMENTS}, bool[] needs) "
    "-> (Tensor dq, Tensor dk, Tensor dv, Tensor dbias, Tensor dsinks)"
)
_TANGENTS = "Tensor? q_moved, Tensor? k_moved, Tensor? v_moved, Tensor? bias_moved, Tensor? sinks_moved"
_LIBRARY.define(
    f"jvp(Tensor out, Tensor lse, Tensor lse_low, {_TANGENTS}, {_ARGUMENTS}) -> (Tensor out_moved, Tensor lse_moved)"
)
_LIBRARY.define(
    "backward_jvp(Tensor dout, Tensor? dlse, Tensor out, Tensor lse, Tensor lse_low, "
    "Tensor? dout_moved, Tensor? dlse_moved, Tensor? out_moved, Tensor? lse_moved, "
    f"{_TANGENTS}, {_ARGUMENTS}, bool[] needs) -> (Tensor dq, Tensor dk, Tensor dv, Tensor dbias, Tensor dsinks)"
)

_CACHE_ARGUMENTS = """
    Tensor cache_lengths, {new}, Tensor? block_table, Tensor? cu_seqlens_q, Tensor? rotary_cos, Tensor? rotary_sin,
    Tensor? k_scale, Tensor? v_scale, Tensor? bias, Tensor? alibi_slopes, Tensor? sinks, Tensor? tree_mask,
    SymInt max_seqlen_q, bool rotary_interleaved, bool batch_invariant, float scale, float? softcap, SymInt? left,
    SymInt? right, str anchor, float dropout_p, str? backend
"""
_LIBRARY.define(
    "attend_to_cache(Tensor q, Tensor k_cache, Tensor v_cache,"
    + _CACHE_ARGUMENTS.format(new="Tensor? k, Tensor? v")
    + ") -> (Tensor out, Tensor lse)"
)
_LIBRARY.define(
    "extend_cache(Tensor q, Tensor(a!) k_cache, Tensor(b!) v_cache,"
    + _CACHE_ARGUMENTS.format(new="Tensor k, Tensor v")
    + ") -> (Tensor out, Tensor lse)"
)

Flat = tuple[Any, ...]
_ENDS_Q = TENSORS.index("cu_seqlens_q")
_INPUT_FIELDS = len(dataclasses.fields(Inputs))


def flatten(inputs: Inputs, spec: AttentionSpec, backend: str | None) -> Flat:
    """The operators' common arguments."""
    tensors = tuple(inputs.tensors().values())
    scalars = (spec.scale, spec.softcap, spec.left, spec.right, spec.anchor, spec.dropout_p)
    return (*tensors, inputs.max_seqlen_q, inputs.max_seqlen_kv, *scalars, backend)


def unflatten(flat: Flat) -> tuple[Inputs, AttentionSpec, str | None]:
    """The inverse of ``flatten``."""
    return Inputs(*flat[:_INPUT_FIELDS]), AttentionSpec(*flat[_INPUT_FIELDS:-1]), flat[-1]


def _forward(*args: Any) -> Outputs:
    *flat, needs_grad = args
    inputs, spec, backend = unflatten(tuple(flat))
    refuse_context_parallel()
    _check_values(inputs)
    return select(Problem.of(inputs, spec, needs_grad), requested(backend)).forward(inputs, spec)


def _backward(
    dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, lse_low: Tensor, *args: Any
) -> tuple[Tensor, ...]:
    *flat, needed = args
    inputs, spec, backend = unflatten(tuple(flat))
    chosen = select(Problem.of(inputs, spec, needs_grad=True), requested(backend))
    given = (_with_contiguous_rows(dout), dlse, out, lse, lse_low)
    return in_order(chosen.backward(*given, inputs, spec, names_of(needed)), dout)


def _with_contiguous_rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()  # autograd may hand over expanded scalars


def names_of(needed: Sequence[bool]) -> list[str]:
    """The inputs whose gradients are asked for."""
    return [name for name, is_needed in zip(DIFFERENTIABLE, needed, strict=True) if is_needed]


def in_order(grads: Grads, like: Tensor) -> tuple[Tensor, ...]:
    """The gradients as operators give them, empty where not asked for."""
    found = (grads.dq, grads.dk, grads.dv, grads.dbias, grads.dsinks)
    return tuple(like.new_empty(0) if grad is None else grad for grad in found)


def _jvp(out: Tensor, lse: Tensor, lse_low: Tensor, *args: Any) -> tuple[Tensor, ...]:
    moving, flat = args[: len(DIFFERENTIABLE)], args[len(DIFFERENTIABLE) :]
    inputs, spec, backend = unflatten(flat)
    results = Rows(out=out, lse=lse, lse_low=lse_low)
    return _able(inputs, spec, backend, DERIVATIVE_FEATURES).jvp(_tangents(moving), results, inputs, spec)


def _backward_jvp(*args: Any) -> tuple[Tensor, ...]:
    (*rows, dout_moved, dlse_moved, out_moved, lse_moved), moving = args[:9], args[9 : 9 + len(DIFFERENTIABLE)]
    *flat, needed = args[9 + len(DIFFERENTIABLE) :]
    inputs, spec, backend = unflatten(tuple(flat))
    known, moved = Rows(*rows), Rows(dout_moved, dlse_moved, out_moved, lse_moved)
    chosen = _able(inputs, spec, backend, DERIVATIVE_FEATURES)
    return in_order(chosen.backward_jvp(known, moved, _tangents(moving), inputs, spec, names_of(needed)), rows[0])


def _tangents(moving: Sequence[Tensor | None]) -> Tangents:
    return Tangents(*(None if x is None else _with_contiguous_rows(x) for x in moving))


def _able(inputs: Inputs, spec: AttentionSpec, backend: str | None, also: Sequence[str]) -> Backend:
    """The backend of what not all have: the one asked for if it has it, else the first that does."""
    problem, name = Problem.of(inputs, spec, needs_grad=True, also=also), requested(backend)
    return select(problem, None if name is not None and reasons(problem)[name] else name)


def statistics(inputs: Inputs, spec: AttentionSpec, backend: str | None) -> Statistics:
    """The statistics of the weights. No operator: under compilers and transforms the formula is derived."""
    refuse_context_parallel()
    _check_values(inputs)
    with without_autocast(inputs.q.device.type):
        return _able(inputs, spec, backend, STATISTICS_FEATURES).statistics(inputs, spec)


def statistics_backward(
    gradient: StatisticsGradient, inputs: Inputs, spec: AttentionSpec, backend: str | None, needs: Sequence[str]
) -> Grads:
    """The gradients of the inputs named in ``needs``, among which v is not."""
    with without_autocast(inputs.q.device.type):
        return _able(inputs, spec, backend, STATISTICS_FEATURES).statistics_backward(gradient, inputs, spec, needs)


def without_autocast(device: str) -> contextlib.AbstractContextManager[object]:
    """A context without autocast: it has already cast q, k and v, and must not change the spec's fp32."""
    is_on = autocast_dtype(device) is not None
    return torch.autocast(device, enabled=False) if is_on else contextlib.nullcontext()


def refuse_context_parallel() -> None:
    """Raise UnsupportedError where q, k and v are this rank's tokens only, and attention would be to those alone.

    Inside torch's ``context_parallel`` only torch's attention is right, inside ``sharded`` of
    ``fastattn.integrations.context_parallel`` only ``fastattn.attention``.
    """
    if state.whole_rows is not None:
        raise UnsupportedError(
            "This call inside sharded() would attend to this rank's tokens alone. Call fastattn.attention there, or "
            "leave the context."
        )
    if torch.compiler.is_compiling():
        return  # the operator asks again when it runs
    global last_plain
    function = torch.nn.functional.scaled_dot_product_attention
    if function is last_plain:
        return
    if (getattr(function, "__module__", None) or "").startswith("torch.distributed."):
        raise UnsupportedError(
            "fastattn inside torch's context_parallel() would attend to this rank's tokens alone. Leave that context "
            "and use fastattn.integrations.context_parallel: ring_attention, ulysses_attention, or sharded()."
        )
    last_plain = function


last_plain: object = None  # torch's attention function, as it was last outside of context_parallel


def _check_values(inputs: Inputs) -> None:
    """Check the values of ``cu_seqlens`` if they are in host memory, where reading them costs nothing."""
    if inputs.is_packed and inputs.q.device.type == "cpu":
        inputs.boundaries()


def prepared(
    inputs: Inputs, spec: AttentionSpec, backend: str | None, *, needs_grad: bool, with_lse: bool, heads_first: bool
) -> tuple[Run, Run | None] | None:
    """Runs for calls like this one, forward and backward; None if its backend has none."""
    chosen = select(Problem.of(inputs, spec, needs_grad), backend)
    if inputs.has_more_than_qkv and not chosen.prepares_more:
        return None
    forward = chosen.prepared_forward(inputs, spec, keep=needs_grad or with_lse, heads_first=heads_first)
    if forward is None or not needs_grad:
        return None if forward is None else (forward, None)
    dout, needs = _gradient_of_out(inputs, heads_first), (*QKV, *gradients_of_more(inputs))
    backward = chosen.prepared_backward(inputs, spec, dout, needs, heads_first=heads_first)
    return None if backward is None else (forward, backward)


def gradients_of_more(inputs: Inputs) -> Sequence[str]:
    """Those among the tensors besides q, k and v that need a gradient."""
    return [name for name in DIFFERENTIABLE if name not in QKV and _needs_gradient(getattr(inputs, name))]


def _needs_gradient(x: Tensor | None) -> bool:
    return x is not None and x.requires_grad


def _gradient_of_out(inputs: Inputs, heads_first: bool) -> Tensor:
    """A meta tensor with the strides that a contiguous gradient of ``out`` has in the internal layout."""
    *batch, rows, heads, dim = inputs.out_shape()
    shape = (*batch, heads, rows, dim) if heads_first else (*batch, rows, heads, dim)
    dout = torch.empty(shape, dtype=inputs.q.dtype, device="meta")
    return dout.transpose(1, 2) if heads_first else dout


# --- operators by plans -------------------------------------------------------------------------------------------


def _forward_by_plan(*args: Any) -> tuple[Tensor, ...]:
    """``fastattn::forward`` by the plan of its kind, as compiled graphs call it; the first of a kind makes the plan."""
    given, scalars = _plannable(args[: len(TENSORS)]), args[len(TENSORS) :]
    if given is None:
        return _forward_in_full(*args)
    kind, run = plan.look_up(given, ("forward", *scalars, requested(None)))
    if run is not None:
        refuse_context_parallel()
        return run(*given)
    results = _forward_in_full(*args)
    if kind is not None and not plan.is_known(kind):
        inputs, spec, backend = unflatten(args[:-1])
        chosen = _able_to_prepare(inputs, spec, backend, needs_grad=args[-1])
        made = None if chosen is None else chosen.prepared_forward(inputs, spec, keep=True, apart=True)
        plan.remember(kind, made, given)
    return results


def _backward_by_plan(*args: Any) -> tuple[Tensor, ...]:
    """``fastattn::backward`` likewise, where lse has no gradient."""
    (dout, dlse, *results), flat, needed = args[: len(_ROWS)], args[len(_ROWS) : -1], args[-1]
    tensors = _plannable(flat[: len(TENSORS)])
    if tensors is None or dlse is not None or not all(needed[: len(QKV)]):
        return _backward_in_full(*args)
    given = (dout, *results, *tensors)
    kind, run = plan.look_up(given, ("backward", *flat[len(TENSORS) :], tuple(needed), requested(None)))
    if run is not None:
        return run(*given)
    found = _backward_in_full(*args)
    if kind is not None and not plan.is_known(kind):
        plan.remember(kind, _prepared_gradients(dout, results, flat, names_of(needed)), given)
    return found


def _prepared_gradients(dout: Tensor, results: Sequence[Tensor], flat: Flat, needs: Sequence[str]) -> Run | None:
    """A prepared backward pass that returns what the operator does: also nothing, for what needs no gradient."""
    inputs, spec, backend = unflatten(flat)
    chosen = _able_to_prepare(inputs, spec, backend, needs_grad=True)
    if chosen is None or dout.stride(-1) != 1 or not all(x.is_contiguous() for x in results):
        return None
    run = chosen.prepared_backward(inputs, spec, dout.to("meta"), needs, apart=True)
    if run is None or len(needs) == len(DIFFERENTIABLE):
        return run
    places, nothing = (
        [needs.index(x) if x in needs else None for x in DIFFERENTIABLE],
        model((0,), dout.dtype, dout.device),
    )

    def gradients(*given: Tensor | None) -> tuple[Tensor, ...]:
        found = run(*given)
        return tuple([torch.empty_like(nothing) if n is None else found[n] for n in places])

    return gradients


def _plannable(tensors: Sequence[Tensor | None]) -> tuple[Tensor | None, ...] | None:
    """The tensors that a prepared run takes; None where the seed or the boundaries of a call are among them."""
    *given, seed = tensors
    if seed is not None or given[_ENDS_Q] is not None:
        return None
    for x in given[len(QKV) :]:
        if x is not None:
            return tuple(given)
    return tuple(given[: len(QKV)])


def _able_to_prepare(inputs: Inputs, spec: AttentionSpec, backend: str | None, *, needs_grad: bool) -> Backend | None:
    chosen = select(Problem.of(inputs, spec, needs_grad), requested(backend))
    tensors = list(inputs.tensors().values())
    is_able = chosen.prepares_more or not inputs.has_more_than_qkv
    return chosen if is_able and plan.is_plain(tensors) else None


def _fake_forward(*args: Any) -> Outputs:
    inputs, _, _ = unflatten(args[:-1])
    lse = inputs.q.new_empty(inputs.lse_shape(), dtype=lse_dtype(inputs.q.dtype))
    return inputs.q.new_empty(inputs.out_shape()), lse, torch.empty_like(lse)


def _fake_backward(
    dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, lse_low: Tensor, *args: Any
) -> tuple[Tensor, ...]:
    return _fake_gradients(dout, *args)


def _fake_gradients(like: Tensor, *args: Any) -> tuple[Tensor, ...]:
    inputs, _, _ = unflatten(args[:-1])
    given = (getattr(inputs, name) for name in DIFFERENTIABLE)
    return tuple(
        x.new_empty(x.shape) if needed else like.new_empty(0) for x, needed in zip(given, args[-1], strict=True)
    )


def _fake_jvp(out: Tensor, lse: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return out.new_empty(out.shape), lse.new_empty(lse.shape)


def _kernel(function: Callable[..., tuple[Tensor, ...]], names: Sequence[str]) -> Callable[..., tuple[Tensor, ...]]:
    """Wrap an implementation: check storages, turn autocast off, and return the strides that the fakes promise."""

    def kernel(*args: Any) -> tuple[Tensor, ...]:
        check_storages(names, args)
        with without_autocast(args[0].device.type):
            return tuple(x.contiguous() for x in function(*args))

    return kernel


_ROWS = ("dout", "dlse", "out", "lse", "lse_low")
_forward_in_full, _backward_in_full = _kernel(_forward, TENSORS), _kernel(_backward, (*_ROWS, *TENSORS))
_LIBRARY.impl("forward", _forward_by_plan, "CompositeExplicitAutograd")
_LIBRARY.impl("backward", _backward_by_plan, "CompositeExplicitAutograd")
_MOVING = tuple(f"{name}_moved" for name in DIFFERENTIABLE)
_MOVED = tuple(f"{name}_moved" for name in ("dout", "dlse", "out", "lse"))
for _name, _pass, _names in (
    ("jvp", _jvp, (*_ROWS[2:], *_MOVING, *TENSORS)),
    ("backward_jvp", _backward_jvp, (*_ROWS, *_MOVED, *_MOVING, *TENSORS)),
):
    _LIBRARY.impl(_name, _kernel(_pass, _names), "CompositeExplicitAutograd")
torch.library.register_fake("fastattn::forward", _fake_forward, lib=_LIBRARY)
torch.library.register_fake("fastattn::backward", _fake_backward, lib=_LIBRARY)
torch.library.register_fake("fastattn::jvp", _fake_jvp, lib=_LIBRARY)
torch.library.register_fake(
    "fastattn::backward_jvp", lambda dout, *args: _fake_gradients(dout, *args[8 + len(DIFFERENTIABLE) :]), lib=_LIBRARY
)

# The operators whose results selective activation checkpointing should save rather than compute again.
SAC_SAVE_OPS = (torch.ops.fastattn.forward.default,)


# --- caches -------------------------------------------------------------------------------------------------------

CACHE_FIELDS = len(dataclasses.fields(CacheInputs))


def attend_to_cache(inputs: CacheInputs, spec: AttentionSpec, backend: str | None) -> tuple[Tensor, Tensor]:
    """Append the new keys and values, then ``(out, lse)`` of attention to the cache; there is no derivative."""
    flat = tuple(getattr(inputs, name) for name in CACHE_TENSORS)
    scalars = (spec.scale, spec.softcap, spec.left, spec.right, spec.anchor, spec.dropout_p)
    operator = torch.ops.fastattn.attend_to_cache if inputs.k is None else torch.ops.fastattn.extend_cache
    return operator(*flat, *(getattr(inputs, name) for name in CACHE_SCALARS), *scalars, backend)


def _attend_to_cache(*args: Any) -> tuple[Tensor, Tensor]:
    inputs, spec = CacheInputs(*args[:CACHE_FIELDS]), AttentionSpec(*args[CACHE_FIELDS:-1])
    refuse_context_parallel()
    inputs = inputs.replace(batch_invariant=wants_batch_invariance(inputs.batch_invariant))
    backend = select(facts_of(inputs, spec), requested(args[-1]))
    if inputs.q.device.type == "cpu" and not backend.checks_cache_values:
        check_cache_values(inputs, spec)
    return backend.attend_to_cache(inputs, spec)


def prepared_for_cache(inputs: CacheInputs, spec: AttentionSpec, backend: str | None) -> Run | None:
    """A run for calls on a cache like this one, which checks values but not shapes; None if its backend has none."""
    return select(facts_of(inputs, spec), backend).prepared_for_cache(inputs, spec)


def _fake_attend_to_cache(*args: Any) -> tuple[Tensor, Tensor]:
    inputs = CacheInputs(*args[:CACHE_FIELDS])
    if inputs.k is not None:
        _refuse_shared_storage(inputs)
    lse = inputs.q.new_empty(inputs.lse_shape(), dtype=lse_dtype(inputs.q.dtype))
    return inputs.q.new_empty(inputs.out_shape()), lse


def _refuse_shared_storage(inputs: CacheInputs) -> None:
    """Raise InputError for caches that are parts of one tensor: a compiled step would copy all of it each time."""
    k_storage, v_storage = (x.untyped_storage()._cdata for x in (inputs.k_cache, inputs.v_cache))
    if k_storage == v_storage:
        todo = "Allocate two tensors: k_cache, v_cache = (torch.zeros(...) for _ in range(2))."
        raise input_error("v_cache", "a part of the same memory as k_cache, compiled", "memory of its own", todo)


for _name in ("attend_to_cache", "extend_cache"):
    _LIBRARY.impl(_name, _kernel(_attend_to_cache, CACHE_TENSORS), "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastattn::{_name}", _fake_attend_to_cache, lib=_LIBRARY)
