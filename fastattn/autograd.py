"""Derivatives of the first and second order: autograd.Functions around the operators, each calling the others.

    F                        reverse mode: ``backward``       forward mode: ``jvp``
    Attention (forward)      AttentionBackward                AttentionJvp
    AttentionBackward        AttentionJvp, BackwardJvp        AttentionJvp, BackwardJvp
    AttentionJvp             AttentionBackward, BackwardJvp   the reference formula
    BackwardJvp              the reference formula            the reference formula

For fixed ``dout`` and ``dlse`` the backward pass gives the gradient of the scalar ``<dout, out> + <dlse, lse>``, whose
Hessian is symmetric. So its vector-Jacobian product along ``u`` is its Jacobian-vector product along ``u``, and the
gradient for ``dout`` is the tangent of ``out`` along ``u``: BackwardJvp serves double backward, forward over reverse,
reverse over forward and products with a Hessian alike, in linear memory. Third derivatives hold the score matrix.

``vmap.py`` has the rules by which samples are folded into a batch.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.compiler import is_compiling

from fastattn import ops, reference, vmap
from fastattn.backends.base import Outputs
from fastattn.errors import UnsupportedError
from fastattn.plan import ALIGNMENT, Plan
from fastattn.problem import DIFFERENTIABLE, MORE, TENSORS, Inputs, Rows, Tangents
from fastattn.spec import AttentionSpec
from fastattn.torch_internals import (
    is_batch_of_gradients,
    is_deterministic,
    is_in_forward_mode,
    is_inside_another_jvp,
    is_transformed,
    is_watched,
)

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])


def attend(inputs: Inputs, spec: AttentionSpec, backend: str | None, with_lse: bool = True) -> tuple[Tensor, Tensor]:
    """``(out, lse)``, differentiable in reverse and forward mode, under vmap, and under these nested in each other.

    Without ``with_lse`` nobody reads lse.
    """
    compiling, transformed = is_compiling(), is_transformed()
    # Dynamo refuses a Function with a jvp and drops its derivative inside func.grad: torch derives the formula.
    if compiling and (transformed or is_in_forward_mode()):
        with ops.without_autocast(inputs.q.device.type):
            out, lse, _ = reference.forward(inputs, spec)
            return out, lse
    needs_grad = needs_gradient(inputs)
    flat = ops.flatten(inputs, spec, backend)
    if not (needs_grad or transformed or is_in_forward_mode()):
        out, lse, _ = torch.ops.fastattn.forward(*flat, False)  # the Function costs more time than the operator
        return out, lse
    if compiling:
        function = CompiledAttention if with_lse else CompiledAlone
        out, lse, _ = function.apply(*_distinct(flat), needs_grad)
    else:
        out, lse, _ = Attention.apply(*flat, needs_grad)
    return out, lse


def _aligned(x: Tensor) -> Tensor:
    """``x``, or a copy that lies as kernels on an accelerator were compiled to find it."""
    return x if x.data_ptr() % ALIGNMENT == 0 else x.clone()


def needs_gradient(inputs: Inputs) -> bool:
    """Whether autograd will ask for the gradient of any input."""
    tracked = (getattr(inputs, name) for name in DIFFERENTIABLE)
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tracked)


def lses(kept: Sequence[Tensor]) -> Sequence[Tensor]:
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


class CompiledAttention(torch.autograd.Function):
    """``fastattn::forward`` with its gradient alone: Dynamo refuses a Function with a jvp."""

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
        return _gradients(ctx, dout, dlse)


def _gradients(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    if dout is None and dlse is None:  # a double backward comes by, which has nothing for out and lse
        return (None,) * len(ctx.needs_input_grad)
    out, lse, lse_low, *tensors = ctx.saved_tensors
    needed = [ctx.needs_input_grad[TENSORS.index(name)] for name in DIFFERENTIABLE]
    rows = (torch.zeros_like(out) if dout is None else dout, dlse, out, lse, lse_low)
    grads = _derivative(AttentionBackward)(*rows, *tensors, *ctx.scalars, needed)
    return (*_among_tensors(grads, needed), *(None for _ in ctx.scalars), None)


class CompiledAlone(CompiledAttention):
    """``CompiledAttention`` where nobody reads lse: Dynamo would have it have a gradient of zeros."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Outputs) -> None:
        ctx.save_for_backward(*output, *inputs[: len(TENSORS)])
        ctx.scalars = inputs[len(TENSORS) : -1]
        ctx.mark_non_differentiable(output[1], output[2])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        return _gradients(ctx, dout, None)


