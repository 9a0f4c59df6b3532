"""The problem of a call: its tensors (``Inputs``), their checks, and the facts that dispatch reads (``Problem``)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fastattn import layout
from fastattn.errors import input_error
from fastattn.spec import AttentionSpec

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTS = (torch.int32, torch.int64)


@dataclass(frozen=True)
class Inputs:
    """The tensors of one attention call, in the internal layout. ``1|X`` is a size of X, or 1 that broadcasts.

    Attributes:
        q: ``(B, S_q, H_q, D_qk)``, or ``(T_q, H_q, D_qk)`` if packed.
        k: ``(B, S_kv, H_kv, D_qk)``, or ``(T_kv, H_kv, D_qk)``.
        v: ``(B, S_kv, H_kv, D_v)``, or ``(T_kv, H_kv, D_v)``.
        bias: ``(1|B, 1|H_q, 1|S_q, 1|S_kv)``, floating; dense only.
        mask: the same shape, boolean, True = attend; dense only.
        alibi_slopes: ``(1|B, H_q)`` fp32; packed: ``(1|N, H_q)``.
        sinks: ``(1|B, H_q)`` floating, a logit per head; packed: ``(1|N, H_q)``.
        segment_ids_q: ``(1|B, S_q)`` integers; dense only, with ``segment_ids_kv`` ``(1|B, S_kv)``.
        intervals: ``(1|B, 1|H_q, S_q, n, 2)`` int32, ranges ``[start, stop)`` of keys for each query row; packed
            ``(1, 1|H_q, T_q, n, 2)``, counted from the beginning of the sequence.
        cu_seqlens_q: ``(N + 1,)`` int32 boundaries of N packed sequences, with ``cu_seqlens_kv``.
        rng_state: ``(2,)`` int64, the seed and the offset of dropout.
        max_seqlen_q: longest query sequence (``S_q`` if dense), with ``max_seqlen_kv``.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor | None = None
    mask: Tensor | None = None
    alibi_slopes: Tensor | None = None
    sinks: Tensor | None = None
    segment_ids_q: Tensor | None = None
    segment_ids_kv: Tensor | None = None
    intervals: Tensor | None = None
    cu_seqlens_q: Tensor | None = None
    cu_seqlens_kv: Tensor | None = None
    rng_state: Tensor | None = None
    max_seqlen_q: int = 0
    max_seqlen_kv: int = 0

    @property
    def is_packed(self) -> bool:
        return self.cu_seqlens_q is not None

    @property
    def has_more_than_qkv(self) -> bool:
        """Whether any other tensor takes part."""
        return not (
            self.bias is self.mask is self.alibi_slopes is self.sinks is None
            and self.segment_ids_q is self.segment_ids_kv is self.intervals is None
            and self.cu_seqlens_q is self.rng_state is None
        )

    @property
    def batch(self) -> int:
        """B, or N if packed."""
        return self.cu_seqlens_q.shape[0] - 1 if self.cu_seqlens_q is not None else self.q.shape[0]

    @property
    def heads_q(self) -> int:
        return self.q.shape[-2]

    @property
    def heads_kv(self) -> int:
        return self.k.shape[-2]

    def tensors(self) -> dict[str, Tensor | None]:
        """The tensors by name, in the order of ``TENSORS``; written out, since Dynamo guards what is looked up."""
        return {
            "q": self.q, "k": self.k, "v": self.v, "bias": self.bias, "mask": self.mask,
            "alibi_slopes": self.alibi_slopes, "sinks": self.sinks, "segment_ids_q": self.segment_ids_q,
            "segment_ids_kv": self.segment_ids_kv, "intervals": self.intervals, "cu_seqlens_q": self.cu_seqlens_q,
            "cu_seqlens_kv": self.cu_seqlens_kv, "rng_state": self.rng_state,
        }  # fmt: skip

    def out_shape(self) -> tuple[int, ...]:
        return (*self.q.shape[:-1], self.v.shape[-1])

    def lse_shape(self) -> tuple[int, ...]:
        """``(B, H_q, S_q)``, or ``(H_q, T_q)`` if packed."""
        if self.is_packed:
            return (self.q.shape[1], self.q.shape[0])
        return (self.q.shape[0], self.q.shape[2], self.q.shape[1])

    def key_shape(self) -> tuple[int, ...]:
        """Of a number for each key and query head: ``(B, H_q, S_kv)``, or ``(H_q, T_kv)`` if packed."""
        if self.is_packed:
            return (self.q.shape[1], self.k.shape[0])
        return (self.q.shape[0], self.q.shape[2], self.k.shape[1])

    def weights_shape(self, averaged: bool) -> tuple[int, ...]:
        """Of dense calls: ``(B, H_q, S_q, S_kv)``, or ``(B, S_q, S_kv)`` if averaged over the heads."""
        batch, s_q, heads, _ = self.q.shape
        return (batch, *(() if averaged else (heads,)), s_q, self.k.shape[1])

    def replace(self, **changes: object) -> Inputs:
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]

    def boundaries(self) -> tuple[list[int], list[int]]:
        """``cu_seqlens_q`` and ``cu_seqlens_kv`` as checked host ints. Waits for the device if they are on one."""
        assert self.cu_seqlens_q is not None and self.cu_seqlens_kv is not None
        of_q, of_kv = self.cu_seqlens_q.tolist(), self.cu_seqlens_kv.tolist()
        layout.check_cu_seqlens_values("cu_seqlens_q", of_q, self.q.shape[0], self.max_seqlen_q)
        layout.check_cu_seqlens_values("cu_seqlens_kv", of_kv, self.k.shape[0], self.max_seqlen_kv)
        return of_q, of_kv


