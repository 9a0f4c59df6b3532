"""``attention_with_kv_cache``: names and defaults, turned into ``CacheInputs`` and ``AttentionSpec``. No arithmetic."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastattn import dispatch, ops, plan
from fastattn.errors import input_error
from fastattn.functional import Window, autocast, band, four_dims, longest, make_spec, per_head
from fastattn.kv_cache import CacheInputs, cache_problem, check_cache_inputs
from fastattn.problem import check_rank


def attention_with_kv_cache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_lengths: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    *,
    block_table: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    max_seqlen_q: int | None = None,
    causal: bool = True,
    window: Window | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    rotary_interleaved: bool = False,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of new tokens to a cache of keys and values, to which theirs are appended first: decoding.

    Each sequence ``b`` has ``cache_lengths[b]`` positions in the cache. With ``k`` and ``v`` their rows are written, in
    place, to the positions that follow. Then ``out`` is what ``fastattn.attention`` gives for q and all of the ``S_kv``
    positions that the sequence has by now, whether the cache is contiguous or paged:

        page_size = 4, block_table[b] = [7, 2, ...], cache_lengths[b] = 5, one new token:

        page 7:  0 1 2 3        page 2:  4 [5] . .        S_kv = 6

    Pages that no query row keeps a position of are not read, nor are their numbers looked up, and the rows of a page
    beyond ``S_kv`` may hold anything, NaN included. ``cache_lengths`` itself is left alone. There is no gradient.

    Args:
        q: queries ``(B, S_q, H_q, D_qk)``, or packed ``(T_q, H_q, D_qk)`` with ``cu_seqlens_q``: sequences that decode
            one token and sequences whose prompt is still to be read go into one call. The last query of a sequence
            stands at its last position.
        k_cache: contiguous ``(B, S_max, H_kv, D_qk)``, or paged ``(P, page_size, H_kv, D_qk)`` with ``block_table``. In
            the dtype of q, or ``torch.float8_e4m3fn``.
        v_cache: ``(B, S_max, H_kv, D_v)`` or ``(P, page_size, H_kv, D_v)``, likewise.
        cache_lengths: int32 ``(B,)``, positions filled before the call. Stays on the device: on a GPU nothing waits for
            it, so there the caller answers for its values; in host memory they are checked.
        k: new keys ``(B, S_new, H_kv, D_qk)``, packed like q ``(T_q, H_kv, D_qk)``; None appends nothing.
        v: new values, likewise.
        block_table: int32 ``(B, max_pages)``, the pages of each sequence in order; any ``page_size``. Entries of pages
            that are not in use, or that a window has left behind, may be anything.
        cu_seqlens_q: int32 ``(B + 1,)``, where each sequence's rows of a packed q (and k, v) begin, and the end.
        max_seqlen_q: longest query sequence. None reads it from ``cu_seqlens_q``, which on a GPU waits for the device.
        causal: attend to no later key; False lets every query see all ``S_kv`` (cross-attention).
        window: ``(left, right)`` neighbours, as in ``fastattn.attention``.
        scale: factor on the scores; None is ``D_qk ** -0.5``.
        softcap: as in ``fastattn.attention``.
        bias: added to the scores; broadcasts to ``(B, H_q, S_q, S_bias)`` with ``S_kv <= S_bias``; dense q only.
        alibi_slopes: ``(H_q,)`` or ``(B, H_q)``; adds ``-slope * distance`` to the diagonal.
        sinks: ``(H_q,)``, a logit for each head that takes part in the softmax but has no value.
        rotary_cos: ``(S_rotary, D_rotary / 2)`` from ``fastattn.nn.rotary.rotary_tables``, ``S_rotary`` at least what
            the cache holds. q and k are turned to their positions first, and k is stored turned. Without k, only q.
        rotary_sin: likewise.
        rotary_interleaved: pairs are neighbours ``(2i, 2i + 1)``; False: half of ``D_rotary`` apart.
        k_scale: fp32 ``(H_kv,)``, or ``(P, H_kv)`` for each page, of an e4m3 cache: ``key = stored * k_scale``. New
            keys are divided by it and rounded, at most ``2^-4`` of each number off; None is 1.
        v_scale: likewise.
        return_lse: also return the log-sum-exp of each row.
        backend: a name from ``fastattn.backends()``, which runs or raises; None chooses.

    Returns:
        ``out`` like q but with ``D_v``; with ``return_lse`` also ``lse``, fp32 ``(B, H_q, S_q)`` or ``(H_q, T_q)``.

    Raises:
        InputError: an argument is wrong, or a tensor requires grad. The caches are then as they were.
        UnsupportedError: the backend asked for cannot serve the call; the message gives its reasons.

    Source:
        Kwon et al., "Efficient memory management for large language model serving with PagedAttention", 2023.

    Example:
        >>> import torch, fastattn
        >>> k_cache = v_cache = torch.zeros(20, 16, 2, 64)                       # 20 pages of 16 rows
        >>> block_table = torch.tensor([[3, 9], [4, 0]], dtype=torch.int32)
        >>> lengths = torch.tensor([17, 5], dtype=torch.int32)
        >>> q, k = torch.randn(2, 1, 8, 64), torch.randn(2, 1, 2, 64)
        >>> out = fastattn.attention_with_kv_cache(q, k_cache, v_cache, lengths, k, k, block_table=block_table)
        >>> out.shape, bool((k_cache[9, 1] == k[0, 0]).all())
        (torch.Size([2, 1, 8, 64]), True)
    """
    tensors = (q, k_cache, v_cache, cache_lengths, k, v, block_table)
    like = None
    if cu_seqlens_q is rotary_cos is rotary_sin is k_scale is v_scale is bias is alibi_slopes is sinks is None:
        like = _likeness(tensors, (causal, window, scale, softcap, max_seqlen_q, backend))
        if like is not None and (run := plan.known(like)) is not None:
            out, lse = run(*tensors)
            return (out, lse) if return_lse else out
    dispatch.check_name(backend)
    is_packed = cu_seqlens_q is not None
    order = "(T_q, H, D), packed as cu_seqlens_q says" if is_packed else "(B, S, H, D); packed needs cu_seqlens_q"
    check_rank({"q": q}, range(3, 4) if is_packed else range(4, 5), order)
    check_rank({"k_cache": k_cache, "v_cache": v_cache}, range(4, 5), "(B, S_max, H, D) or (P, page_size, H, D)")
    _check_tensors(cache_lengths=cache_lengths)
    optional = {"k": k, "v": v, "block_table": block_table, "rotary_cos": rotary_cos, "rotary_sin": rotary_sin}
    _check_tensors(**{name: x for name, x in optional.items() if x is not None})
    (q,) = autocast(q)
    k, v = (None if x is None else autocast(x)[0] for x in (k, v))
    inputs = CacheInputs(
        q=q,
        k_cache=k_cache,
        v_cache=v_cache,
        cache_lengths=cache_lengths,
        k=k,
        v=v,
        block_table=block_table,
        cu_seqlens_q=cu_seqlens_q,
        rotary_cos=rotary_cos,
        rotary_sin=rotary_sin,
        k_scale=per_head("k_scale", k_scale),
        v_scale=per_head("v_scale", v_scale),
        bias=four_dims("bias", bias),
        alibi_slopes=per_head("alibi_slopes", alibi_slopes),
        sinks=per_head("sinks", sinks),
        max_seqlen_q=q.shape[1] if cu_seqlens_q is None else longest("q", cu_seqlens_q, max_seqlen_q, q.device),
        rotary_interleaved=rotary_interleaved,
    )
    spec = make_spec(q, scale, softcap, band(causal, window), 0.0)
    check_cache_inputs(inputs, spec)
    if dispatch.explained and dispatch.note(lambda: cache_problem(inputs, spec)):
        return q
    with torch.no_grad():
        out, lse = ops.attend_to_cache(inputs, spec, dispatch.requested(backend))
    if like is not None and not plan.is_known(like):
        plan.remember(like, ops.prepared_for_cache(inputs, spec, dispatch.requested(backend)))
    return (out, lse) if return_lse else out


explain_with_kv_cache = dispatch.explainer(attention_with_kv_cache)


def _likeness(tensors: Sequence[Tensor | None], options: tuple[Any, ...]) -> Hashable | None:
    """What the call has in common with those like it; None if it has to go the long way."""
    like = None if dispatch.explained else plan.signature(tensors, (*options, dispatch.requested(None)))
    if like is not None:
        ops.refuse_context_parallel()
    return like


def _check_tensors(**tensors: Tensor) -> None:
    for name, x in tensors.items():
        if not isinstance(x, Tensor):
            raise input_error(name, type(x).__name__, "a torch.Tensor", "Convert it with torch.as_tensor.")
