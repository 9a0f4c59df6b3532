"""Ways to call a backend through public functions: layouts, plans, threads, transforms, compilers, caches, modules.

A way takes a sample and the name of a backend, and returns ``out``, and ``lse`` if it has one, in the layout of the
sample. All ways must give the same result, up to the tolerance rule.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastattn.decoding import attention_with_kv_cache
from fastattn.functional import attention, attention_varlen
from fastattn.nn import MultiHeadAttention
from fastattn.problem import Grads, Inputs, Statistics, StatisticsGradient
from fastattn.reference import lse_dtype
from fastattn.testing.derivatives import Motion, judge_derivatives
from fastattn.testing.inputs import Sample
from fastattn.testing.statistics import judge_statistics
from fastattn.testing.tolerance import Results, Row, Yardstick

Way = Callable[[Sample, str], Results]
Pair = tuple[Tensor, Tensor]


def serves(sample: Sample) -> bool:
    """Whether ``fastattn.attention`` can express the problem: dense, with the anchor ``lower_right``."""
    return _has_public_anchor(sample) and not sample.inputs.is_packed


def _has_public_anchor(sample: Sample) -> bool:
    has_diagonal = sample.spec.has_band or sample.inputs.alibi_slopes is not None
    return sample.spec.anchor == "lower_right" or not has_diagonal


def measure_way(name: str, sample: Sample, backend: str, *, yardstick: Yardstick | None = None) -> list[Row]:
    """Judge ``out`` and ``lse`` computed in the way of this name, their derivatives, or returned statistics."""
    if name == RETURN_STATS:
        return judge_statistics(functools.partial(_return_stats, backend), sample)
    if name in DERIVATIVES:
        moves, run = DERIVATIVES[name]
        found = functools.partial(run, backend=backend)
        return judge_derivatives(sample, moves(Motion.of(sample)), found, f", {name}")
    return (yardstick or Yardstick(sample)).judge(WAYS[name](sample, backend), f", {name}")


def options_of(sample: Sample) -> dict[str, Any]:
    """The keywords of ``fastattn.attention`` for the problem."""
    inputs, spec = sample.inputs, sample.spec
    segments = None if inputs.segment_ids_q is None else (inputs.segment_ids_q, inputs.segment_ids_kv)
    return {
        "window": (spec.left, spec.right), "scale": spec.scale, "softcap": spec.softcap, "bias": inputs.bias,
        "mask": inputs.mask, "alibi_slopes": inputs.alibi_slopes, "sinks": inputs.sinks, "segment_ids": segments,
        "intervals": inputs.intervals, "dropout_p": spec.dropout_p, "rng_state": inputs.rng_state, "return_lse": True,
    }  # fmt: skip


def _call(sample: Sample, backend: str, q: Tensor, k: Tensor, v: Tensor, **changes: Any) -> Results:
    out, lse = attention(q, k, v, **options_of(sample) | changes, backend=backend)
    return {"out": out, "lse": lse}


def _qkv(sample: Sample) -> tuple[Tensor, Tensor, Tensor]:
    return sample.inputs.q, sample.inputs.k, sample.inputs.v


def _heads_first(sample: Sample, backend: str) -> Results:
    found = _call(sample, backend, *(x.transpose(1, 2) for x in _qkv(sample)), layout="BHSD")
    return found | {"out": found["out"].transpose(1, 2)}


def _replayed(sample: Sample, backend: str) -> Results:
    """By a plan that was made for tensors with other values."""
    others = [torch.randn_like(x) for x in _qkv(sample)]
    for _ in range(2):
        _call(sample, backend, *others)
    return _call(sample, backend, *_qkv(sample))


def _negative(sample: Sample, backend: str) -> Results:
    """Tensors with the negative bit, after others without it."""
    _call(sample, backend, *_qkv(sample))
    return _call(sample, backend, *(torch._neg_view(-x) for x in _qkv(sample)))


def _offset(sample: Sample, backend: str) -> Results:
    """Tensors that begin one element after an aligned address."""
    return _call(sample, backend, *(_one_further(x) for x in _qkv(sample)))


def _one_further(x: Tensor) -> Tensor:
    buffer = x.new_full((x.numel() + 1,), float("nan"))
    return buffer[1:].view(x.shape).copy_(x)


def _threads(sample: Sample, backend: str) -> Results:
    """Four threads at once, which have to agree."""
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: _call(sample, backend, *_qkv(sample)), range(4)))
    for other in found[1:]:
        assert all(torch.equal(other[name].nan_to_num(7), x.nan_to_num(7)) for name, x in found[0].items()), "threads"
    return found[0]


def _vmap(sample: Sample, backend: str) -> Results:
    q, k, v = (torch.stack([torch.zeros_like(x), x]) for x in _qkv(sample))
    out, lse = torch.vmap(lambda *x: tuple(_call(sample, backend, *x).values()), randomness="same")(q, k, v)
    return {"out": out[1], "lse": lse[1]}


def _learned(sample: Sample, backend: str) -> Results:
    """The forward pass of calls with gradients, twice, so that the second runs by a plan."""
    for _ in range(2):
        found = _call(sample, backend, *(x.detach().requires_grad_() for x in _qkv(sample)))
        found["out"].backward(sample.dout.to(found["out"].dtype))
    return {name: x.detach() for name, x in found.items()}


def _compiled(sample: Sample, backend: str) -> Results:
    """As a whole graph of torch.compile, which sees shapes and strides through the operator's fake."""
    torch._dynamo.reset()
    call = torch.compile(lambda *x: _call(sample, backend, *x), backend="aot_eager", fullgraph=True)
    return call(*_qkv(sample))


