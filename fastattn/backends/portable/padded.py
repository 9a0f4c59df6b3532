"""Packed sequences without knowing their boundaries on the host: laid out as a dense batch, all on the device.

Reading ``cu_seqlens`` on an accelerator would wait for it. Here each sequence becomes a batch entry of ``max_seqlen``
rows, and segment ids keep the padding apart. With a lower right anchor the sequences stand at the end of their entries,
with an upper left one at the beginning, so that one band fits them all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastattn.backends.base import Outputs
from fastattn.numerics import NEVER
from fastattn.problem import Inputs
from fastattn.spec import AttentionSpec

# Padding of the queries and of the keys: never equal, so never attended.
_REAL, _NO_QUERY, _NO_KEY = 0, 1, 2


def is_needed(inputs: Inputs, spec: AttentionSpec) -> bool:
    return inputs.is_packed and inputs.q.device.type != "cpu" and not _must_shift_dropout(inputs, spec)


def _must_shift_dropout(inputs: Inputs, spec: AttentionSpec) -> bool:
    """Dropout counts positions from the beginning of a sequence, which standing at the end would shift."""
    return spec.dropout_p > 0 and _stands_at_end(inputs, spec)


def _stands_at_end(inputs: Inputs, spec: AttentionSpec) -> bool:
    has_diagonal = spec.has_band or inputs.alibi_slopes is not None
    return has_diagonal and spec.anchor == "lower_right" and not _is_same(inputs.cu_seqlens_q, inputs.cu_seqlens_kv)


def _is_same(a: Tensor | None, b: Tensor | None) -> bool:
    return a is not None and b is not None and a.data_ptr() == b.data_ptr()


def forward(dense_forward: Callable[..., Any], inputs: Inputs, spec: AttentionSpec) -> Outputs:
    """The results of ``dense_forward(inputs, spec)`` for packed inputs."""
    to_q, to_kv = _places(inputs, spec)
    out, *lses = dense_forward(_pad_inputs(inputs, to_q, to_kv), spec)
    lse, low = (x.transpose(1, 2).flatten(0, 1)[to_q].transpose(0, 1).contiguous() for x in lses)
    return out.flatten(0, 1)[to_q], lse, low


def backward(
    dense_backward: Callable[..., Any],
    dout: Tensor,
    dlse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    lse_low: Tensor,
    inputs: Inputs,
    spec: AttentionSpec,
    *,
    needs: Sequence[str],
) -> tuple[Tensor | None, ...]:
    """The results of ``dense_backward`` for packed inputs."""
    to_q, to_kv = _places(inputs, spec)
    n = inputs.batch
    dout, out = (_pad(x, to_q, n, inputs.max_seqlen_q) for x in (dout, out))
    lse = _pad(lse.transpose(0, 1), to_q, n, inputs.max_seqlen_q, fill=NEVER).transpose(1, 2)
    lse_low = _pad(lse_low.transpose(0, 1), to_q, n, inputs.max_seqlen_q).transpose(1, 2)
    if dlse is not None:
        dlse = _pad(dlse.transpose(0, 1), to_q, n, inputs.max_seqlen_q).transpose(1, 2)
    grads = dense_backward(dout, dlse, out, lse, lse_low, _pad_inputs(inputs, to_q, to_kv), spec, needs)
    places = (to_q, to_kv, to_kv)
    return *(x if x is None else x.flatten(0, 1)[to] for x, to in zip(grads, places, strict=False)), None


def _places(inputs: Inputs, spec: AttentionSpec) -> tuple[Tensor, Tensor]:
    """The row of the flattened dense batch at which each packed row stands, for queries and for keys."""
    at_end = _stands_at_end(inputs, spec)
    sides = (
        (inputs.cu_seqlens_q, inputs.q.shape[0], inputs.max_seqlen_q),
        (inputs.cu_seqlens_kv, inputs.k.shape[0], inputs.max_seqlen_kv),
    )
    to_q, to_kv = (
        _side(cu_seqlens, total, longest, at_end) for cu_seqlens, total, longest in sides if cu_seqlens is not None
    )
    return to_q, to_kv


def _side(cu_seqlens: Tensor, total: int, longest: int, at_end: bool) -> Tensor:
    t = torch.arange(total, device=cu_seqlens.device)
    n = torch.searchsorted(cu_seqlens[1:].contiguous(), t, right=True)
    places = n * longest + t - cu_seqlens[n]
    return places + longest - cu_seqlens.diff()[n] if at_end else places


def _pad(x: Tensor, places: Tensor, n: int, longest: int, fill: float = 0) -> Tensor:
    """``(T, ...)`` -> ``(N, max_seqlen, ...)``."""
    return x.new_full((n * longest, *x.shape[1:]), fill).index_copy(0, places, x).unflatten(0, (n, longest))


def _pad_inputs(inputs: Inputs, to_q: Tensor, to_kv: Tensor) -> Inputs:
    """The dense batch in place of the packed one."""
    n = inputs.batch
    sides = ((to_q, inputs.max_seqlen_q, _NO_QUERY), (to_kv, inputs.max_seqlen_kv, _NO_KEY))
    of_q, of_kv = (
        _pad(torch.full_like(places, _REAL), places, n, longest, fill=padding) for places, longest, padding in sides
    )
    return inputs.replace(
        q=_pad(inputs.q, to_q, n, inputs.max_seqlen_q),
        k=_pad(inputs.k, to_kv, n, inputs.max_seqlen_kv),
        v=_pad(inputs.v, to_kv, n, inputs.max_seqlen_kv),
        cu_seqlens_q=None,
        cu_seqlens_kv=None,
        segment_ids_q=of_q,
        segment_ids_kv=of_kv,
    )
