"""``Workload``: a problem to measure, as plain data that can be stored as JSON; ``Operands``: its tensors.

A workload is a realistic problem, while a case of ``testing/cases.py`` tests one corner of the definition on small
irregular shapes.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastattn
from fastattn.flops import backward_flops, forward_flops
from fastattn.problem import Inputs
from fastattn.spec import AttentionSpec, distance, keep

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
PASSES = ("forward", "backward", "both")


@dataclass(frozen=True)
class Workload:
    """A problem: shapes, dtype, the features used, and which passes to measure. Causal is lower right.

    Attributes:
        bias_grad: the bias has a gradient.
        mask: a boolean mask as a tensor: every row keeps the first quarter of the keys, and those up to its own.
        scattered: the mask hides every tenth pair instead, as if drawn at random: no block of it is of one kind.
        documents: number of documents in each sequence; 1 is an ordinary batch.
        packed: the documents come as ``cu_seqlens`` (batch must be 1) instead of segment ids.
        spread: the least and the greatest length of packed documents, which take all lengths between in turn; None is
            one length for all. ``s_q`` is their sum.
        intervals: the documents come as intervals instead of segment ids.
        grid: height, width and window of an image: each token keeps its neighbourhood, given as intervals.
        passes: of PASSES, to be timed.
        memory: measure peak memory too (on a GPU it always is; on a CPU it costs a process for each workload).
        label: a model's name or the like, shown in tables.
    """

    s_q: int
    s_kv: int
    heads_q: int
    heads_kv: int
    d_qk: int
    d_v: int
    batch: int = 1
    dtype: str = "bf16"
    causal: bool = False
    window: tuple[int, int] | None = None
    softcap: float | None = None
    alibi: bool = False
    sinks: bool = False
    bias: bool = False
    bias_grad: bool = True
    mask: bool = False
    scattered: bool = False
    documents: int = 1
    packed: bool = False
    spread: tuple[int, int] | None = None
    intervals: bool = False
    grid: tuple[int, int, int] | None = None
    dropout_p: float = 0.0
    passes: tuple[str, ...] = PASSES
    memory: bool = False
    label: str = ""

    @property
    def features(self) -> list[str]:
        """The features beyond dense attention, in words."""
        window = self.window and f"window {self.window[0]}"
        softcap = self.softcap and f"softcap {self.softcap:g}"
        of_length = self.spread and f" of {self.spread[0]} to {self.spread[1]}"
        documents = self.documents > 1 and f"{self.documents} documents{of_length or ''}{' packed' * self.packed}"
        neighbours = self.grid and "neighbourhood of {2} in {0} x {1}".format(*self.grid)
        words = ("causal" if self.causal else "", window, softcap, documents, neighbours)
        flags = [name for name in ("alibi", "sinks", "bias", "scattered", "mask", "intervals") if getattr(self, name)]
        flags += ["without gradient"] if self.bias and not self.bias_grad else []
        return [word for word in words if word] + flags + (["dropout"] if self.dropout_p else [])

    @property
    def id(self) -> str:
        """Unique within a suite and readable: ``bf16 b4 s4096 h16/4 d128 causal``."""
        s = f"s{self.s_q}" if self.s_q == self.s_kv else f"s{self.s_q}/{self.s_kv}"
        h = f"h{self.heads_q}" if self.heads_q == self.heads_kv else f"h{self.heads_q}/{self.heads_kv}"
        d = f"d{self.d_qk}" if self.d_qk == self.d_v else f"d{self.d_qk}/{self.d_v}"
        words = [self.label, self.dtype, f"b{self.batch}", s, h, d, *(self.features or ["full"])]
        return " ".join(word for word in words if word)

    @property
    def spec(self) -> AttentionSpec:
        left, right = self.window or (None, None)
        return AttentionSpec(self.d_qk**-0.5, self.softcap, left, 0 if self.causal else right, dropout_p=self.dropout_p)

    @property
    def lengths(self) -> tuple[int, ...]:
        """The tokens of each document."""
        if self.spread is None:
            return (self.s_q // self.documents,) * self.documents
        least, most = self.spread
        return tuple(least + n % (most + 1 - least) for n in range(self.documents))

    @property
    def longest(self) -> int:
        """The most tokens of a document."""
        return max(self.lengths)

    @property
    def has_mask(self) -> bool:
        """Whether torch's own attention needs a mask tensor for this."""
        square = self.s_q == self.s_kv
        hides = self.mask or self.window is not None or self.documents > 1 or self.grid is not None
        return hides or (self.causal and not square)

    def keeps(self, i: Any, j: Any) -> Any:
        """Whether query row ``i`` attends to key ``j``: the band, inside its own document, where the mask is True."""
        kept = keep(self.spec, i, j, self.s_q, self.s_kv)
        if self.mask:
            return kept & (_is_drawn(i, j) if self.scattered else (j < self.s_kv // 4) | (j <= i))
        if self.grid is not None:
            height, width, window = self.grid
            axes = ((i // width, j // width, height), (i % width, j % width, width))
            for place, other, length in axes:
                first = (place - window // 2).clamp(0, length - window)
                kept = kept & (other >= first) & (other < first + window)
        return kept if self.documents == 1 else kept & (self.document(i) == self.document(j))

    def document(self, i: Any) -> Any:
        """The number of the document that holds token ``i``."""
        if self.spread is None:
            return i // (self.s_q // self.documents)
        return sum((i >= start) * 1 for start in itertools.accumulate(self.lengths[:-1]))

    def distance(self, i: Any, j: Any) -> Any:
        """The distances that ALiBi's slopes are multiplied with."""
        return distance(self.spec, i, j, self.s_q, self.s_kv)

    def score_bytes(self) -> int:
        """Bytes of one ``S_q x S_kv`` score matrix in the dtype of the workload."""
        return self.batch * self.heads_q * self.s_q * self.s_kv * DTYPES[self.dtype].itemsize

    def flops(self) -> dict[str, int]:
        """FLOPs of each pass, of kept pairs only: masked pairs do not count."""
        forward = backward = 0
        for length, count in collections.Counter(self.lengths).items():
            batch, s_kv = self.batch * count, self.s_kv // self.documents if self.spread is None else length
            q = torch.empty(batch, length, self.heads_q, self.d_qk, device="meta")
            k, v = (torch.empty(batch, s_kv, self.heads_kv, d, device="meta") for d in (self.d_qk, self.d_v))
            forward += forward_flops(Inputs(q, k, v), self.spec)
            backward += backward_flops(Inputs(q, k, v), self.spec)
        if self.mask or self.grid is not None:
            kept = self.keeps(torch.arange(self.s_q)[:, None], torch.arange(self.s_kv)[None]).sum().item()
            forward, backward = (flops * kept // (self.s_q * self.s_kv) for flops in (forward, backward))
        return {"forward": forward, "backward": backward, "both": forward + backward}

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Workload:
        tuples = {
            name: tuple(data[name]) for name in ("window", "spread", "grid", "passes") if data.get(name) is not None
        }
        return cls(**{**data, **tuples})


@dataclass(frozen=True)
class Operands:
    """The tensors of a workload. q, k, v and dout are stored as ``(B, S, H, D)``, the order that projections give.

    Attributes:
        bias: ``(1, H_q, S_q, S_kv)``.
        mask: ``(1, 1, S_q, S_kv)``, boolean.
        segment_ids: ``(B, S)`` int32, the same for q and kv.
        intervals: ``(S_q, n, 2)`` int32.
        cu_seqlens: ``(N + 1,)`` int32 if packed; then q, k, v and dout have no batch dimension.
    """

    workload: Workload
    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    bias: Tensor | None = None
    mask: Tensor | None = None
    sinks: Tensor | None = None
    alibi_slopes: Tensor | None = None
    segment_ids: Tensor | None = None
    intervals: Tensor | None = None
    cu_seqlens: Tensor | None = None
    rng_state: Tensor | None = None

    @classmethod
    def of(cls, workload: Workload, device: torch.device, seed: int = 0) -> Operands:
        """Random normal tensors; the leaves require gradients."""
        generator = torch.Generator(device).manual_seed(seed)
        dtype = DTYPES[workload.dtype]

        def normal(*shape: int, leaf: bool = True) -> Tensor:
            x = torch.empty(shape, dtype=dtype, device=device).normal_(generator=generator)
            return x.requires_grad_(leaf)

        batch = () if workload.packed else (workload.batch,)
        rows_q, rows_kv = (*batch, workload.s_q), (*batch, workload.s_kv)
        if sum(workload.lengths) != workload.s_q:
            raise ValueError(f"{workload.id}: {workload.s_q} tokens do not split into {workload.documents} documents")
        lengths = torch.tensor(workload.lengths, device=device)
        has_segments = workload.documents > 1 and not workload.packed and not workload.intervals
        ids = torch.arange(workload.documents, dtype=torch.int32, device=device).repeat_interleave(lengths)
        heads = torch.arange(1, workload.heads_q + 1, device=device)
        return cls(
            workload=workload,
            q=normal(*rows_q, workload.heads_q, workload.d_qk),
            k=normal(*rows_kv, workload.heads_kv, workload.d_qk),
            v=normal(*rows_kv, workload.heads_kv, workload.d_v),
            dout=normal(*rows_q, workload.heads_q, workload.d_v, leaf=False),
            bias=normal(1, workload.heads_q, workload.s_q, workload.s_kv, leaf=workload.bias_grad)
            if workload.bias
            else None,
            mask=_of_positions(workload, workload.keeps, device)[None, None] if workload.mask else None,
            sinks=normal(workload.heads_q) if workload.sinks else None,
            alibi_slopes=torch.exp2(-8.0 * heads / workload.heads_q) if workload.alibi else None,
            segment_ids=ids.expand(workload.batch, -1) if has_segments else None,
            intervals=_ranges(workload, device),
            cu_seqlens=F.pad(lengths.cumsum(0), (1, 0)).int() if workload.packed else None,
            rng_state=torch.tensor([seed, 0], device=device) if workload.dropout_p else None,
        )

    @property
    def leaves(self) -> dict[str, Tensor]:
        """The operands with a gradient, by the name in the spec."""
        named = {"q": self.q, "k": self.k, "v": self.v, "bias": self.bias, "sinks": self.sinks}
        return {name: x for name, x in named.items() if x is not None and x.requires_grad}

    @property
    def inputs(self) -> Inputs:
        """The same tensors as the package's internal form: for FLOP counts and for the correctness gate."""
        workload = self.workload
        return Inputs(
            q=self.q,
            k=self.k,
            v=self.v,
            bias=self.bias,
            mask=self.mask,
            alibi_slopes=None if self.alibi_slopes is None else self.alibi_slopes[None],
            sinks=None if self.sinks is None else self.sinks[None],
            segment_ids_q=self.segment_ids,
            segment_ids_kv=self.segment_ids,
            intervals=None if self.intervals is None else self.intervals[None, None],
            cu_seqlens_q=self.cu_seqlens,
            cu_seqlens_kv=self.cu_seqlens,
            rng_state=self.rng_state,
            max_seqlen_q=workload.longest if workload.packed else workload.s_q,
            max_seqlen_kv=workload.longest if workload.packed else workload.s_kv,
        )

    def keep_matrix(self) -> Tensor:
        """``(S_q, S_kv)`` boolean, True = attend: the mask for libraries without this feature."""
        return _of_positions(self.workload, self.workload.keeps, self.q.device)

    def alibi_bias(self) -> Tensor:
        """``(1, H_q, S_q, S_kv)`` fp32: ALiBi as a bias for libraries without it."""
        assert self.alibi_slopes is not None
        distances = _of_positions(self.workload, self.workload.distance, self.q.device)
        return (-self.alibi_slopes[:, None, None] * distances)[None]


def _ranges(workload: Workload, device: torch.device) -> Tensor | None:
    if workload.grid is not None:
        height, width, window = workload.grid
        return fastattn.intervals.neighbourhood((height, width), window, device=device)
    return fastattn.intervals.documents(workload.lengths, device=device) if workload.intervals else None


def _of_positions(w: Workload, function: Callable[[Tensor, Tensor], Tensor], device: torch.device) -> Tensor:
    """``(S_q, S_kv)``: a function of query row and key."""
    return function(torch.arange(w.s_q, device=device)[:, None], torch.arange(w.s_kv, device=device)[None, :])


def _is_drawn(i: Any, j: Any) -> Any:
    """Nine pairs of ten, by a hash of their positions."""
    mixed = (i * 73856093) ^ (j * 19349663)
    return ((mixed >> 7) ^ mixed) % 10 > 0
