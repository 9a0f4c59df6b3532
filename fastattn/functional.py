"""The public functions: names and defaults, turned into ``Inputs`` and ``AttentionSpec``. No arithmetic."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from fastattn import dispatch, plan, reference, rng
from fastattn.autograd import attend
from fastattn.errors import input_error
from fastattn.layout import Layout, check_cu_seqlens, check_layout, from_internal, to_internal
from fastattn.ops import prepared_forward, refuse_context_parallel, without_autocast
from fastattn.problem import Inputs, Problem, broadcasts, check_inputs, check_rank, check_scores_shape
from fastattn.spec import Anchor, AttentionSpec

Window = tuple[int | None, int | None]


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
    dropout_p: float = 0.0,
    rng_state: Tensor | None = None,
    layout: Layout = "BSHD",
    return_lse: bool = False,
    return_weights: bool | Literal["mean"] = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, ...]:
    """Scaled dot-product attention with every option of the spec, fused and differentiable.

    ``out = dropout(softmax(cap(scale * q @ k^T) + bias + alibi, where kept)) @ v``, the full order of operations and
    drawings of the masks standing in ``fastattn/spec.py``.

    Args:
        q: queries ``(B, S_q, H_q, D_qk)``; float16, bfloat16, float32 or float64.
        k: keys ``(B, S_kv, H_kv, D_qk)``; ``H_kv`` divides ``H_q`` (grouped and multi-query attention).
        v: values ``(B, S_kv, H_kv, D_v)``.
        causal: attend to no later key. The last query sees the last key (lower right), as decoding needs:

                S_q = 2, S_kv = 5:   1 1 1 1 0
                                     1 1 1 1 1

        window: ``(left, right)``, how many neighbours on each side are kept, the diagonal itself extra; None or -1
            is unbounded on that side. With ``causal`` the right side is 0. ``window=(1, 0)``:

                S_q = S_kv = 4:      1 0 0 0
                                     1 1 0 0
                                     0 1 1 0
                                     0 0 1 1

        scale: factor on the scores; None is ``D_qk ** -0.5``.
        softcap: ``softcap * tanh(scores / softcap)`` before bias and masks (Gemma 2); None or 0 is off.
        bias: added to the scores, any shape that broadcasts to ``(B, H_q, S_q, S_kv)``; has a gradient.
        mask: boolean, True = attend, any shape that broadcasts to ``(B, H_q, S_q, S_kv)``.
        alibi_slopes: ``(H_q,)`` or ``(B, H_q)``; adds ``-slope * distance`` to the diagonal (Press et al., 2021).
        sinks: ``(H_q,)``, a logit for each head that takes part in the softmax but has no value; has a gradient.
        segment_ids: ``(B, S)`` integers; tokens attend inside their own segment. A pair ``(for q, for kv)`` where
            they differ.
        dropout_p: probability of dropping an attention weight. 0 during evaluation is the caller's business.
        rng_state: int64 ``(2,)``, seed and offset of dropout; None draws from torch's generator.
        layout: ``"BSHD"`` or ``"BHSD"``: order of the dimensions of q, k, v and out.
        return_lse: also return the log-sum-exp of each row.
        return_weights: also return the attention weights after dropout, by the reference formula whatever the backend:
            for looking at, since they take the quadratic memory that fused attention avoids. ``"mean"`` averages them
            over the heads, computed one by one. ``out`` is not touched.
        backend: a name from ``fastattn.backends()``, which runs or raises; None chooses.

    Returns:
        ``out`` like q but with ``D_v``; with ``return_lse`` also ``lse``, fp32 ``(B, H_q, S_q)``, natural log; with
        ``return_weights`` also the weights, fp32 ``(B, H_q, S_q, S_kv)``, or their mean ``(B, S_q, S_kv)``; each of
        them differentiable. A row that keeps no key gives 0, lse ``-inf`` and zero gradients, never NaN. Results do
        not depend on the backend beyond rounding; the dropped elements do not depend on it at all.

    Raises:
        InputError: an argument is wrong; the message names it, what was given, what is allowed and what to do.
        UnsupportedError: the backend asked for cannot serve the call; the message gives its reasons.

    Source:
        Vaswani et al., "Attention is all you need", 2017; Dao, "FlashAttention-2", 2023.

    Example:
        >>> import torch, fastattn
        >>> q = torch.randn(2, 128, 8, 64)
        >>> k = v = torch.randn(2, 128, 2, 64)
        >>> fastattn.attention(q, k, v, causal=True, window=(32, 0)).shape
        torch.Size([2, 128, 8, 64])
    """
    dispatch.check_name(backend)
    if return_weights not in (False, True, "mean"):
        todo = '"mean" averages over the heads.'
        raise input_error("return_weights", repr(return_weights), 'True, False or "mean"', todo)
    inputs, spec = dense_problem(
        q,
        k,
        v,
        causal=causal,
        window=window,
        scale=scale,
        softcap=softcap,
        bias=bias,
        mask=mask,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
        segment_ids=segment_ids,
        dropout_p=dropout_p,
        rng_state=rng_state,
        layout=layout,
    )
    out, lse = _serve(inputs, spec, backend)
    out = from_internal(out, layout)
    extras = [lse] if return_lse else []
    if return_weights:
        with without_autocast(q.device.type):
            weights = reference.mean_weights if return_weights == "mean" else reference.weights
            extras.append(weights(inputs, spec))
    return (out, *extras) if extras else out


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
    dropout_p: float = 0.0,
    rng_state: Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention over sequences of different lengths, packed end to end without padding.

    Sequence ``n`` owns query rows ``cu_seqlens_q[n] : cu_seqlens_q[n + 1]`` and the key rows of ``cu_seqlens_kv``
    alike, and is computed as ``attention`` would on it alone. Zero-length sequences are allowed.

    Args:
        q: queries ``(T_q, H_q, D_qk)``.
        k: keys ``(T_kv, H_kv, D_qk)``.
        v: values ``(T_kv, H_kv, D_v)``.
        cu_seqlens_q: int32 ``(N + 1,)``, a running sum of the lengths that begins with 0 and ends with ``T_q``.
            Its values are checked where they lie in host memory; on a GPU reading them would stall the device.
        cu_seqlens_kv: the same for the keys.
        max_seqlen_q: longest query sequence. None reads it from ``cu_seqlens_q``, which on a GPU waits for the device.
        max_seqlen_kv: longest key sequence, likewise.
        causal: as in ``attention``, within each sequence (lower right).
        window: as in ``attention``.
        scale: as in ``attention``.
        softcap: as in ``attention``.
        alibi_slopes: ``(H_q,)`` or ``(N, H_q)``.
        sinks: ``(H_q,)``, as in ``attention``.
        dropout_p: as in ``attention``.
        rng_state: as in ``attention``; element coordinates count from the start of each sequence.
        return_lse: also return lse.
        backend: as in ``attention``.

    Returns:
        ``out`` ``(T_q, H_q, D_v)``; with ``return_lse`` also ``lse``, fp32 ``(H_q, T_q)``.

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
    dispatch.check_name(backend)
    todo = "Pack the sequences end to end; padded ones go to fastattn.attention."
    check_rank({"q": q, "k": k, "v": v}, range(3, 4), "(T, H, D), sequences packed end to end", todo)
    q, k, v = autocast(q, k, v)
    inputs = Inputs(
        q=q,
        k=k,
        v=v,
        alibi_slopes=per_head("alibi_slopes", alibi_slopes),
        sinks=per_head("sinks", sinks),
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_kv=cu_seqlens_kv,
        rng_state=_rng_state(rng_state, dropout_p, q),
        max_seqlen_q=longest("q", cu_seqlens_q, max_seqlen_q, q.device),
        max_seqlen_kv=longest("kv", cu_seqlens_kv, max_seqlen_kv, q.device),
    )
    spec = make_spec(q, scale, softcap, band(causal, window), dropout_p)
    out, lse = _serve(inputs, spec, backend)
    return (out, lse) if return_lse else out


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
    """``torch.nn.functional.scaled_dot_product_attention``, the same arguments with the same meaning.

    Args:
        query: ``(N, ..., H_q, L, E)``.
        key: ``(N, ..., H, S, E)``.
        value: ``(N, ..., H, S, E_v)``.
        attn_mask: broadcasts to ``(N, ..., H_q, L, S)``; boolean (True = attend), or added to the scores, with a
            gradient.
        dropout_p: probability of dropping an attention weight, whether in training or not.
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
    if is_causal and attn_mask is not None:
        raise input_error("attn_mask", "a mask together with is_causal=True", "one of the two", "Merge them yourself.")
    check_rank({"query": query, "key": key, "value": value}, range(2, 65), "(N, ..., H, L, E), at least 2 dimensions")
    query, key, value = autocast(query, key, value)
    query, key, value = _torch_batches(query, key, value, enable_gqa)
    shape = query.shape
    if attn_mask is not None:
        attn_mask = _torch_mask(attn_mask, (*shape[:-1], key.shape[-2]))
    query, key, value = (_to_four_dims(x).transpose(1, 2) for x in (query, key, value))
    is_boolean = attn_mask is not None and attn_mask.dtype == torch.bool
    inputs = Inputs(
        q=query,
        k=key,
        v=value,
        bias=None if is_boolean else attn_mask,
        mask=attn_mask if is_boolean else None,
        rng_state=_rng_state(None, dropout_p, query),
        max_seqlen_q=query.shape[1],
        max_seqlen_kv=key.shape[1],
    )
    spec = make_spec(query, scale, None, band(is_causal, None), dropout_p, anchor="upper_left")
    out, _ = _serve(inputs, spec, None)
    return out.transpose(1, 2).reshape(*shape[:-1], value.shape[-1])


