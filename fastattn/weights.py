"""Attention weights of all rows and heads, or their averages over the heads, by a kernel or by the formula."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from fastattn import ops, reference
from fastattn.autograd import needs_gradient
from fastattn.backends import load
from fastattn.backends.base import Backend
from fastattn.dispatch import choose, reasons, requested
from fastattn.plan import is_plain
from fastattn.problem import DIFFERENTIABLE, TENSORS, Inputs, Problem
from fastattn.spec import AttentionSpec
from fastattn.torch_internals import has_dispatch_modes, is_in_forward_mode, is_traced, is_transformed

BUDGET = 8 * 2**20  # bytes of weights that are averaged at a time: they stay in a cache, and malloc keeps their pages


def all_weights(inputs: Inputs, spec: AttentionSpec, *, averages: bool, dtype: torch.dtype | None = None) -> Tensor:
    """The weights ``(B, H_q, S_q, S_kv)`` of a dense call, or their ``averages`` over the heads, differentiable.

    Args:
        inputs: the tensors; values are not read.
        spec: the scalars.
        averages: ``(B, S_q, S_kv)``.
        dtype: of the result; None is that of the computation, fp32, or fp64 for fp64 inputs.
    """
    dtype = reference.compute_dtype(inputs) if dtype is None else dtype
    backend = _with_kernel(inputs, spec)
    if backend is None:
        return _by_formula(inputs, spec, averages).to(dtype)
    if needs_gradient(inputs):
        found: Tensor = WeightsByKernel.apply(averages, dtype, *ops.flatten(inputs, spec, backend.name))
        return found
    return backend.weights(inputs, spec, averages=averages, dtype=dtype)


def _with_kernel(inputs: Inputs, spec: AttentionSpec) -> Backend | None:
    """The backend of such calls, if it computes weights and no tool of torch watches or transforms this one."""
    tensors = [x for x in inputs.tensors().values() if x is not None]
    if spec.dropout_p or torch.compiler.is_compiling() or is_transformed() or is_in_forward_mode():
        return None
    if is_traced() or has_dispatch_modes() or any(type(x) not in (Tensor, Parameter) for x in tensors):
        return None
    problem = Problem.of(inputs, spec, needs_gradient(inputs))
    name = requested(None) or choose(problem)[0]
    if name is None or not load(name).computes_weights or reasons(problem)[name] or not is_plain(tensors):
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
        inputs, spec, name = ops.unflatten((*ctx.saved_tensors, *ctx.scalars))
        needed = ctx.needs_input_grad[2:]
        needs = [name for name in DIFFERENTIABLE if name != "v" and needed[TENSORS.index(name)]]
        if torch.is_grad_enabled() or not is_plain([dweights]):
            with torch.enable_grad():
                found = _by_formula(inputs, spec, ctx.averages).to(dweights.dtype)
            wanted = [getattr(inputs, name) for name in needs]
            grads = torch.autograd.grad(found, wanted, dweights, create_graph=True, allow_unused=True)
            by_name = dict(zip(needs, grads, strict=True))
        else:
            of_inputs = load(str(name)).weights_backward(dweights, inputs, spec, needs)
            by_name = {name: getattr(of_inputs, f"d{name}") for name in needs}
        return (None, None, *(by_name.get(name) for name in TENSORS), *(None for _ in ctx.scalars))


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
