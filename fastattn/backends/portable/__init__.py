"""Attention in torch ops, on any device, with memory linear in the sequence length.

A problem is planned (``plan``) into blocks of the score matrix outside which nothing is computed. Blocks run on
torch's flash kernel for the CPU (``flash``) where it computes the same thing, else through online softmax over tiles
(``tiles``). On an accelerator it is always tiles, and nothing there waits for the device (not yet run on a GPU).
``decode`` attends to caches. Jacobian-vector products and statistics of the weights are always tiles
(``derivatives``, ``statistics``).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastattn.backends.base import Backend, Capabilities, Outputs
from fastattn.backends.portable import decode, derivatives, flash, statistics, terms, tiles
from fastattn.kv_cache import CacheInputs
from fastattn.problem import CACHE_FEATURES, DERIVATIVE_FEATURES, FEATURES, STATISTICS_FEATURES, Grads, Inputs
from fastattn.spec import AttentionSpec


class PortableBackend(Backend):
    name = "portable"
    capabilities = Capabilities(
        features=frozenset(FEATURES + DERIVATIVE_FEATURES + STATISTICS_FEATURES + CACHE_FEATURES) - {"batch invariant"}
    )
    jvp = staticmethod(derivatives.jvp)
    backward_jvp = staticmethod(derivatives.backward_jvp)
    statistics_backward = staticmethod(statistics.backward)
    statistics = staticmethod(statistics.forward)

    def forward(self, inputs: Inputs, spec: AttentionSpec) -> Outputs:
        results = _without_sinks(inputs, spec)
        return results if inputs.sinks is None else terms.add_sinks(*results, inputs)

    def backward(
        self,
        dout: Tensor,
        dlse: Tensor | None,
        out: Tensor,
        lse: Tensor,
        lse_low: Tensor,
        inputs: Inputs,
        spec: AttentionSpec,
        needs: Sequence[str],
    ) -> Grads:
        has_sinks = inputs.sinks is not None and "sinks" in needs
        dsinks = terms.sink_gradient(dout, dlse, out, lse, lse_low, inputs) if has_sinks else None
        if not {"q", "k", "v", "bias"} & set(needs):
            return Grads(dsinks=dsinks)
        found: tuple[Tensor | None, ...]
        if flash.serves(inputs, spec, needs) and terms.is_moderate(lse) and terms.are_finite(inputs):
            found = flash.backward(dout, dlse, out, lse, inputs, spec)
        else:
            found = tiles.backward(dout, dlse, out, lse, lse_low, inputs, spec, needs)
        wanted = {f"d{name}": x for name, x in zip(("q", "k", "v", "bias"), found, strict=False) if name in needs}
        return Grads(**wanted, dsinks=dsinks)

    def attend_to_cache(self, inputs: CacheInputs, spec: AttentionSpec) -> tuple[Tensor, Tensor]:
        return decode.attend(inputs, spec, self.forward)


def _without_sinks(inputs: Inputs, spec: AttentionSpec) -> Outputs:
    """On torch's kernel where it serves, nothing is NaN, and lse as one number tells enough; else on tiles."""
    if flash.serves(inputs, spec) and terms.are_finite(inputs):
        out, lse = flash.forward(inputs, spec)
        if terms.is_moderate(lse):
            return out, lse, torch.zeros_like(lse)
    shrink = terms.shrink_of_values(inputs)
    out, lse, low = tiles.forward(inputs if shrink == 1 else inputs.replace(v=inputs.v * shrink), spec)
    return (out if shrink == 1 else out / shrink), lse, low


BACKEND = PortableBackend()
