"""``flash_attn.flash_attn_interface``: attention on separate q, k and v, on packed sequences, and with a cache."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastattn import dispatch, rng
from fastattn.decoding import attention_with_kv_cache
from fastattn.dispatch import Explanation
from fastattn.errors import UnsupportedError, input_error
from fastattn.functional import attention, attention_varlen, explain, explain_varlen
from fastattn.inspection import attention_weights
from fastattn.rotary import apply_rotary
from fastattn.spec import AttentionSpec

WithProbs = Tensor | tuple[Tensor, Tensor, Tensor]


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] | Tensor = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> WithProbs:
    """``flash_attn.flash_attn_func``.

    Args:
        q: ``(B, S_q, H_q, D)``.
        k: ``(B, S_kv, H_kv, D)``; ``H_kv`` divides ``H_q``.
        v: ``(B, S_kv, H_kv, D_v)``.
        dropout_p: probability of dropping an attention weight; 0.0 during evaluation.
        softmax_scale: factor on the scores; None is ``D ** -0.5``.
        causal: attend to no later key, lower right.
        window_size: ``(left, right)`` neighbours, -1 unbounded.
        softcap: ``softcap * tanh(scores / softcap)``; 0.0 is off.
        alibi_slopes: ``(H_q,)`` or ``(B, H_q)``; adds ``-slope * |i + S_kv - S_q - j|``.
        deterministic: choose only among backends whose gradients repeat bit for bit.
        return_attn_probs: also return ``softmax_lse`` and ``S_dmask``.

    Returns:
        ``out`` ``(B, S_q, H_q, D_v)``. With ``return_attn_probs`` also ``softmax_lse``, fp32 ``(B, H_q, S_q)``, and
        ``S_dmask`` ``(B, H_q, S_q, S_kv)``, the probabilities before dropout, negative where dropped: meant for tests,
        and empty unless ``dropout_p > 0``. flash-attn's is scaled differently in each row, with sizes rounded up.

    Raises:
        InputError: an argument is wrong.
        UnsupportedError: ``deterministic=True``, and ``fastattn.use_backend`` names a backend that is not
        deterministic.

    Source:
        https://github.com/Dao-AILab/flash-attention

    Example:
        >>> import torch
        >>> from fastattn.integrations.flash_attn import flash_attn_func
        >>> q = torch.randn(2, 16, 8, 64)
        >>> flash_attn_func(q, q, q, causal=True, window_size=(8, -1)).shape
        torch.Size([2, 16, 8, 64])
    """
    scores: dict[str, Any] = {
        "causal": causal, "window": _window(window_size), "scale": softmax_scale, "softcap": softcap,
        "alibi_slopes": alibi_slopes, "rng_state": rng.new_rng_state(q.device) if dropout_p else None,
    }  # fmt: skip
    backend = _backend(explain(q, k, v, dropout_p=dropout_p, **scores)) if deterministic else None
    out, lse = attention(q, k, v, dropout_p=dropout_p, return_lse=True, backend=backend, **scores)
    if not return_attn_probs:
        return out
    return out, lse, _signed_weights(q, k, dropout_p, scores)


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] | Tensor = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> WithProbs:
    """``flash_attn.flash_attn_varlen_func``: sequences of different lengths, packed end to end.

    Args:
        q: ``(T_q, H_q, D)``.
        k: ``(T_kv, H_kv, D)``.
        v: ``(T_kv, H_kv, D_v)``.
        cu_seqlens_q: int32 ``(N + 1,)``, where each query sequence begins, and the end.
        cu_seqlens_k: likewise for the keys.
        max_seqlen_q: longest query sequence.
        max_seqlen_k: longest key sequence.
        dropout_p: this and the others as in ``flash_attn_func``.
        softmax_scale: as there.
        causal: as there, within each sequence.
        window_size: as there.
        softcap: as there.
        alibi_slopes: ``(H_q,)`` or ``(N, H_q)``.
        deterministic: as there.
        return_attn_probs: as there.
        block_table: int32 ``(N, max_pages)``, the pages of each sequence in a cache ``(num_pages, page_size, H_kv, D)``
            that k and v are then; ``cu_seqlens_k`` gives the lengths. As in flash-attn there is no gradient then.

    Returns:
        ``out`` ``(T_q, H_q, D_v)``. With ``return_attn_probs`` also ``softmax_lse``, fp32 ``(H_q, T_q)``, and
        ``S_dmask`` ``(N, H_q, max_seqlen_q, max_seqlen_k)``, 0 beyond the lengths.

    Raises:
        InputError: an argument is wrong.
        UnsupportedError: dropout with a ``block_table``.

    Example:
        >>> import torch
        >>> from fastattn.integrations.flash_attn import flash_attn_varlen_func
        >>> q, cu_seqlens = torch.randn(7, 4, 32), torch.tensor([0, 3, 7], dtype=torch.int32)
        >>> flash_attn_varlen_func(q, q, q, cu_seqlens, cu_seqlens, 4, 4, causal=True).shape
        torch.Size([7, 4, 32])
    """
    scores: dict[str, Any] = {
        "causal": causal, "window": _window(window_size), "scale": softmax_scale, "softcap": softcap,
        "alibi_slopes": alibi_slopes,
    }  # fmt: skip
    if block_table is not None:
        _refuse_dropout(dropout_p)
        lengths = cu_seqlens_k.diff().to(torch.int32)
        paged: dict[str, Any] = {"block_table": block_table, "cu_seqlens_q": cu_seqlens_q, "max_seqlen_q": max_seqlen_q}
        with torch.no_grad():
            out, lse = attention_with_kv_cache(q, k, v, lengths, return_lse=True, **paged, **scores)
        return (out, lse, q.new_empty(0)) if return_attn_probs else out
    scores["rng_state"] = rng.new_rng_state(q.device) if dropout_p else None
    options = scores | {"max_seqlen_q": max_seqlen_q, "max_seqlen_kv": max_seqlen_k, "dropout_p": dropout_p}
    packed = q, k, v, cu_seqlens_q, cu_seqlens_k
    backend = _backend(explain_varlen(*packed, **options)) if deterministic else None
    out, lse = attention_varlen(*packed, return_lse=True, backend=backend, **options)
    if not return_attn_probs:
        return out
    if not dropout_p:
        return out, lse, q.new_empty(0)
    signed = q.new_zeros(len(cu_seqlens_q) - 1, q.shape[1], max_seqlen_q, max_seqlen_k)
    begins = zip(*(cu.tolist() for cu in (cu_seqlens_q, cu_seqlens_k)), strict=True)
    for n, ((i0, j0), (i1, j1)) in enumerate(itertools.pairwise(begins)):
        own = scores | {"alibi_slopes": _of_sequence(alibi_slopes, n)}
        signed[n, :, : i1 - i0, : j1 - j0] = _signed_weights(q[None, i0:i1], k[None, j0:j1], dropout_p, own, n)[0]
    return out, lse, signed


@torch.no_grad()
def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] | Tensor = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """``flash_attn.flash_attn_with_kvcache``: decoding. New keys and values are written into the cache, in place.

    Args:
        q: ``(B, S_q, H_q, D)``.
        k_cache: ``(B_cache, S_cache, H_kv, D)``.
        v_cache: ``(B_cache, S_cache, H_kv, D_v)``.
        k: ``(B, S_new, H_kv, D)``, written to the cache from position ``cache_seqlens`` on; None appends nothing.
        v: ``(B, S_new, H_kv, D_v)``.
        rotary_cos: ``(S_rotary, D_rotary / 2)``; rotates ``k`` and ``q`` before use. Rows of q have the positions
            ``cache_seqlens + i`` with a causal or windowed mask, else all the position ``cache_seqlens``.
        rotary_sin: likewise.
        cache_seqlens: the number of tokens in each cache row before the call: an int or int32 ``(B,)``. None: all.
        cache_batch_idx: int32 ``(B,)``, the cache row of each batch entry; None is ``0 .. B - 1``.
        cache_leftpad: int32 ``(B,)``, the first token of each cache row that counts.
        block_table: int32 ``(B, max_pages)``, the pages of each sequence; the caches are then ``(num_pages, page_size,
            H_kv, D)``, with pages of any size.
        softmax_scale: as in ``flash_attn_func``.
        causal: query row ``i`` sees keys up to ``length - S_q + i``, ``length`` including the appended tokens.
        window_size: as in ``flash_attn_func``.
        softcap: as there.
        rotary_interleaved: rotate the pairs (0, 1), (2, 3), ...; False: pairs half of ``D_rotary`` apart.
        alibi_slopes: as there.
        num_splits: a scheduling hint of flash-attn; ignored.
        return_softmax_lse: also return lse.

    Returns:
        ``out`` ``(B, S_q, H_q, D_v)``; with ``return_softmax_lse`` also fp32 ``(B, H_q, S_q)``. As in flash-attn there
        is no gradient.

    Raises:
        InputError: an argument is wrong, or the new tokens do not fit into the cache.

    Example:
        >>> import torch
        >>> from fastattn.integrations.flash_attn import flash_attn_with_kvcache
        >>> k_cache, v_cache = (torch.zeros(2, 100, 4, 64) for _ in range(2))
        >>> q, k, v = torch.randn(3, 2, 1, 4, 64)
        >>> lengths = torch.tensor([5, 60], dtype=torch.int32)
        >>> flash_attn_with_kvcache(q, k_cache, v_cache, k, v, cache_seqlens=lengths, causal=True).shape
        torch.Size([2, 1, 4, 64])
        >>> bool((k_cache[1, 60] == k[1, 0]).all())
        True
    """
    capacity = k_cache.shape[1] * (1 if block_table is None else block_table.shape[1])
    before = _cache_lengths(q, capacity, k, v, cache_seqlens)
    if rotary_cos is not None or rotary_sin is not None:
        q, k = _rotated(
            q, k, rotary_cos, rotary_sin, before, causal or _window(window_size) != (-1, -1), rotary_interleaved
        )
    if cache_batch_idx is not None and block_table is None:
        block_table = cache_batch_idx.int()[:, None]  # a row of a contiguous cache is one page
    bias = None
    if cache_leftpad is not None:
        is_text = torch.arange(capacity, device=q.device) >= cache_leftpad[:, None]
        bias = torch.where(is_text, 0.0, float("-inf"))[:, None, None].to(q.dtype)
    out, lse = attention_with_kv_cache(
        q,
        k_cache,
        v_cache,
        before.int(),
        k,
        v,
        block_table=block_table,
        causal=causal,
        window=_window(window_size),
        scale=softmax_scale,
        softcap=softcap,
        bias=bias,
        alibi_slopes=alibi_slopes,
        return_lse=True,
    )
    return (out, lse) if return_softmax_lse else out


def _window(window_size: Sequence[int] | Tensor) -> tuple[int, int]:
    if not isinstance(window_size, tuple | list | Tensor) or len(window_size) != 2:
        raise input_error("window_size", repr(window_size), "(left, right)", "-1 leaves a side unbounded.")
    left, right = (max(-1, int(side)) for side in window_size)
    return left, right


@torch.no_grad()
def _signed_weights(q: Tensor, k: Tensor, dropout_p: float, scores: dict[str, Any], first: int = 0) -> Tensor:
    """The attention weights ``(B, H, S_q, S_kv)``, negative where dropout takes them; empty without dropout.

    ``first`` is the index of the first batch entry among the sequences of the call.
    """
    if not dropout_p:
        return q.new_empty(0)
    weights = attention_weights(q, k, **scores | {"rng_state": None})
    batch, heads, s_q, s_kv = weights.shape
    sizes = ((batch, 1, 1, 1), (heads, 1, 1), (s_q, 1), (s_kv,))
    b, h, i, j = (torch.arange(math.prod(size), device=q.device).view(size) for size in sizes)
    spec = AttentionSpec(scale=1.0, dropout_p=dropout_p)
    survives = rng.dropout_keep(spec, scores["rng_state"], (first + b) * heads + h, i, j)
    return torch.where(survives, weights, -weights).to(q.dtype)


def _of_sequence(alibi_slopes: Tensor | None, n: int) -> Tensor | None:
    return alibi_slopes if alibi_slopes is None or alibi_slopes.dim() == 1 else alibi_slopes[n : n + 1]


def _refuse_dropout(dropout_p: float) -> None:
    if dropout_p:
        raise UnsupportedError("dropout_p > 0 with a block_table: a cache is read without dropout. Pass 0.0.")


def _backend(explanation: Explanation) -> str:
    """The backend for a call whose forward and backward passes must be deterministic."""
    problem = dataclasses.replace(explanation.problem, deterministic=True, needs_grad=True)
    chosen = dispatch.select(problem, dispatch.requested(None))
    if chosen.capabilities.deterministic_by_flag and not torch.are_deterministic_algorithms_enabled():
        raise UnsupportedError(
            f"deterministic=True: the {chosen.name!r} backend repeats bit for bit under "
            "torch.use_deterministic_algorithms(True) alone. Turn that on, or use another backend."
        )
    return chosen.name


def _cache_lengths(
    q: Tensor, capacity: int, k: Tensor | None, v: Tensor | None, cache_seqlens: int | Tensor | None
) -> Tensor:
    """``(B,)`` int64: the number of tokens in each row of the cache, checked if it is in host memory."""
    if (k is None) != (v is None):
        raise input_error("k, v", "one of the two", "both or neither", "They are appended together.")
    if cache_seqlens is None:
        if k is not None:
            todo = "It says where to write."
            raise input_error("cache_seqlens", None, "an int or an int32 tensor when k and v are given", todo)
        cache_seqlens = capacity
    is_known = not isinstance(cache_seqlens, Tensor) or cache_seqlens.device.type == "cpu"
    lengths = torch.as_tensor(cache_seqlens, dtype=torch.int64)
    if isinstance(cache_seqlens, Tensor) and lengths.shape != q.shape[:1]:
        given = f"shape {tuple(lengths.shape)}"
        raise input_error("cache_seqlens", given, f"({q.shape[0]},), one for each batch entry", "Or an int for all.")
    room = capacity - (0 if k is None else k.shape[1])
    if is_known and bool(((lengths < 0) | (lengths > room)).any()):
        allowed = f"0 to {room}, what leaves room in a cache of {capacity}"
        raise input_error("cache_seqlens", lengths.tolist(), allowed, "Make the cache longer.")
    return lengths.to(q.device).expand(q.shape[0])


def _rotated(
    q: Tensor,
    k: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    begin: Tensor,
    advances: bool,
    interleaved: bool,
) -> tuple[Tensor, Tensor]:
    """q and k rotated by their positions; the rows of q share one position unless it ``advances``."""
    if cos is None or sin is None or k is None:
        given = ", ".join(n for n, x in (("rotary_cos", cos), ("rotary_sin", sin), ("k", k)) if x is not None)
        raise input_error("rotary_cos, rotary_sin", f"only {given}", "both, together with k and v", "As in flash-attn.")

    def rotate(x: Tensor, advances: bool) -> Tensor:
        steps = torch.arange(x.shape[1], device=x.device) if advances else torch.zeros(x.shape[1], device=x.device)
        at = begin[:, None] + steps.long()
        return apply_rotary(x, cos[at], sin[at], interleaved)

    return rotate(q, advances), rotate(k, True)
