"""``Peer``: an implementation of attention to compare with; those here need only torch and fastattn.

A peer gives reasons if it cannot run a workload, and otherwise prepares a function without arguments that runs its
forward pass. Preparation builds masks and compiles; it is not timed, which favours the peers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastattn
from fastattn.backends import load
from fastattn.measure.workload import DTYPES, Operands, Workload
from fastattn.problem import Inputs, Problem

Forward = Callable[[], Tensor]
Passed = tuple[Tensor | None, tuple[Tensor, ...]]


@dataclass(frozen=True)
class Peer:
    """An implementation that is measured.

    Attributes:
        name: its name in tables and in ``--peers``.
        reasons: ``reasons(workload, device_type)``, why it cannot run; [] means it can.
        prepare: ``prepare(operands)``, its forward pass, whose output has the layout of q: ``(B, S, H, D)`` or packed.
        has_backward: whether its forward pass can be differentiated.
        is_ours: whether it is fastattn, and so not one to compare with.
        scores_held: how many score matrices ``S_q x S_kv`` it holds at its peak, forward and backward.
    """

    name: str
    reasons: Callable[[Workload, str], list[str]]
    prepare: Callable[[Operands], Forward]
    has_backward: bool = True
    is_ours: bool = False
    scores_held: tuple[int, int] = (0, 0)


def pass_call(forward: Forward, operands: Operands, pass_name: str) -> Callable[[], Passed]:
    """The call of a pass: "forward" without a graph, "backward" over a graph built once, "both" one after the other.

    The call returns ``(out, gradients)``; "backward" returns no out, "forward" no gradients.
    """
    leaves, dout = list(operands.leaves.values()), operands.dout
    if pass_name == "forward":
        without_graph = torch.no_grad()(forward)
        return lambda: (without_graph(), ())
    if pass_name == "backward":
        built = forward()
        return lambda: (None, torch.autograd.grad(built, leaves, dout, retain_graph=True))

    def both() -> Passed:
        out = forward()
        return out, torch.autograd.grad(out, leaves, dout)

    return both


def cannot(workload: Workload, *features: str) -> list[str]:
    """A reason for each of the named, unsupported features that the workload uses.

    Features are "softcap", "alibi", "sinks", "bias", "mask", "window", "documents", "packed", "dropout", "gqa",
    "mixed head dims".
    """
    uses = {
        "softcap": workload.softcap is not None,
        "alibi": workload.alibi,
        "sinks": workload.sinks,
        "bias": workload.bias,
        "mask": workload.mask or workload.grid is not None,
        "window": workload.window is not None,
        "documents": workload.documents > 1,
        "packed": workload.packed,
        "dropout": workload.dropout_p > 0,
        "gqa": workload.heads_q != workload.heads_kv,
        "mixed head dims": workload.d_qk != workload.d_v,
    }
    why = {"dropout": "drops other elements, so its result cannot be checked"}
    return [why.get(feature, f"no {feature}") for feature in features if uses[feature]]


def _ours_reasons(backend: str | None) -> Callable[[Workload, str], list[str]]:
    def reasons(workload: Workload, device_type: str) -> list[str]:
        if backend is None:
            return []
        w = workload
        shapes = ((w.heads_q, w.d_qk), (w.heads_kv, w.d_qk), (w.heads_kv, w.d_v))
        q, k, v = (torch.empty(1, 1, *shape, dtype=DTYPES[w.dtype], device=device_type) for shape in shapes)
        # not explain(): it asks for the automatic choice, which may run a self-check in the middle of a benchmark
        return load(backend).unsupported_reasons(Problem.of(Inputs(q, k, v, max_seqlen_q=1, max_seqlen_kv=1), w.spec))

    return reasons


def fastattn_peer(backend: str | None) -> Peer:
    """fastattn on one backend; None lets it choose, as a user's call does."""

    def prepare(operands: Operands) -> Forward:
        w = operands.workload
        options: dict[str, Any] = {
            "causal": w.causal,
            "window": w.window,
            "softcap": w.softcap,
            "alibi_slopes": operands.alibi_slopes,
            "sinks": operands.sinks,
            "dropout_p": w.dropout_p,
            "rng_state": operands.rng_state,
            "backend": backend,
        }
        q, k, v = operands.q, operands.k, operands.v
        call: Callable[..., Any] = fastattn.attention
        if operands.cu_seqlens is None:
            options |= {"bias": operands.bias, "mask": operands.mask, "segment_ids": operands.segment_ids}
            options |= {"intervals": operands.intervals}
            return lambda: call(q, k, v, **options)
        cu_seqlens, longest = operands.cu_seqlens, w.longest
        options |= {"max_seqlen_q": longest, "max_seqlen_kv": longest}
        call_packed: Callable[..., Any] = fastattn.attention_varlen
        return lambda: call_packed(q, k, v, cu_seqlens, cu_seqlens, **options)

    name = f"fastattn-{backend}" if backend else "fastattn"
    return Peer(
        name, _ours_reasons(backend), prepare, is_ours=True, scores_held=(6, 8) if backend == "eager" else (0, 0)
    )


