"""Attention in torch's own operators, for exported programs that run without fastattn.

``torch.jit.trace`` and ``torch.onnx.export`` always record it; ``plain_torch()`` selects it for ``torch.export`` and
AOTInductor.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn import reference
from fastattn.problem import Inputs
from fastattn.spec import AttentionSpec
from fastattn.torch_internals import is_exported_to_onnx, is_traced

_wanted: ContextVar[bool] = ContextVar("fastattn_plain_torch", default=False)


@contextlib.contextmanager
def plain_torch() -> Iterator[None]:
    """Make attention that is exported inside the block consist of torch's operators alone.

    Programs of ``torch.export.export`` or AOTInductor then load and run without fastattn, at the speed of torch's
    attention.

    Example:
        >>> import torch, fastattn
        >>> from fastattn.integrations.export import plain_torch
        >>> model, x = fastattn.MultiHeadAttention(16, 2, batch_first=True).eval(), torch.randn(1, 3, 16)
        >>> with plain_torch():
        ...     program = torch.export.export(model, (x, x, x), {"need_weights": False})
        >>> any("fastattn" in str(node.target) for node in program.graph.nodes)
        False
    """
    token = _wanted.set(True)
    try:
        yield
    finally:
        _wanted.reset(token)


def is_wanted() -> bool:
    """Whether the running call is recorded for a process without fastattn."""
    return not torch.compiler.is_dynamo_compiling() and (is_traced() or _wanted.get() or is_exported_to_onnx())


def attend(inputs: Inputs, spec: AttentionSpec) -> tuple[Tensor, Tensor]:
    """``(out, lse)`` of the spec, by torch's attention if it has all the terms, else by the reference formula."""
    is_grouped = bool(inputs.heads_q != inputs.heads_kv)  # sizes are tensors while torch.jit.trace records
    if is_grouped and not inputs.is_packed:
        inputs = inputs.replace(k=_for_each_head(inputs.k, inputs), v=_for_each_head(inputs.v, inputs))
    has_more = spec.softcap is not None or inputs.alibi_slopes is not None or inputs.sinks is not None
    out, lse, _ = reference.forward(inputs, spec)
    if has_more or inputs.is_packed or spec.dropout_p:
        return out, lse
    q, k, v = (x.transpose(1, 2) for x in (inputs.q, inputs.k, inputs.v))
    terms = (inputs.mask, inputs.segment_ids_q, inputs.intervals, inputs.bias)
    has_mask = any(x is not None for x in terms)
    is_causal = not has_mask and spec.left is None and spec.right == 0 and spec.anchor == "upper_left"
    mask = None if is_causal else _mask(inputs, spec)
    out = F.scaled_dot_product_attention(q, k, v, mask, 0.0, is_causal, scale=spec.scale)
    return out.transpose(1, 2), lse  # exporters drop the operators of lse as dead code if lse is not returned


def _for_each_head(x: Tensor, inputs: Inputs) -> Tensor:
    """Keys or values repeated for each query head: torch 2.11 exports no grouped heads of any length."""
    return x.unsqueeze(3).expand(-1, -1, -1, inputs.heads_q // inputs.heads_kv, -1).flatten(2, 3)


def _mask(inputs: Inputs, spec: AttentionSpec) -> Tensor | None:
    """Band, segments, intervals, mask and bias, as torch's ``attn_mask``; None if there are none."""
    bounded = spec.left is not None or spec.right is not None
    if inputs.mask is inputs.segment_ids_q is inputs.intervals is None and not bounded:
        return None if inputs.bias is None else inputs.bias.to(inputs.q.dtype)
    kept = reference.keep_matrix(inputs, spec, reference.Positions.of(inputs))
    return kept if inputs.bias is None else inputs.bias.to(inputs.q.dtype).masked_fill(~kept, float("-inf"))
