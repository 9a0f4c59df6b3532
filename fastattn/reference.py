"""The formula of ``spec.py`` in eager torch ops: forward, and backward in closed form. Any device, any float dtype.

Every backend is tested against it. It is differentiable to any order, because jvp, double backward and vmap work
through its ordinary torch ops, and it stores the whole ``S_q x S_kv`` score matrix. With ``p`` the probabilities and
``z`` the factors of dropout (0 or ``dropout_scale``):

    dv    = (p * z)^T dout
    dp    = z * (dout v^T)
    delta = rowsum(dout * out)
    dt    = p * (dp - delta + dlse)               gradient of the finished scores
    dbias = dt
    ds    = dt * (1 - (capped / softcap)^2)       if softcap
    dq    = scale * ds k          dk = scale * ds^T q
    dsink = sum_i p_sink * (dlse - delta)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastattn import kv_cache, numerics, rng
from fastattn.kv_cache import CacheInputs
from fastattn.problem import DIFFERENTIABLE, Grads, Inputs, Rows, Statistics, StatisticsGradient, Tangents, pairs_of
from fastattn.spec import AttentionSpec, distance, in_intervals, keep
from fastattn.trees import Tree


@dataclass(frozen=True)
class Positions:
    """Positions of the query rows ``(B, 1, S_q, 1)`` and key rows ``(B, 1, 1, S_kv)`` in their sequences.

    A packed batch is treated as a dense batch of one, whose rows have index, position and lengths of their sequence.
    ``h`` ``(1, H, 1, 1)`` are the indices of the heads computed, out of ``num_heads``.
    """

    h: Tensor
    num_heads: int
    i: Tensor
    j: Tensor
    sequence_q: Tensor
    sequence_kv: Tensor
    s_q: Tensor | int
    s_kv: Tensor | int

    @classmethod
    def of(cls, inputs: Inputs) -> Positions:
        device, num_heads = inputs.q.device, inputs.heads_q
        h = torch.arange(num_heads, device=device)[None, :, None, None]
        if not inputs.is_packed:
            b = torch.arange(inputs.batch, device=device)[:, None, None, None]
            i = torch.arange(inputs.q.shape[1], device=device)[None, None, :, None]
            j = torch.arange(inputs.k.shape[1], device=device)[None, None, None, :]
            return cls(h, num_heads, i, j, b, b, inputs.q.shape[1], inputs.k.shape[1])
        assert inputs.cu_seqlens_q is not None and inputs.cu_seqlens_kv is not None
        i, n_q = _packed_positions(inputs.q.shape[0], inputs.cu_seqlens_q)
        j, n_kv = _packed_positions(inputs.k.shape[0], inputs.cu_seqlens_kv)
        s_q, s_kv = inputs.cu_seqlens_q.diff()[n_q], inputs.cu_seqlens_kv.diff()[n_q]
        row, column = (None, None, slice(None), None), (None, None, None, slice(None))
        return cls(h, num_heads, i[row], j[column], n_q[row], n_kv[column], s_q[row], s_kv[row])

    def at_rows(self, rows: Tensor) -> Positions:
        """The positions of some query rows of a dense batch."""
        return dataclasses.replace(self, i=self.i[:, :, rows])

    def at_heads(self, heads: Tensor) -> Positions:
        """The positions in some query heads."""
        return dataclasses.replace(self, h=self.h[:, heads])


def _packed_positions(total: int, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """The position inside its sequence, and the index of that sequence, of each of ``total`` packed rows."""
    t = torch.arange(total, device=cu_seqlens.device)
    n = torch.searchsorted(cu_seqlens[1:].contiguous(), t, right=True)
    return t - cu_seqlens[n], n


@dataclass(frozen=True)
class _Terms:
    """The operands and scores of the formula, as ``(B, H_q, ...)`` tensors in the dtype of the computation."""

    q: Tensor
    k: Tensor
    v: Tensor
    kept: Tensor  # [B, 1|H_q, S_q, S_kv]
    positions: Positions
    scores: Tensor  # [B, H_q, S_q, S_kv], finished
    capped: Tensor | None  # scores after softcap, before bias
    sinks: Tensor | None  # [B|1, H_q, 1]


def keep_matrix(inputs: Inputs, spec: AttentionSpec, at: Positions) -> Tensor:
    """True for each pair that band, lengths, sequences, segments, intervals, boolean mask and a finite bias keep."""
    kept = keep(spec, at.i, at.j, at.s_q, at.s_kv) & (at.sequence_q == at.sequence_kv)
    if inputs.segment_ids_q is not None and inputs.segment_ids_kv is not None:
        kept = kept & (inputs.segment_ids_q[:, None, :, None] == inputs.segment_ids_kv[:, None, None, :])
    if inputs.intervals is not None:
        kept = kept & in_intervals(pairs_of(inputs.intervals), at.j)
    if inputs.bias is not None:
        kept = kept & (inputs.bias != float("-inf"))
    return kept if inputs.mask is None else kept & inputs.mask


def forward(
    inputs: Inputs, spec: AttentionSpec, dtype: torch.dtype | None = None, at: Positions | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """``(out, lse, lse_low)`` by the formula of the spec; ``numerics.py`` explains ``lse_low``.

    Args:
        inputs: the tensors.
        spec: the scalars.
        dtype: dtype of the computation; None means fp32, or fp64 for fp64 inputs.
        at: the positions of the rows; None derives them from ``inputs``.
    """
    dtype = dtype or compute_dtype(inputs)
    t = _terms(inputs, spec, dtype, at)
    largest, total = _normaliser(t)
    p = _dropped(_weights(t, largest, total), _survivors(inputs, spec, t.positions), spec)
    out = numerics.kept_product(p, t.v, t.kept).transpose(1, 2).to(inputs.q.dtype)
    lse, low = (x.to(lse_dtype(inputs.q.dtype)) for x in numerics.split_lse(largest, total))
    results = (out, lse, low)
    return tuple((x[0] if inputs.is_packed else x).contiguous() for x in results)  # type: ignore[return-value]


def scores(inputs: Inputs, spec: AttentionSpec) -> Tensor:
    """The finished scores ``(B, H_q, S_q, S_kv)``; -inf where a pair is not kept."""
    return _terms(inputs, spec, compute_dtype(inputs)).scores


def weights(inputs: Inputs, spec: AttentionSpec, at: Positions | None = None) -> Tensor:
    """The factors of v, dropout included: ``(B, H_q, S_q, S_kv)`` in the dtype of the computation.

    ``at`` gives the positions of the rows and heads, if ``inputs`` is a part of a larger problem.
    """
    t = _terms(inputs, spec, compute_dtype(inputs), at)
    return _dropped(_weights(t, *_normaliser(t)), _survivors(inputs, spec, t.positions), spec)


def sink_weights(inputs: Inputs, lse: Tensor, lse_low: Tensor) -> Tensor:
    """The weight of each row's sink, ``(B, H_q, S_q)`` in the dtype of ``lse``; 0 without sinks."""
    lse, lse_low = (x[None] if inputs.is_packed else x for x in (lse, lse_low))
    if inputs.sinks is None:
        return torch.zeros_like(lse)
    return torch.exp((_per_sequence(inputs.sinks, inputs, Positions.of(inputs))[..., 0] - lse) - lse_low)


