"""The public functions of attention to a cache of keys and values."""

from __future__ import annotations

from typing import Never

import torch
from torch import Tensor

from fastattn import plan
from fastattn.arguments import Window, cache_problem
from fastattn.dispatch import Explanation, check_name, requested, wants_batch_invariance
from fastattn.errors import name_error
from fastattn.kv_cache import check_cache_inputs, facts_of
from fastattn.serving import cache_by_plan, serve_cache


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
    tree_mask: Tensor | None = None,
    batch_invariant: bool = False,
    return_lse: bool = False,
    backend: str | None = None,
    **misnamed: Never,
) -> Tensor | tuple[Tensor, Tensor]:
    """Append the keys and values of new tokens to a cache, in place, and attend to it: decoding.

    Each sequence ``b`` has ``cache_lengths[b]`` positions in the cache. The rows of ``k`` and ``v``, if given, are
    written to the positions that follow. ``out`` is then the result of ``fastattn.attention`` for q and all ``S_kv``
    positions of the sequence, whether the cache is contiguous or paged:

        page_size = 4, block_table[b] = [7, 2, ...], cache_lengths[b] = 5, one new token:

        page 7:  0 1 2 3        page 2:  4 [5] . .        S_kv = 6

    Pages of which no query row keeps a position are neither read nor looked up, and the rows of a page beyond ``S_kv``
    may hold anything, NaN included. ``cache_lengths`` is not changed. There is no gradient.

    Args:
        q: queries ``(B, S_q, H_q, D_qk)``, or packed ``(T_q, H_q, D_qk)`` with ``cu_seqlens_q``, so that one call
            serves sequences that decode one token and sequences with a whole prompt. The last query of a sequence is at
            its last position.
        k_cache: contiguous ``(B, S_max, H_kv, D_qk)``, or paged ``(P, page_size, H_kv, D_qk)`` with ``block_table``. In
            the dtype of q, or ``torch.float8_e4m3fn``.
        v_cache: ``(B, S_max, H_kv, D_v)`` or ``(P, page_size, H_kv, D_v)``, likewise.
        cache_lengths: int32 ``(B,)``, positions filled before the call. In host memory its values are checked; on a
            GPU they are not read by the host, and the caller has to make sure that they are right.
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
        rotary_cos: ``(S_rotary, D_rotary / 2)`` from ``fastattn.nn.rotary.rotary_tables``, with ``S_rotary`` at least
            the capacity of the cache. q and k are rotated by their positions first, and k is stored rotated.
        rotary_sin: likewise.
        rotary_interleaved: True rotates neighbouring head dims ``(2i, 2i + 1)``; False pairs ``D_rotary / 2`` apart.
        k_scale: fp32 ``(H_kv,)``, or ``(P, H_kv)`` for each page, of an e4m3 cache: ``key = stored * k_scale``. New
            keys are divided by it and rounded, with a relative error of at most ``2^-4``; None is 1.
        v_scale: likewise.
        tree_mask: the new tokens are the nodes of trees, one for each sequence, as in speculative decoding: int32 words
            ``(B|1, S_new, ceil(S_new / 32))``, packed ``(T_q, ceil(max_seqlen_q / 32))``, or boolean ``(B|1, S_new,
            S_new)``, packed ``(T_q, max_seqlen_q)``, True = attend. A new token sees all positions before the call, and
            of the new ones those whose bit is set in its row: its ancestors and itself. Its depth, the number of its
            bits less 1, counts for its position in rotary embedding, window and ALiBi, so that its ``out`` is that of
            decoding its path alone. Each query needs a new token, and ``causal`` must be True.
            ``fastattn.nn.tree_mask`` makes the words of parents; ``KVCache.keep`` and ``PagedKVCache.keep`` keep the
            accepted path.
        batch_invariant: True gives each sequence the same bits whatever other sequences are in the call, in which
            order, and with whatever page size; slower. ``fastattn.use_batch_invariance`` asks for it in a block. Only
            ``cpu``, ``triton`` and ``cuda`` can.
        return_lse: also return the log-sum-exp of each row.
        backend: a name from ``fastattn.backends()``, which runs or raises; None chooses.

    Returns:
        ``out`` like q but with ``D_v``; with ``return_lse`` also ``lse``, ``(B, H_q, S_q)`` or ``(H_q, T_q)``, fp32
        (fp64 for fp64 inputs).

    Raises:
        InputError: an argument is wrong, or a tensor requires grad. The caches are then unchanged.
        UnsupportedError: the backend asked for cannot serve the call; the message gives its reasons.

    Source:
        Kwon et al., "Efficient memory management for large language model serving with PagedAttention", 2023.

    Example:
        >>> import torch, fastattn
        >>> k_cache, v_cache = (torch.zeros(20, 16, 2, 64) for _ in range(2))    # 20 pages of 16 rows
        >>> block_table = torch.tensor([[3, 9], [4, 0]], dtype=torch.int32)
        >>> lengths = torch.tensor([17, 5], dtype=torch.int32)
        >>> q, k = torch.randn(2, 1, 8, 64), torch.randn(2, 1, 2, 64)
        >>> out = fastattn.attention_with_kv_cache(q, k_cache, v_cache, lengths, k, k, block_table=block_table)
        >>> out.shape, bool((k_cache[9, 1] == k[0, 0]).all())
        (torch.Size([2, 1, 8, 64]), True)
    """
    if misnamed:
        raise name_error(attention_with_kv_cache, misnamed)
    tensors, kind = (q, k_cache, v_cache, cache_lengths, k, v, block_table), None
    if not torch.compiler.is_compiling() and (
        cu_seqlens_q
        is rotary_cos
        is rotary_sin
        is k_scale
        is v_scale
        is bias
        is alibi_slopes
        is sinks
        is tree_mask
        is None
    ):
        invariant = wants_batch_invariance(batch_invariant)
        options = ("cache", causal, type(causal), window, scale, softcap, max_seqlen_q, requested(backend), invariant)
        kind, planned = plan.look_up(tensors, options)
        if planned is not None:
            out, lse = cache_by_plan(planned, tensors)
            return (out, lse) if return_lse else out
    inputs, spec = cache_problem(
        *tensors[:6],
        block_table=block_table,
        cu_seqlens_q=cu_seqlens_q,
        max_seqlen_q=max_seqlen_q,
        causal=causal,
        window=window,
        scale=scale,
        softcap=softcap,
        bias=bias,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
        rotary_cos=rotary_cos,
        rotary_sin=rotary_sin,
        rotary_interleaved=rotary_interleaved,
        k_scale=k_scale,
        v_scale=v_scale,
        tree_mask=tree_mask,
        batch_invariant=wants_batch_invariance(batch_invariant),
    )
    out, lse = serve_cache(inputs, spec, backend, kind)
    return (out, lse) if return_lse else out


