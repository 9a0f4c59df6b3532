"""Arguments of the public functions turned into a problem: ``Inputs`` or ``CacheInputs``, and an ``AttentionSpec``.

Public names, defaults and layouts are resolved here. Nothing is computed and no random number is drawn. The only values
read are the lengths of packed sequences whose longest was not given. ``problem.check_inputs`` and
``kv_cache.check_cache_inputs`` check the result.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from fastattn import rng
from fastattn.errors import input_error
from fastattn.kv_cache import CacheInputs
from fastattn.layout import Layout, check_cu_seqlens, check_layout, to_internal
from fastattn.problem import Inputs, broadcasts, check_rank, check_scores_shape
from fastattn.spec import Anchor, AttentionSpec
from fastattn.torch_internals import autocast_dtype
from fastattn.trees import words_of

if TYPE_CHECKING:
    from torch.nn.attention.bias import CausalBias  # it imports Dynamo and Triton, which takes longer than fastattn

Window = tuple[int | None, int | None]


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
    intervals: Tensor | None = None,
) -> tuple[Inputs, AttentionSpec]:
    """The problem of ``attention`` from its arguments, not yet checked."""
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
        intervals=five_dims(intervals),
        rng_state=rng_state if dropout_p else None,
        max_seqlen_q=q.shape[1],
        max_seqlen_kv=k.shape[1],
    )
    return inputs, make_spec(q, scale, softcap, band(causal, window), dropout_p)


def packed_problem(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_kv: Tensor,
    *,
    max_seqlen_q: int | None,
    max_seqlen_kv: int | None,
    causal: bool,
    window: Window | None,
    scale: float | None,
    softcap: float | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    dropout_p: float,
    rng_state: Tensor | None,
    intervals: Tensor | None = None,
) -> tuple[Inputs, AttentionSpec]:
    """The problem of ``attention_varlen`` from its arguments, not yet checked."""
    todo = "Pack the sequences end to end; padded ones go to fastattn.attention."
    check_rank({"q": q, "k": k, "v": v}, range(3, 4), "(T, H, D), sequences packed end to end", todo)
    q, k, v = autocast(q, k, v)
    inputs = Inputs(
        q=q,
        k=k,
        v=v,
        alibi_slopes=per_head("alibi_slopes", alibi_slopes),
        sinks=per_head("sinks", sinks),
        intervals=five_dims(intervals),
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_kv=cu_seqlens_kv,
        rng_state=rng_state if dropout_p else None,
        max_seqlen_q=longest("q", cu_seqlens_q, max_seqlen_q, q.device),
        max_seqlen_kv=longest("kv", cu_seqlens_kv, max_seqlen_kv, q.device),
    )
    return inputs, make_spec(q, scale, softcap, band(causal, window), dropout_p)


def torch_problem(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    *,
    scale: float | None,
    enable_gqa: bool,
) -> tuple[Inputs, AttentionSpec, tuple[int, ...]]:
    """The problem of ``scaled_dot_product_attention``, not yet checked, and the shape of torch's result.

    Leading dimensions are folded into the batch; the shape unfolds them.
    """
    anchor: Anchor = "upper_left"
    kind = type(attn_mask)
    if (kind.__module__, kind.__name__) == ("torch.nn.attention.bias", "CausalBias"):  # has no values, lengths only
        bias = cast("CausalBias", attn_mask)
        check_causal_bias(bias, query, key)
        is_lower = bias.variant.name == "LOWER_RIGHT"
        attn_mask, is_causal, anchor = None, True, "lower_right" if is_lower else anchor
    if is_causal and attn_mask is not None:
        raise input_error("attn_mask", "a mask together with is_causal=True", "one of the two", "Merge them yourself.")
    check_rank({"query": query, "key": key, "value": value}, range(2, 65), "(N, ..., H, L, E), at least 2 dimensions")
    query, key, value = autocast(query, key, value)
    query, key, value = _torch_batches(query, key, value, enable_gqa)
    shape = (*query.shape[:-1], value.shape[-1])
    if attn_mask is not None:
        attn_mask = _torch_mask(attn_mask, (*query.shape[:-1], key.shape[-2]))
    query, key, value = (_to_four_dims(x).transpose(1, 2) for x in (query, key, value))
    is_boolean = attn_mask is not None and attn_mask.dtype == torch.bool
    inputs = Inputs(
        q=query,
        k=key,
        v=value,
        bias=None if is_boolean else attn_mask,
        mask=attn_mask if is_boolean else None,
        max_seqlen_q=query.shape[1],
        max_seqlen_kv=key.shape[1],
    )
    return inputs, make_spec(query, scale, None, band(is_causal, None), dropout_p, anchor), shape


def cache_problem(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_lengths: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    *,
    block_table: Tensor | None,
    cu_seqlens_q: Tensor | None,
    max_seqlen_q: int | None,
    causal: bool,
    window: Window | None,
    scale: float | None,
    softcap: float | None,
    bias: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    rotary_cos: Tensor | None,
    rotary_sin: Tensor | None,
    rotary_interleaved: bool,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    tree_mask: Tensor | None = None,
    batch_invariant: bool = False,
) -> tuple[CacheInputs, AttentionSpec]:
    """The problem of ``attention_with_kv_cache`` from its arguments, not yet checked."""
    is_packed = cu_seqlens_q is not None
    order = "(T_q, H, D), packed as cu_seqlens_q says" if is_packed else "(B, S, H, D); packed needs cu_seqlens_q"
    check_rank({"q": q}, range(3, 4) if is_packed else range(4, 5), order)
    check_rank({"k_cache": k_cache, "v_cache": v_cache}, range(4, 5), "(B, S_max, H, D) or (P, page_size, H, D)")
    _check_tensors(cache_lengths=cache_lengths)
    optional = {"k": k, "v": v, "block_table": block_table, "rotary_cos": rotary_cos,
                "rotary_sin": rotary_sin, "tree_mask": tree_mask}  # fmt: skip
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
        tree_mask=words_of(tree_mask) if tree_mask is not None and tree_mask.dtype == torch.bool else tree_mask,
        max_seqlen_q=q.shape[1] if cu_seqlens_q is None else longest("q", cu_seqlens_q, max_seqlen_q, q.device),
        rotary_interleaved=flag("rotary_interleaved", rotary_interleaved, "True pairs neighbouring head dims."),
        batch_invariant=flag("batch_invariant", batch_invariant, "use_batch_invariance asks for it in a block."),
    )
    return inputs, make_spec(q, scale, softcap, band(causal, window), 0.0)


def with_rng_state(inputs: Inputs, spec: AttentionSpec) -> Inputs:
    """``inputs`` with a fresh ``rng_state`` from torch's generator, if there is dropout and none was given."""
    if spec.dropout_p == 0 or inputs.rng_state is not None:
        return inputs
    return inputs.replace(rng_state=rng.new_rng_state(inputs.q.device))