def mean_weights(inputs: Inputs, spec: AttentionSpec) -> Tensor:
    """The mean of ``weights`` over the heads, ``(B, S_q, S_kv)``, one head at a time."""
    everywhere = Positions.of(inputs)
    total = torch.zeros((), device=inputs.q.device)
    for head in torch.arange(inputs.heads_q, device=inputs.q.device).split(1):
        total = total + weights(of_heads(inputs, head), spec, everywhere.at_heads(head))[:, 0]
    return total / inputs.heads_q


def of_heads(inputs: Inputs, heads: Tensor) -> Inputs:
    """The same problem for some of its query heads, each with a key/value head of its own."""

    def along_1(x: Tensor | None) -> Tensor | None:
        return x if x is None or x.shape[1] == 1 else x[:, heads]

    kv_heads = heads // (inputs.heads_q // inputs.heads_kv)
    return inputs.replace(
        q=inputs.q[:, :, heads],
        k=inputs.k[:, :, kv_heads],
        v=inputs.v[:, :, kv_heads],
        bias=along_1(inputs.bias),
        mask=along_1(inputs.mask),
        intervals=along_1(inputs.intervals),
        alibi_slopes=along_1(inputs.alibi_slopes),
        sinks=along_1(inputs.sinks),
    )


def backward(
    dout: Tensor,
    dlse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    lse_low: Tensor,
    inputs: Inputs,
    spec: AttentionSpec,
    needs: Sequence[str] = DIFFERENTIABLE,
    *,
    dtype: torch.dtype | None = None,
) -> Grads:
    """The gradients named in ``needs``, in closed form, by the formulas at the top of this file."""
    dtype = dtype or compute_dtype(inputs)
    t = _terms(inputs, spec, dtype)
    dout, out = (_heads_first(x, inputs).to(dtype) for x in (dout, out))
    lse, lse_low = (x.view(t.q.shape[:-1]).to(dtype) for x in (lse, lse_low))
    shift = (dout * out).sum(-1)
    if dlse is not None:
        shift = shift - dlse.reshape(lse.shape).to(dtype)  # delta - dlse
    p = _weights_again(t, lse, lse_low)
    survivors = _survivors(inputs, spec, t.positions)
    dt = p * (_dropped(dout @ t.v.transpose(-1, -2), survivors, spec) - shift[..., None])
    dt = torch.where(t.kept, dt, 0)
    ds = dt if t.capped is None else torch.where(t.kept, dt * (1 - (t.capped / float(spec.softcap or 1)) ** 2), 0)
    kept, columns = t.kept, t.kept.transpose(-1, -2)
    dropped = _dropped(p, survivors, spec)
    return Grads(
        dq=_rows(spec.scale * numerics.kept_product(ds, t.k, kept), inputs.q) if "q" in needs else None,
        dk=_rows(spec.scale * numerics.kept_product(ds.mT, t.q, columns), inputs.k) if "k" in needs else None,
        dv=_rows(numerics.kept_product(dropped.mT, dout, columns), inputs.v) if "v" in needs else None,
        dbias=_sum_to(dt, inputs.bias) if inputs.bias is not None and "bias" in needs else None,
        dsinks=_sink_gradient(t, (lse, lse_low), shift, inputs) if "sinks" in needs else None,
    )


