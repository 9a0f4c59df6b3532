"""Attention with products of e4m3 numbers: ``attention_fp8``, a forward pass behind its own name."""

from __future__ import annotations

import warnings
from typing import Any, Never

import torch
from torch import Tensor

from fastattn.arguments import Window, autocast, dense_problem
from fastattn.dispatch import choose, reasons, requested, select
from fastattn.errors import input_error, name_error
from fastattn.functional import attention
from fastattn.layout import Layout, from_internal
from fastattn.ops import refuse_context_parallel, without_autocast
from fastattn.problem import FP8_FEATURES, Inputs, Problem, check_inputs, check_rank
from fastattn.quantized import Quantized, quantize
from fastattn.spec import AttentionSpec
from fastattn.state import remembered

Operands = tuple[Quantized, Quantized, Quantized]


def attention_fp8(
    q: Tensor | Quantized,
    k: Tensor | Quantized,
    v: Tensor | Quantized,
    *,
    causal: bool = False,
    window: Window | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    segment_ids: Tensor | tuple[Tensor, Tensor] | None = None,
    intervals: Tensor | None = None,
    layout: Layout = "BSHD",
    return_lse: bool = False,
    backend: str | None = None,
    **misnamed: Never,
) -> Tensor | tuple[Tensor, Tensor]:
    """``attention`` of operands rounded to e4m3, for inference: it has no backward pass.

    ``out`` is that of ``attention`` for ``quantize(x).dequantize()`` in place of q, k and v, without dropout. Kernels
    round the weights ``p <= 1`` before the second product, too: by at most ``p / 16``, or ``2^-18`` below ``2^-14``.
    docs/guides/fp8.md states the error of the whole.

    Args:
        q: queries ``(B, S_q, H_q, D_qk)``, rounded here, or ``quantize(q)``.
        k: keys ``(B, S_kv, H_kv, D_qk)``, or ``quantize(k)``.
        v: values ``(B, S_kv, H_kv, D_v)``, or ``quantize(v, role="value")``.
        causal, window, scale, softcap, bias, mask, alibi_slopes, sinks, segment_ids, intervals: as in ``attention``.
        layout: ``"BSHD"`` or ``"BHSD"``: order of the dimensions of tensors among q, k, v, and of out.
        return_lse: also return the log-sum-exp of each row.
        backend: a name from ``fastattn.backends()``; None takes the first with a kernel in e4m3. Where there is none,
            or the one asked for has none, ``attention`` serves the dequantized operands, after a warning.

    Returns:
        ``out`` in the dtype of q, with ``return_lse`` also ``lse``, ``(B, H_q, S_q)`` in fp32.

    Raises:
        InputError: an argument is wrong, or requires a gradient while gradients are enabled.
        UnsupportedError: the backend asked for cannot serve the call, not even dequantized.

    Source:
        Shah et al., "FlashAttention-3", 2024, section 3.3.

    Example:
        >>> import torch, fastattn
        >>> q = torch.randn(1, 256, 4, 64)
        >>> k = v = torch.randn(1, 256, 2, 64)
        >>> out = fastattn.attention_fp8(q, k, v, causal=True)
        >>> bool((out - fastattn.attention(q, k, v, causal=True)).abs().max() < 0.5)
        True
    """
    if misnamed:
        raise name_error(attention_fp8, misnamed)
    _refuse_gradients({"q": q, "k": k, "v": v, "bias": bias, "sinks": sinks})
    operands = _quantized(q, k, v, layout)
    options: dict[str, Any] = {
        "causal": causal, "window": window, "scale": scale, "softcap": softcap, "bias": bias, "mask": mask,
        "alibi_slopes": alibi_slopes, "sinks": sinks, "segment_ids": segment_ids, "intervals": intervals,
    }  # fmt: skip
    with torch.no_grad(), without_autocast(operands[0].values.device.type):
        shapes = (_shape_of(x, operands[0].dtype) for x in operands)
        inputs, spec = dense_problem(*shapes, **options, dropout_p=0.0, rng_state=None, layout="BSHD")
        check_inputs(inputs, spec)
        refuse_context_parallel()
        out, lse = _served(operands, inputs, spec, options, requested(backend))
    out = from_internal(out, layout)
    return (out, lse) if return_lse else out


def _served(
    operands: Operands, inputs: Inputs, spec: AttentionSpec, options: dict[str, Any], backend: str | None
) -> tuple[Tensor, Tensor]:
    """``(out, lse)`` by a kernel in e4m3, or of the dequantized operands."""
    problem = Problem.of(inputs, spec, also=FP8_FEATURES)
    chosen, passed_over = choose(problem) if backend is None else (backend, {})
    why_not = reasons(problem) if chosen is None else {chosen: reasons(problem)[chosen]}
    if chosen is not None and not why_not[chosen]:
        return select(problem, chosen).forward_fp8(*operands, inputs, spec)
    _warn_dequantized(tuple(f"{name}: {'; '.join(why)}" for name, why in (why_not | passed_over).items() if why))
    # in bf16 and fp32 the dequantized numbers are those that were rounded; fp16 might overflow
    dtype = torch.bfloat16 if inputs.q.dtype == torch.bfloat16 else torch.float32
    out, lse = attention(*(x.dequantize(dtype) for x in operands), **options, return_lse=True, backend=backend)
    return out.to(inputs.q.dtype), lse


@remembered
def _warn_dequantized(why: tuple[str, ...]) -> None:
    text = f"attention_fp8: no kernel multiplies in e4m3 ({', '.join(why)}), so attention serves dequantized operands"
    warnings.warn(f"{text}; quantize saves memory then, and no time", stacklevel=5)


def _refuse_gradients(given: dict[str, Any]) -> None:
    for name, x in given.items():
        if isinstance(x, Tensor) and x.requires_grad and torch.is_grad_enabled():
            todo = "Call it under torch.no_grad(), or train with fastattn.attention."
            raise input_error(name, "a tensor that requires grad", "one that does not: e4m3 has no backward pass", todo)


def _quantized(q: Any, k: Any, v: Any, layout: Layout) -> Operands:
    """The operands, those rounded that are not yet."""
    found = []
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor | Quantized):
            raise input_error(name, type(x).__name__, "a tensor, or what quantize returns", "Convert it.")
        if isinstance(x, Tensor):
            check_rank({name: x}, range(4, 5), "(B, S, H, D), in the order that layout names")
            x = quantize(*autocast(x), role="value" if name == "v" else "key", layout=layout)
        found.append(x)
    return found[0], found[1], found[2]


def _shape_of(x: Quantized, dtype: torch.dtype) -> Tensor:
    """A tensor of the shape and device of ``x``, of one row in memory."""
    return torch.empty(x.values.shape[-1], dtype=dtype, device=x.values.device).expand(x.values.shape)
