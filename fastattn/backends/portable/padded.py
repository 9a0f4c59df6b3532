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
from fastattn.problem import Grads, Inputs, Rows, Tangents
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
    out, *lses = dense_forward(_pad_inputs(inputs, spec, to_q, to_kv), spec)
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
    rows = _pad_rows(Rows(dout, dlse, out, lse, lse_low), to_q, inputs, of_lse=NEVER)
    given = (rows.dout, rows.dlse, rows.out, rows.lse, rows.lse_low)
    grads = dense_backward(*given, _pad_inputs(inputs, spec, to_q, to_kv), spec, needs)
    places = (to_q, to_kv, to_kv)
    return *(x if x is None else x.flatten(0, 1)[to] for x, to in zip(grads, places, strict=False)), None


def jvp(
    dense_jvp: Callable[..., Any], tangents: Tangents, results: Rows, inputs: Inputs, spec: AttentionSpec
) -> tuple[Tensor, Tensor]:
    """The results of ``dense_jvp`` for packed inputs."""
    to_q, to_kv = _places(inputs, spec)
    rows = _pad_rows(results, to_q, inputs, of_lse=NEVER)
    moving = _pad_tangents(tangents, to_q, to_kv, inputs)
    out, lse = dense_jvp(moving, rows, _pad_inputs(inputs, spec, to_q, to_kv), spec)
    return out.flatten(0, 1)[to_q], lse.transpose(1, 2).flatten(0, 1)[to_q].transpose(0, 1).contiguous()


def backward_jvp(
    dense_jvp: Callable[..., Any],
    rows: Rows,
    moved: Rows,
    tangents: Tangents,
    inputs: Inputs,
    spec: AttentionSpec,
    *,
    needs: Sequence[str],
) -> Grads:
    """The results of ``dense_jvp`` for packed inputs."""
    to_q, to_kv = _places(inputs, spec)
    rows, moved = _pad_rows(rows, to_q, inputs, of_lse=NEVER), _pad_rows(moved, to_q, inputs)
    moving = _pad_tangents(tangents, to_q, to_kv, inputs)
    grads = dense_jvp(rows, moved, moving, _pad_inputs(inputs, spec, to_q, to_kv), spec, needs)
    by_row = {"dq": to_q, "dk": to_kv, "dv": to_kv}
    found = {name: getattr(grads, name) for name in by_row}
    found = {name: x if x is None else x.flatten(0, 1)[by_row[name]] for name, x in found.items()}
    return Grads(**found, dsinks=grads.dsinks)


def _pad_rows(rows: Rows, to_q: Tensor, inputs: Inputs, of_lse: float = 0) -> Rows:
    """Numbers of packed query rows as those of the dense batch; lse is ``of_lse`` where there is no row."""

    def pad(x: Tensor | None, fill: float = 0) -> Tensor | None:
        return x if x is None else _pad(x, to_q, inputs.batch, inputs.max_seqlen_q, fill)

    def pad_lse(x: Tensor | None, fill: float = 0) -> Tensor | None:
        padded = pad(x if x is None else x.transpose(0, 1), fill)
        return padded if padded is None else padded.transpose(1, 2)

    return Rows(pad(rows.dout), pad_lse(rows.dlse), pad(rows.out), pad_lse(rows.lse, of_lse), pad_lse(rows.lse_low))


def _pad_tangents(tangents: Tangents, to_q: Tensor, to_kv: Tensor, inputs: Inputs) -> Tangents:
    sides = (
        (tangents.q, to_q, inputs.max_seqlen_q),
        *((x, to_kv, inputs.max_seqlen_kv) for x in (tangents.k, tangents.v)),
    )
    q, k, v = (x if x is None else _pad(x, to, inputs.batch, longest) for x, to, longest in sides)
    return Tangents(q, k, v, sinks=tangents.sinks)


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


def _pad_intervals(inputs: Inputs, spec: AttentionSpec, to_q: Tensor) -> Tensor | None:
    """``(1, 1|H_q, T_q, n, 2)`` -> ``(N, 1|H_q, max_seqlen, n, 2)``, counted from where the keys of an entry begin."""
    if inputs.intervals is None:
        return None
    assert inputs.cu_seqlens_kv is not None
    by_row = inputs.intervals[0].transpose(0, 1)
    ranges = _pad(by_row, to_q, inputs.batch, inputs.max_seqlen_q).transpose(1, 2)
    if not _stands_at_end(inputs, spec):
        return ranges
    skipped = (inputs.max_seqlen_kv - inputs.cu_seqlens_kv.diff())[:, None, None, None, None]
    return ranges.clamp(0, inputs.max_seqlen_kv) + skipped


def _pad_inputs(inputs: Inputs, spec: AttentionSpec, to_q: Tensor, to_kv: Tensor) -> Inputs:
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
        intervals=_pad_intervals(inputs, spec, to_q),
    )