def band(causal: bool, window: Window | None) -> tuple[int | None, int | None]:
    """``(left, right)`` of the spec from the public ``causal`` and ``window``."""
    flag("causal", causal, "For a pattern of your own pass mask=.")
    if window is None:
        window = (None, None)
    if not isinstance(window, tuple | list) or len(window) != 2:
        todo = "For the W latest keys, the query's own included, pass (W - 1, 0)."
        raise input_error("window", repr(window), "(left, right)", todo)
    left, right = (_window_side(side) for side in window)
    return left, 0 if causal else right


def flag(name: str, x: bool, todo: str) -> bool:
    if not isinstance(x, bool | torch.SymBool):
        raise input_error(name, repr(x), "True or False", todo)
    return x


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
    """The tensors in autocast's dtype if autocast is on; float64 stays, as in torch."""
    dtype = autocast_dtype(tensors[0].device.type)
    if dtype is None:
        return tensors
    return tuple(x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x for x in tensors)


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


def five_dims(intervals: Tensor | None) -> Tensor | None:
    """``intervals`` with leading dimensions of 1: ``(S_q, n, 2)`` and ``(H_q, S_q, n, 2)`` do for the whole batch."""
    if intervals is None:
        return None
    order = "(B, H_q, S_q, n, 2), or without its first one or two dimensions"
    if not isinstance(intervals, Tensor):
        raise input_error("intervals", type(intervals).__name__, f"a tensor {order}", "fastattn.intervals builds them.")
    if not 3 <= intervals.dim() <= 5:
        todo = "Give each query row n ranges; fastattn.intervals builds them."
        raise input_error("intervals", f"shape {tuple(intervals.shape)}", order, todo)
    if intervals.shape[-2] == 0:  # an empty tensor has no address, so that kernels would see no intervals
        intervals = intervals.new_zeros((*intervals.shape[:-2], 1, intervals.shape[-1]))
    return intervals[(None,) * (5 - intervals.dim())]


def per_head(name: str, x: Tensor | None) -> Tensor | None:
    if x is None:
        return None
    if not isinstance(x, Tensor):
        raise input_error(name, type(x).__name__, "a torch.Tensor or None", "Convert it with torch.as_tensor.")
    x = x[None] if x.dim() == 1 else x
    return x.float() if name == "alibi_slopes" and x.dtype in (torch.float16, torch.bfloat16) else x


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


def check_causal_bias(attn_mask: CausalBias, query: Tensor, key: Tensor) -> None:
    if (attn_mask.seq_len_q, attn_mask.seq_len_kv) != (query.shape[-2], key.shape[-2]):
        given, allowed = f"a CausalBias of {tuple(attn_mask.shape)}", f"({query.shape[-2]}, {key.shape[-2]})"
        raise input_error("attn_mask", given, allowed, "Make it with the lengths of query and key.")


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


def _check_tensors(**tensors: Tensor) -> None:
    for name, x in tensors.items():
        if not isinstance(x, Tensor):
            raise input_error(name, type(x).__name__, "a torch.Tensor", "Convert it with torch.as_tensor.")
