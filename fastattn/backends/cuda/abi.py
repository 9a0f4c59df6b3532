"""The flat structs of ``csrc/common/params.h``, packed from ``Inputs`` and ``AttentionSpec``.

``FORWARD``, ``BACKWARD`` and ``DECODE`` name their fields in order; tests/project/test_build.py holds them against C++.
Values that the kernels need beyond the spec are computed here: scales in base 2, the band without None, the keys that
some query keeps, the padding of the workspace of the backward pass.
"""

from __future__ import annotations

import dataclasses
import functools
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastattn.backends.base import Outputs
from fastattn.backends.cuda import terms
from fastattn.backends.cuda.instances import PADDED_ROWS
from fastattn.backends.cuda.terms import Terms
from fastattn.errors import input_error
from fastattn.problem import Inputs
from fastattn.spec import AttentionSpec, tile_range

UNBOUNDED = 1 << 29  # kUnbounded: more than any length
MOST_SOFTCAP = 4096  # with softcap the backward kernels read lse as one float: its rounding stays below that of fp16
# Keys and values of the heads worked on together should stay in the 50 MB of L2 beside everything else.
L2_BYTES = 32 << 20
DOUBLES = ("scale", "score_scale", "cap_scale", "numbers.dropout_scale")

Fields = dict[str, int | float]
NO_TERMS: Fields = {**terms.NO_ADDRESSES, **terms.NO_NUMBERS}


@dataclass(frozen=True)
class Abi:
    """The struct of a pass: the version that it begins with, and the names of its fields."""

    name: str
    version: int
    names: tuple[str, ...]

    @functools.cached_property
    def _layout(self) -> struct.Struct:
        return struct.Struct("<" + "".join("d" if name in DOUBLES else "q" for name in self.names))

    @functools.cached_property
    def addresses(self) -> tuple[str, ...]:
        """The fields that point to tensors, 0 standing for none. They follow the version; the stream comes last."""
        return self.names[1 : self.names.index("q_batch_stride")]

    @functools.cached_property
    def address_part(self) -> struct.Struct:
        """The layout of ``addresses``."""
        return struct.Struct(f"<{len(self.addresses)}q")

    @property
    def size(self) -> int:
        return self._layout.size

    def pack(self, fields: Fields) -> bytes:
        return self._layout.pack(*(fields[name] for name in self.names))

    def unpack(self, packed: bytes) -> Fields:
        return dict(zip(self.names, self._layout.unpack(packed), strict=True))

    def template(self, fields: Fields) -> Callable[[Sequence[int], int], bytes]:
        """``pack`` as a function of what changes from call to call: the addresses and the stream."""
        head, stream = struct.Struct(f"<{1 + len(self.addresses)}q"), struct.Struct("<q")
        between = self.pack(fields)[head.size : -stream.size]
        return lambda addresses, on: head.pack(self.version, *addresses) + between + stream.pack(on)


_TERMS, _NUMBERS = tuple(terms.NO_ADDRESSES), tuple(terms.NO_NUMBERS)
FORWARD = Abi("forward", 4, (
    "version", "q", "k", "v", "out", "lse", "lse_low", "sinks", "cu_seqlens_q", "cu_seqlens_kv", "counter",
    *_TERMS, "q_batch_stride", "q_row_stride", "q_head_stride", "k_batch_stride", "k_row_stride", "k_head_stride",
    "v_batch_stride", "v_row_stride", "v_head_stride", "sinks_batch_stride", "dtype", "batch", "heads_q", "heads_kv",
    "head_dim_qk", "head_dim_v", "seqlen_q", "seqlen_kv", "key_begin", "key_end", "left", "right", "lower_right",
    "has_band", "has_softcap", *_NUMBERS, "score_scale", "cap_scale", "heads_per_pass", "device", "blocks", "stream",
))  # fmt: skip
BACKWARD = Abi("backward", 4, (
    "version", "q", "k", "v", "out", "dout", "lse", "lse_low", "dlse", "sinks", "cu_seqlens_q", "cu_seqlens_kv",
    "dq", "dk", "dv", "dsinks", "lse_parts", "delta", "dq_sums", "dk_parts", "dv_parts", "dbias",
    *_TERMS,
    "q_batch_stride", "q_row_stride", "q_head_stride", "k_batch_stride", "k_row_stride", "k_head_stride",
    "v_batch_stride", "v_row_stride", "v_head_stride", "dout_batch_stride", "dout_row_stride", "dout_head_stride",
    "sinks_batch_stride", "dtype", "batch", "heads_q", "heads_kv", "head_dim_qk", "head_dim_v", "seqlen_q", "seqlen_kv",
    "padded_q", "padded_kv", "sum_columns", "key_begin", "key_end", "left", "right", "lower_right", "has_softcap",
    *_NUMBERS, "scale", "score_scale", "cap_scale", "heads_per_pass", "kv_heads_per_pass", "device", "stream",
))  # fmt: skip