def statistics(inputs: Inputs, spec: AttentionSpec, dtype: torch.dtype | None = None) -> Statistics:
    """The statistics that the spec defines; ``dtype`` is that of the computation, as in ``forward``."""
    t = _terms(inputs, spec, dtype or compute_dtype(inputs))
    p = _weights(t, *_normaliser(t))
    entropy = -(p * torch.where(p > 0, p, 1).log()).sum(-1)
    if t.scores.shape[-1] == 0 or t.scores.shape[-2] == 0:
        largest, key = torch.full_like(entropy, numerics.NEVER), torch.full_like(entropy, -1, dtype=torch.long)
        key_max = torch.zeros_like(p.sum(-2))
    else:
        largest, key = t.scores.max(-1)
        positions = t.positions.j.flatten()[key]
        key = torch.where(largest == numerics.NEVER, -1, positions)
        key_max = p.detach().amax(-2)
    found = (entropy, largest, key, p.sum(-2), key_max)
    results = (x if x.dtype == torch.long else x.to(lse_dtype(inputs.q.dtype)) for x in found)
    return Statistics(*((x[0] if inputs.is_packed else x).contiguous() for x in results))


def statistics_backward(
    gradient: StatisticsGradient,
    inputs: Inputs,
    spec: AttentionSpec,
    needs: Sequence[str],
    *,
    dtype: torch.dtype | None = None,
) -> Grads:
    """The gradients named in ``needs`` of the differentiable statistics, as torch derives them."""
    names = ("entropy", "largest_logit", "key_sum")

    def differentiable(*values: Tensor) -> tuple[Tensor, ...]:
        found = statistics(inputs.replace(**dict(zip(needs, values, strict=True))), spec, dtype)
        return tuple(getattr(found, name) for name in names)

    values, pull_back = torch.func.vjp(differentiable, *(getattr(inputs, name) for name in needs))  # type: ignore[misc]
    given = (getattr(gradient, name) for name in names)
    found = pull_back(tuple(torch.zeros_like(x) if g is None else g for x, g in zip(values, given, strict=True)))
    return Grads(**{f"d{name}": x for name, x in zip(needs, found, strict=True)})


