"""Attention weights of all rows and heads, or their averages over the heads, by a kernel or by the formula."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter, functional

from fastattn import ops, plan, reference
from fastattn.arguments import dense_problem
from fastattn.autograd import PlannedAttention, needs_gradient
from fastattn.backends import load
from fastattn.backends.base import Backend, Run
from fastattn.dispatch import choose, reasons, requested
from fastattn.plan import Plan
from fastattn.problem import DIFFERENTIABLE, TENSORS, Inputs, Problem, check_inputs
from fastattn.serving import planned
from fastattn.spec import AttentionSpec
from fastattn.storage import check_storages
from fastattn.torch_internals import (
    has_dispatch_modes,
    is_batch_of_gradients,
    is_in_forward_mode,
    is_traced,
    is_transformed,
    is_watched,
)

WITHOUT_OPTIONS: dict[str, Any] = {
    "causal": False, "window": None, "scale": None, "softcap": None, "bias": None, "mask": None, "alibi_slopes": None,
    "sinks": None, "segment_ids": None, "intervals": None, "dropout_p": 0.0, "rng_state": None, "layout": "BSHD",
}  # fmt: skip
BUDGET = 8 * 2**20  # bytes of weights that are averaged at a time: they stay in a cache, and malloc keeps their pages


@dataclass(frozen=True, slots=True)
class WeightsPlan:
    """Functions prepared for calls of one kind, on q and k alone.

    Attributes:
        forward: ``(q, k) -> weights``.
        backward: ``(dweights, q, k) -> (dq, dk)``; None where nothing needs a gradient.
        scalars: those of the call, as ``ops.flatten`` has them.
        averages: over the heads.
    """

    forward: Callable[[Tensor, Tensor], Tensor]
    backward: Run | None
    scalars: tuple[Any, ...]
    averages: bool


def all_weights(
    inputs: Inputs,
    spec: AttentionSpec,
    *,
    averages: bool,
    dtype: torch.dtype | None = None,
    kind: Hashable | None = None,
) -> Tensor:
    """The weights ``(B, H_q, S_q, S_kv)`` of a dense call, or their ``averages`` over the heads, differentiable.

    Args:
        inputs: the tensors; values are not read.
        spec: the scalars.
        averages: ``(B, S_q, S_kv)``.
        dtype: of the result; None is that of the computation, fp32, or fp64 for fp64 inputs.
        kind: that of ``look_up``, for a plan of further calls like this one.
    """
    dtype = reference.compute_dtype(inputs) if dtype is None else dtype
    backend, needs_grad = _with_kernel(inputs, spec), needs_gradient(inputs)
    if backend is None:
        return _by_formula(inputs, spec, averages).to(dtype)
    check_storages(TENSORS, inputs.tensors().values())
    if kind is not None and not plan.is_known(kind):
        made = _planned(backend, inputs, spec, averages, dtype)
        plan.remember(kind, made, (inputs.q, inputs.k))
        if made is not None:  # by the plan at once: checkpoints compare what two equal calls save
            return by_plan(made, inputs.q, inputs.k)
    if needs_grad:
        found: Tensor = WeightsByKernel.apply(averages, dtype, *ops.flatten(inputs, spec, backend.name))
        return found
    return backend.weights(inputs, spec, averages=averages, dtype=dtype)


def look_up(
    q: Tensor, k: Tensor, options: dict[str, Any], averages: bool, dtype: torch.dtype
) -> tuple[Hashable | None, WeightsPlan | None]:
    """The kind of a call whose other tensors, and dropout, are None, and its plan; see ``plan.look_up``."""
    if options.get("dropout_p") or "layout" in options:
        return None, None
    for name in _TENSOR_OPTIONS:
        if options.get(name) is not None:
            return None, None
    return plan.look_up((q, k), ("weights", averages, dtype, *options.items(), requested(None)))


_TENSOR_OPTIONS = ("bias", "mask", "alibi_slopes", "sinks", "segment_ids", "intervals")


def attention_with_weights(
    q: Tensor, k: Tensor, v: Tensor, averages: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor] | None:
    """``(out, weights)`` of a call without options, both computed at once by one node of autograd.

    For few scores on a CPU, whose weights take less time than to wait until somebody reads them. None where there is no
    plan for both: then neither was computed.
    """
    if functional.scaled_dot_product_attention is not ops.last_plain:
        ops.refuse_context_parallel()
    backend = requested(None)
    kind, found = plan.look_up((q, k, v), ("attention and weights", averages, dtype, backend))
    if found is None:
        if kind is None or plan.is_known(kind):
            return None
        inputs, spec = dense_problem(q, k, v, **WITHOUT_OPTIONS)
        check_inputs(inputs, spec)
        check_storages(("q", "k", "v"), (q, k, v))
        kernel, of_out = _with_kernel(inputs, spec), planned(inputs, spec, backend)
        of_weights = None if kernel is None else _planned(kernel, inputs, spec, averages, dtype)
        found = None if of_out is None or of_weights is None else (of_out, of_weights)
        plan.remember(kind, found, (q, k, v))
        if found is None:
            return None
    of_out, of_weights = found
    if of_out.backward is not None:
        out, weights = apply_both(q, k, v, of_out, of_weights)
        return out, weights
    return of_out.forward(q, k, v)[0], of_weights.forward(q, k)


def by_plan(found: WeightsPlan, q: Tensor, k: Tensor) -> Tensor:
    return found.forward(q, k) if found.backward is None else apply_planned(q, k, found)


def _planned(
    backend: Backend, inputs: Inputs, spec: AttentionSpec, averages: bool, dtype: torch.dtype
) -> WeightsPlan | None:
    needs_grad = needs_gradient(inputs)
    if needs_grad and not (inputs.q.requires_grad and inputs.k.requires_grad):
        return None
    made = backend.prepared_weights(inputs, spec, averages=averages, dtype=dtype)
    if made is None:
        return None
    scalars = ops.flatten(inputs, spec, backend.name)[len(TENSORS) :]
    return WeightsPlan(made[0], made[1] if needs_grad else None, scalars, averages)


def _with_kernel(inputs: Inputs, spec: AttentionSpec) -> Backend | None:
    """The backend of such calls, if it computes weights and no tool of torch watches or transforms this one."""
    tensors = [x for x in inputs.tensors().values() if x is not None]
    if spec.dropout_p or torch.compiler.is_compiling() or is_transformed() or is_in_forward_mode():
        return None
    if is_traced() or has_dispatch_modes() or any(type(x) not in (Tensor, Parameter) for x in tensors):
        return None
    problem = Problem.of(inputs, spec, needs_gradient(inputs))
    name = requested(None) or choose(problem)[0]
    if name is None or not load(name).computes_weights or reasons(problem)[name] or not plan.is_plain(tensors):
        return None
    return load(name)


class WeightsByKernel(torch.autograd.Function):
    """The weights by a backend, with their gradient; a second derivative goes through the formula."""

    @staticmethod
    def forward(ctx: Any, averages: bool, dtype: torch.dtype, *flat: Any) -> Tensor:
        ctx.save_for_backward(*flat[: len(TENSORS)])
        ctx.scalars, ctx.averages = flat[len(TENSORS) :], averages
        inputs, spec, name = ops.unflatten(flat)
        return load(str(name)).weights(inputs, spec, averages=averages, dtype=dtype)

    @staticmethod
    def backward(ctx: Any, dweights: Tensor) -> tuple[Tensor | None, ...]:
        flat = (*ctx.saved_tensors, *ctx.scalars)
        needed = ctx.needs_input_grad[2:]
        needs = [name for name in DIFFERENTIABLE if name != "v" and needed[TENSORS.index(name)]]
        by_name = dict(zip(needs, _gradients(dweights, flat, ctx.averages, needs), strict=True))
        return (None, None, *(by_name.get(name) for name in TENSORS), *(None for _ in ctx.scalars))


class WeightsByPlan(torch.autograd.Function):
    """The same by a plan. Calls under a transform or a compiler never come here: they have no plan."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, found: WeightsPlan) -> Tensor:
        ctx.save_for_backward(q, k)
        ctx.plan = found
        return found.forward(q, k)

    @staticmethod
    def backward(ctx: Any, dweights: Tensor) -> tuple[Tensor | None, ...]:
        return *_gradients_by_plan(ctx.plan, dweights, *ctx.saved_tensors), None


