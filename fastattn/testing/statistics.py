"""Statistics of the weights and their gradients, judged by the rule of ``tolerance``.

The condition of a result is, as there, its formula with each sum replaced by the root of the sum of its squared terms.
Sums over the keys of a row, or over query rows, count the roundings of each term, too. Weights are positive: an error
that those of a row share moves the entropy by its own relative size, and where all rows are alike, so are their errors,
and ``key_sum`` moves by the sum of them.
The position of the largest logit is judged by the exact logit that stands there: of two that rounding cannot tell
apart, either is right.

Statistics are stored in the dtype of the arithmetic and read nothing that was rounded to another, so eager's error is
that of eager in this dtype, too. The factors are half of those there: no result of a first pass, rounded, enters a
second one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastattn import reference
from fastattn.backends import load
from fastattn.backends.base import Backend
from fastattn.problem import Grads, Statistics, StatisticsGradient
from fastattn.testing.inputs import Sample
from fastattn.testing.tolerance import (
    CONDITION_FACTOR,
    EAGER_FACTOR,
    Limits,
    Results,
    Row,
    check_contract,
    heads_first,
    in_float64,
    largest,
    like_input,
    offset_of,
    poisoned,
    roundings,
)

FACTORS = (EAGER_FACTOR / 2, CONDITION_FACTOR / 2)
Run = Callable[[Sample, StatisticsGradient, Sequence[str]], tuple[Statistics, Grads]]


def measure_statistics(backend: Backend | str, sample: Sample) -> list[Row]:
    """Judge every statistic, and the gradients that flow back from the differentiable ones.

    Args:
        backend: a backend that declares "statistics", or its name.
        sample: from ``inputs.make``.

    Raises:
        AssertionError: a result breaks the contract of ``backends.base`` in shape, dtype or memory.
    """
    chosen = load(backend) if isinstance(backend, str) else backend

    def run(sample: Sample, gradient: StatisticsGradient, needs: Sequence[str]) -> tuple[Statistics, Grads]:
        with poisoned():
            statistics = chosen.statistics(sample.inputs, sample.spec)
            return statistics, chosen.statistics_backward(gradient, sample.inputs, sample.spec, needs)

    return judge_statistics(run, sample)


def judge_statistics(run: Run, sample: Sample) -> list[Row]:
    """Judge what ``run(sample, gradient, needs)`` computes: the statistics, and the gradients of ``needs``."""
    wide, needs, gradient = in_float64(sample), _needs(sample), _gradient(sample)
    statistics, grads = run(sample, gradient, needs)
    _check(statistics, grads, sample)
    exactly = StatisticsGradient(*(getattr(gradient, f.name).double() for f in dataclasses.fields(gradient)))
    exact = _reference(wide, exactly, None)
    scores, arithmetic = reference.scores(wide.inputs, wide.spec), reference.compute_dtype(sample.inputs)
    of_gradients = _reference(sample, gradient, sample.inputs.q.dtype)
    eager = of_gradients | _statistics(reference.statistics(sample.inputs, sample.spec, arithmetic))
    found = _named(statistics, grads, needs)
    found["logit at largest_key"] = _at_key(scores, statistics.largest_key, wide).to(arithmetic)
    exact["logit at largest_key"], eager["logit at largest_key"] = exact["largest_logit"], eager["largest_logit"]
    condition = _condition(wide, exactly, scores, exact)
    limits = {
        name: Limits.of(exact[name], eager[name], condition[name], found[name].dtype, arithmetic, FACTORS)
        for name in condition
    }
    return [row for name, limit in limits.items() for row in limit.judge(name, found[name])]


def _needs(sample: Sample) -> tuple[str, ...]:
    return tuple(name for name in sample.needs if name != "v")


def _gradient(sample: Sample) -> StatisticsGradient:
    generator, inputs = torch.Generator().manual_seed(2), sample.inputs
    shapes = (inputs.lse_shape(), inputs.lse_shape(), inputs.key_shape())
    drawn = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return StatisticsGradient(*(x.to(inputs.q.device, reference.lse_dtype(inputs.q.dtype)) for x in drawn))


def _named(statistics: Statistics, grads: Grads, needs: tuple[str, ...]) -> Results:
    return _statistics(statistics) | {f"d{name}": getattr(grads, f"d{name}") for name in needs}


def _statistics(found: Statistics) -> Results:
    return {name: x for name, x in found._asdict().items() if name != "largest_key"}


def _check(statistics: Statistics, grads: Grads, sample: Sample) -> None:
    inputs = sample.inputs
    for name, x in statistics._asdict().items():
        shape = inputs.key_shape() if name.startswith("key_") else inputs.lse_shape()
        dtype = torch.int64 if name == "largest_key" else reference.lse_dtype(inputs.q.dtype)
        check_contract(name, x, shape, dtype, needs_contiguous=True)
    for name in _needs(sample):
        like = getattr(inputs, name)
        check_contract(f"d{name}", getattr(grads, f"d{name}"), tuple(like.shape), like.dtype, needs_contiguous=False)


def _reference(sample: Sample, gradient: StatisticsGradient, dtype: torch.dtype | None) -> Results:
    statistics = reference.statistics(sample.inputs, sample.spec, dtype)
    needs = _needs(sample)
    grads = reference.statistics_backward(gradient, sample.inputs, sample.spec, needs, dtype=dtype)
    return _named(statistics, grads, needs)


def _at_key(scores: Tensor, key: Tensor, sample: Sample) -> Tensor:
    """The scores ``[B, H, S_q, S_kv]`` at a position of each row's sequence; -inf at -1."""
    inputs = sample.inputs
    found = key.view(scores.shape[:-1])
    if inputs.is_packed:
        assert inputs.cu_seqlens_kv is not None
        at = reference.Positions.of(inputs)
        found = torch.where(found < 0, found, found + inputs.cu_seqlens_kv.long()[at.sequence_q[..., 0]])
    if not scores.numel():
        return torch.full(key.shape, float("-inf"), dtype=scores.dtype, device=scores.device)
    logits = scores.gather(-1, found.clamp(min=0)[..., None])[..., 0]
    return torch.where(found < 0, float("-inf"), logits).view(key.shape)