explain = dispatch.explainer(attention)
explain_varlen = dispatch.explainer(attention_varlen)


def dense_problem(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    window: Window | None,
    scale: float | None,
    softcap: float | None,
    bias: Tensor | None,
    mask: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    segment_ids: Tensor | tuple[Tensor, Tensor] | None,
    dropout_p: float,
    rng_state: Tensor | None,
    layout: Layout,
) -> tuple[Inputs, AttentionSpec]:
    """What ``attention`` is asked to compute, from its arguments; not yet checked as a whole."""
    check_layout(layout)
    check_rank({"q": q, "k": k, "v": v}, range(4, 5), "(B, S, H, D), in the order that layout names")
    q, k, v = (to_internal(x, layout) for x in autocast(q, k, v))
    segments_q, segments_kv = _segments(segment_ids)
    inputs = Inputs(
        q=q,
        k=k,
        v=v,
        bias=four_dims("bias", bias, q, k),
        mask=four_dims("mask", mask, q, k),
        alibi_slopes=per_head("alibi_slopes", alibi_slopes),
        sinks=per_head("sinks", sinks),
        segment_ids_q=segments_q,
        segment_ids_kv=segments_kv,
        rng_state=_rng_state(rng_state, dropout_p, q),
        max_seqlen_q=q.shape[1],
        max_seqlen_kv=k.shape[1],
    )
    return inputs, make_spec(q, scale, softcap, band(causal, window), dropout_p)