class Attention(CompiledAttention):
    """``fastattn::forward`` with all its derivatives."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Outputs) -> None:
        CompiledAttention.setup_context(ctx, inputs, output)
        ctx.save_for_forward(*output, *inputs[: len(TENSORS)])

    @staticmethod
    def jvp(ctx: Any, *moved: Tensor | None) -> tuple[Tensor | None, ...]:
        out, lse, lse_low, *tensors = ctx.saved_tensors
        tangents = _of_inputs(moved)
        return (*_derivative(AttentionJvp)(out, lse, lse_low, *tangents, *tensors, *ctx.scalars), None)

    @staticmethod
    def vmap(info: Any, in_dims: vmap.Dims, *args: Any) -> tuple[Any, Any]:
        if vmap.drops_alike(info, in_dims, args):
            return vmap.one_by_one(info.batch_size, in_dims, args, Attention.apply)
        folded = vmap.fold(info.batch_size, in_dims, args[:-1], per_sample=())
        results = Attention.apply(*folded, args[-1])
        return vmap.unfold_outputs(info.batch_size, results, vmap.is_packed(args))


def _derivative(function: type[torch.autograd.Function]) -> Callable[..., tuple[Tensor, ...]]:
    """A Function where it may be differentiated again, else its operator, which costs less time."""
    is_final = torch.compiler.is_compiling() or not (
        torch.is_grad_enabled() or is_transformed() or is_in_forward_mode()
    )
    return function.forward if is_final else function.apply


def _of_inputs(flat: Sequence[T]) -> list[T]:
    """Those that belong to differentiable inputs."""
    return [flat[TENSORS.index(name)] for name in DIFFERENTIABLE]


def _among_tensors(grads: Sequence[Tensor], needed: Sequence[bool]) -> tuple[Tensor | None, ...]:
    """The gradients that were needed, in the order of the operators' tensors."""
    by_name = {name: x for name, x, is_needed in zip(DIFFERENTIABLE, grads, needed, strict=True) if is_needed}
    return tuple(by_name.get(name) for name in TENSORS)


