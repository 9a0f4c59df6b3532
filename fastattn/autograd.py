"""Derivatives of the operators, as autograd.Functions.

``Attention`` is the forward operator and ``AttentionBackward`` its gradient, itself differentiable: a second
derivative goes through the reference formula. Under ``vmap`` the mapped dimension is folded into the batch
(for packed sequences, into more sequences), so per-sample gradients run on the same kernels.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from fastattn import ops, reference
from fastattn.backends.base import Outputs
from fastattn.plan import ALIGNMENT, Plan
from fastattn.problem import DIFFERENTIABLE, MORE, TENSORS, Inputs
from fastattn.spec import AttentionSpec
from fastattn.torch_internals import is_in_forward_mode, is_transformed, is_watched

Dims = Sequence[int | None]
F = TypeVar("F", bound=Callable[..., Any])


def attend(inputs: Inputs, spec: AttentionSpec, backend: str | None) -> tuple[Tensor, Tensor]:
    """``(out, lse)``, differentiable in reverse and forward mode, under vmap, and under these nested in each other."""
    compiling, transformed = torch.compiler.is_compiling(), is_transformed()
    # Outputs mode has no kernel, and Dynamo drops a Function's derivative inside func.grad: torch derives the formula.
    if is_in_forward_mode() or (compiling and transformed):
        with ops.without_autocast(inputs.q.device.type):
            out, lse, _ = reference.forward(inputs, spec)
            return out, lse
    needs_grad = needs_gradient(inputs)
    flat = ops.flatten(inputs, spec, backend)
    if not needs_grad and not transformed:
        out, lse, _ = torch.ops.fastattn.forward(*flat, False)  # the Function costs more time than the operator
        return out, lse
    out, lse, _ = Attention.apply(*(_distinct(flat) if compiling else flat), needs_grad)
    return out, lse


def _aligned(x: Tensor) -> Tensor:
    """``x``, or a copy that lies as kernels on an accelerator were compiled to find it."""
    return x if x.data_ptr() % ALIGNMENT == 0 else x.clone()


def needs_gradient(inputs: Inputs) -> bool:
    """Whether autograd will ask for the gradient of any input."""
    tracked = (getattr(inputs, name) for name in DIFFERENTIABLE)
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tracked)


def attend_as_planned(
    plan: Plan, q: Tensor, k: Tensor, v: Tensor, with_lse: bool, more: Sequence[Tensor | None] = ()
) -> Tensor | tuple[Tensor, Tensor]:
    """``out``, or ``(out, lse)``, of a call whose kind has a plan; differentiable like ``attend`` in reverse mode."""
    if plan.backward is not None:
        return PlannedAttention.apply(q, k, v, plan, with_lse, *more)
    out, *kept = plan.forward(q, k, v, *more)
    out = out.transpose(1, 2) if plan.heads_first else out
    return (out, _lses(kept)[0]) if with_lse else out


def _lses(kept: Sequence[Tensor]) -> Sequence[Tensor]:
    """``lse`` and ``lse_low`` of what a planned forward pass kept."""
    return kept if len(kept) == 2 else kept[0].unbind()


def _distinct(flat: ops.Flat) -> ops.Flat:
    """Dynamo refuses a Function that is given one tensor twice (v is k, shared segment ids): pass views."""
    tensors = flat[: len(TENSORS)]
    repeated = [x is not None and any(x is earlier for earlier in tensors[:n]) for n, x in enumerate(tensors)]
    views = (x.view_as(x) if again else x for x, again in zip(tensors, repeated, strict=True))
    return (*views, *flat[len(TENSORS) :])


def _with_arguments_of(operator: Any) -> Callable[[F], F]:
    """Give a Function's ``forward(*args)`` the operator's signature: Dynamo counts parameters, apply() binds them."""
    names = (argument.name for argument in operator.default._schema.arguments)
    parameters = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_ONLY) for name in names]

    def decorate(forward: F) -> F:
        forward.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        return forward

    return decorate


class Attention(torch.autograd.Function):
    """``fastattn::forward`` with its derivative."""

    @staticmethod
    @_with_arguments_of(torch.ops.fastattn.forward)
    def forward(*args: Any) -> Outputs:
        return torch.ops.fastattn.forward(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Outputs) -> None:
        ctx.save_for_backward(*output, *inputs[: len(TENSORS)])
        ctx.scalars = inputs[len(TENSORS) : -1]
        ctx.mark_non_differentiable(output[2])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        out, lse, lse_low, *tensors = ctx.saved_tensors
        if dout is None:
            dout = torch.zeros_like(out)
        flat = (*tensors, *ctx.scalars)
        needed = [ctx.needs_input_grad[TENSORS.index(name)] for name in DIFFERENTIABLE]
        grads = _backward_operator()(dout, dlse, out, lse, lse_low, *flat, needed)
        by_name = dict(zip(DIFFERENTIABLE, (g if n else None for g, n in zip(grads, needed, strict=True)), strict=True))
        return (*(by_name.get(name) for name in TENSORS), *(None for _ in ctx.scalars), None)

    @staticmethod
    def vmap(info: Any, in_dims: Dims, *args: Any) -> tuple[Any, Any]:
        if _drops_alike(info, in_dims, args):
            return _one_by_one(info.batch_size, in_dims, args, Attention.apply)
        folded = _fold(info.batch_size, in_dims, args[:-1], per_sample=())
        needs_grad = args[-1]
        results = Attention.apply(*folded, needs_grad)
        return _unfold_outputs(info.batch_size, results, is_packed=_is_packed(args))


def _backward_operator() -> Callable[..., tuple[Tensor, ...]]:
    """The gradient, itself differentiable only if that may be needed: the Function takes longer than the operator."""
    is_final = not (torch.is_grad_enabled() or is_transformed())
    return torch.ops.fastattn.backward if is_final else AttentionBackward.apply


class PlannedAttention(torch.autograd.Function):
    """Attention on q, k and v by a plan. Calls under a transform or a compiler never come here: they have no plan."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, plan: Plan, with_lse: bool, *more: Tensor | None) -> Any:
        results = plan.forward(q, k, v, *more)
        ctx.save_for_backward(*results, q, k, v, *more)
        ctx.plan, ctx.count = plan, len(results)
        ctx.set_materialize_grads(False)
        out = results[0].transpose(1, 2) if plan.heads_first else results[0]
        return (out, _lses(results[1:])[0]) if with_lse else out

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None = None) -> tuple[Tensor | None, ...]:
        plan, saved = ctx.plan, ctx.saved_tensors
        (out, *kept), (q, k, v, *more) = saved[: ctx.count], saved[ctx.count :]
        if dout is None:
            dout = torch.zeros(*q.shape[:-1], v.shape[-1], dtype=q.dtype, device=q.device)
        needs = dict(zip(MORE, ctx.needs_input_grad[5:], strict=True)) if more else {}
        needs_more = bool(needs) and (needs["bias"] or needs["sinks"])
        is_plain = dlse is None and type(dout) is Tensor and not (needs_more or torch.is_grad_enabled() or is_watched())
        is_plain = is_plain and plan.deterministic == torch.are_deterministic_algorithms_enabled()
        if is_plain and dout.dtype is out.dtype and not dout.is_neg():
            grads = plan.backward(_aligned(dout.contiguous()), out, *kept, q, k, v, *more)
        else:
            dout = dout.transpose(1, 2) if plan.heads_first else dout
            operands = (x.transpose(1, 2) if plan.heads_first else x for x in (q, k, v))
            flat = (*operands, *(more or (None,) * len(MORE)), None, *plan.scalars)
            needed = [True, True, True, needs.get("bias", False), needs.get("sinks", False)]
            grads = _backward_operator()(dout, dlse, out, *_lses(kept), *flat, needed)
        dq, dk, dv = grads[:3]
        if plan.heads_first:
            dq, dk, dv = dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)
        if not more:
            return dq, dk, dv, None, None
        of_more = dict(zip(DIFFERENTIABLE, grads, strict=True)) if needs_more else {}
        return dq, dk, dv, None, None, *(of_more[name] if needed else None for name, needed in needs.items())


