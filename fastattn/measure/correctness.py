"""The correctness gate of benchmarks: a result on the exact tensors that are timed, judged by ``tolerance.py``.

The rule needs the whole score matrix in fp64, which does not fit into memory for long sequences. Therefore sampled
query rows of sampled heads are judged against a smaller problem with the same exact result: these rows as its queries,
all keys, and the band as a mask. For the gradients ``dout`` is zero outside the sampled rows, so that dk, dv and dbias
of the whole problem equal those of the smaller one. The rows are spread over the length, so that every tile has some.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import fastattn
from fastattn import reference
from fastattn.backends.base import Backend, Capabilities, Outputs
from fastattn.measure.peers import Forward, pass_call
from fastattn.measure.workload import Operands
from fastattn.problem import Grads, Inputs
from fastattn.spec import AttentionSpec, distance, keep
from fastattn.testing import cases, tolerance
from fastattn.testing.inputs import Sample

ROWS = 128
SLICES = 2
MOST_SCORES = 1 << 24  # of the smaller problem


@dataclass(frozen=True)
class Verdict:
    """The verdict of the gate on one pass.

    Attributes:
        ok: whether the pass is correct.
        worst: the largest ratio of an error to its bound; at most 1 if ok.
        where: the name of that result.
    """

    ok: bool
    worst: float
    where: str

    def __str__(self) -> str:
        return f"{'green' if self.ok else 'red'}: {self.where} at {self.worst:.2g} of the bound"


def check(forward: Forward, operands: Operands, pass_name: str) -> Verdict:
    """Run a pass of a peer once and judge it: "forward" by out, the others by out and the gradients.

    Args:
        forward: its forward pass, from ``Peer.prepare``.
        operands: the tensors it works on.
        pass_name: of ``workload.PASSES``.
    """
    part = Part.of(operands)
    operands = dataclasses.replace(operands, dout=part.only(operands.dout))
    # backward alone returns no out, and both runs the same kernels
    out, grads = pass_call(forward, operands, "forward" if pass_name == "forward" else "both")()
    assert out is not None
    return judge(part, operands, out, grads)


@dataclass(frozen=True)
class Part:
    """The sampled part of a problem, and how to cut it out of a tensor.

    Attributes:
        pairs: (batch entry, key/value head); no two share a head, so that gradients shared by the batch do not mix.
        rows: query rows.
        group: query heads per key/value head.
        packed: the tensors have no batch; they are viewed as one batch entry.
    """

    pairs: tuple[tuple[int, int], ...]
    rows: Tensor
    group: int
    packed: bool

    @classmethod
    def of(cls, operands: Operands) -> Part:
        w, generator = operands.workload, torch.Generator().manual_seed(0)
        batch, length = w.batch, w.s_q
        slices = 1 if w.dropout_p else min(SLICES, w.heads_kv)
        group = w.heads_q // w.heads_kv
        count = min(length, ROWS, max(16, MOST_SCORES // (slices * group * w.s_kv)))
        starts = torch.arange(count + 1) * length // count
        rows = starts[:-1] + (torch.rand(count, generator=generator) * starts.diff()).long()
        heads = torch.randperm(w.heads_kv, generator=generator)[:slices].tolist()
        entries = torch.randint(batch, (slices,), generator=generator).tolist()
        if w.dropout_p:  # which elements are dropped depends on their place, so the part must lie at the origin
            heads, entries, rows = [0], [0], torch.arange(count)
        pairs = tuple(zip(entries, heads, strict=True))
        return cls(pairs, rows.to(operands.q.device), group, w.packed)

    def queries(self, x: Tensor) -> Tensor:
        """``[pairs, rows, G, D]`` of q, dq, out or dout."""
        x = self._dense(x)
        return torch.stack([x[b, self.rows, self._heads(h)] for b, h in self.pairs])

    def keys(self, x: Tensor) -> Tensor:
        """``[pairs, S_kv, 1, D]`` of k, v, dk or dv."""
        x = self._dense(x)
        return torch.stack([x[b, :, h : h + 1] for b, h in self.pairs])

    def scores(self, x: Tensor) -> Tensor:
        """``[pairs, G, rows, S_kv]`` of a bias or its gradient, ``(1, H_q, S_q, S_kv)``."""
        return torch.stack([x[0, self._heads(h)][:, self.rows] for _, h in self.pairs])

    def per_head(self, x: Tensor) -> Tensor:
        """``[pairs, G]`` of slopes, sinks or their gradient, ``(H_q,)``."""
        return torch.stack([x[self._heads(h)] for _, h in self.pairs])

    def only(self, x: Tensor) -> Tensor:
        """``x``, which is shaped like out, with zeros outside the part."""
        kept = torch.zeros_like(x)
        source, target = self._dense(x), self._dense(kept)
        for b, h in self.pairs:
            target[b, self.rows, self._heads(h)] = source[b, self.rows, self._heads(h)]
        return kept

    def cut(self, name: str, x: Tensor) -> Tensor:
        """The part of a result or gradient, by the name in the tolerance rule."""
        by_name = {"out": self.queries, "dq": self.queries, "dk": self.keys, "dv": self.keys}
        return by_name.get(name, self.scores if name == "dbias" else self.per_head)(x)

    def _heads(self, h_kv: int) -> slice:
        return slice(h_kv * self.group, (h_kv + 1) * self.group)

    def _dense(self, x: Tensor) -> Tensor:
        return x[None] if self.packed else x


def smaller(operands: Operands, part: Part, needs: Sequence[str]) -> Sample:
    """The part as a problem of its own, whose band, documents and ALiBi are written out as mask and bias."""
    w, spec = operands.workload, operands.workload.spec
    q, k, v = (cut(x.detach()) for cut, x in zip((part.queries, part.keys, part.keys), _qkv(operands), strict=True))
    s_q, s_kv = w.s_q, w.s_kv
    i, j = part.rows[:, None], torch.arange(s_kv, device=q.device)[None, :]
    kept = keep(spec, i, j, s_q, s_kv).expand(len(part.pairs), 1, -1, -1)
    if part.packed:  # documents are as long in queries as in keys: the band is the same inside each
        kept = kept & (w.document(i) == w.document(j))
    if operands.segment_ids is not None:
        ids = torch.stack([operands.segment_ids[b] for b, _ in part.pairs])
        kept = kept & (ids[:, None, part.rows, None] == ids[:, None, None, :])
    if operands.intervals is not None:
        kept = kept & fastattn.intervals.to_mask(operands.intervals[part.rows], s_kv)
    if operands.mask is not None:
        kept = kept & operands.mask[:, :, part.rows]
    bias = None if operands.bias is None else part.scores(operands.bias.detach())
    if operands.alibi_slopes is not None:
        assert bias is None, "ALiBi is written out as the bias here, so there can be no other"
        bias = -part.per_head(operands.alibi_slopes)[:, :, None, None] * distance(spec, i, j, s_q, s_kv)
    inputs = Inputs(
        q=q,
        k=k,
        v=v,
        bias=bias,
        mask=kept,
        sinks=None if operands.sinks is None else part.per_head(operands.sinks.detach()),
        rng_state=operands.rng_state,
        max_seqlen_q=len(part.rows),
        max_seqlen_kv=s_kv,
    )
    # testing.cases.Case drops the gradients of tensors it was not told of
    case = cases.Case(
        w.id, dtype=q.dtype, bias=(1, 1, 1, 1) if "bias" in needs else None, sinks=w.sinks, needs=tuple(needs)
    )
    without_band = dataclasses.replace(spec, left=None, right=None)
    return Sample(case, inputs, without_band, part.queries(operands.dout), None)


def _qkv(operands: Operands) -> tuple[Tensor, Tensor, Tensor]:
    return operands.q, operands.k, operands.v


def judge(part: Part, operands: Operands, out: Tensor, gradients: Sequence[Tensor]) -> Verdict:
    """The verdict on a whole result.

    Args:
        part: the sampled rows and heads.
        operands: the tensors that the result was computed from, with ``dout`` zero outside the part.
        out: the output.
        gradients: those of ``operands.leaves``; none judges out alone.
    """
    out, grads = out.detach(), dict(zip(operands.leaves, gradients, strict=True)) if gradients else {}
    for name, x in {"out": out, **{f"d{name}": grad for name, grad in grads.items()}}.items():
        if not x.isfinite().all():
            return Verdict(False, math.inf, f"{name} is not finite")
    sample = smaller(operands, part, tuple(grads))
    found = {"out": part.cut("out", out)} | {f"d{name}": part.cut(f"d{name}", grad) for name, grad in grads.items()}
    for name, grad in grads.items():
        total, inside = grad.double().abs().sum(), found[f"d{name}"].double().abs().sum()
        if not torch.isclose(total, inside, rtol=1e-9):
            return Verdict(False, math.inf, f"d{name} where dout is zero")
    _, *lse = reference.forward(sample.inputs, sample.spec)  # peers return none, and it is not judged
    rows = tolerance.measure(_Found(found, lse), sample)
    judged = [row for row in rows if not row.name.startswith("lse")]
    worst = max(judged, key=_share)
    return Verdict(all(row.ok for row in judged), _share(worst), worst.name)


def _share(row: tolerance.Row) -> float:
    """The ratio of the error to its bound."""
    if math.isnan(row.error):
        return math.inf
    return row.error / row.bound if row.bound else (math.inf if row.error else 0.0)


class _Found(Backend):
    """A finished result in the form of a backend, for ``tolerance.measure``."""

    name = "found"
    capabilities = Capabilities()

    def __init__(self, found: dict[str, Tensor], lse: Sequence[Tensor]) -> None:
        self._found = found
        self._lse = lse

    def forward(self, inputs: Inputs, spec: AttentionSpec) -> Outputs:
        lse, lse_low = self._lse
        return self._found["out"], lse, lse_low

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
        return Grads(**{f"d{name}": self._found[f"d{name}"] for name in needs})