class AttentionAndWeights(torch.autograd.Function):
    """``(out, weights)`` by plans, of a call without options."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, of_out: Plan, of_weights: WeightsPlan) -> Any:
        results = of_out.forward(q, k, v)
        ctx.save_for_backward(*results, q, k, v)
        ctx.plan, ctx.of_weights = of_out, of_weights
        ctx.set_materialize_grads(False)
        return results[0], of_weights.forward(q, k)

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dweights: Tensor | None) -> tuple[Tensor | None, ...]:
        dq, dk, *others = PlannedAttention.backward(ctx, dout)
        if dweights is not None:
            more = _gradients_by_plan(ctx.of_weights, dweights, *ctx.saved_tensors[-3:-1])
            dq, dk = (_sum(x, y) for x, y in zip((dq, dk), more, strict=True))
        return dq, dk, *others


# Function.apply without what it does first for torch.func, which plans do not serve (docs/decisions/plans.md).
apply_planned = super(torch.autograd.Function, WeightsByPlan).apply
apply_both = super(torch.autograd.Function, AttentionAndWeights).apply


def _sum(x: Tensor | None, y: Tensor | None) -> Tensor | None:
    """In the memory of ``x``, which nobody else has, where that is not recorded."""
    if x is None or y is None:
        return y if x is None else x
    return x + y if torch.is_grad_enabled() or is_transformed() else x.add_(y)


def _gradients_by_plan(found: WeightsPlan, dweights: Tensor, q: Tensor, k: Tensor) -> Sequence[Tensor | None]:
    """Those of q and k."""
    if torch.is_grad_enabled() or is_watched() or is_batch_of_gradients() or not plan.is_plain((dweights,)):
        flat = (q, k, k, *(None,) * (len(TENSORS) - 3), *found.scalars)
        return _gradients(dweights, flat, found.averages, ("q", "k"))
    assert found.backward is not None
    return found.backward(dweights, q, k)


def _gradients(
    dweights: Tensor, flat: tuple[Any, ...], averages: bool, needs: Sequence[str]
) -> Sequence[Tensor | None]:
    """Those named in ``needs``, differentiable where gradients are recorded."""
    inputs, spec, name = ops.unflatten(flat)
    is_recorded = torch.is_grad_enabled() or is_transformed() or is_batch_of_gradients()
    if is_recorded or not plan.is_plain((dweights,)):
        with torch.enable_grad():
            # Views of their own: one operand may be computed from another, or be it.
            views = {name: getattr(inputs, name).view_as(getattr(inputs, name)) for name in needs}
            found = _by_formula(replace(inputs, **views), spec, averages).to(dweights.dtype)
        return torch.autograd.grad(found, [*views.values()], dweights, create_graph=True, allow_unused=True)
    of_inputs = load(str(name)).weights_backward(dweights, inputs, spec, needs)
    return [getattr(of_inputs, f"d{name}") for name in needs]


# --- by the formula -----------------------------------------------------------------------------------------------


def _by_formula(inputs: Inputs, spec: AttentionSpec, averages: bool) -> Tensor:
    return _averaged(inputs, spec) if averages else _of_heads(inputs, spec)


def _of_heads(inputs: Inputs, spec: AttentionSpec, at: reference.Positions | None = None) -> Tensor:
    """``reference.weights`` in fewer passes over memory, for scores that are a product, a bias and a mask."""
    if spec.softcap is not None or inputs.alibi_slopes is not None or inputs.sinks is not None or spec.dropout_p:
        return reference.weights(inputs, spec, at)
    dtype = reference.compute_dtype(inputs)
    batch, s_q, heads, width = inputs.q.shape
    q, k = inputs.q.transpose(1, 2).to(dtype) * spec.scale, inputs.k.permute(0, 2, 3, 1).to(dtype)
    if heads != inputs.heads_kv:  # the heads that share a key head are rows of one product
        q = q.reshape(batch, inputs.heads_kv, -1, width)
    scores = torch.matmul(q, k)
    scores = scores if heads == inputs.heads_kv else scores.view(batch, heads, s_q, -1)
    if inputs.bias is not None:
        scores = scores + inputs.bias.to(dtype)
    terms = (inputs.mask, inputs.segment_ids_q, inputs.intervals, spec.left, spec.right)
    if any(x is not None for x in terms):
        kept = reference.keep_matrix(inputs, spec, at or reference.Positions.of(inputs))
        scores = scores.masked_fill(~kept, float("-inf"))
    elif inputs.bias is None:
        return torch.softmax(scores, -1)
    # an empty row is computed on zeros, which keeps its derivative free of NaN
    empty = (scores == float("-inf")).all(-1, keepdim=True)
    return torch.softmax(scores.masked_fill(empty, 0), -1).masked_fill(empty, 0)


def _averaged(inputs: Inputs, spec: AttentionSpec) -> Tensor:
    bytes_of_head = inputs.batch * inputs.q.shape[1] * inputs.k.shape[1] * reference.compute_dtype(inputs).itemsize
    at_once = max(1, BUDGET // max(1, bytes_of_head))
    if at_once >= inputs.heads_q or needs_gradient(inputs):
        return _of_heads(inputs, spec).mean(1)
    everywhere, total = reference.Positions.of(inputs), None
    for heads in torch.arange(inputs.heads_q, device=inputs.q.device).split(at_once):
        weights = _of_heads(reference.of_heads(inputs, heads), spec, everywhere.at_heads(heads))
        some = weights[:, 0] if len(heads) == 1 else weights.sum(1)
        total = some if total is None else total.add_(some)
    assert total is not None
    return total.div_(inputs.heads_q)