def _module(sample: Sample, backend: str) -> Results:
    """``MultiHeadAttention`` whose projections are identities."""
    inputs, spec = sample.inputs, sample.spec
    heads, dim = inputs.heads_q, inputs.q.shape[-1]
    layer = MultiHeadAttention(
        heads * dim, heads, bias=False, batch_first=True, dtype=inputs.q.dtype, window=(spec.left, spec.right),
        softcap=spec.softcap, sinks=inputs.sinks is not None, backend=backend,
    ).requires_grad_(False)  # fmt: skip
    identity = torch.eye(heads * dim, dtype=inputs.q.dtype)
    layer.in_proj_weight.copy_(identity.repeat(3, 1))
    layer.out_proj.weight.copy_(identity)
    if layer.sinks is not None and inputs.sinks is not None:
        layer.sinks.copy_(inputs.sinks.view(-1))
    q, k, v = (x.flatten(2) for x in _qkv(sample))
    out, _ = layer(q, k, v, attn_mask=_attn_mask(sample), need_weights=False)
    return {"out": out.view(inputs.out_shape())}


def _attn_mask(sample: Sample) -> Tensor | None:
    """Bias or mask as torch's module wants it: ``(N * H, L, S)``, True where a mask hides."""
    inputs = sample.inputs
    given = inputs.bias if inputs.mask is None else ~inputs.mask
    full = (inputs.batch, inputs.heads_q, inputs.q.shape[1], inputs.k.shape[1])
    return None if given is None else given.expand(full).flatten(0, 1)


def _fits_module(sample: Sample) -> bool:
    """Whether ``MultiHeadAttention`` has all options of the problem."""
    inputs, spec = sample.inputs, sample.spec
    terms = (inputs.alibi_slopes, inputs.segment_ids_q, inputs.intervals)
    has_more = any(x is not None for x in terms) or spec.dropout_p > 0
    has_two_masks = inputs.bias is not None and inputs.mask is not None
    has_odd_sizes = inputs.heads_q != inputs.heads_kv or inputs.q.shape[-1] != inputs.v.shape[-1]
    has_sinks_per_sequence = inputs.sinks is not None and inputs.sinks.numel() != inputs.heads_q
    has_own_scale = spec.scale != inputs.q.shape[-1] ** -0.5
    return not (has_more or has_two_masks or has_odd_sizes or has_sinks_per_sequence or has_own_scale)