# The tensor fields of Inputs in order, and those among them that have a gradient.
TENSORS = tuple(f.name for f in dataclasses.fields(Inputs) if not f.name.startswith("max_"))
DIFFERENTIABLE = ("q", "k", "v", "bias", "sinks")
MORE = TENSORS[3:-1]  # what a prepared run may be given after q, k and v: all of them but the seed of dropout


@dataclass(frozen=True)
class Grads:
    """Gradients, shaped like the inputs they belong to; None where not asked for."""

    dq: Tensor | None = None
    dk: Tensor | None = None
    dv: Tensor | None = None
    dbias: Tensor | None = None
    dsinks: Tensor | None = None


class Statistics(NamedTuple):
    """Statistics of the weights before dropout, or gradients of them; ``spec.py`` defines each.

    Of rows they are ``(B, H_q, S_q)``, packed ``(H_q, T_q)``; of keys ``(B, H_q, S_kv)``, packed ``(H_q, T_kv)``. They
    are fp32, or fp64 for fp64 inputs.

    Attributes:
        entropy: of each row, in nats; differentiable.
        largest_logit: the largest score of each row; differentiable.
        largest_key: its position in the sequence, int64; -1 in an empty row.
        key_sum: the sum of each key's weights; differentiable.
        key_max: the largest of each key's weights.
    """

    entropy: Tensor
    largest_logit: Tensor
    largest_key: Tensor
    key_sum: Tensor
    key_max: Tensor


@dataclass(frozen=True)
class StatisticsGradient:
    """Gradients of the differentiable statistics; None is zero."""

    entropy: Tensor | None = None
    largest_logit: Tensor | None = None
    key_sum: Tensor | None = None


@dataclass(frozen=True)
class Tangents:
    """Directions in which the differentiable inputs move, shaped like them; None stands still."""

    q: Tensor | None = None
    k: Tensor | None = None
    v: Tensor | None = None
    bias: Tensor | None = None
    sinks: Tensor | None = None


@dataclass(frozen=True)
class Rows:
    """Numbers of each query row that the backward pass reads, or their tangents, of which None is zero.

    Attributes:
        dout: gradient of ``out``, shaped like it.
        dlse: gradient of ``lse``.
        out, lse, lse_low: results of the forward pass. ``lse_low`` has no tangent: that of ``lse`` is exact enough.
    """

    dout: Tensor | None = None
    dlse: Tensor | None = None
    out: Tensor | None = None
    lse: Tensor | None = None
    lse_low: Tensor | None = None


def check_rank(
    tensors: Mapping[str, Tensor],
    dims: range,
    order: str,
    todo: str = "Reshape it, or unsqueeze what is missing; packed sequences go to fastattn.attention_varlen.",
) -> None:
    """Raise InputError unless these are dense tensors whose number of dimensions is in ``dims``.

    ``order`` names the dimensions in the message. Call it before anything that reads a shape; ``check_inputs`` checks
    the rest.
    """
    for name, x in tensors.items():
        if not isinstance(x, Tensor):
            raise input_error(name, type(x).__name__, "a torch.Tensor", "Convert it with torch.as_tensor.")
        if x.layout != torch.strided or x.is_nested:
            given = "a nested tensor" if x.is_nested else x.layout
            raise input_error(name, given, "a dense tensor", "Convert it with .to_dense() or .to_padded_tensor(0).")
        if x.dim() not in dims:
            raise input_error(name, f"shape {tuple(x.shape)}", order, todo)
        if x.shape[-1] < 1:
            raise input_error(name, f"shape {tuple(x.shape)}", "a head dim of at least 1", "Check the view.")


