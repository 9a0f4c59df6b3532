"""The flat struct of ``csrc/params.h``, packed from ``Inputs`` and ``AttentionSpec``.

``FIELDS`` names its fields in order; tests/unit/test_build.py holds it against the C++ struct. Meaning that the kernels
need beyond the spec is added here: the exponent's base, the band without None, the keys that some query keeps.
"""

from __future__ import annotations

import math
import struct

import torch
from torch import Tensor

from fastattn.errors import input_error
from fastattn.problem import Inputs
from fastattn.spec import AttentionSpec, tile_range

VERSION = 1
UNBOUNDED = 1 << 29  # kUnbounded: more than any length
LOG2E = math.log2(math.e)
# Keys and values of the heads worked on together should stay in the 50 MB of L2 beside everything else.
L2_BYTES = 32 << 20

FIELDS = (
    "version", "q", "k", "v", "out", "lse", "sinks", "cu_seqlens_q", "cu_seqlens_kv",
    "q_batch_stride", "q_row_stride", "q_head_stride", "k_batch_stride", "k_row_stride", "k_head_stride",
    "v_batch_stride", "v_row_stride", "v_head_stride", "sinks_batch_stride", "dtype", "batch", "heads_q", "heads_kv",
    "head_dim_qk", "head_dim_v", "seqlen_q", "seqlen_kv", "key_begin", "key_end", "left", "right", "lower_right",
    "has_band", "has_softcap", "scale_log2", "cap_scale", "heads_per_pass", "device", "blocks", "stream",
)  # fmt: skip
DOUBLES = ("scale_log2", "cap_scale")
_LAYOUT = struct.Struct("<" + "".join("d" if name in DOUBLES else "q" for name in FIELDS))
SIZE = _LAYOUT.size


def pack(fields: dict[str, int | float]) -> bytes:
    return _LAYOUT.pack(*(fields[name] for name in FIELDS))


def forward_fields(
    inputs: Inputs, spec: AttentionSpec, out: Tensor, lse: Tensor, stream: int
) -> dict[str, int | float]:
    """The fields of one forward pass. ``inputs`` must be as ``prepared`` leaves them."""
    q, k, v = inputs.q, inputs.k, inputs.v
    seqlen_q, seqlen_kv = q.shape[-3], k.shape[-3]
    if max(seqlen_q, seqlen_kv) >= UNBOUNDED:
        given = f"{max(seqlen_q, seqlen_kv)} rows"
        raise input_error("q", given, f"fewer than {UNBOUNDED} rows", "Positions in the CUDA kernels have 32 bits.")
    is_dense = not inputs.is_packed
    key_begin, key_end = tile_range(spec, 0, seqlen_q, seqlen_q, seqlen_kv) if is_dense else (0, seqlen_kv)
    fields: dict[str, int | float] = {
        "version": VERSION,
        "q": q.data_ptr(),
        "k": k.data_ptr(),
        "v": v.data_ptr(),
        "out": out.data_ptr(),
        "lse": lse.data_ptr(),
        "sinks": _address(inputs.sinks),
        "cu_seqlens_q": _address(inputs.cu_seqlens_q),
        "cu_seqlens_kv": _address(inputs.cu_seqlens_kv),
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
        "left": UNBOUNDED if spec.left is None else min(spec.left, UNBOUNDED),
        "right": UNBOUNDED if spec.right is None else min(spec.right, UNBOUNDED),
        "lower_right": int(spec.anchor == "lower_right"),
        "has_band": int(spec.has_band),
        "has_softcap": int(spec.softcap is not None),
        "scale_log2": (spec.scale if spec.softcap is None else spec.softcap) * LOG2E,
        "cap_scale": 0.0 if spec.softcap is None else spec.scale / spec.softcap,
        "heads_per_pass": heads_per_pass(inputs),
        "device": q.device.index or 0,
        "blocks": 0,
        "stream": stream,
    }
    for name, x in (("q", q), ("k", k), ("v", v)):
        fields[f"{name}_batch_stride"] = x.stride(0) if is_dense else 0
        fields[f"{name}_row_stride"], fields[f"{name}_head_stride"] = x.stride(-3), x.stride(-2)
    return fields


def heads_per_pass(inputs: Inputs) -> int:
    """Query heads whose keys and values fit L2 together: whole groups, at least one, at most all there are."""
    row_bytes = (inputs.k.shape[-1] + inputs.v.shape[-1]) * inputs.k.element_size()
    head_bytes = max(1, inputs.max_seqlen_kv * row_bytes)
    group = inputs.heads_q // inputs.heads_kv
    all_heads = inputs.heads_q * (1 if inputs.is_packed else inputs.batch)
    return max(1, min(max(1, L2_BYTES // head_bytes) * group, all_heads))


def prepared(inputs: Inputs, spec: AttentionSpec) -> tuple[Inputs, AttentionSpec]:
    """The same problem with tensors that TMA can read, fp32 sinks and a positive scale.

    TMA wants addresses and strides that 16 bytes divide, and no stride of 0; other tensors are copied. The kernels take
    the maximum before they scale, so a negative scale moves into q, and so does one too small for fp32.
    """
    q, k, v = (x if _is_readable(x) else _copy(x) for x in (inputs.q, inputs.k, inputs.v))
    scale = spec.scale
    if spec.softcap is None and scale < torch.finfo(torch.float32).tiny:
        sign = -1.0 if scale <= -torch.finfo(torch.float32).tiny else 0.0
        q, scale = q * sign, -scale if sign else 1.0
    sinks = None if inputs.sinks is None else inputs.sinks.float().contiguous()
    bounds = (None if x is None else x.contiguous() for x in (inputs.cu_seqlens_q, inputs.cu_seqlens_kv))
    cu_seqlens_q, cu_seqlens_kv = bounds
    changed = inputs.replace(q=q, k=k, v=v, sinks=sinks, cu_seqlens_q=cu_seqlens_q, cu_seqlens_kv=cu_seqlens_kv)
    return changed, AttentionSpec(scale, spec.softcap, spec.left, spec.right, spec.anchor)


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _is_readable(x: Tensor) -> bool:
    steps = [stride * x.element_size() for stride, size in zip(x.stride(), x.shape, strict=True)][:-1]
    used = [step for step, size in zip(steps, x.shape, strict=False) if size > 1]
    return x.stride(-1) == 1 and x.data_ptr() % 16 == 0 and all(step > 0 and step % 16 == 0 for step in used)


def _copy(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device).copy_(x)