def _serve(inputs: Inputs, spec: AttentionSpec, backend: str | None) -> tuple[Tensor, Tensor]:
    backend, qkv = dispatch.requested(backend), (inputs.q, inputs.k, inputs.v)
    like = None if dispatch.explained or inputs.has_more_than_qkv else plan.signature(qkv, (spec, backend))
    if like is not None and (run := plan.known(like)) is not None:
        refuse_context_parallel()
        out, lse, *_ = run(*qkv)
        return out, lse
    check_inputs(inputs, spec)
    if dispatch.explained and dispatch.note(lambda: Problem.of(inputs, spec)):
        return inputs.q, inputs.q
    out, lse = attend(inputs, spec, backend)
    if like is not None and not plan.is_known(like):
        plan.remember(like, prepared_forward(inputs, spec, backend))
    return out, lse


def band(causal: bool, window: Window | None) -> tuple[int | None, int | None]:
    """``(left, right)`` of the spec from the public ``causal`` and ``window``."""
    if not isinstance(causal, bool | torch.SymBool):
        raise input_error("causal", repr(causal), "True or False", "For a pattern of your own pass mask=.")
    if window is None:
        window = (None, None)
    if not isinstance(window, tuple | list) or len(window) != 2:
        todo = "For the W latest keys, the query's own included, pass (W - 1, 0)."
        raise input_error("window", repr(window), "(left, right)", todo)
    left, right = (_window_side(side) for side in window)
    return left, 0 if causal else right


def _window_side(side: int | None) -> int | None:
    if side is None or side == -1:
        return None
    if isinstance(side, bool) or not isinstance(side, int | torch.SymInt) or side < 0:
        raise input_error("window", repr(side), "ints >= 0, and None or -1 for unbounded", "It counts neighbours.")
    return side


def make_spec(
    q: Tensor,
    scale: float | None,
    softcap: float | None,
    left_right: tuple[int | None, int | None],
    dropout_p: float,
    anchor: Anchor = "lower_right",
) -> AttentionSpec:
    scale = q.shape[-1] ** -0.5 if scale is None else number("scale", scale)
    softcap = None if softcap is None else number("softcap", softcap) or None
    left, right = left_right
    return AttentionSpec(scale, softcap, left, right, anchor, number("dropout_p", dropout_p))


def number(name: str, x: float) -> float:
    if isinstance(x, bool) or not isinstance(x, int | float | torch.SymInt | torch.SymFloat):
        given = "a tensor" if isinstance(x, Tensor) else repr(x)
        raise input_error(name, given, "a Python number", "It is a constant; to learn a scale, multiply q by it.")
    return float(x)


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """q, k, v in autocast's dtype, where autocast is on."""
    device = tensors[0].device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):  # meta has none
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(x.to(dtype) if x.is_floating_point() else x for x in tensors)


