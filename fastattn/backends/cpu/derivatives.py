"""Jacobian-vector products of both passes by the C++ kernels: two structs, of the inputs and of their tangents."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastattn.backends.cpu.attention import Call, Gradients, words_of
from fastattn.backends.cpu.library import Library
from fastattn.problem import DIFFERENTIABLE, Grads, Inputs, Rows, Tangents
from fastattn.spec import AttentionSpec


def jvp(
    library: Library,
    tangents: Tangents,
    results: Rows,
    inputs: Inputs,
    spec: AttentionSpec,
    *,
    machine: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The tangents of out and lse."""
    machine = library.machine if machine is None else machine
    of_inputs, rows = Call(inputs, spec, machine), _readable(results, inputs)
    out = torch.empty(inputs.out_shape(), dtype=inputs.q.dtype, device=inputs.q.device)
    lse = torch.empty(inputs.lse_shape(), dtype=of_inputs.words, device=inputs.q.device)
    given = of_inputs.packed(out=rows.out, lse=rows.lse, lse_low=rows.lse_low)
    moving = _Moving(tangents, inputs, spec, machine)
    library.run("jvp", given, moving.packed(Rows(out=out, lse=lse)))
    return out, lse


def backward_jvp(
    library: Library,
    rows: Rows,
    moved: Rows,
    tangents: Tangents,
    inputs: Inputs,
    spec: AttentionSpec,
    needs: Sequence[str],
    *,
    machine: int | None = None,
) -> Grads:
    """The tangents of the gradients named in ``needs``."""
    machine = library.machine if machine is None else machine
    call, rows, moved = Call(inputs, spec, machine), _readable(rows, inputs), _readable(moved, inputs)
    grads = Gradients.of(inputs, needs)
    given = call.packed(
        out=rows.out, lse=rows.lse, lse_low=rows.lse_low, dout=rows.dout, dlse=rows.dlse, **grads.tensors()
    )
    moving = _Moving(tangents, inputs, spec, machine)
    library.run("backward_jvp", given, moving.packed(moved))
    return grads.finished()


def _readable(rows: Rows, inputs: Inputs) -> Rows:
    """With tensors as the kernels read them."""
    words = words_of(inputs.q.dtype)
    dlse, lse, low = (None if x is None else x.to(words).contiguous() for x in (rows.dlse, rows.lse, rows.lse_low))
    dout = rows.dout if rows.dout is None or rows.dout.stride(-1) == 1 else rows.dout.contiguous()
    return Rows(dout, dlse, None if rows.out is None else rows.out.contiguous(), lse, low)


class _Moving:
    """The tangents as the kernels read them, beside the terms of the scores. It owns what the struct points to."""

    def __init__(self, tangents: Tangents, inputs: Inputs, spec: AttentionSpec, machine: int) -> None:
        given = {name: getattr(tangents, name) for name in DIFFERENTIABLE}
        moving = inputs.replace(**{name: x for name, x in given.items() if x is not None})
        self._call = Call(moving, spec, machine)
        self._still: dict[str, Tensor | None] = {name: None for name, x in given.items() if x is None}

    def packed(self, rows: Rows) -> bytes:
        """The struct, with ``rows``; null in place of what stands still."""
        return self._call.packed(out=rows.out, lse=rows.lse, dout=rows.dout, dlse=rows.dlse, **self._still)
