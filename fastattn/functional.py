"""The public functions: ``arguments.py`` turns their arguments into a problem, ``serving.py`` has it computed."""

from __future__ import annotations

from typing import Any, Literal, Never

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.nn import Parameter
from torch.overrides import handle_torch_function, has_torch_function_variadic

from fastattn import plan, reference, state
from fastattn.arguments import Window, dense_problem, packed_problem, torch_problem, with_rng_state
from fastattn.autograd import needs_gradient
from fastattn.dispatch import Explanation, check_name, requested, requested_now
from fastattn.errors import input_error, name_error
from fastattn.layout import Layout, check_cu_seqlens_values, from_internal
from fastattn.nested import Packed
from fastattn.ops import without_autocast
from fastattn.problem import MORE, Inputs, Problem, check_inputs
from fastattn.serving import by_plan, serve
from fastattn.spec import AttentionSpec
from fastattn.statistics import statistics


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    window: Window | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    segment_ids: Tensor | tuple[Tensor, Tensor] | None = None,
    intervals: Tensor | None = None,
    dropout_p: float = 0.0,
    rng_state: Tensor | None = None,
    layout: Layout = "BSHD",
    return_lse: bool = False,
    return_weights: bool | Literal["mean"] = False,
    return_stats: bool = False,
    backend: str | None = None,
    **misnamed: Never,
) -> Tensor | tuple[Any, ...]:
    """Scaled dot-product attention with every option of the spec, fused and differentiable.

    ``out = dropout(softmax(cap(scale * q @ k^T) + bias + alibi, where kept)) @ v``. ``fastattn/spec.py`` has the full
    order of operations and drawings of the masks.

    Args:
        q: queries ``(B, S_q, H_q, D_qk)``; float16, bfloat16, float32 or float64. q, k and v may be nested tensors
            ``(N, S_n, H, D)``, without bias, mask, segment_ids, intervals and further results.
        k: keys ``(B, S_kv, H_kv, D_qk)``; ``H_kv`` divides ``H_q`` (grouped and multi-query attention).
        v: values ``(B, S_kv, H_kv, D_v)``.
        causal: attend to no later key. The last query sees the last key (lower right), as decoding needs:

                S_q = 2, S_kv = 5:   1 1 1 1 0
                                     1 1 1 1 1

        window: ``(left, right)``, the number of neighbours kept on each side of the diagonal, which is kept too; None
            or -1 is unbounded on that side. With ``causal`` the right side is 0. ``window=(1, 0)``:

                S_q = S_kv = 4:      1 0 0 0
                                     1 1 0 0
                                     0 1 1 0
                                     0 0 1 1

        scale: factor on the scores; None is ``D_qk ** -0.5``.
        softcap: ``softcap * tanh(scores / softcap)`` before bias and masks (Gemma 2); None or 0 is off.
        bias: added to the scores, any shape that broadcasts to ``(B, H_q, S_q, S_kv)``; has a gradient. A pair whose
            bias is -inf is not kept.
        mask: boolean, True = attend, any shape that broadcasts to ``(B, H_q, S_q, S_kv)``.
        alibi_slopes: ``(H_q,)`` or ``(B, H_q)``; adds ``-slope * distance`` from the diagonal (Press et al., 2021).
        sinks: ``(H_q,)``, a logit for each head that takes part in the softmax but has no value; has a gradient.
        segment_ids: ``(B, S)`` integers; tokens attend inside their own segment. Pass a pair ``(for q, for kv)`` if
            queries and keys have different ids.
        intervals: int32 ``(1|B, 1|H_q, S_q, n, 2)``: each query row keeps the union of n ranges ``[start, stop)`` of
            keys, of what all else keeps. Leading dimensions of 1 may be left out. ``fastattn.intervals`` builds them.
        dropout_p: probability of dropping an attention weight; pass 0 during evaluation.
        rng_state: int64 ``(2,)``, seed and offset of dropout; None draws from torch's generator.
        layout: ``"BSHD"`` or ``"BHSD"``: order of the dimensions of q, k, v and out.
        return_lse: also return the log-sum-exp of each row.
        return_weights: also return the attention weights after dropout, computed by the reference formula for
            inspection: they take the quadratic memory that fused attention avoids. ``"mean"`` averages them over the
            heads, computed one by one. ``out`` still comes from the backend.
        return_stats: also return ``Statistics`` of the weights before dropout, in linear memory: entropy, largest logit
            and its key for each row, sum and maximum for each key; ``fastattn/spec.py`` defines them.
        backend: a name from ``fastattn.backends()``, which runs or raises; None chooses.

    Returns:
        ``out`` like q but with ``D_v``; with ``return_lse`` also ``lse``, ``(B, H_q, S_q)``, natural log; with
        ``return_weights`` also the weights ``(B, H_q, S_q, S_kv)``, or their mean ``(B, S_q, S_kv)``; with
        ``return_stats`` last the statistics. lse and weights are fp32 (fp64 for fp64 inputs). Each result is
        differentiable, of the statistics those that have a derivative. A row that keeps no key gives 0, lse ``-inf``
        and zero gradients, never NaN. Results do not depend on the backend beyond rounding; the dropped elements do
        not depend on it at all.

    Raises:
        InputError: an argument is wrong; the message names it, what was given, what is allowed and what to do.
        UnsupportedError: the backend asked for cannot serve the call; the message gives its reasons.
        TypeError: an argument has another name here; the message suggests it.

    Source:
        Vaswani et al., "Attention is all you need", 2017; Dao, "FlashAttention-2", 2023.

    Example:
        >>> import torch, fastattn
        >>> q = torch.randn(2, 128, 8, 64)
        >>> k = v = torch.randn(2, 128, 2, 64)
        >>> fastattn.attention(q, k, v, causal=True, window=(32, 0)).shape
        torch.Size([2, 128, 8, 64])
    """
    if misnamed:
        raise name_error(attention, misnamed)
    if return_weights not in (False, True, "mean"):
        todo = '"mean" averages over the heads.'
        raise input_error("return_weights", repr(return_weights), 'True, False or "mean"', todo)
    kind = None
    if not (dropout_p or return_weights or return_stats or is_compiling()):
        more = _more(bias, mask, alibi_slopes, sinks, segment_ids, intervals)
        asked = requested_now(backend)
        options = ("attention", causal, type(causal), window, scale, softcap, layout, return_lse, asked)
        kind, planned = (None, None) if more is None else plan.look_up((q, k, v, *more), options)
        if planned is not None:
            return by_plan(planned, q, k, v, return_lse, more)  # type: ignore[arg-type]
    given: dict[str, Any] = {
        "causal": causal, "window": window, "scale": scale, "softcap": softcap, "bias": bias, "mask": mask,
        "alibi_slopes": alibi_slopes, "sinks": sinks, "segment_ids": segment_ids, "intervals": intervals,
        "dropout_p": dropout_p, "rng_state": rng_state, "layout": layout,
    }  # fmt: skip
    if has_torch_function_variadic(q, k, v) or state.whole_rows is not None:
        given |= {"return_lse": return_lse, "return_weights": return_weights, "return_stats": return_stats}
        given |= {"backend": backend}
        if state.whole_rows is not None:
            return state.whole_rows(q, k, v, **given)
        return handle_torch_function(attention, (q, k, v), q, k, v, **given)
    if isinstance(q, Tensor) and q.is_nested:
        return _of_nested(q, k, v, given, return_lse or return_weights or return_stats, backend)
    inputs, spec = dense_problem(q, k, v, **given)
    inputs = with_rng_state(inputs, spec)
    out, lse = serve(inputs, spec, backend, kind=kind, heads_first=layout == "BHSD", with_lse=return_lse)
    out = from_internal(out, layout)
    extras: list[Any] = [lse] if return_lse else []
    if return_weights:
        with without_autocast(q.device.type):
            weights = reference.mean_weights if return_weights == "mean" else reference.weights
            extras.append(weights(inputs, spec))
    if return_stats:
        extras.append(statistics(inputs, spec, requested(backend)))
    return (out, *extras) if extras else out