DECODE = Abi("decode", 5, (
    "version", "q", "k_cache", "v_cache", "out", "lse", "partial_out", "partial_lse", "sinks", "cache_lengths",
    "block_table", "cu_seqlens_q", "new_k", "new_v", "k_scale", "v_scale", "tree", "depths",
    "alibi_slopes", "bias",
    "q_batch_stride", "q_row_stride", "q_head_stride", "k_batch_stride", "k_row_stride", "k_head_stride",
    "v_batch_stride", "v_row_stride", "v_head_stride", "new_k_batch_stride", "new_k_row_stride", "new_k_head_stride",
    "new_v_batch_stride", "new_v_row_stride", "new_v_head_stride", "sinks_batch_stride", "table_stride",
    "k_scale_stride", "v_scale_stride", "tree_words", "shares_tree", "slopes_batch_stride",
    *(f"bias_strides.{of}" for of in terms.PAIR_STRIDES), "bias_is_float", "dtype", "is_e4m3", "is_gathered",
    "batch", "heads_q", "heads_kv", "head_dim_qk", "head_dim_v", "seqlen_q", "new_keys", "pages", "page_size",
    "capacity", "box_rows", "left", "right", "has_softcap", "score_scale", "cap_scale", "heads_per_tile",
    "positions_per_tile", "tiles", "splits", "device", "stream",
))  # fmt: skip


def results(inputs: Inputs) -> Outputs:
    """Memory for what the forward pass computes."""
    out = torch.empty(inputs.out_shape(), dtype=inputs.q.dtype, device=inputs.q.device)
    lse, lse_low = (torch.empty(inputs.lse_shape(), dtype=torch.float32, device=out.device) for _ in range(2))
    return out, lse, lse_low


def forward_fields(
    inputs: Inputs | Terms, spec: AttentionSpec, results: Outputs, stream: int, counter: Tensor | None = None
) -> Fields:
    """The fields of a forward pass. ``inputs`` must be as ``prepared`` leaves them, ``counter`` as in ``counters``.

    They are ``Terms`` where there may be terms: these hold memory that has to outlive the launch.
    """
    return {
        **_common_fields(inputs, spec, stream),
        "version": FORWARD.version,
        **{name: x.data_ptr() for name, x in zip(("out", "lse", "lse_low"), results, strict=True)},
        "counter": address(counter),
        "has_band": int(spec.has_band),
        "blocks": 0,
    }


