"""Every peer by name: those of ``fastattn.measure.peers`` and the ones that compile, force a kernel or need a package.

The output of every peer passes the correctness gate before its time is printed, so a peer that computes something else
is reported as wrong, not as fast.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import fastattn
from fastattn.errors import InputError
from fastattn.measure.peers import (
    EAGER,
    SDPA,
    Forward,
    Peer,
    bias_and_mask,
    cannot,
    eager_attention,
    fastattn_peer,
    prepare_sdpa,
    sdpa_reasons,
)
from fastattn.measure.workload import Operands, Workload

Reasons = Callable[[Workload, str], list[str]]


def _on_gpu(reasons: Reasons, *, half_only: bool = True) -> Reasons:
    """The reasons of a GPU library: the device, the dtype if it has half precision only, then ``reasons``."""

    def checked(workload: Workload, device_type: str) -> list[str]:
        if device_type != "cuda":
            return [f"no {device_type} kernel"]
        dtype = ["no fp32"] if half_only and workload.dtype == "fp32" else []
        return dtype + reasons(workload, device_type)

    return checked


def _with_package(module: str, reasons: Reasons) -> Reasons:
    def checked(workload: Workload, device_type: str) -> list[str]:
        return _on_gpu(reasons)(workload, device_type) if _is_installed(module) else [f"{module} is not installed"]

    return checked


@functools.cache
def _is_installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _lacks(*features: str) -> Reasons:
    return lambda workload, device_type: cannot(workload, *features)


# Compiled by torch: eager attention and FlexAttention


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """``torch.compile`` for one static shape, usable for several backward passes over one forward."""
    import torch._functorch.config

    torch._functorch.config.donated_buffer = False  # backward alone is timed with retain_graph
    torch._dynamo.reset()  # every workload is a new shape; none may count towards the recompile limit
    return torch.compile(function, dynamic=False)


def _prepare_eager_compiled(operands: Operands) -> Forward:
    bias, kept = bias_and_mask(operands)
    compiled = _compiled(lambda: eager_attention(operands, bias, kept))
    return lambda: compiled()


def _prepare_flex(operands: Operands) -> Forward:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    w = operands.workload

    def mask_mod(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return w.keeps(i, j)

    def score_mod(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        if w.softcap is not None:
            score = w.softcap * torch.tanh(score / w.softcap)
        if operands.bias is not None:
            score = score + operands.bias[0, h, i, j]
        if operands.alibi_slopes is not None:
            score = score - operands.alibi_slopes[h] * w.distance(i, j)
        return score

    q, k, v = (x.transpose(-3, -2) for x in (operands.q, operands.k, operands.v))
    q, k, v = (x[None] for x in (q, k, v)) if w.packed else (q, k, v)
    device = str(operands.q.device)
    is_masked = w.causal or w.has_mask
    options = {
        "score_mod": score_mod if w.softcap is not None or w.bias or w.alibi else None,
        "block_mask": create_block_mask(mask_mod, None, None, w.s_q, w.s_kv, device=device) if is_masked else None,
        "scale": w.spec.scale,
        "enable_gqa": w.heads_q != w.heads_kv,
    }
    compiled = _compiled(flex_attention)

    def forward() -> Tensor:
        out = compiled(q, k, v, **options).transpose(-3, -2)
        return out[0] if w.packed else out

    return forward


# torch's attention with one kernel forced


def _sdpa_peer(name: str, kernel: str, reasons: Reasons, scores_held: tuple[int, int] = (0, 0)) -> Peer:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def prepare(operands: Operands) -> Forward:
        forward = prepare_sdpa(operands)

        def forced() -> Tensor:
            with sdpa_kernel(getattr(SDPBackend, kernel)):
                return forward()

        return forced

    return Peer(name, reasons, prepare, scores_held=scores_held)


def _flash_reasons(workload: Workload, device_type: str) -> list[str]:
    needs_mask = workload.has_mask or workload.bias or workload.alibi
    return sdpa_reasons(workload, device_type) + (["no mask"] if needs_mask else [])


def _prepare_torch_varlen(operands: Operands) -> Forward:
    from torch.nn.attention.varlen import varlen_attn

    w = operands.workload
    lengths: Any = (operands.cu_seqlens, operands.cu_seqlens, w.longest, w.longest)
    options: dict[str, Any] = {"scale": w.spec.scale, "window_size": _window(w), "enable_gqa": w.heads_q != w.heads_kv}
    call: Callable[..., Any] = varlen_attn
    return lambda: call(operands.q, operands.k, operands.v, *lengths, **options)


def _varlen_reasons(workload: Workload, device_type: str) -> list[str]:
    dense = [] if workload.packed else ["packed batches only"]
    return dense + cannot(workload, "softcap", "alibi", "sinks", "bias", "mask", "dropout", "mixed head dims")


def _window(workload: Workload) -> tuple[int, int]:
    """The band in flash-attn's terms: neighbours kept on each side, -1 for all."""
    left, right = workload.spec.left, workload.spec.right
    return (-1 if left is None else left, -1 if right is None else right)