def check_inputs(inputs: Inputs, spec: AttentionSpec) -> None:
    """Raise InputError unless the tensors fit together. Reads no values, so it never waits for a device."""
    _check_qkv(inputs)
    _check_scalars(spec)
    if inputs.is_packed:
        _check_packed(inputs)
    _check_scores_terms(inputs)
    check_per_head(inputs.alibi_slopes, inputs.sinks, inputs.batch, inputs.heads_q)
    _check_segments(inputs)
    _check_intervals(inputs)
    _check_rng_state(inputs.rng_state)
    check_devices(inputs.tensors(), inputs.q.device)


def broadcasts(shape: Sequence[int], full: Sequence[int]) -> bool:
    """Whether ``shape`` broadcasts to ``full``, both with as many dimensions."""
    # Not ``size in (1, whole)``: Dynamo answers that without comparing symbolic sizes.
    return all(size == 1 or size == whole for size, whole in zip(shape, full, strict=True))


def _check_qkv(inputs: Inputs) -> None:
    q, k, v = inputs.q, inputs.k, inputs.v
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dtype not in FLOATS:
            raise input_error(name, x.dtype, "float16, bfloat16, float32 or float64", "Convert it with .to(...).")
        if x.dtype != q.dtype:
            raise input_error(name, x.dtype, f"{q.dtype}, the dtype of q", "Convert all three to one dtype.")
        if x.shape[-2] < 1:
            raise input_error(name, f"shape {tuple(x.shape)}", "at least one head", "Check the view.")
    check_heads(q, k, v)
    if not inputs.is_packed and q.shape[0] != k.shape[0]:
        raise input_error("k", f"batch {k.shape[0]}", f"batch {q.shape[0]}, that of q", "Expand the smaller one.")


def check_heads(q: Tensor, k: Tensor, v: Tensor, k_name: str = "k", v_name: str = "v") -> None:
    """Raise InputError unless the heads and head dims of queries, keys and values fit together."""
    if k.shape[-1] != q.shape[-1]:
        raise input_error(k_name, f"head dim {k.shape[-1]}", f"head dim {q.shape[-1]}, that of q", "Only v may differ.")
    if k.shape[:-1] != v.shape[:-1]:
        allowed = f"the shape of {k_name}, {tuple(k.shape)}, but for D_v"
        raise input_error(v_name, f"shape {tuple(v.shape)}", allowed, "Check it.")
    if q.shape[-2] % k.shape[-2]:
        raise input_error(
            k_name,
            f"{k.shape[-2]} heads for {q.shape[-2]} query heads",
            "a number of heads that divides the query heads",
            "Each key/value head serves H_q // H_kv query heads.",
        )


def _check_scalars(spec: AttentionSpec) -> None:
    check_scale_and_softcap(spec)
    if not 0.0 <= spec.dropout_p <= 1.0:
        raise input_error("dropout_p", spec.dropout_p, "a probability in [0, 1]", "0 turns dropout off.")


def check_scale_and_softcap(spec: AttentionSpec) -> None:
    """Raise InputError unless scale is finite, and softcap positive and finite or None."""
    if not spec.scale == spec.scale or spec.scale in (float("inf"), float("-inf")):
        raise input_error("scale", spec.scale, "a finite number", "None means D_qk ** -0.5.")
    if spec.softcap is not None and not 0 < spec.softcap < float("inf"):
        raise input_error("softcap", spec.softcap, "a positive finite number, or None", "None (or 0) turns it off.")


def _check_packed(inputs: Inputs) -> None:
    q, cu_q, cu_kv = inputs.q, inputs.cu_seqlens_q, inputs.cu_seqlens_kv
    assert cu_q is not None
    layout.check_cu_seqlens("cu_seqlens_q", cu_q, q.device)
    layout.check_cu_seqlens("cu_seqlens_kv", cu_kv, q.device)  # type: ignore[arg-type]
    assert cu_kv is not None
    if cu_q.shape != cu_kv.shape:
        given = f"{cu_kv.shape[0] - 1} sequences"
        raise input_error("cu_seqlens_kv", given, f"{cu_q.shape[0] - 1}, as in cu_seqlens_q", "Every query needs one.")
    for name in ("bias", "mask", "segment_ids_q", "segment_ids_kv"):
        if getattr(inputs, name) is not None:
            todo = "cu_seqlens already separates the sequences; for more, use the dense attention()."
            raise input_error(name, "a tensor", "None with packed sequences", todo)