def _condition(sample: Sample, gradient: StatisticsGradient, scores: Tensor, exact: Results) -> Results:
    inputs, spec = sample.inputs, sample.spec
    q2, k2 = (heads_first(x, inputs).square() for x in (inputs.q, inputs.k))
    k2 = k2.nan_to_num(0).repeat_interleave(inputs.heads_q // inputs.heads_kv, dim=1)
    dtype = sample.case.dtype
    raw2 = spec.scale**2 * roundings(inputs.q.shape[-1], dtype) * (q2 @ k2.mT)
    finite = torch.where(scores == float("-inf"), 0, scores)
    p = reference.weights(inputs.replace(rng_state=None), dataclasses.replace(spec, dropout_p=0.0))
    log_p = torch.where(p > 0, p, 1).log()
    offset = offset_of(finite.abs(), raw2.sqrt(), dtype)
    magnified = (1 + raw2.sqrt() + offset + log_p.abs()).square()
    weight, rows, columns = p.square() * magnified, scores.shape[:-1], (*scores.shape[:2], scores.shape[-1])
    over_rows, over_keys = (roundings(n, dtype) for n in scores.shape[-2:])
    of_entropy, of_largest = (x.view(rows)[..., None] for x in (gradient.entropy, gradient.largest_logit))  # type: ignore[union-attr]
    assert gradient.key_sum is not None
    of_weights = gradient.key_sum.view(columns)[:, :, None] - of_entropy * (log_p + 1)
    shift = (p * of_weights).sum(-1, keepdim=True)
    of_logs2 = of_entropy.square() * magnified
    shift2 = over_keys * (weight * of_weights.square() + p.square() * of_logs2).sum(-1, keepdim=True)
    is_largest = (scores == exact["largest_logit"].view(rows)[..., None]) & (scores != float("-inf"))
    dt2 = weight * (of_weights.square() + shift.square()) + p.square() * (of_logs2 + shift2)
    dt2 = dt2 + is_largest * of_largest.square()
    ds2 = dt2 if spec.softcap is None else dt2 * (1 + (2 / spec.softcap) ** 2 * raw2)
    _, lse, lse_low = reference.forward(inputs, spec)
    offset = offset_of(lse.abs().nan_to_num(posinf=0).view(rows), largest(raw2, -1).sqrt(), dtype)
    shared = (1 + offset) * (1 + exact["entropy"].view(rows))
    of_sinks = reference.sink_weights(inputs, lse, lse_low).square() * magnified.sum(-1)
    sink2 = (of_sinks * (shift2 + shift.square())[..., 0]).sum((0, 2))
    of_logit = largest(magnified, -1)
    found = {
        "entropy": over_keys * (weight * (1 + log_p.abs()).square()).sum(-1) + shared.square(),
        "largest_logit": of_logit,
        "logit at largest_key": of_logit,
        "key_sum": over_rows * weight.sum(-2) + weight.sqrt().sum(-2).square(),
        "key_max": largest(weight, -2),
        "dq": over_keys * spec.scale**2 * like_input(ds2 @ k2, exact["dq"]) if "dq" in exact else None,
        "dk": over_rows * spec.scale**2 * like_input(ds2.mT @ q2, exact["dk"]) if "dk" in exact else None,
        "dbias": dt2.sum_to_size(exact["dbias"].shape) if "dbias" in exact else None,
        "dsinks": sink2.max().expand(exact["dsinks"].shape) if "dsinks" in exact else None,
    }
    return {name: x.sqrt().view(exact[name].shape) for name, x in found.items() if x is not None}