# Packages, if they are installed


def _flash_attn_reasons(workload: Workload, device_type: str) -> list[str]:
    segments = ["no segment ids"] if workload.documents > 1 and not workload.packed else []
    return segments + cannot(workload, "sinks", "bias", "mask", "dropout", "mixed head dims")


def _prepare_flash_attn(operands: Operands) -> Forward:
    import flash_attn

    w = operands.workload
    q, k, v, cu_seqlens = operands.q, operands.k, operands.v, operands.cu_seqlens
    options = {
        "softmax_scale": w.spec.scale,
        "causal": w.causal,
        "window_size": _window(w) if w.window else (-1, -1),
        "softcap": w.softcap or 0.0,
        "alibi_slopes": operands.alibi_slopes,
    }
    if cu_seqlens is None:
        return lambda: flash_attn.flash_attn_func(q, k, v, **options)
    longest = w.longest
    return lambda: flash_attn.flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, longest, longest, **options)


def _flash_attn_3_reasons(workload: Workload, device_type: str) -> list[str]:
    dense = ["packed is not wired up here"] if workload.packed else []
    return dense + _flash_attn_reasons(workload, device_type) + cannot(workload, "alibi")


def _prepare_flash_attn_3(operands: Operands) -> Forward:
    import flash_attn_interface

    w = operands.workload
    options = {
        "softmax_scale": w.spec.scale,
        "causal": w.causal,
        "window_size": _window(w) if w.window else (-1, -1),
        "softcap": w.softcap or 0.0,
    }

    def forward() -> Tensor:
        result = flash_attn_interface.flash_attn_func(operands.q, operands.k, operands.v, **options)
        return result[0] if isinstance(result, tuple) else result  # older releases return lse too

    return forward


def _prepare_xformers(operands: Operands) -> Forward:
    from xformers.ops import fmha

    w, group = operands.workload, operands.workload.heads_q // operands.workload.heads_kv
    q, k, v = (x[None] if w.packed else x for x in (operands.q, operands.k, operands.v))
    if group > 1:  # (B, S, H_kv, G, D)
        q = q.unflatten(2, (w.heads_kv, group))
        k, v = (x[:, :, :, None].expand(-1, -1, -1, group, -1) for x in (k, v))
    bias = None
    if w.packed:
        bias = fmha.attn_bias.BlockDiagonalMask.from_seqlens(list(w.lengths))
        bias = bias.make_causal() if w.causal else bias
    elif w.causal:
        bias = fmha.attn_bias.LowerTriangularFromBottomRightMask()

    def forward() -> Tensor:
        out = fmha.memory_efficient_attention(q, k, v, attn_bias=bias, scale=w.spec.scale)
        out = out.flatten(2, 3) if group > 1 else out
        return out[0] if w.packed else out

    return forward


def _xformers_reasons(workload: Workload, device_type: str) -> list[str]:
    segments = ["no segment ids"] if workload.documents > 1 and not workload.packed else []
    window = ["window is not wired up here"] if workload.window else []
    return (
        segments + window + cannot(workload, "softcap", "alibi", "sinks", "bias", "mask", "dropout", "mixed head dims")
    )