def check_scores_shape(name: str, x: Tensor, q: Tensor, k: Tensor) -> None:
    """Raise InputError unless ``x`` broadcasts to the scores of a dense q and k."""
    full = (q.shape[0], q.shape[2], q.shape[1], k.shape[1])
    if x.dim() > 4 or not broadcasts(x.shape, full[4 - x.dim() :]):
        allowed = f"a shape that broadcasts to (B, H_q, S_q, S_kv) = {tuple(full)}"
        todo = f"Put size 1 where it is shared; of padding, (B, S_kv), pass {name}[:, None, None]."
        raise input_error(name, f"shape {tuple(x.shape)}", allowed, todo)


def _check_scores_terms(inputs: Inputs) -> None:
    for name, x in (("bias", inputs.bias), ("mask", inputs.mask)):
        if x is None:
            continue
        check_scores_shape(name, x, inputs.q, inputs.k)
    if inputs.mask is not None and inputs.mask.dtype != torch.bool:
        todo = "Pass a float mask as bias=, or compare it: mask != 0."
        raise input_error("mask", inputs.mask.dtype, "torch.bool, True = attend", todo)
    if inputs.bias is not None and inputs.bias.dtype not in FLOATS:
        todo = "Pass a boolean mask as mask= (True = attend)."
        raise input_error("bias", inputs.bias.dtype, "float16, bfloat16, float32 or float64", todo)


def check_per_head(alibi_slopes: Tensor | None, sinks: Tensor | None, batch: int, heads: int) -> None:
    """Raise InputError unless these are ``(1, heads)`` or ``(batch, heads)``, floating, and slopes without gradient."""
    for name, x in (("alibi_slopes", alibi_slopes), ("sinks", sinks)):
        if x is None:
            continue
        if x.dim() != 2 or not broadcasts(x.shape[:1], (batch,)) or x.shape[1] != heads:
            raise input_error(
                name,
                f"shape {tuple(x.shape)}",
                f"(H_q,) = ({heads},) or (B, H_q) = ({batch}, {heads})",
                "One number for each query head.",
            )
        if x.dtype not in FLOATS:
            raise input_error(name, x.dtype, "a floating dtype", "Convert it with .float().")
    if alibi_slopes is not None and alibi_slopes.requires_grad and torch.is_grad_enabled():
        todo = "Slopes are constants; for learned ones pass bias = -slope * distance, which has a gradient."
        raise input_error("alibi_slopes", "a tensor that requires grad", "one that does not", todo)


def _check_segments(inputs: Inputs) -> None:
    if (inputs.segment_ids_q is None) != (inputs.segment_ids_kv is None):
        raise input_error("segment_ids", "one of two", "a pair (for q, for kv), or one tensor for both", "Pass both.")
    for side, x, like in (("q", inputs.segment_ids_q, inputs.q), ("kv", inputs.segment_ids_kv, inputs.k)):
        if x is None:
            continue
        if x.dtype not in INTS:
            raise input_error("segment_ids", f"{x.dtype} for {side}", "int32 or int64", "Convert it with .int().")
        if x.dim() != 2 or not broadcasts(x.shape[:1], like.shape[:1]) or x.shape[1] != like.shape[1]:
            allowed = f"(B, S) = {(like.shape[0], like.shape[1])}"
            raise input_error("segment_ids", f"shape {tuple(x.shape)} for {side}", allowed, "One id for each token.")


def _check_intervals(inputs: Inputs) -> None:
    x = inputs.intervals
    if x is None:
        return
    if x.dtype != torch.int32:
        raise input_error("intervals", x.dtype, "torch.int32, pairs [start, stop) of key positions", "Use .int().")
    rows, batch = inputs.q.shape[-3], 1 if inputs.is_packed else inputs.batch
    fits = x.dim() == 5 and broadcasts(x.shape[:2], (batch, inputs.heads_q))
    if not fits or x.shape[2] != rows or x.shape[4] != 2:
        sizes = f"(1, 1 or {inputs.heads_q}" if batch == 1 else f"(1 or {batch}, 1 or {inputs.heads_q}"
        order = "(1, 1|H_q, T_q, n, 2)" if inputs.is_packed else "(1|B, 1|H_q, S_q, n, 2)"
        todo = "Give each query row n ranges; fastattn.intervals builds them."
        raise input_error("intervals", f"shape {tuple(x.shape)}", f"{order} = {sizes}, {rows}, n, 2)", todo)