def _more(
    bias: Tensor | None,
    mask: Tensor | None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    segment_ids: Any = None,
    intervals: Tensor | None = None,
) -> tuple[Tensor | None, ...] | None:
    """What follows q, k and v in a planned call, in the shapes of ``Inputs``; None for what the long way refuses."""
    if bias is mask is alibi_slopes is sinks is segment_ids is intervals is None:
        return ()
    segments = segment_ids if isinstance(segment_ids, tuple) else (segment_ids, segment_ids)
    found: list[Any] = []
    for x, dims in ((bias, 4), (mask, 4), (alibi_slopes, 2), (sinks, 2), (intervals, 5)):
        if x is not None and (type(x) not in (Tensor, Parameter) or x.dim() > dims):
            return None
        if x is not None and x is intervals and x.shape[-2:-1] == (0,):
            return None  # its plan would be one for a range in each row
        found.append(x if x is None or x.dim() == dims else x[(None,) * (dims - x.dim())])
    return (*found[:4], *segments, found[4], None, None) if len(segments) == 2 else None


def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_kv: Tensor,
    *,
    max_seqlen_q: int | None = None,
    max_seqlen_kv: int | None = None,
    causal: bool = False,
    window: Window | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    intervals: Tensor | None = None,
    dropout_p: float = 0.0,
    rng_state: Tensor | None = None,
    return_lse: bool = False,
    return_stats: bool = False,
    backend: str | None = None,
    **misnamed: Never,
) -> Tensor | tuple[Any, ...]:
    """Attention over sequences of different lengths, packed end to end without padding.

    Sequence ``n`` has query rows ``cu_seqlens_q[n] : cu_seqlens_q[n + 1]`` and key rows ``cu_seqlens_kv[n] :
    cu_seqlens_kv[n + 1]``. Its result is that of ``attention`` on it alone. Zero-length sequences are allowed.

    Args:
        q: queries ``(T_q, H_q, D_qk)``.
        k: keys ``(T_kv, H_kv, D_qk)``.
        v: values ``(T_kv, H_kv, D_v)``.
        cu_seqlens_q: int32 ``(N + 1,)``, a running sum of the lengths that begins with 0 and ends with ``T_q``.
            Its values are checked in host memory only; on a GPU reading them would stall the device.
        cu_seqlens_kv: the same for the keys.
        max_seqlen_q: longest query sequence. None reads it from ``cu_seqlens_q``, which on a GPU waits for the device.
        max_seqlen_kv: longest key sequence, likewise.
        causal: as in ``attention``, within each sequence (lower right).
        window: as in ``attention``.
        scale: as in ``attention``.
        softcap: as in ``attention``.
        alibi_slopes: ``(H_q,)`` or ``(N, H_q)``.
        sinks: ``(H_q,)``, as in ``attention``.
        intervals: int32 ``(1, 1|H_q, T_q, n, 2)``, as in ``attention``; ranges count from the start of each sequence.
        dropout_p: as in ``attention``.
        rng_state: as in ``attention``; positions count from the start of each sequence.
        return_lse: also return lse.
        return_stats: as in ``attention``; positions of keys count from the start of each sequence.
        backend: as in ``attention``.

    Returns:
        ``out`` ``(T_q, H_q, D_v)``; with ``return_lse`` also ``lse`` ``(H_q, T_q)``, fp32 (fp64 for fp64 inputs); with
        ``return_stats`` last ``Statistics``.

    Raises:
        InputError: an argument is wrong.
        UnsupportedError: the backend asked for cannot serve the call.

    Example:
        >>> import torch, fastattn
        >>> q = torch.randn(7, 4, 32)
        >>> cu_seqlens = torch.tensor([0, 3, 7], dtype=torch.int32)
        >>> fastattn.attention_varlen(q, q, q, cu_seqlens, cu_seqlens, causal=True).shape
        torch.Size([7, 4, 32])
    """
    if misnamed:
        raise name_error(attention_varlen, misnamed)
    kind = None
    given = None if is_compiling() else _more(None, None, intervals=intervals)
    is_plain = alibi_slopes is sinks is None and given is not None and not (dropout_p or return_stats)
    if is_plain and max_seqlen_q is not None and max_seqlen_kv is not None:
        options = ("varlen", causal, type(causal), window, scale, softcap, return_lse, max_seqlen_q, max_seqlen_kv)
        more = (*(given or (None,) * len(MORE))[:-2], cu_seqlens_q, cu_seqlens_kv)
        kind, planned = plan.look_up((q, k, v, *more), (*options, requested_now(backend)))
        if planned is not None:
            for name, ends, x, most in (
                ("cu_seqlens_q", cu_seqlens_q, q, max_seqlen_q),
                ("cu_seqlens_kv", cu_seqlens_kv, k, max_seqlen_kv),
            ):
                check_cu_seqlens_values(name, ends.tolist(), x.shape[0], most)
            return by_plan(planned, q, k, v, return_lse, more)
    inputs, spec = packed_problem(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_kv,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_kv=max_seqlen_kv,
        causal=causal,
        window=window,
        scale=scale,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
        intervals=intervals,
        dropout_p=dropout_p,
        rng_state=rng_state,
    )
    out, lse = serve(inputs, spec, backend, kind=kind, with_lse=return_lse)
    extras: list[Any] = [lse] if return_lse else []
    if return_stats:
        extras.append(statistics(inputs, spec, requested(backend)))
    return (out, *extras) if extras else out


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Replace ``torch.nn.functional.scaled_dot_product_attention``: the same arguments with the same meaning.

    Args:
        query: ``(N, ..., H_q, L, E)``.
        key: ``(N, ..., H, S, E)``.
        value: ``(N, ..., H, S, E_v)``.
        attn_mask: broadcasts to ``(N, ..., H_q, L, S)``; boolean (True = attend), or added to the scores, with a
            gradient.
        dropout_p: probability of dropping an attention weight; as in torch it applies in evaluation too.
        is_causal: attend to no later key, counted from the upper left. Excludes ``attn_mask``. ``L = 2``, ``S = 5``:

                1 0 0 0 0
                1 1 0 0 0

        scale: factor on the scores; None is ``E ** -0.5``.
        enable_gqa: allow ``H < H_q``, each key/value head serving ``H_q // H`` query heads.

    Returns:
        ``(N, ..., H_q, L, E_v)``. Rows that attend to nothing are 0.

    Raises:
        InputError: an argument is wrong.

    Example:
        >>> import torch, fastattn
        >>> q = torch.randn(2, 8, 128, 64)
        >>> fastattn.scaled_dot_product_attention(q, q, q, is_causal=True).shape
        torch.Size([2, 8, 128, 64])
    """
    kind = None
    if not (dropout_p or is_compiling()):
        more: tuple[Tensor | None, ...] | None = ()
        if attn_mask is not None:
            is_boolean = isinstance(attn_mask, Tensor) and attn_mask.dtype == torch.bool
            more = _more(None, attn_mask) if is_boolean else _more(attn_mask, None)
        options = ("torch", is_causal, type(is_causal), scale, enable_gqa, requested_now(None))
        kind, planned = (None, None) if more is None else plan.look_up((query, key, value, *more), options)
        if planned is not None:
            return _in_order_of(query, by_plan(planned, query, key, value, False, more))  # type: ignore[arg-type]
    if has_torch_function_variadic(query, key, value):
        given: tuple[Any, ...] = (query, key, value, attn_mask, dropout_p, is_causal)
        scaling: dict[str, Any] = {"scale": scale, "enable_gqa": enable_gqa}
        return handle_torch_function(scaled_dot_product_attention, (query, key, value), *given, **scaling)
    if isinstance(query, Tensor) and query.is_nested:
        return _torch_of_nested(query, key, value, attn_mask, dropout_p, is_causal, scale)
    inputs, spec, shape = torch_problem(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )
    is_plain = query.dim() == key.dim() == 4 and query.shape[0] == key.shape[0] == value.shape[0]
    out, _ = serve(inputs, spec, None, kind=kind if is_plain else None, heads_first=True)
    return _in_order_of(query, out.transpose(1, 2).reshape(shape))


def _in_order_of(query: Tensor, out: Tensor) -> Tensor:
    """``out`` contiguous if the query is, as torch returns it, since callers call ``view`` on it."""
    return out.contiguous() if query.is_contiguous() else out


def _of_nested(
    q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any], wants_more: Any, backend: str | None
) -> Tensor:
    """``attention`` of nested tensors ``(N, S_n, H, D)``, without padding."""
    dense_only = {name: options.pop(name) for name in ("bias", "mask", "segment_ids", "intervals", "layout")}
    given = [name for name, x in dense_only.items() if x is not None and x != "BSHD"]
    given += ["return_lse, return_weights or return_stats"] if wants_more else []
    if given or not (k.is_nested and v.is_nested):
        given_text = f"a nested tensor with {', '.join(given) or 'dense k or v'}"
        allowed = "three nested tensors (N, S_n, H, D), causal, window, scale, softcap, alibi_slopes, sinks, dropout_p"
        raise input_error("q", given_text, allowed, "Sequences of different lengths have no common mask; pad them.")
    packed_q, packed_k, packed_v = (Packed.of(x) for x in (q, k, v))
    options |= {"max_seqlen_q": packed_q.longest, "max_seqlen_kv": packed_k.longest, "backend": backend}
    boundaries = packed_q.offsets, packed_k.offsets
    out = attention_varlen(packed_q.values, packed_k.values, packed_v.values, *boundaries, **options)
    assert isinstance(out, Tensor)
    return packed_q.nested(out)


def _torch_of_nested(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
) -> Tensor:
    """``scaled_dot_product_attention`` of jagged tensors ``(N, H, S_n, E)``; causal counts from the upper left."""
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    if attn_mask is not None or (is_causal and not torch.equal(Packed.of(q).offsets, Packed.of(k).offsets)):
        todo = "Pass equal lengths, or fastattn.attention, whose causal=True counts from the lower right."
        raise input_error("query", "a nested tensor with attn_mask or other lengths than key", "neither", todo)
    out = attention(q, k, v, causal=is_causal, scale=scale, dropout_p=dropout_p)
    assert isinstance(out, Tensor)
    return out.transpose(1, 2)


def explain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    window: Window | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    segment_ids: Tensor | tuple[Tensor, Tensor] | None = None,
    intervals: Tensor | None = None,
    dropout_p: float = 0.0,
    rng_state: Tensor | None = None,
    layout: Layout = "BSHD",
    return_lse: bool = False,
    return_weights: bool | Literal["mean"] = False,
    return_stats: bool = False,
    backend: str | None = None,
    **misnamed: Never,
) -> Explanation:
    """Name the backend that would serve ``fastattn.attention``, with the reasons against the others.

    Nothing is computed and no random number is drawn; tensors may be on the meta device. On a GPU without a verdict it
    runs the self-check of a backend, in a separate process, as the first call would.

    Args:
        q, k, v and all that follows: as in ``fastattn.attention``.

    Returns:
        an ``Explanation``: prints as a table, and has ``chosen``, ``reasons`` (a list for each backend, empty if it
        can serve the call), ``delegates`` (which backend computes derivatives beyond the gradient, and statistics)
        and ``problem``.

    Raises:
        InputError: an argument is wrong.

    Example:
        >>> import torch, fastattn
        >>> q = torch.randn(1, 16, 2, 8)
        >>> fastattn.explain(q, q, q, causal=True).reasons["eager"]
        []
    """
    if misnamed:
        raise name_error(explain, misnamed)
    inputs, spec = dense_problem(
        q, k, v, causal=causal, window=window, scale=scale, softcap=softcap, bias=bias, mask=mask,
        alibi_slopes=alibi_slopes, sinks=sinks, segment_ids=segment_ids, intervals=intervals, dropout_p=dropout_p,
        rng_state=rng_state, layout=layout,
    )  # fmt: skip
    return _explanation(inputs, spec, backend)


def explain_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_kv: Tensor,
    *,
    max_seqlen_q: int | None = None,
    max_seqlen_kv: int | None = None,
    causal: bool = False,
    window: Window | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    intervals: Tensor | None = None,
    dropout_p: float = 0.0,
    rng_state: Tensor | None = None,
    return_lse: bool = False,
    return_stats: bool = False,
    backend: str | None = None,
    **misnamed: Never,
) -> Explanation:
    """Name the backend that would serve ``fastattn.attention_varlen``, with the reasons against the others.

    Like ``fastattn.explain``, except that the longest lengths, if not given, are read from ``cu_seqlens``.

    Example:
        >>> import torch, fastattn
        >>> q, cu_seqlens = torch.randn(7, 4, 32), torch.tensor([0, 3, 7], dtype=torch.int32)
        >>> "packed" in fastattn.explain_varlen(q, q, q, cu_seqlens, cu_seqlens).problem.features
        True
    """
    if misnamed:
        raise name_error(explain_varlen, misnamed)
    inputs, spec = packed_problem(
        q, k, v, cu_seqlens_q, cu_seqlens_kv, max_seqlen_q=max_seqlen_q, max_seqlen_kv=max_seqlen_kv, causal=causal,
        window=window, scale=scale, softcap=softcap, alibi_slopes=alibi_slopes, sinks=sinks, intervals=intervals,
        dropout_p=dropout_p, rng_state=rng_state,
    )  # fmt: skip
    return _explanation(inputs, spec, backend)


def _explanation(inputs: Inputs, spec: AttentionSpec, backend: str | None) -> Explanation:
    check_name(backend)
    check_inputs(inputs, spec)
    return Explanation.of(Problem.of(inputs, spec, needs_gradient(inputs)))