def _prepare_flashinfer(operands: Operands) -> Forward:
    """The ragged prefill wrapper; a dense batch is a packed one of equal lengths."""
    import flashinfer

    w, device = operands.workload, operands.q.device
    q, k, v = (x if w.packed else x.flatten(0, 1) for x in (operands.q, operands.k, operands.v))
    starts_q, starts_kv = (
        torch.arange(w.batch + 1, dtype=torch.int32, device=device) * (x.shape[0] // w.batch)
        if operands.cu_seqlens is None
        else operands.cu_seqlens
        for x in (q, k)
    )
    wrapper = flashinfer.BatchPrefillWithRaggedKVCacheWrapper(torch.empty(1 << 28, dtype=torch.uint8, device=device))
    wrapper.plan(
        starts_q,
        starts_kv,
        w.heads_q,
        w.heads_kv,
        w.d_qk,
        head_dim_vo=w.d_v,
        causal=w.causal,
        sm_scale=w.spec.scale,
        window_left=-1 if w.spec.left is None else w.spec.left,
        logits_soft_cap=w.softcap or 0.0,
        q_data_type=q.dtype,
    )
    return lambda: wrapper.run(q, k, v).view(*operands.q.shape[:-1], w.d_v)


def _flashinfer_reasons(workload: Workload, device_type: str) -> list[str]:
    segments = ["no segment ids"] if workload.documents > 1 and not workload.packed else []
    two_sided = ["no window without causal"] if workload.window and not workload.causal else []
    return segments + two_sided + cannot(workload, "alibi", "sinks", "bias", "mask", "dropout")


PEERS: dict[str, Peer] = {
    peer.name: peer
    for peer in (
        fastattn_peer(None),
        *(fastattn_peer(name) for name in fastattn.backends()),
        EAGER,
        Peer("eager-compiled", _lacks("dropout"), _prepare_eager_compiled, scores_held=(3, 5)),
        SDPA,
        _sdpa_peer("sdpa-flash", "FLASH_ATTENTION", _flash_reasons),
        _sdpa_peer("sdpa-efficient", "EFFICIENT_ATTENTION", _on_gpu(sdpa_reasons, half_only=False)),
        _sdpa_peer("sdpa-cudnn", "CUDNN_ATTENTION", _on_gpu(sdpa_reasons)),
        _sdpa_peer("sdpa-math", "MATH", sdpa_reasons, scores_held=(3, 5)),
        Peer("flex", _lacks("sinks", "dropout"), _prepare_flex),
        Peer("torch-varlen", _on_gpu(_varlen_reasons), _prepare_torch_varlen),
        Peer("flash-attn", _with_package("flash_attn", _flash_attn_reasons), _prepare_flash_attn),
        Peer("flash-attn-3", _with_package("flash_attn_interface", _flash_attn_3_reasons), _prepare_flash_attn_3),
        Peer("xformers", _with_package("xformers", _xformers_reasons), _prepare_xformers),
        Peer("flashinfer", _with_package("flashinfer", _flashinfer_reasons), _prepare_flashinfer, has_backward=False),
    )
}

# The default of --peers: on a CPU those that need no compiler.
DEFAULTS = {
    "cpu": ("fastattn", "eager", "sdpa"),
    "cuda": tuple(name for name in PEERS if name not in ("fastattn-eager", "sdpa")),
}


def chosen(names: Sequence[str] | None, device_type: str) -> list[Peer]:
    """The peers of these names; None is the default for the device, "all" every one.

    Raises:
        InputError: there is no peer of a name.
    """
    if names is None:
        names = DEFAULTS.get(device_type, DEFAULTS["cpu"])
    elif list(names) == ["all"]:
        names = tuple(PEERS)
    unknown = [name for name in names if name not in PEERS]
    if unknown:
        raise InputError(f"--peers: got {', '.join(unknown)}; allowed: all, {', '.join(PEERS)}.")
    return [PEERS[name] for name in dict.fromkeys(names)]