def jvp(
    tangents: Tangents, results: Rows, inputs: Inputs, spec: AttentionSpec, *, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """The tangents of out and lse as torch derives them from ``forward``, which ``results`` are of and not read."""

    def moved(*values: Tensor) -> tuple[Tensor, Tensor]:
        out, lse, _ = forward(inputs.replace(**dict(zip(moving, values, strict=True))), spec, dtype)
        return out, lse

    moving = {name: x for name in DIFFERENTIABLE if (x := getattr(tangents, name)) is not None}
    primals = tuple(getattr(inputs, name) for name in moving)
    out, lse = jacobian_product(moved, primals, tuple(moving.values()))
    return out.contiguous(), lse.contiguous()


def jacobian_product(
    function: Callable[..., tuple[Tensor, ...]], primals: tuple[Tensor, ...], tangents: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    """The tangents of ``function(*primals)`` as ``primals`` move along ``tangents``.

    In reverse mode twice, a vector-Jacobian product being linear in its vector: torch has no forward mode in
    forward mode.
    """
    if not primals:
        return tuple(torch.zeros_like(x) for x in function())
    values, pull_back = torch.func.vjp(function, *primals)  # type: ignore[misc]
    _, push = torch.func.vjp(lambda *seeds: pull_back(seeds), *map(torch.zeros_like, values))  # type: ignore[misc]
    return push(tangents)


def backward_jvp(
    rows: Rows,
    moved: Rows,
    tangents: Tangents,
    inputs: Inputs,
    spec: AttentionSpec,
    needs: Sequence[str],
    *,
    dtype: torch.dtype | None = None,
) -> Grads:
    """The tangents of the gradients named in ``needs``, as torch derives them from both passes."""

    def gradients(*values: Tensor) -> tuple[Tensor, ...]:
        at = dict(zip(moving, values, strict=True))
        dout, dlse = (at.pop(name, getattr(rows, name)) for name in ("dout", "dlse"))
        at_inputs = inputs.replace(**at)
        grads = backward(dout, dlse, *forward(at_inputs, spec, dtype), at_inputs, spec, needs, dtype=dtype)
        return tuple(getattr(grads, f"d{name}") for name in needs)

    given = {name: getattr(moved, name) for name in ("dout", "dlse")}
    given |= {name: getattr(tangents, name) for name in DIFFERENTIABLE}
    moving = {name: x for name, x in given.items() if x is not None}
    primals = tuple(getattr(rows if name in ("dout", "dlse") else inputs, name) for name in moving)
    found = jacobian_product(gradients, primals, tuple(moving.values()))
    return Grads(**{f"d{name}": x for name, x in zip(needs, found, strict=True)})


def attend_to_cache(
    inputs: CacheInputs, spec: AttentionSpec, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """Append, gather every position that the cache can hold, and attend: ``(out, lse)`` by the formula of the spec."""
    kv_cache.append(inputs)
    dtype = dtype or lse_dtype(inputs.q.dtype)
    dense, at = gathered(inputs, spec, dtype)
    if inputs.tree_mask is not None:
        dense, at = _in_trees(dense, at, kv_cache.tree_of(inputs))
        spec = dataclasses.replace(spec, right=None)
    out, lse, _ = forward(dense, spec, dtype, at)
    return out.to(inputs.q.dtype), lse


def gathered(inputs: CacheInputs, spec: AttentionSpec, dtype: torch.dtype) -> tuple[Inputs, Positions]:
    """The content of the cache as dense (or packed) tensors in ``dtype``, and the positions of their rows.

    Rows beyond the lengths are included and masked by their positions: no size depends on the value of a length.
    """
    device, reach = inputs.q.device, _reach(inputs)
    b, j = torch.arange(inputs.batch, device=device)[:, None], torch.arange(reach, device=device)[None, :]
    page, row = kv_cache.rows_of(inputs, b, j)
    page = page.clamp(0, max(0, inputs.k_cache.shape[0] - 1))  # entries that are not in use may be anything
    k = kv_cache.read(inputs.k_cache, inputs.k_scale, page, row, dtype)  # [B, S, H_kv, D]
    v = kv_cache.read(inputs.v_cache, inputs.v_scale, page, row, dtype)
    q = kv_cache.rotated_queries(inputs, spec).to(dtype)
    dense = Inputs(q, k, v, bias=inputs.bias, alibi_slopes=inputs.alibi_slopes, sinks=inputs.sinks)
    s_kv = (inputs.cache_lengths + inputs.new_lengths()).long()
    h = torch.arange(inputs.heads_q, device=device)[None, :, None, None]
    if inputs.cu_seqlens_q is None:
        i, b = torch.arange(q.shape[1], device=device)[None, None, :, None], b[:, None, None]
        return dense, Positions(h, inputs.heads_q, i, j[:, None, None], b, b, q.shape[1], s_kv[:, None, None, None])
    sequence, i = kv_cache.packed_positions(inputs)
    ends = torch.arange(inputs.batch + 1, device=device, dtype=torch.int32) * reach
    dense = dense.replace(k=k.flatten(0, 1), v=v.flatten(0, 1), cu_seqlens_q=inputs.cu_seqlens_q, cu_seqlens_kv=ends)
    of_rows = (x[None, None, :, None] for x in (i, sequence, inputs.cu_seqlens_q.diff()[sequence], s_kv[sequence]))
    at_i, of_q, s_q, s_kv = of_rows
    at_j, of_kv = (x.expand(inputs.batch, reach).reshape(1, 1, 1, -1) for x in (j, b))
    return dense, Positions(h, inputs.heads_q, at_i, at_j, of_q, of_kv, s_q, s_kv)


def _in_trees(dense: Inputs, at: Positions, tree: Tree) -> tuple[Inputs, Positions]:
    """The gathered tensors with a mask of what each row sees, and the positions in the paths of the trees."""
    of_q, of_kv = at.sequence_q, at.sequence_kv
    depths = tree.depths[of_q, at.i]
    mask = tree.sees(of_q, at.i, of_kv, at.j)
    return dense.replace(mask=mask), dataclasses.replace(at, i=depths, j=tree.position(of_kv, at.j))


def _reach(inputs: CacheInputs) -> int:
    """Positions to gather: the capacity, or the length of a shorter bias, which bounds the lengths too."""
    is_short = inputs.bias is not None and 1 < inputs.bias.shape[3] < inputs.capacity
    return inputs.bias.shape[3] if inputs.bias is not None and is_short else inputs.capacity


def compute_dtype(inputs: Inputs) -> torch.dtype:
    return lse_dtype(inputs.q.dtype)


def lse_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp32, but fp64 for fp64 inputs."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _terms(inputs: Inputs, spec: AttentionSpec, dtype: torch.dtype, at: Positions | None = None) -> _Terms:
    at = Positions.of(inputs) if at is None else at
    kept = keep_matrix(inputs, spec, at)
    q, k, v = (_heads_first(x, inputs).to(dtype) for x in (inputs.q, inputs.k, inputs.v))
    group = inputs.heads_q // inputs.heads_kv
    used = _used_keys(kept, inputs)[..., None]
    # rows that no query keeps may hold NaN, and 0 * NaN is NaN
    k, v = (torch.where(used, x, 0).repeat_interleave(group, dim=1) for x in (k, v))
    scores = spec.scale * (q @ k.transpose(-1, -2))
    capped = None
    if spec.softcap is not None:
        scores = capped = spec.softcap * torch.tanh(scores / spec.softcap)
    if inputs.bias is not None:
        scores = scores + inputs.bias.to(dtype)
    if inputs.alibi_slopes is not None:
        slopes = _per_sequence(inputs.alibi_slopes, inputs, at).to(dtype)
        scores = scores - slopes * distance(spec, at.i, at.j, at.s_q, at.s_kv).to(dtype)
    sinks = None if inputs.sinks is None else _per_sequence(inputs.sinks, inputs, at).to(dtype)[..., 0]
    return _Terms(q, k, v, kept, at, torch.where(kept, scores, float("-inf")), capped, sinks)


def _used_keys(kept: Tensor, inputs: Inputs) -> Tensor:
    """``[B, H_kv, S_kv]``: True where some query row of some head keeps the key."""
    used = kept.any(dim=-2)
    if used.shape[1] == 1:
        return used
    return used.unflatten(1, (inputs.heads_kv, -1)).any(dim=2)


def _heads_first(x: Tensor, inputs: Inputs) -> Tensor:
    """``(B, S, H, D)`` or packed ``(T, H, D)`` -> ``(B, H, S, D)``."""
    return (x[None] if inputs.is_packed else x).transpose(1, 2)


def _per_sequence(x: Tensor, inputs: Inputs, at: Positions) -> Tensor:
    """``(1|B, H_q)`` -> ``(1|B, H_q, 1|S_q, 1)``: the number for each row, in a packed batch its sequence's."""
    if inputs.is_packed and x.shape[0] != 1:
        return x[at.sequence_q.flatten()].transpose(0, 1)[None, :, :, None]
    return x[:, :, None, None]


def _normaliser(t: _Terms) -> tuple[Tensor, Tensor]:
    """``m`` and ``l``: the largest score of each row, the sink among them, and the sum of ``exp(score - m)``.

    They are kept apart because ``m + log(l)`` rounds ``log(l)`` away where all scores of a row share an offset of 1e8.
    In an empty row they are -inf and 1.
    """
    columns = t.scores if t.sinks is None else torch.cat([t.scores, _sink_column(t)], dim=-1)
    if columns.shape[-1] == 0:
        nothing = columns.new_full(columns.shape[:-1], float("-inf"))
        return nothing, torch.ones_like(nothing)
    largest = columns.detach().amax(-1)
    empty = largest == float("-inf")
    total = _exponentials(columns, largest).sum(-1)
    return largest, torch.where(empty, 1, total)


def _sink_column(t: _Terms) -> Tensor:
    assert t.sinks is not None
    return t.sinks[..., None].expand(*t.scores.shape[:-1], 1)


def _exponentials(scores: Tensor, largest: Tensor) -> Tensor:
    """``exp(score - largest)``; in an empty row ``exp(-inf - 0) = 0``."""
    return torch.exp(scores - torch.where(largest == float("-inf"), 0, largest)[..., None])


def _weights(t: _Terms, largest: Tensor, total: Tensor) -> Tensor:
    return torch.where(t.kept, _exponentials(t.scores, largest) / total[..., None], 0)


def _weights_again(t: _Terms, lse: Tensor, lse_low: Tensor) -> Tensor:
    """The weights from ``lse`` and ``lse_low``, subtracted in this order so that the large numbers cancel first."""
    finite_lse = torch.where(lse == float("-inf"), 0, lse)
    p = torch.exp((t.scores - finite_lse[..., None]) - lse_low[..., None])
    return torch.where(t.kept, p, 0)  # in a row whose lse is NaN, exp(-inf - lse) is NaN too


def _survivors(inputs: Inputs, spec: AttentionSpec, at: Positions) -> Tensor | None:
    """True for each weight that dropout keeps; None without dropout."""
    if spec.dropout_p == 0:
        return None
    assert inputs.rng_state is not None
    head = rng.head_number(inputs.rng_state, at.sequence_q, at.h, at.num_heads)
    return rng.dropout_keep(spec, inputs.rng_state, head, at.i, at.j)


def _dropped(x: Tensor, survivors: Tensor | None, spec: AttentionSpec) -> Tensor:
    """``x`` times the factors of dropout."""
    return x if survivors is None else torch.where(survivors, x * spec.dropout_scale, 0)


def _rows(x: Tensor, like: Tensor) -> Tensor:
    """``(B, H_q, S, D)`` -> the shape and dtype of ``like``, summing the query heads that share one of its heads."""
    x = x.unflatten(1, (like.shape[-2], -1)).sum(2).transpose(1, 2)
    return x.to(like.dtype).reshape(like.shape)


def _sum_to(x: Tensor, like: Tensor) -> Tensor:
    """Sum ``x`` over the dimensions that ``like`` broadcasts."""
    broadcast = [d for d, size in enumerate(like.shape) if size == 1 and x.shape[d] != 1]
    return (x.sum(broadcast, keepdim=True) if broadcast else x).to(like.dtype)


def _sink_gradient(t: _Terms, lses: tuple[Tensor, Tensor], shift: Tensor, inputs: Inputs) -> Tensor | None:
    if t.sinks is None or inputs.sinks is None:
        return None
    lse, lse_low = lses
    dsink = -torch.exp((t.sinks - lse) - lse_low) * shift  # [B, H_q, S_q]
    if inputs.is_packed and inputs.sinks.shape[0] != 1:
        by_sequence = torch.zeros_like(inputs.sinks, dtype=dsink.dtype)
        return by_sequence.index_add(0, t.positions.sequence_q.flatten(), dsink[0].transpose(0, 1)).to(
            inputs.sinks.dtype
        )
    return _sum_to(dsink.sum(-1), inputs.sinks).to(inputs.sinks.dtype)