class AttentionBackward(torch.autograd.Function):
    """``fastattn::backward`` with its derivative, which is that of the reference formula."""

    @staticmethod
    @_with_arguments_of(torch.ops.fastattn.backward)
    def forward(*args: Any) -> tuple[Tensor, ...]:
        return torch.ops.fastattn.backward(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        dout, dlse, _out, _lse, _lse_low, *flat = inputs[:-1]
        ctx.save_for_backward(dout, dlse, *flat[: len(TENSORS)])
        ctx.scalars = flat[len(TENSORS) :]
        ctx.needs = [name for name, needed in zip(DIFFERENTIABLE, inputs[-1], strict=True) if needed]
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        dout, dlse, *tensors = ctx.saved_tensors
        inputs, spec, _ = ops.unflatten((*tensors, *ctx.scalars))
        named = {"dout": dout, "dlse": dlse} | {name: getattr(inputs, name) for name in DIFFERENTIABLE}
        primals = {name: x for name, x in named.items() if x is not None}

        def gradients(*values: Tensor) -> tuple[Tensor, ...]:
            at = dict(zip(primals, values, strict=True))
            moved = inputs.replace(**{name: at[name] for name in DIFFERENTIABLE if name in at})
            with ops.without_autocast(moved.q.device.type):
                results = reference.forward(moved, spec)
                grads = reference.backward(at["dout"], at.get("dlse"), *results, moved, spec, ctx.needs)
            return tuple(getattr(grads, f"d{name}") for name in ctx.needs)

        values, pull_back = torch.func.vjp(gradients, *primals.values())  # type: ignore[misc]
        given = dict(zip(DIFFERENTIABLE, cotangents, strict=True))
        seeds = (given[name] for name in ctx.needs)
        found = pull_back(tuple(torch.zeros_like(x) if s is None else s for x, s in zip(values, seeds, strict=True)))
        second = dict(zip(primals, found, strict=True))
        first = (second["dout"], second.get("dlse"), None, None, None)
        return (*first, *(second.get(name) for name in TENSORS), *(None for _ in ctx.scalars), None)

    @staticmethod
    def vmap(info: Any, in_dims: Dims, *args: Any) -> tuple[Any, Any]:
        if _drops_alike(info, in_dims[5:], args[5:]):
            return _one_by_one(info.batch_size, in_dims, args, AttentionBackward.apply)
        size, flat, needed = info.batch_size, args[5:-1], args[-1]
        needs = [name for name, is_needed in zip(DIFFERENTIABLE, needed, strict=True) if is_needed]
        is_packed = _is_packed(flat)
        dout, out = (_into_batch(size, d, x) for d, x in ((in_dims[0], args[0]), (in_dims[2], args[2])))
        dlse, lse, lse_low = (_fold_lse(size, in_dims[n], args[n], is_packed) for n in (1, 3, 4))
        folded = _fold(size, in_dims[5:], flat, per_sample=needs)
        grads = AttentionBackward.apply(dout, dlse, out, lse, lse_low, *folded, needed)
        by_sample = []
        for name, grad in zip(DIFFERENTIABLE, grads, strict=True):
            if name not in needs:
                by_sample.append(grad)
                continue
            grad = grad.unflatten(0, (size, -1))
            was_shared = name in ("bias", "sinks") and _batch_size(flat, in_dims[5:], name) == 1
            by_sample.append(grad.sum(1, keepdim=True) if was_shared else grad)
        return tuple(by_sample), tuple(0 if name in needs else None for name in DIFFERENTIABLE)


# --- vmap: fold the mapped dimension of every argument into the batch -------------------------------------------


def _fold(size: int, in_dims: Dims, flat: Sequence[Any], per_sample: Sequence[str]) -> tuple[Any, ...]:
    """The operators' common arguments with ``size`` samples in one batch.

    A tensor shared by all samples stays shared, unless its gradient is needed ``per_sample``.
    """
    is_packed = _is_packed(flat)
    batch = _batch_size(flat, in_dims, "cu_seqlens_q") - 1 if is_packed else _batch_size(flat, in_dims, "q")
    folded: list[Tensor | None] = []
    for name, x, dim in zip(TENSORS, flat, in_dims, strict=False):
        if x is None:
            folded.append(None)
        elif name in ("q", "k", "v"):
            folded.append(_into_batch(size, dim, x))
        elif name == "rng_state":
            folded.append(x if dim is None else x.select(dim, 0))  # the batch index already tells samples apart
        elif name.startswith("cu_seqlens"):
            total = _batch_size(flat, in_dims, "q" if name.endswith("_q") else "k")
            folded.append(_join_sequences(size, dim, x, total))
        elif dim is None and x.shape[0] == 1 and name not in per_sample:
            folded.append(x)
        else:
            x = x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
            folded.append(x.expand(size, batch, *x.shape[2:]).flatten(0, 1))
    return (*folded, *flat[len(TENSORS) :])


def _drops_alike(info: Any, in_dims: Dims, flat: Sequence[Any]) -> bool:
    """Whether samples share dropout's elements, which count from the first batch entry of a call."""
    at = TENSORS.index("rng_state")
    return info.randomness == "same" and flat[at] is not None and in_dims[at] is None


def _one_by_one(size: int, in_dims: Dims, args: Sequence[Any], function: Callable[..., Any]) -> tuple[Any, Any]:
    """Each sample by a call of its own."""
    samples = []
    for n in range(size):
        at_n = (x.select(dim, n) if isinstance(dim, int) else x for x, dim in zip(args, in_dims, strict=True))
        samples.append(function(*at_n))
    return tuple(torch.stack(each) for each in zip(*samples, strict=True)), (0,) * len(samples[0])


def _into_batch(size: int, dim: int | None, x: Tensor) -> Tensor:
    x = x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
    return x.flatten(0, 1)


def _fold_lse(size: int, dim: int | None, x: Tensor | None, is_packed: bool) -> Tensor | None:
    if x is None or not is_packed:
        return None if x is None else _into_batch(size, dim, x)
    x = x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
    return x.transpose(0, 1).flatten(1, 2)  # (V, H, T) -> (H, V * T)


def _join_sequences(size: int, dim: int | None, cu_seqlens: Tensor, total: int) -> Tensor:
    """Boundaries of ``size`` packed batches of ``total`` tokens, laid end to end."""
    each = cu_seqlens.expand(size, -1) if dim is None else cu_seqlens.movedim(dim, 0)
    begins = torch.arange(0, size * total, total, dtype=each.dtype, device=each.device)[:, None]
    end = each.new_full((1,), size * total)
    return torch.cat([(each[:, :-1] + begins).flatten(), end])


def _unfold_outputs(size: int, results: Outputs, is_packed: bool) -> tuple[Any, Any]:
    of_lse = 1 if is_packed else 0
    dims = (0, of_lse, of_lse)
    return tuple(x.unflatten(dim, (size, -1)) for x, dim in zip(results, dims, strict=True)), dims


def _is_packed(flat: Sequence[Any]) -> bool:
    return flat[TENSORS.index("cu_seqlens_q")] is not None


def _batch_size(flat: Sequence[Any], in_dims: Dims, name: str) -> int:
    """The first dimension of one sample of an argument."""
    at = TENSORS.index(name)
    x, dim = flat[at], in_dims[at]
    return x.shape[1 if dim == 0 else 0]
