"""The values of a case: seeded tensors in the memory layout that the case asks for."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastattn import reference
from fastattn.problem import Inputs, check_inputs
from fastattn.spec import AttentionSpec
from fastattn.testing.cases import Case, Memory


@dataclass(frozen=True)
class Sample:
    """A problem with its values, and the gradients of its results.

    Attributes:
        case: the problem.
        inputs: the tensors.
        spec: the scalars.
        dout: gradient of out.
        dlse: gradient of lse, or None.
    """

    case: Case
    inputs: Inputs
    spec: AttentionSpec
    dout: Tensor
    dlse: Tensor | None

    @property
    def needs(self) -> tuple[str, ...]:
        """The gradients asked for, of the tensors that exist."""
        return tuple(name for name in self.case.needs if getattr(self.inputs, name) is not None)


def make(case: Case, device: torch.device | str = "cpu", seed: int = 0) -> Sample:
    """The sample of a case. The values depend on ``case`` and ``seed`` alone; they are drawn on the CPU."""
    draw = _Draw(torch.Generator().manual_seed(seed), torch.device(device))
    spec = AttentionSpec(
        scale=case.D_qk**-0.5 if case.scale is None else case.scale,
        softcap=case.softcap,
        left=case.left,
        right=case.right,
        anchor=case.anchor,
        dropout_p=case.dropout_p,
    )
    q, k, v = _qkv(case, draw)
    rows = len(case.lengths) if case.lengths is not None else case.B
    per_head = (rows if case.per_sequence else 1, case.H_q)
    extras = case.extras_dtype or case.dtype
    inputs = Inputs(
        q=q,
        k=k,
        v=v,
        bias=_bias(case, extras, draw) if case.bias is not None else None,
        mask=_mask(case, draw) if case.mask is not None else None,
        alibi_slopes=draw.normal(per_head, torch.float32).abs() / 4 if case.alibi else None,
        sinks=draw.normal(per_head, extras) if case.sinks else None,
        rng_state=torch.tensor([0x1234_5678_9ABC + seed, 7], device=device) if case.dropout_p > 0 else None,
    )
    inputs = inputs.replace(**_segments(case, draw), intervals=_intervals(case, draw), **_lengths(case, device))
    check_inputs(inputs, spec)
    if case.nan_rows:
        inputs = _with_nan_rows(inputs, spec)
    dout = _in_memory(draw.normal(inputs.out_shape(), case.dtype), case.memory)
    dlse = draw.normal(inputs.lse_shape(), reference.lse_dtype(case.dtype)) if case.dlse else None
    return Sample(case, inputs, spec, dout, dlse)


@dataclass(frozen=True)
class _Draw:
    generator: torch.Generator
    device: torch.device

    def normal(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64).to(self.device, dtype)

    def integers(self, high: int, shape: tuple[int, ...]) -> Tensor:
        return torch.randint(high, shape, generator=self.generator).to(self.device)


def _qkv(case: Case, draw: _Draw) -> tuple[Tensor, Tensor, Tensor]:
    if case.lengths is not None:
        before_q, before_kv = (sum(lengths) for lengths in zip(*case.lengths, strict=True))
        q_rows, kv_rows = (before_q,), (before_kv,)
    else:
        q_rows, kv_rows = (case.B, case.S_q), (case.B, case.S_kv)  # type: ignore[assignment]
    shapes = (
        (*q_rows, case.H_q, case.D_qk),
        (*kv_rows, case.H_kv, case.D_qk),
        (*kv_rows, case.H_kv, case.D_v),
    )
    factors = (case.magnitude, case.magnitude, 1.0)
    tensors = [draw.normal(shape, case.dtype) * factor for shape, factor in zip(shapes, factors, strict=True)]
    if case.memory == "sliced":
        fused = torch.cat(tensors, dim=-2)  # heads of q, k and v side by side, as a fused projection leaves them
        q, k, v = fused.split([case.H_q, case.H_kv, case.H_kv], dim=-2)
        return q, k, v
    q, k, v = (_in_memory(x, case.memory) for x in tensors)
    return q, k, (k if case.memory == "shared" else v)


def _in_memory(x: Tensor, memory: Memory) -> Tensor:
    """A tensor equal to ``x`` with the strides that ``memory`` names."""
    if memory == "BHSD":
        return x.transpose(-3, -2).contiguous().transpose(-3, -2)
    if memory == "strided":
        *batch, rows, heads, dim = x.shape
        buffer = x.new_full((*batch, 2 * rows + 1, heads, dim + 3), float("nan"))
        view = buffer[..., 1::2, :, 1 : dim + 1]
        return view.copy_(x)
    if memory == "strided head dim":
        return torch.stack([x, torch.full_like(x, float("nan"))], dim=-1)[..., 0]
    if memory == "expanded":
        return x[..., :1, :].expand(x.shape)
    return x


def _bias(case: Case, dtype: torch.dtype, draw: _Draw) -> Tensor:
    assert case.bias is not None
    bias = draw.normal(case.bias, dtype)
    if case.bias_values == "offset":
        return bias + draw.normal((*case.bias[:3], 1), dtype) * 2.0 ** (8 if dtype == torch.float16 else 24)
    if case.bias_values != "normal":
        lowest = torch.finfo(dtype).min if case.bias_values == "padding" else float("-inf")
        return bias.where(draw.integers(3, case.bias) > 0, lowest)
    return bias


def _mask(case: Case, draw: _Draw) -> Tensor:
    full = (case.B, case.H_q, case.S_q, case.S_kv)
    if case.mask == "random":
        return draw.integers(4, full) > 0
    if case.mask == "empty rows":
        rows = torch.arange(case.S_q, device=draw.device)[None, None, :, None]
        return (draw.integers(4, (1, 1, *full[2:])) > 0) & (rows % 3 > 0)
    if case.mask == "padding":
        lengths = 1 + draw.integers(max(1, case.S_kv - 1), (case.B, 1, 1, 1))
        return torch.arange(case.S_kv, device=draw.device) < lengths
    return torch.zeros((1, 1, 1, case.S_kv), dtype=torch.bool, device=draw.device)


def _segments(case: Case, draw: _Draw) -> dict[str, Tensor]:
    """Documents of random lengths; where the lengths of q and kv are equal, the documents are too."""
    if not case.segments:
        return {}
    ids = [draw.integers(case.segments, (case.B, s)).sort(dim=-1).values for s in (case.S_q, case.S_kv)]
    return {"segment_ids_q": ids[0], "segment_ids_kv": ids[0] if case.S_q == case.S_kv else ids[1]}


def _intervals(case: Case, draw: _Draw) -> Tensor | None:
    if case.intervals is None:
        return None
    pairs = case.lengths or ((case.S_q, case.S_kv),)
    rows, keys = sum(s_q for s_q, _ in pairs), max(1, *(s_kv for _, s_kv in pairs))
    batch = 1 if case.lengths is not None else case.B
    if case.intervals == "blocks":
        starts = draw.integers(-(-keys // 16), (batch, 1, -(-rows // 16), 4)).repeat_interleave(16, 2)[:, :, :rows] * 16
        return torch.stack([starts, starts + 16], dim=-1).int()
    shape = (1, 1, rows, 1) if case.intervals == "one" else (batch, case.H_q, rows, 3)
    starts = draw.integers(keys + 8, shape) - 4
    return torch.stack([starts, starts + draw.integers(keys, shape) - 2], dim=-1).int()


def _lengths(case: Case, device: torch.device | str) -> dict[str, Any]:
    if case.lengths is None:
        return {"max_seqlen_q": case.S_q, "max_seqlen_kv": case.S_kv}
    of_q, of_kv = zip(*case.lengths, strict=True)
    cu_q, cu_kv = ([0, *itertools.accumulate(lengths)] for lengths in (of_q, of_kv))
    return {
        "cu_seqlens_q": torch.tensor(cu_q, dtype=torch.int32, device=device),
        "cu_seqlens_kv": torch.tensor(cu_kv, dtype=torch.int32, device=device),
        "max_seqlen_q": max(of_q),
        "max_seqlen_kv": max(of_kv),
    }


def _with_nan_rows(inputs: Inputs, spec: AttentionSpec) -> Inputs:
    """NaN in every key and value row that no query keeps."""
    kept = reference.keep_matrix(inputs, spec, reference.Positions.of(inputs))
    used = kept.any(dim=-2).any(dim=1)[..., None, None]  # [B, S_kv, 1, 1], by some head
    used = used[0] if inputs.is_packed else used
    return inputs.replace(k=inputs.k.where(used, float("nan")), v=inputs.v.where(used, float("nan")))