def _packed(sample: Sample, backend: str) -> Results:
    """The sequences of the batch one after the other."""
    inputs, options = sample.inputs, options_of(sample)
    for name in ("bias", "mask", "segment_ids"):
        options.pop(name)
    if inputs.intervals is not None:
        options["intervals"] = _of_all_entries(inputs)
    q, k, v = (x.flatten(0, 1) for x in _qkv(sample))
    cu_q, cu_k = (_boundaries(inputs.batch, x.shape[1]) for x in (inputs.q, inputs.k))
    out, lse = attention_varlen(q, k, v, cu_q, cu_k, **options, backend=backend)
    return {
        "out": out.view(inputs.out_shape()),
        "lse": lse.unflatten(1, (inputs.batch, inputs.q.shape[1])).transpose(0, 1),
    }


def _ragged(sample: Sample, backend: str) -> Results:
    """A packed problem through the public function."""
    out, lse = _call_packed(sample, backend)
    return {"out": out, "lse": lse}


def _call_packed(sample: Sample, backend: str, **changes: Any) -> Any:
    inputs, options = sample.inputs, options_of(sample) | changes
    for name in ("bias", "mask", "segment_ids"):
        options.pop(name)
    cu_q, cu_k = inputs.cu_seqlens_q, inputs.cu_seqlens_kv
    assert cu_q is not None and cu_k is not None
    return attention_varlen(*_qkv(sample), cu_q, cu_k, **options, backend=backend)


def _of_all_entries(inputs: Inputs) -> Tensor:
    """The intervals of the entries' rows one after the other, ``(1, 1|H_q, B * S_q, n, 2)``."""
    assert inputs.intervals is not None
    each = inputs.intervals.expand(inputs.batch, *inputs.intervals.shape[1:])
    return each.transpose(0, 1).flatten(1, 2)[None]


def _boundaries(batch: int, length: int) -> Tensor:
    return torch.arange(batch + 1, dtype=torch.int32) * length