def pairs_of(intervals: Tensor) -> list[tuple[Tensor, Tensor]]:
    """``(start, stop)`` of each of the n ranges, ``(1|B, 1|H_q, S_q, 1)``, for ``spec.in_intervals``."""
    return [(x[..., 0, None], x[..., 1, None]) for x in intervals.unbind(-2)]


def _check_rng_state(rng_state: Tensor | None) -> None:
    if rng_state is None:
        return
    is_tensor = isinstance(rng_state, Tensor)
    if not is_tensor or rng_state.shape != (2,) or rng_state.dtype != torch.int64:
        given = f"shape {tuple(rng_state.shape)}, {rng_state.dtype}" if is_tensor else type(rng_state).__name__
        raise input_error("rng_state", given, "an int64 tensor of 2: seed and offset", "Or None to draw a fresh one.")


def check_devices(tensors: Mapping[str, Tensor | None], device: torch.device) -> None:
    """Raise InputError unless every tensor that is not None is on ``device``, that of q."""
    for name, x in tensors.items():
        if x is not None and x.device != device:
            raise input_error(name, f"device {x.device}", f"device {device}, that of q", "Move it with .to().")


@dataclass(frozen=True)
class Problem:
    """The facts that backends base their reasons on, all host values.

    Batch size and lengths are not among them, so choices can be cached by problem.

    Attributes:
        device: "cpu", "cuda", ...
        arch: compute capability as major * 10 + minor on CUDA, else 0.
        dtype: of q, k and v.
        head_dim_qk, head_dim_v: head dims.
        group: query heads per key/value head.
        features: what is asked for, a member of any of the tuples ``*FEATURES`` below.
        needs_grad: whether a backward pass will follow (or is asked for).
        deterministic: torch.use_deterministic_algorithms is on.
        page_size: rows of a page of a paged cache; 0 without one.
    """

    device: str
    arch: int
    dtype: torch.dtype
    head_dim_qk: int
    head_dim_v: int
    group: int
    features: frozenset[str]
    needs_grad: bool = False
    deterministic: bool = False
    page_size: int = 0

    @classmethod
    def of(cls, inputs: Inputs, spec: AttentionSpec, needs_grad: bool = False, also: Sequence[str] = ()) -> Problem:
        """The facts of a call; ``also`` names what is asked besides the forward and backward pass."""
        q = inputs.q
        return cls(
            device=q.device.type,
            arch=arch_of(q.device),
            dtype=q.dtype,
            head_dim_qk=q.shape[-1],
            head_dim_v=inputs.v.shape[-1],
            group=inputs.heads_q // inputs.heads_kv,
            features=frozenset((*used_features(inputs, spec), *also)),
            needs_grad=needs_grad,
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )


FEATURES = (
    "band", "softcap", "bias", "mask", "alibi", "sinks", "segments", "intervals", "packed", "dropout", "gqa",
    "mixed head dims", "strided head dim",
)  # fmt: skip
# Further features: Jacobian-vector products of both passes (``Backend.jvp``); statistics of the weights, with their
# gradients (``Backend.statistics``).
DERIVATIVE_FEATURES = ("jvp",)
STATISTICS_FEATURES = ("statistics",)
# A further feature: operands in e4m3 (``Backend.forward_fp8``).
FP8_FEATURES = ("fp8",)
# Further features of attention_with_kv_cache. A sequence with more than PROMPT_ROWS query rows is a "prompt": its time
# goes into computing rather than reading the cache.
CACHE_FEATURES = ("cache", "append", "paged cache", "rotary", "fp8 cache", "prompt", "tree", "batch invariant")
PROMPT_ROWS = 32


def used_features(inputs: Inputs, spec: AttentionSpec) -> Sequence[str]:
    """The members of FEATURES that this problem needs; a backend declares those it supports."""
    used = {
        "band": spec.has_band,
        "softcap": spec.softcap is not None,
        "bias": inputs.bias is not None,
        "mask": inputs.mask is not None,
        "alibi": inputs.alibi_slopes is not None,
        "sinks": inputs.sinks is not None,
        "segments": inputs.segment_ids_q is not None,
        "intervals": inputs.intervals is not None,
        "packed": inputs.is_packed,
        "dropout": spec.dropout_p > 0,
        "gqa": inputs.heads_q != inputs.heads_kv,
        "mixed head dims": inputs.q.shape[-1] != inputs.v.shape[-1],
        "strided head dim": any(x.stride(-1) != 1 and x.shape[-1] > 1 for x in (inputs.q, inputs.k, inputs.v)),
    }
    return [name for name in FEATURES if used[name]]


def arch_of(device: torch.device) -> int:
    """Compute capability as major * 10 + minor on CUDA, else 0."""
    if device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return major * 10 + minor