def eager_attention(operands: Operands, bias: Tensor | None, kept: Tensor | None) -> Tensor:
    """Softmax attention as written by hand, in the dtype of the inputs."""
    w = operands.workload
    q, k, v = (x.transpose(-3, -2) for x in (operands.q, operands.k, operands.v))
    if w.heads_q != w.heads_kv:
        k, v = (x.repeat_interleave(w.heads_q // w.heads_kv, dim=-3) for x in (k, v))
    scores = (q @ k.transpose(-1, -2)) * w.spec.scale  # [B, H_q, S_q, S_kv]
    if w.softcap is not None:
        scores = w.softcap * torch.tanh(scores / w.softcap)
    if bias is not None:
        scores = scores + bias
    if kept is not None:
        scores = scores.masked_fill(~kept, float("-inf"))
    if operands.sinks is None:
        p = torch.softmax(scores, dim=-1)
    else:
        column = operands.sinks[:, None, None].expand(*scores.shape[:-1], 1)
        p = torch.softmax(torch.cat([scores, column], dim=-1), dim=-1)[..., :-1]
    return (p @ v).transpose(-3, -2)


def bias_and_mask(operands: Operands) -> tuple[Tensor | None, Tensor | None]:
    """The additive and the boolean part of the scores, as tensors."""
    w = operands.workload
    bias = operands.bias
    if operands.alibi_slopes is not None:
        alibi = operands.alibi_bias().to(operands.q.dtype)
        bias = alibi if bias is None else bias + alibi
    return bias, operands.keep_matrix() if w.causal or w.has_mask else None


def _prepare_eager(operands: Operands) -> Forward:
    bias, kept = bias_and_mask(operands)
    return lambda: eager_attention(operands, bias, kept)


def sdpa_reasons(workload: Workload, device_type: str) -> list[str]:
    """The reasons why torch's ``scaled_dot_product_attention`` cannot express the workload."""
    return cannot(workload, "softcap", "sinks", "dropout")


def prepare_sdpa(operands: Operands) -> Forward:
    """``scaled_dot_product_attention``: with its causal flag if that suffices, else with a mask built beforehand.

    Packed documents of one length are a batch of them without one token to spare; others are padded to the longest.
    """
    w = operands.workload
    q, k, v = operands.q, operands.k, operands.v
    if w.spread is not None:
        return _prepare_padded_sdpa(operands)
    if w.packed:
        q, k, v = (x.unflatten(0, (w.documents, -1)) for x in (q, k, v))
        w = dataclasses.replace(
            w, batch=w.documents, s_q=w.s_q // w.documents, s_kv=w.s_kv // w.documents, documents=1, packed=False
        )
        operands = dataclasses.replace(operands, workload=w, q=q, k=k, v=v)
    q, k, v = (x.transpose(-3, -2) for x in (q, k, v))
    causal_flag = w.causal and not (w.has_mask or w.bias or w.alibi)
    bias, kept = (None, None) if causal_flag else bias_and_mask(operands)
    options: dict[str, Any] = {"scale": w.spec.scale, "is_causal": causal_flag, "enable_gqa": w.heads_q != w.heads_kv}
    is_packed = operands.cu_seqlens is not None

    def forward() -> Tensor:
        mask = bias
        if bias is not None and kept is not None:
            mask = bias.masked_fill(~kept, float("-inf"))  # part of every call if the bias learns
        elif kept is not None:
            mask = kept
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, **options).transpose(-3, -2)
        return out.flatten(0, 1) if is_packed else out

    return forward


def _prepare_padded_sdpa(operands: Operands) -> Forward:
    """Padding to the longest document, attention with a mask, and the tokens without the padding."""
    w = operands.workload
    count, longest, device = w.documents, w.longest, operands.q.device
    places = torch.cat([torch.arange(length) + n * longest for n, length in enumerate(w.lengths)]).to(device)
    is_there = torch.zeros(count * longest, dtype=torch.bool, device=device).index_fill(0, places, True)
    one = torch.arange(longest, device=device)
    band = dataclasses.replace(w, s_q=longest, s_kv=longest, documents=1, packed=False, spread=None)
    kept = is_there.view(count, 1, 1, longest) & band.keeps(one[:, None], one)
    kept = kept | (one[:, None] == one)  # rows of padding keep themselves: one without keys would be NaN

    def padded(x: Tensor) -> Tensor:
        rows = x.new_zeros(count * longest, *x.shape[1:]).index_copy(0, places, x)
        return rows.unflatten(0, (count, longest)).transpose(1, 2)

    def forward() -> Tensor:
        q, k, v = (padded(x) for x in (operands.q, operands.k, operands.v))
        options: dict[str, Any] = {"scale": w.spec.scale, "enable_gqa": w.heads_q != w.heads_kv}
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=kept, **options)
        return out.transpose(1, 2).flatten(0, 1).index_select(0, places)

    return forward


EAGER = Peer("eager", lambda workload, device_type: cannot(workload, "dropout"), _prepare_eager, scores_held=(3, 5))
SDPA = Peer("sdpa", sdpa_reasons, prepare_sdpa)