def backward_fields(
    given: Inputs | Terms, spec: AttentionSpec, tensors: dict[str, Tensor | None], stream: int
) -> Fields:
    """The fields of one backward pass.

    Args:
        given: inputs as ``readable`` leaves them, or their terms.
        spec: the scalars.
        tensors: the other tensors by the names of their fields, None where not wanted; ``dout`` is readable by TMA,
            what is read or written besides is contiguous. ``dq_sums`` ends in the columns of the fused kernel.
        stream: the CUDA stream.
    """
    dout, sums = tensors["dout"], tensors["dq_sums"]
    assert dout is not None
    inputs = given.inputs if isinstance(given, Terms) else given
    is_dense = not inputs.is_packed
    return {
        **_common_fields(given, spec, stream),
        **{name: address(x) for name, x in tensors.items()},
        "version": BACKWARD.version,
        "sinks": address(inputs.sinks if tensors["dsinks"] is not None else None),
        "dout_batch_stride": dout.stride(0) if is_dense else 0,
        "dout_row_stride": dout.stride(-3),
        "dout_head_stride": dout.stride(-2),
        "padded_q": padded_rows(inputs, inputs.q.shape[-3]),
        "padded_kv": padded_rows(inputs, inputs.k.shape[-3]),
        "sum_columns": 0 if sums is None else sums.shape[-1],
        "scale": spec.scale,
        "kv_heads_per_pass": kv_heads_per_pass(inputs),
    }


def _common_fields(given: Inputs | Terms, spec: AttentionSpec, stream: int) -> Fields:
    inputs, of_terms = (given.inputs, given.fields()) if isinstance(given, Terms) else (given, NO_TERMS)
    q, k, v = inputs.q, inputs.k, inputs.v
    seqlen_q, seqlen_kv = q.shape[-3], k.shape[-3]
    if max(seqlen_q, seqlen_kv) >= UNBOUNDED:
        rows = f"{max(seqlen_q, seqlen_kv)} rows"
        raise input_error("q", rows, f"fewer than {UNBOUNDED} rows", "Positions in the CUDA kernels have 32 bits.")
    is_dense = not inputs.is_packed
    key_begin, key_end = tile_range(spec, 0, seqlen_q, seqlen_q, seqlen_kv) if is_dense else (0, seqlen_kv)
    fields: Fields = {
        "q": q.data_ptr(),
        "k": k.data_ptr(),
        "v": v.data_ptr(),
        "sinks": address(inputs.sinks),
        "cu_seqlens_q": address(inputs.cu_seqlens_q),
        "cu_seqlens_kv": address(inputs.cu_seqlens_kv),
        "sinks_batch_stride": inputs.heads_q if inputs.sinks is not None and inputs.sinks.shape[0] > 1 else 0,
        "dtype": int(q.dtype == torch.float16),
        "batch": inputs.batch,
        "heads_q": inputs.heads_q,
        "heads_kv": inputs.heads_kv,
        "head_dim_qk": q.shape[-1],
        "head_dim_v": v.shape[-1],
        "seqlen_q": seqlen_q,
        "seqlen_kv": seqlen_kv,
        "key_begin": key_begin,
        "key_end": key_end,
        "lower_right": int(spec.anchor == "lower_right"),
        **spec_fields(spec),
        **of_terms,
        "heads_per_pass": heads_per_pass(inputs),
        "device": q.device.index or 0,
        "stream": stream,
    }
    for name, x in (("q", q), ("k", k), ("v", v)):
        fields[f"{name}_batch_stride"] = x.stride(0) if is_dense else 0
        fields[f"{name}_row_stride"], fields[f"{name}_head_stride"] = x.stride(-3), x.stride(-2)
    return fields


def spec_fields(spec: AttentionSpec) -> Fields:
    """The fields of the spec that every pass has; the anchor is not among them."""
    if spec.softcap is not None and spec.softcap > MOST_SOFTCAP:
        todo = 'Use backend="triton".'
        raise input_error("softcap", f"{spec.softcap:g}", f"at most {MOST_SOFTCAP} in the CUDA kernels", todo)
    return {
        "left": UNBOUNDED if spec.left is None else min(spec.left, UNBOUNDED),
        "right": UNBOUNDED if spec.right is None else min(spec.right, UNBOUNDED),
        "has_softcap": int(spec.softcap is not None),
        "score_scale": spec.scale if spec.softcap is None else spec.softcap,
        "cap_scale": 0.0 if spec.softcap is None else spec.scale / spec.softcap,
    }