def _cache(sample: Sample, backend: str) -> Results:
    """Keys and values in a cache with pages of five rows; the call appends up to three of them."""
    inputs, options = sample.inputs, options_of(sample)
    for name in ("mask", "segment_ids", "intervals", "dropout_p", "rng_state"):
        options.pop(name)
    batch, s_kv, page = inputs.batch, inputs.k.shape[1], 5
    pages = -(-s_kv // page)
    table = torch.randperm(batch * pages).int().view(batch, pages)
    new = min(3, s_kv)
    caches = []
    for x in (inputs.k, inputs.v):
        padded = x.new_full((batch, pages * page, *x.shape[2:]), float("nan"))
        padded[:, : s_kv - new] = x[:, : s_kv - new]
        cache = torch.empty_like(padded).view(batch * pages, page, *x.shape[2:])
        cache[table.flatten().long()] = padded.view(batch * pages, page, *x.shape[2:])
        caches.append(cache)
    lengths = torch.full((batch,), s_kv - new, dtype=torch.int32)
    arguments = (*caches, lengths, inputs.k[:, s_kv - new :], inputs.v[:, s_kv - new :])
    out, lse = attention_with_kv_cache(
        inputs.q, *arguments, block_table=table, causal=False, **options, backend=backend
    )
    return {"out": out, "lse": lse}


def _of_values(sample: Sample, backend: str) -> Callable[..., Pair]:
    """``(out, lse)`` as a function of the inputs whose gradients the sample needs."""

    def call(*values: Tensor) -> Pair:
        given = sample.inputs.replace(**dict(zip(sample.needs, values, strict=True)))
        found = _call(dataclasses.replace(sample, inputs=given), backend, given.q, given.k, given.v)
        return found["out"], found["lse"]

    return call


def _values(sample: Sample) -> tuple[Tensor, ...]:
    return tuple(getattr(sample.inputs, name) for name in sample.needs)


def _dlse(sample: Sample) -> Tensor:
    inputs = sample.inputs
    zeros = inputs.q.new_zeros(inputs.lse_shape(), dtype=lse_dtype(inputs.q.dtype))
    return zeros if sample.dlse is None else sample.dlse


def _forward_mode(sample: Sample, motion: Motion, backend: str) -> Results:
    """``torch.func.jvp`` of a function that computes the results and their gradients."""

    def both(values: tuple[Tensor, ...], dout: Tensor, dlse: Tensor) -> tuple[Pair, tuple[Tensor, ...]]:
        results, pull, *_ = torch.func.vjp(_of_values(sample, backend), *values)
        return results, pull((dout, dlse))

    along = tuple(getattr(motion.tangents, name) for name in sample.needs)
    moved_dlse = torch.zeros_like(_dlse(sample)) if motion.dlse is None else motion.dlse
    moved = torch.func.jvp(both, (_values(sample), sample.dout, _dlse(sample)), (along, motion.dout, moved_dlse))
    return _derivatives(sample, *moved[1])


def _double_backward(sample: Sample, motion: Motion, backend: str) -> Results:
    """The gradients of ``<gradients, tangents>``: tangents of the gradients, since a Hessian is symmetric."""
    values = tuple(x.detach().requires_grad_() for x in _values(sample))
    dout, dlse = (x.detach().requires_grad_() for x in (sample.dout, _dlse(sample)))
    results = _of_values(sample, backend)(*values)
    grads = torch.autograd.grad(results, values, (dout, dlse), create_graph=True)
    along = tuple(getattr(motion.tangents, name) for name in sample.needs)
    found = torch.autograd.grad(grads, (dout, dlse, *values), along)
    return _derivatives(sample, (found[0], found[1]), found[2:])


def _derivatives(sample: Sample, results: Pair, grads: Sequence[Tensor]) -> Results:
    names = ("out", "lse", *(f"d{name}" for name in sample.needs))
    return dict(zip(names, (*results, *grads), strict=True))


def _return_stats(
    backend: str, sample: Sample, gradient: StatisticsGradient, needs: Sequence[str]
) -> tuple[Statistics, Grads]:
    """The statistics that ``return_stats=True`` adds to the results, and their gradients."""
    values = {name: getattr(sample.inputs, name).detach().requires_grad_() for name in needs}
    given = dataclasses.replace(sample, inputs=sample.inputs.replace(**values))
    if given.inputs.is_packed:
        *_, found = _call_packed(given, backend, return_stats=True)
    else:
        *_, found = attention(*_qkv(given), **options_of(given), return_stats=True, backend=backend)
    kinds = [field.name for field in dataclasses.fields(gradient)]
    along = [getattr(gradient, kind) for kind in kinds]
    grads = torch.autograd.grad([getattr(found, kind) for kind in kinds], list(values.values()), along)
    by_name = dict(zip((f"d{name}" for name in values), grads, strict=True))
    return Statistics(*(x.detach() for x in found)), Grads(**by_name)


DERIVATIVES: dict[str, tuple[Callable[[Motion], Motion], Callable[..., Results]]] = {
    "forward mode": (lambda motion: motion, _forward_mode),
    "double backward": (Motion.of_inputs_alone, _double_backward),
}

RETURN_STATS = "return_stats"

WAYS: dict[str, Way] = {
    "heads first": _heads_first,
    "replayed": _replayed,
    "negative bit": _negative,
    "odd offset": _offset,
    "threads": _threads,
    "vmap": _vmap,
    "learned": _learned,
    "compiled": _compiled,
    "module": _module,
    "packed": _packed,
    "ragged": _ragged,
    "cache": _cache,
}


def ways_of(sample: Sample) -> list[str]:
    """The ways that can express the problem."""
    inputs, spec = sample.inputs, sample.spec
    if not serves(sample):
        return ["ragged", RETURN_STATS] if inputs.is_packed and _has_public_anchor(sample) else []
    has_data = inputs.bias is not None or inputs.mask is not None or inputs.segment_ids_q is not None
    hidden = (inputs.mask, inputs.segment_ids_q, inputs.intervals)
    has_no_cache = any(x is not None for x in hidden) or spec.dropout_p or not inputs.k.shape[1]
    # What is dropped depends on the place in the batch, which packing and vmap change.
    left_out = {"packed", "vmap"} if spec.dropout_p else {"packed"} if has_data else set()
    left_out |= {"ragged"} | ({"cache"} if has_no_cache else set()) | (set() if _fits_module(sample) else {"module"})
    if sample.case.memory == "expanded":  # torch.func.jvp refuses a tensor whose elements share memory
        left_out |= {"forward mode"}
    return [name for name in (*WAYS, *DERIVATIVES, RETURN_STATS) if name not in left_out]
