"""Statistics of the weights with their gradients: entropies, largest logits, sums over columns."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastattn import ops, reference
from fastattn.problem import DIFFERENTIABLE, TENSORS, Inputs, Statistics, StatisticsGradient
from fastattn.spec import AttentionSpec
from fastattn.torch_internals import is_batch_of_gradients, is_in_forward_mode, is_transformed


def statistics(inputs: Inputs, spec: AttentionSpec, backend: str | None) -> Statistics:
    """The statistics that the spec defines, in linear memory; transforms and compilers get the formula."""
    if torch.compiler.is_compiling() or is_transformed() or is_in_forward_mode():
        with ops.without_autocast(inputs.q.device.type):
            return reference.statistics(inputs, spec)
    return Statistics(*WeightStatistics.apply(*ops.flatten(inputs, spec, backend)))


class WeightStatistics(torch.autograd.Function):
    """``ops.statistics`` with its gradient; a second derivative goes through the reference formula."""

    @staticmethod
    def forward(ctx: Any, *flat: Any) -> tuple[Tensor, ...]:
        ctx.save_for_backward(*flat[: len(TENSORS)])
        ctx.scalars = flat[len(TENSORS) :]
        found = ops.statistics(*ops.unflatten(flat))
        ctx.mark_non_differentiable(found.largest_key, found.key_max)
        ctx.set_materialize_grads(False)
        return tuple(found)

    @staticmethod
    def backward(ctx: Any, *given: Tensor | None) -> tuple[Tensor | None, ...]:
        entropy, largest, _, key_sum, _ = given
        gradient = StatisticsGradient(entropy, largest, key_sum)
        inputs, spec, backend = ops.unflatten((*ctx.saved_tensors, *ctx.scalars))
        needs = [name for name in DIFFERENTIABLE if name != "v" and ctx.needs_input_grad[TENSORS.index(name)]]
        if torch.is_grad_enabled() or is_batch_of_gradients():
            with ops.without_autocast(inputs.q.device.type):
                grads = reference.statistics_backward(gradient, inputs, spec, needs)
        else:
            grads = ops.statistics_backward(gradient, inputs, spec, backend, needs)
        by_name = {name: getattr(grads, f"d{name}") for name in needs}
        if ctx.needs_input_grad[TENSORS.index("v")]:
            by_name["v"] = torch.zeros_like(inputs.v)
        return (*(by_name.get(name) for name in TENSORS), *(None for _ in ctx.scalars))
