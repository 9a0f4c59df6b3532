"""Attention in torch ops, on any device, with memory linear in the sequence length.

A problem is planned (``plan``) into blocks of the score matrix outside which nothing is computed. Blocks run on torch's
flash kernel for the CPU (``flash``) where it computes the same thing, else through online softmax over tiles (``tiles``).
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fastattn.backends.base import Backend, Capabilities
from fastattn.backends.portable import flash, terms, tiles
from fastattn.problem import Grads, Inputs
from fastattn.spec import AttentionSpec


class PortableBackend(Backend):
    name = "portable"
    capabilities = Capabilities()

    def forward(self, inputs: Inputs, spec: AttentionSpec) -> tuple[Tensor, Tensor]:
        inputs = terms.without_unused_keys(inputs, spec)
        run = flash if flash.serves(inputs, spec) else tiles
        out, lse = run.forward(inputs, spec)
        return (out, lse) if inputs.sinks is None else terms.add_sinks(out, lse, inputs)

    def backward(
        self,
        dout: Tensor,
        dlse: Tensor | None,
        out: Tensor,
        lse: Tensor,
        inputs: Inputs,
        spec: AttentionSpec,
        needs: Sequence[str],
    ) -> Grads:
        inputs = terms.without_unused_keys(inputs, spec)
        has_sinks = inputs.sinks is not None and "sinks" in needs
        dsinks = terms.sink_gradient(dout, dlse, out, lse, inputs) if has_sinks else None
        if not {"q", "k", "v", "bias"} & set(needs):
            return Grads(dsinks=dsinks)
        if flash.serves(inputs, spec, needs):
            dq, dk, dv = flash.backward(dout, dlse, out, lse, inputs, spec)
            return Grads(*(x if name in needs else None for x, name in ((dq, "q"), (dk, "k"), (dv, "v"))), dsinks=dsinks)
        dq, dk, dv, dbias = tiles.backward(dout, dlse, out, lse, inputs, spec, needs)
        return Grads(dq, dk, dv, dbias, dsinks)


BACKEND = PortableBackend()
