"""Programs that run where fastattn is not installed: ``torch.export``, AOTInductor, ONNX.

By default an exported program contains fastattn's operators, one node for each attention call, and needs ``import
fastattn`` where it is loaded. ``plain_torch()`` and ``without_fastattn()`` make programs of torch's operators alone.
``torch.jit.trace`` and ``torch.onnx.export`` always record torch's operators.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from fastattn import ops, plain
from fastattn.plain import plain_torch

__all__ = ["plain_torch", "without_fastattn"]


def without_fastattn(program: ExportedProgram) -> ExportedProgram:
    """An exported program with fastattn's operators decomposed into torch's.

    Args:
        program: from ``torch.export.export``; inference, not training.

    Returns:
        the same program without the operators of fastattn.

    Example:
        >>> import torch, fastattn
        >>> from fastattn.integrations.export import without_fastattn
        >>> model, x = fastattn.MultiHeadAttention(16, 2, batch_first=True).eval(), torch.randn(1, 3, 16)
        >>> program = torch.export.export(model, (x, x, x), {"need_weights": False})
        >>> any("fastattn" in str(node.target) for node in without_fastattn(program).graph.nodes)
        False
    """
    return program.run_decompositions({torch.ops.fastattn.forward.default: _forward})


def _forward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    inputs, spec, _backend = ops.unflatten(args[:-1])
    out, lse = plain.attend(inputs, spec)
    return out.contiguous(), lse.contiguous(), torch.zeros_like(lse)