def heads_per_pass(inputs: Inputs) -> int:
    """Query heads whose keys and values fit L2 together: whole groups, at least one."""
    return _kv_heads(inputs, inputs.max_seqlen_kv) * (inputs.heads_q // inputs.heads_kv)


def kv_heads_per_pass(inputs: Inputs) -> int:
    """Key/value heads whose queries and their gradients of out fit L2 together."""
    return _kv_heads(inputs, inputs.max_seqlen_q * (inputs.heads_q // inputs.heads_kv))


def _kv_heads(inputs: Inputs, rows: int) -> int:
    row_bytes = (inputs.k.shape[-1] + inputs.v.shape[-1]) * inputs.k.element_size()
    return even_passes(inputs.heads_kv * (1 if inputs.is_packed else inputs.batch), rows * row_bytes)


def even_passes(heads: int, head_bytes: int) -> int:
    """The most of ``heads`` that fit L2 together and leave no last pass with less than three quarters as many.

    Long tiles begin a pass: in a last pass with few heads, blocks would have nothing to do beside them.
    """
    fit = min(heads, max(1, L2_BYTES // max(1, head_bytes)))
    return next((width for width in range(fit, 1, -1) if not 0 < heads % width < 0.75 * width), 1)


def padded_rows(inputs: Inputs, rows: int) -> int:
    """Rows of the backward pass's own tensors for ``rows`` rows: csrc/common/params.h says how they are padded."""
    extra = inputs.batch * PADDED_ROWS if inputs.is_packed else 0
    return -(-(rows + extra) // PADDED_ROWS) * PADDED_ROWS


def prepared(inputs: Inputs, spec: AttentionSpec) -> tuple[Inputs, AttentionSpec]:
    """The same problem with ``readable`` tensors and a positive scale, for the forward pass.

    Its kernels take the maximum before they scale, so a negative scale moves into q, and so does one too small for
    fp32.
    """
    inputs = readable(inputs)
    q, scale = with_positive_scale(inputs.q, spec)
    return inputs.replace(q=q), dataclasses.replace(spec, scale=scale)


def with_positive_scale(q: Tensor, spec: AttentionSpec) -> tuple[Tensor, float]:
    """q and the scale, changed if needed to give the same scores with a scale that is positive in fp32."""
    tiny = torch.finfo(torch.float32).tiny
    if spec.softcap is not None or spec.scale >= tiny:
        return q, spec.scale
    sign = -1.0 if spec.scale <= -tiny else 0.0
    return q * sign, -spec.scale if sign else 1.0


def readable(inputs: Inputs) -> Inputs:
    """The tensors that TMA can read, and copies of those that it cannot; fp32 sinks, contiguous boundaries."""
    q, k, v = (readable_rows(x) for x in (inputs.q, inputs.k, inputs.v))
    sinks = None if inputs.sinks is None else inputs.sinks.float().contiguous()
    bounds = (None if x is None else x.contiguous() for x in (inputs.cu_seqlens_q, inputs.cu_seqlens_kv))
    cu_seqlens_q, cu_seqlens_kv = bounds
    return inputs.replace(q=q, k=k, v=v, sinks=sinks, cu_seqlens_q=cu_seqlens_q, cu_seqlens_kv=cu_seqlens_kv)


def readable_rows(x: Tensor) -> Tensor:
    """``x``, or a copy if an address or stride is not a multiple of 16 bytes or a stride is 0, as TMA requires."""
    steps = [stride * x.element_size() for stride, size in zip(x.stride(), x.shape, strict=True)][:-1]
    used = [step for step, size in zip(steps, x.shape, strict=False) if size > 1]
    is_readable = x.stride(-1) == 1 and x.data_ptr() % 16 == 0 and all(step > 0 and step % 16 == 0 for step in used)
    return x if is_readable else torch.empty(x.shape, dtype=x.dtype, device=x.device).copy_(x)


def address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()