class PlannedAttention(torch.autograd.Function):
    """Attention on q, k and v by a plan. Calls under a transform or a compiler never come here: they have no plan."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, plan: Plan, with_lse: bool, *more: Tensor | None) -> Any:
        results = plan.forward(q, k, v, *more)
        ctx.save_for_backward(*results, q, k, v, *more)
        ctx.plan = plan
        ctx.set_materialize_grads(False)
        return (results[0], lses(results[1:])[0]) if with_lse else results[0]

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None = None) -> tuple[Tensor | None, ...]:
        if dout is None and dlse is None:  # a double backward comes by, which has nothing for out and lse
            return (None,) * len(ctx.needs_input_grad)
        plan, saved = ctx.plan, ctx.saved_tensors
        if (
            dlse is None
            and type(dout) is Tensor
            and dout.dtype is saved[0].dtype
            and not (torch.is_grad_enabled() or dout.is_neg() or is_watched() or is_batch_of_gradients())
            and plan.deterministic == is_deterministic()
        ):
            grads = plan.backward(dout if dout.is_cpu else _aligned(dout.contiguous()), *saved)
            if not plan.places:
                return (*grads, None, None)
            of_more: Sequence[Tensor | None] = [None if n is None else grads[n] for n in plan.places]
        else:
            needs_more = ctx.needs_input_grad[5:]
            count = len(saved) - 3 - len(needs_more)
            grads = _by_operator(plan, dout, dlse, saved[:count], saved[count:], needs_more)
            of_more = grads[3:]
            if plan.heads_first:
                grads = [x.transpose(1, 2) for x in grads[:3]]
        return *grads[:3], None, None, *of_more


# Function.apply without what it does first for torch.func, which plans do not serve (docs/decisions/plans.md).
apply_planned = super(torch.autograd.Function, PlannedAttention).apply


def _by_operator(
    plan: Plan,
    dout: Tensor | None,
    dlse: Tensor | None,
    results: Sequence[Tensor],
    tensors: Sequence[Tensor],
    needs_more: Sequence[bool],
) -> list[Any]:
    """The gradients of q, k, v and what follows them, by the operator: of calls that a prepared run cannot serve."""
    (out, *kept), (q, k, v, *more) = results, tensors
    if dout is None:
        dout = torch.zeros(*q.shape[:-1], v.shape[-1], dtype=q.dtype, device=q.device)
    if plan.heads_first:
        dout, out = dout.transpose(1, 2), out.transpose(1, 2)
    operands = (x.transpose(1, 2) if plan.heads_first else x for x in (q, k, v))
    flat = (*operands, *(more or (None,) * len(MORE)), None, *plan.scalars)
    needs = dict(zip(MORE, needs_more, strict=False))  # a call without more has none
    needed = [True, True, True, needs.get("bias", False), needs.get("sinks", False)]
    grads = _derivative(AttentionBackward)(dout, dlse, out, *lses(kept), *flat, needed)
    by_name = dict(zip(DIFFERENTIABLE, grads, strict=True))
    return [*grads[:3], *(by_name[name] if is_needed else None for name, is_needed in needs.items())]


class AttentionBackward(torch.autograd.Function):
    """``fastattn::backward`` with its derivatives. ``out`` and ``lse`` count as functions of the inputs."""

    @staticmethod
    @_with_arguments_of(torch.ops.fastattn.backward)
    def forward(*args: Any) -> tuple[Tensor, ...]:
        return torch.ops.fastattn.backward(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        tensors = inputs[: 5 + len(TENSORS)]
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)
        *ctx.scalars, ctx.needed = inputs[len(tensors) :]
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        rows, flat = ctx.saved_tensors[:5], (*ctx.saved_tensors[5:], *ctx.scalars)
        if all(x is None for x in cotangents):
            return (None,) * len(ctx.needs_input_grad)
        directions = [x if is_needed else None for x, is_needed in zip(cotangents, ctx.needed, strict=True)]
        out_moved, lse_moved = _derivative(AttentionJvp)(*rows[2:], *directions, *flat)
        needed = _of_inputs(ctx.needs_input_grad[5:])
        grads: Sequence[Tensor] = (out_moved,) * len(DIFFERENTIABLE)
        if any(needed):
            moved = (None, None, out_moved, lse_moved)
            grads = _derivative(BackwardJvp)(*rows, *moved, *directions, *flat, needed)
        first = out_moved, None if rows[1] is None else lse_moved
        return (*first, None, None, None, *_among_tensors(grads, needed), *(None for _ in ctx.scalars), None)

    @staticmethod
    def jvp(ctx: Any, *moved: Tensor | None) -> tuple[Tensor | None, ...]:
        rows, flat = ctx.saved_tensors[:5], (*ctx.saved_tensors[5:], *ctx.scalars)
        tangents = _of_inputs(moved[5:])
        results: Sequence[Tensor | None] = moved[2:4]
        if any(x is not None for x in tangents) and results[0] is None:
            results = _derivative(AttentionJvp)(*rows[2:], *tangents, *flat)
        return _derivative(BackwardJvp)(*rows, *moved[:2], *results, *tangents, *flat, ctx.needed)

    @staticmethod
    def vmap(info: Any, in_dims: vmap.Dims, *args: Any) -> tuple[Any, Any]:
        if vmap.drops_alike(info, in_dims[5:-1], args[5:-1]):
            return vmap.one_by_one(info.batch_size, in_dims, args, AttentionBackward.apply)
        flat, dims, needs = args[5:-1], in_dims[5:-1], ops.names_of(args[-1])
        rows = vmap.fold_rows(info.batch_size, in_dims[:5], args[:5], vmap.is_packed(flat))
        grads = AttentionBackward.apply(*rows, *vmap.fold(info.batch_size, dims, flat, per_sample=needs), args[-1])
        return vmap.unfold_gradients(info.batch_size, grads, dims, flat, needs)


class AttentionJvp(torch.autograd.Function):
    """``fastattn::jvp`` with its derivatives. ``out`` and ``lse`` count as functions of the inputs."""

    @staticmethod
    @_with_arguments_of(torch.ops.fastattn.jvp)
    def forward(*args: Any) -> tuple[Tensor, ...]:
        return torch.ops.fastattn.jvp(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        tensors = inputs[: 8 + len(TENSORS)]
        ctx.save_for_backward(*output, *tensors)
        ctx.save_for_forward(*output, *tensors)
        ctx.scalars = inputs[len(tensors) :]
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        out_moved, lse_moved, out, lse, lse_low, *others = ctx.saved_tensors
        tangents, flat = others[:5], (*others[5:], *ctx.scalars)
        if dout is None and dlse is None:
            return (None,) * len(ctx.needs_input_grad)
        rows = (torch.zeros_like(out) if dout is None else dout, dlse, out, lse, lse_low)
        of_tangents, of_inputs = ctx.needs_input_grad[3:8], _of_inputs(ctx.needs_input_grad[8:])
        first: Sequence[Tensor] = (out,) * len(DIFFERENTIABLE)
        second = first
        if any(of_tangents):
            first = _derivative(AttentionBackward)(*rows, *flat, of_tangents)
        if any(of_inputs):
            moved = (None, None, out_moved, lse_moved)
            second = _derivative(BackwardJvp)(*rows, *moved, *tangents, *flat, of_inputs)
        needed = (x if is_needed else None for x, is_needed in zip(first, of_tangents, strict=True))
        return (None, None, None, *needed, *_among_tensors(second, of_inputs), *(None for _ in ctx.scalars))

    @staticmethod
    def jvp(ctx: Any, *moved: Tensor | None) -> tuple[Tensor, ...]:
        """Along tangents alone it is linear; where the inputs move, too, torch derives the formula."""
        args = (*ctx.saved_tensors[2:], *ctx.scalars)
        if all(x is None for x in moved[8:]):
            return _derivative(AttentionJvp)(*args[:3], *moved[3:8], *args[8:])
        return _Formula.of_jvp(args).jvp(moved)

    @staticmethod
    def vmap(info: Any, in_dims: vmap.Dims, *args: Any) -> tuple[Any, Any]:
        flat, dims, size = args[8:], in_dims[8:], info.batch_size
        if vmap.drops_alike(info, dims, flat):
            return vmap.one_by_one(size, in_dims, args, AttentionJvp.apply)
        packed = vmap.is_packed(flat)
        _, _, *rows = vmap.fold_rows(size, (None, None, *in_dims[:3]), (None, None, *args[:3]), packed)
        per_sample = [name for name, dim in zip(DIFFERENTIABLE, in_dims[3:8], strict=True) if dim is not None]
        folded = vmap.fold(size, dims, flat, per_sample)
        tangents = vmap.fold_tangents(size, in_dims[3:8], args[3:8], flat, folded)
        return vmap.unfold_outputs(size, AttentionJvp.apply(*rows, *tangents, *folded), packed)


class BackwardJvp(torch.autograd.Function):
    """``fastattn::backward_jvp``, whose derivatives are those of the reference formula."""

    @staticmethod
    @_with_arguments_of(torch.ops.fastattn.backward_jvp)
    def forward(*args: Any) -> tuple[Tensor, ...]:
        return torch.ops.fastattn.backward_jvp(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        tensors = inputs[: 14 + len(TENSORS)]
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)
        ctx.scalars = inputs[len(tensors) :]
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        return _Formula.of_backward_jvp((*ctx.saved_tensors, *ctx.scalars)).vjp(cotangents)

    @staticmethod
    def jvp(ctx: Any, *moved: Tensor | None) -> tuple[Tensor, ...]:
        return _Formula.of_backward_jvp((*ctx.saved_tensors, *ctx.scalars)).jvp(moved)

    @staticmethod
    def vmap(info: Any, in_dims: vmap.Dims, *args: Any) -> tuple[Any, Any]:
        flat, dims, size, needs = args[14:-1], in_dims[14:-1], info.batch_size, ops.names_of(args[-1])
        if vmap.drops_alike(info, dims, flat):
            return vmap.one_by_one(size, in_dims, args, BackwardJvp.apply)
        rows = vmap.fold_rows(size, in_dims[:5], args[:5], vmap.is_packed(flat))
        moved = vmap.fold_rows(size, (*in_dims[5:9], None), (*args[5:9], None), vmap.is_packed(flat))[:4]
        moving = [name for name, dim in zip(DIFFERENTIABLE, in_dims[9:14], strict=True) if dim is not None]
        folded = vmap.fold(size, dims, flat, per_sample=[*needs, *moving])
        tangents = vmap.fold_tangents(size, in_dims[9:14], args[9:14], flat, folded)
        grads = BackwardJvp.apply(*rows, *moved, *tangents, *folded, args[-1])
        return vmap.unfold_gradients(size, grads, dims, flat, needs)


@dataclass(frozen=True)
class _Formula:
    """The reference formula as a function of an operator's arguments, to be derived by torch.

    Attributes:
        args: the arguments.
        where: which of them move.
        function: of all arguments, in torch operators.
    """

    args: tuple[Any, ...]
    where: tuple[int, ...]
    function: Callable[..., tuple[Tensor, ...]]

    @classmethod
    def of_jvp(cls, args: tuple[Any, ...]) -> _Formula:
        def function(*args: Any) -> tuple[Tensor, ...]:
            inputs, spec, _ = ops.unflatten(args[8:])
            return reference.jvp(Tangents(*args[3:8]), Rows(), inputs, spec)

        return cls(args, cls._given(args, (*range(3, 8), *_places(8))), function)

    @classmethod
    def of_backward_jvp(cls, args: tuple[Any, ...]) -> _Formula:
        def function(*args: Any) -> tuple[Tensor, ...]:
            inputs, spec, _ = ops.unflatten(args[14:-1])
            moved, needs = Rows(*args[5:7]), ops.names_of(args[-1])
            grads = reference.backward_jvp(Rows(*args[:5]), moved, Tangents(*args[9:14]), inputs, spec, needs)
            return ops.in_order(grads, args[0])

        return cls(args, cls._given(args, (0, 1, 5, 6, *range(9, 14), *_places(14))), function)

    @staticmethod
    def _given(args: tuple[Any, ...], where: Sequence[int]) -> tuple[int, ...]:
        return tuple(n for n in where if args[n] is not None)

    def _at(self, *values: Tensor) -> tuple[Tensor, ...]:
        args = list(self.args)
        for n, x in zip(self.where, values, strict=True):
            args[n] = x
        with ops.without_autocast(args[0].device.type):
            return self.function(*args)

    def jvp(self, moved: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
        if is_inside_another_jvp():  # torch computes rules with forward mode off: the outer one would find zeros
            raise UnsupportedError(
                "Forward mode three times over, or in forward mode over second derivatives, has no rule. Take one of "
                "the derivatives in reverse: jacfwd(jacfwd(jacrev(f))) in place of jacfwd(jacfwd(jacfwd(f)))."
            )
        primals = tuple(self.args[n] for n in self.where)
        given = (moved[n] for n in self.where)
        tangents = (torch.zeros_like(x) if t is None else t for x, t in zip(primals, given, strict=True))
        return reference.jacobian_product(self._at, primals, tuple(tangents))

    def vjp(self, cotangents: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
        values, pull_back = torch.func.vjp(self._at, *(self.args[n] for n in self.where))  # type: ignore[misc]
        seeds = (torch.zeros_like(x) if s is None else s for x, s in zip(values, cotangents, strict=True))
        found = dict(zip(self.where, pull_back(tuple(seeds)), strict=True))
        return tuple(found.get(n) for n in range(len(self.args)))


def _places(first: int) -> Sequence[int]:
    """Where the differentiable inputs stand among arguments whose tensors begin at ``first``."""
    return [first + TENSORS.index(name) for name in DIFFERENTIABLE]
