"""Terms that the kernels look up pair by pair: bias, ALiBi, boolean masks, segments, dropout (``csrc/sm90/terms.cuh``).

Their fields begin with ``terms.`` (addresses) and ``numbers.``, as in ``csrc/common/params.h``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastattn.problem import Inputs
from fastattn.spec import AttentionSpec

SEGMENT_ROWS = 64  # kSegmentRows: rows of each entry of the ranges that segments leave
ADDRESSES = (
    "alibi_slopes", "segment_ids_q", "segment_ids_kv", "mask", "bias", "rng_state", "ranges_q", "ranges_kv", "given_k",
    "given_v",
)  # fmt: skip
PAIR_STRIDES = ("batch", "head", "query", "key")
STRIDES = ("batch", "row", "head")
NUMBERS = (
    "has_terms", "slopes_batch_stride", "ids_q_batch_stride", "ids_kv_batch_stride",
    *(f"{name}_strides.{of}" for name in ("mask", "bias") for of in PAIR_STRIDES), "bias_is_float",
    *(f"given_{name}_strides.{of}" for name in "kv" for of in STRIDES), "dropout_threshold", "dropout_scale",
)  # fmt: skip
NO_ADDRESSES = {f"terms.{name}": 0 for name in ADDRESSES}
NO_NUMBERS: dict[str, int | float] = {**{f"numbers.{name}": 0 for name in NUMBERS}, "numbers.dropout_scale": 1.0}


def has_terms(inputs: Inputs, spec: AttentionSpec) -> bool:
    """Whether a kernel with terms has to serve."""
    x = inputs
    return spec.dropout_p > 0 or not (x.bias is x.mask is x.alibi_slopes is x.segment_ids_q is None)


@dataclass(frozen=True)
class Terms:
    """The terms of a call.

    Attributes:
        inputs: those of the call; k and v are memory that the kernels fill, where a term may leave out keys.
        tensors: what the fields ``terms.`` point to, kept alive as long as this.
        numbers: the fields ``numbers.``.
    """

    inputs: Inputs
    tensors: dict[str, Tensor | None]
    numbers: dict[str, int | float]

    @classmethod
    def of(cls, inputs: Inputs, spec: AttentionSpec) -> Terms:
        """``inputs`` are those that TMA can read."""
        if not has_terms(inputs, spec):
            return cls(inputs, {}, {})
        tensors: dict[str, Tensor | None] = {}
        numbers: dict[str, int | float] = {"has_terms": 1, "dropout_scale": 1.0}
        if inputs.alibi_slopes is not None:
            slopes = tensors["alibi_slopes"] = inputs.alibi_slopes.float().contiguous()
            numbers["slopes_batch_stride"] = slopes.stride(0) if slopes.shape[0] > 1 else 0
        _add_segments(inputs, tensors, numbers)
        _add_pairs(inputs, tensors, numbers)
        if spec.dropout_p > 0:
            assert inputs.rng_state is not None
            tensors["rng_state"] = inputs.rng_state.contiguous()
            numbers["dropout_threshold"], numbers["dropout_scale"] = spec.dropout_threshold, spec.dropout_scale
        if inputs.bias is not None or inputs.mask is not None or inputs.segment_ids_q is not None:
            for name, x in (("k", inputs.k), ("v", inputs.v)):
                tensors[f"given_{name}"] = x
                strides = zip(STRIDES, x.stride()[:3], strict=True)
                numbers |= {f"given_{name}_strides.{of}": stride for of, stride in strides}
            inputs = inputs.replace(k=_like(inputs.k), v=_like(inputs.v))
        return cls(inputs, tensors, numbers)

    def fields(self) -> dict[str, int | float]:
        """The values of all the fields."""
        addresses = {f"terms.{name}": 0 if x is None else x.data_ptr() for name, x in self.tensors.items()}
        return NO_ADDRESSES | addresses | NO_NUMBERS | {f"numbers.{name}": x for name, x in self.numbers.items()}


def readable_bias(bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """``bias`` in fp32 or in ``dtype``, that of q."""
    return bias if bias is None or bias.dtype in (torch.float32, dtype) else bias.float()


def pair_strides(name: str, x: Tensor | None) -> dict[str, int | float]:
    """The fields of the strides of ``x``, 0 where it is shared."""
    if x is None:
        return {f"{name}.{of}": 0 for of in PAIR_STRIDES}
    steps = zip(PAIR_STRIDES, x.shape, x.stride(), strict=True)
    return {f"{name}.{of}": stride if size > 1 else 0 for of, size, stride in steps}


def _like(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _add_segments(inputs: Inputs, tensors: dict[str, Tensor | None], numbers: dict[str, int | float]) -> None:
    if inputs.segment_ids_q is None or inputs.segment_ids_kv is None:
        return
    for side, given in (("q", inputs.segment_ids_q), ("kv", inputs.segment_ids_kv)):
        ids = tensors[f"segment_ids_{side}"] = given.long().contiguous()
        numbers[f"ids_{side}_batch_stride"] = ids.shape[1] if ids.shape[0] > 1 else 0
    batch = max(inputs.segment_ids_q.shape[0], inputs.segment_ids_kv.shape[0])
    for side, rows in (("q", inputs.q.shape[1]), ("kv", inputs.k.shape[1])):
        entries = -(-rows // SEGMENT_ROWS)
        tensors[f"ranges_{side}"] = torch.empty(batch, entries, 4, dtype=torch.int32, device=inputs.q.device)


def _add_pairs(inputs: Inputs, tensors: dict[str, Tensor | None], numbers: dict[str, int | float]) -> None:
    """Mask and bias as they lie in memory, with a stride of 0 where they are shared."""
    bias = readable_bias(inputs.bias, inputs.q.dtype)
    for name, given in (("mask", inputs.mask), ("bias", bias)):
        if given is None:
            continue
        # The kernels step along queries and keys by strides of 32 bits.
        x = tensors[name] = given if max(given.stride()[2:]) < 1 << 31 else given.contiguous()
        numbers |= pair_strides(f"{name}_strides", x)
    numbers["bias_is_float"] = int(bias is not None and bias.dtype == torch.float32)
