"""Attention to a cache of keys and values, as a public function."""

from __future__ import annotations

from torch import Tensor

from fastattn import plan
from fastattn.arguments import Window, cache_problem
from fastattn.dispatch import Explanation, check_name, requested
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
        >>> k_cache, v_cache = (torch.zeros(20, 16, 2, 64) for _ in range(2))    # 20 pages of 16 rows
        >>> block_table = torch.tensor([[3, 9], [4, 0]], dtype=torch.int32)
        >>> lengths = torch.tensor([17, 5], dtype=torch.int32)
        >>> q, k = torch.randn(2, 1, 8, 64), torch.randn(2, 1, 2, 64)
        >>> out = fastattn.attention_with_kv_cache(q, k_cache, v_cache, lengths, k, k, block_table=block_table)
        >>> out.shape, bool((k_cache[9, 1] == k[0, 0]).all())
        (torch.Size([2, 1, 8, 64]), True)
    """
    tensors, kind = (q, k_cache, v_cache, cache_lengths, k, v, block_table), None
    if cu_seqlens_q is rotary_cos is rotary_sin is k_scale is v_scale is bias is alibi_slopes is sinks is None:
        options = ("cache", causal, type(causal), window, scale, softcap, max_seqlen_q, requested(backend))
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
    return_lse: bool = False,
    backend: str | None = None,
) -> Explanation:
    """Name the backend that would serve ``attention_with_kv_cache``, with the reasons against the others.

    Nothing is computed and nothing is appended. As ``fastattn.explain`` otherwise.

    Example:
        >>> import torch, fastattn
        >>> cache, lengths = torch.zeros(2, 16, 2, 64), torch.tensor([5, 9], dtype=torch.int32)
        >>> fastattn.explain_with_kv_cache(torch.randn(2, 1, 8, 64), cache, cache, lengths).reasons["eager"]
        []
    """
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
    )
    check_name(backend)
    check_cache_inputs(inputs, spec)
    return Explanation.of(facts_of(inputs, spec))