def explain_with_kv_cache(
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
    tree_mask: Tensor | None = None,
    batch_invariant: bool = False,
    return_lse: bool = False,
    backend: str | None = None,
    **misnamed: Never,
) -> Explanation:
    """Name the backend that would serve ``attention_with_kv_cache``, with the reasons against the others.

    Nothing is computed or appended. Arguments are those of ``attention_with_kv_cache``, the result is that of
    ``fastattn.explain``.

    Example:
        >>> import torch, fastattn
        >>> cache, lengths = torch.zeros(2, 16, 2, 64), torch.tensor([5, 9], dtype=torch.int32)
        >>> fastattn.explain_with_kv_cache(torch.randn(2, 1, 8, 64), cache, cache, lengths).reasons["eager"]
        []
    """
    if misnamed:
        raise name_error(explain_with_kv_cache, misnamed)
    inputs, spec = cache_problem(
        q,
        k_cache,
        v_cache,
        cache_lengths,
        k,
        v,
        block_table=block_table,
        cu_seqlens_q=cu_seqlens_q,
        max_seqlen_q=max_seqlen_q,
        causal=causal,
        window=window,
        scale=scale,
        softcap=softcap,
        bias=bias,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
        rotary_cos=rotary_cos,
        rotary_sin=rotary_sin,
        rotary_interleaved=rotary_interleaved,
        k_scale=k_scale,
        v_scale=v_scale,
        tree_mask=tree_mask,
        batch_invariant=wants_batch_invariance(batch_invariant),
    )
    check_name(backend)
    check_cache_inputs(inputs, spec)
    return Explanation.of(facts_of(inputs, spec))