def four_dims(name: str, x: Tensor | None, q: Tensor | None = None, k: Tensor | None = None) -> Tensor | None:
    """``x`` with leading dimensions of 1, as broadcasting would add them; with q and k it has to fit their scores."""
    if x is None:
        return None
    if not isinstance(x, Tensor):
        raise input_error(name, type(x).__name__, "a torch.Tensor or None", "Convert it with torch.as_tensor.")
    if x.dim() > 4:
        raise input_error(name, f"shape {tuple(x.shape)}", "at most 4 dimensions: (B, H_q, S_q, S_kv)", "Reshape it.")
    if q is not None and k is not None:
        check_scores_shape(name, x, q, k)  # before it changes, so that the message shows what was given
    return x[(None,) * (4 - x.dim())]


def per_head(name: str, x: Tensor | None) -> Tensor | None:
    if x is None:
        return None
    if not isinstance(x, Tensor):
        raise input_error(name, type(x).__name__, "a torch.Tensor or None", "Convert it with torch.as_tensor.")
    x = x[None] if x.dim() == 1 else x
    return x.float() if name == "alibi_slopes" and x.dtype in (torch.float16, torch.bfloat16) else x


def _rng_state(rng_state: Tensor | None, dropout_p: float, q: Tensor) -> Tensor | None:
    if not dropout_p:
        return None
    return rng.new_rng_state(q.device) if rng_state is None else rng_state


def _segments(segment_ids: Tensor | tuple[Tensor, Tensor] | None) -> tuple[Tensor | None, Tensor | None]:
    """The ids for q and those for kv."""
    pair = segment_ids if isinstance(segment_ids, tuple) else (segment_ids, segment_ids)
    if len(pair) != 2 or not all(ids is None or isinstance(ids, Tensor) for ids in pair):
        given = repr(tuple(type(ids).__name__ for ids in pair)) if len(pair) != 2 else type(pair[0]).__name__
        raise input_error("segment_ids", given, "a tensor, or a pair (for q, for kv)", "Use torch.as_tensor.")
    return pair


def longest(side: str, cu_seqlens: Tensor, given: int | None, device: torch.device) -> int:
    check_cu_seqlens(f"cu_seqlens_{side}", cu_seqlens, device)
    if given is None and cu_seqlens.is_meta:
        raise input_error(f"max_seqlen_{side}", None, "an int, as meta tensors hold no values", "Pass the longest.")
    if given is None:
        return max(0, int(cu_seqlens.diff().max())) if cu_seqlens.shape[0] > 1 else 0
    if isinstance(given, bool) or not isinstance(given, int | torch.SymInt) or given < 0:
        raise input_error(f"max_seqlen_{side}", repr(given), "an int >= 0, or None", "It is the longest sequence.")
    return given


def _torch_batches(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> tuple[Tensor, Tensor, Tensor]:
    """torch's ``(N, ..., H, L, E)``, batches and heads broadcast as torch does."""
    if enable_gqa or query.shape[:-2] == key.shape[:-2] == value.shape[:-2]:
        return query, key, value
    try:
        batch = torch.broadcast_shapes(query.shape[:-2], key.shape[:-2], value.shape[:-2])
    except RuntimeError:
        shapes = f"{tuple(query.shape)}, {tuple(key.shape)}, {tuple(value.shape)}"
        todo = "Pass enable_gqa=True if key and value have fewer heads."
        raise input_error("query, key, value", shapes, "batches and heads that broadcast", todo) from None
    query, key, value = (x.expand(*batch, *x.shape[-2:]) for x in (query, key, value))
    return query, key, value


def _torch_mask(attn_mask: Tensor, full: tuple[int, ...]) -> Tensor:
    """A mask in four dimensions; sizes of 1 stay, unless batches are folded together."""
    if not isinstance(attn_mask, Tensor) or not (attn_mask.dtype == torch.bool or attn_mask.is_floating_point()):
        given = attn_mask.dtype if isinstance(attn_mask, Tensor) else type(attn_mask).__name__
        raise input_error("attn_mask", given, "a boolean or floating tensor, or None", "Boolean: True = attend.")
    sizes = attn_mask.shape
    if len(sizes) > len(full) or not broadcasts(sizes, full[len(full) - len(sizes) :]):
        allowed = f"a shape that broadcasts to {tuple(full)}"
        raise input_error("attn_mask", f"shape {tuple(sizes)}", allowed, "Put size 1 where it is shared.")
    return _to_four_dims(attn_mask if len(full) <= 4 else attn_mask.expand(full))


def _to_four_dims(x: Tensor) -> Tensor:
    if x.dim() == 4:
        return x
    return x[(None,) * (4 - x.dim())] if x.dim() < 4 else x.flatten(0, -4)
