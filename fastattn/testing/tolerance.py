"""The tolerance rule, by which every backend is judged: out, lse and every gradient.

A result is right if its error against the fp64 reference is at most

    2 * (error of eager attention whose arithmetic is in the input's own dtype)
      + eps(dtype) * (|exact result| + the smallest normal number of the dtype, in fp64 that with a normal square)
      + 4 * eps(fp32, or fp64) * condition

in two norms: the largest error, which detects a single wrong element, and the root mean square, which detects a small
systematic error. All backends get the same bits as inputs; the exact result is computed from these in fp64.

The first term is the error that a user has without this package. The other two cover results that eager happens to
compute exactly, as in small tensors: with one key, eager's weight is exactly 1, while a kernel that recomputes it from
lse is off by a rounding. The second is the rounding of the stored result. The third is the rounding of the fp32
arithmetic that the spec asks for, to first order: ``condition`` is the result's formula with every sum replaced by the
root of the sum of its squared terms (roundings are independent: Higham and Mary, "A new approach to probabilistic
rounding error analysis", 2019) and each weight ``p`` by ``p * (1 + |scores| + |lse|)``, since ``exp`` magnifies a
relative error of its argument by the argument; ``|lse|`` counts for no more than what a large bias may absorb of the
products (``offset_of``). Sums over a head dim, and those of dv over query rows, count ``1 + log2(n)`` roundings of each
of their n terms, those of a pairwise sum: backward sums in another order than forward, and with one key eager's error
does not include that.
``delta`` is computed from an ``out`` that was rounded to its dtype. The condition stays above zero even if the exact
result cancels to zero, as ``dp - delta`` does with one key.

Some roundings are not independent, but equal, and equal errors do not average out:

- The weights of a row share the rounding of its lse, so they move ``out`` by ``out * (1 + |lse|)``.
- Equal scores have equal exponentials, errors included, and lse is the logarithm of their sum: a relative error that
  all share is an absolute error of lse, however small lse is. A kernel may round exponentials to the dtype of the
  inputs, as it does before it multiplies them by v, so half an eps(dtype) of them counts.

In fp64 eager is the exact result itself, which rounds as often as what it judges: its error is 0 and says nothing, the
roundings of both count, so the condition counts twice, and every sum counts the roundings of a sum in order.

Eager in fp16 may overflow. Its error is then replaced by the condition times eps(dtype). A result that its dtype cannot
hold is stored as infinity: found and exact results are compared as the nearest finite numbers of that dtype.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fastattn import reference
from fastattn.backends import load
from fastattn.backends.base import Backend
from fastattn.problem import Grads, Inputs
from fastattn.testing.inputs import Sample

EAGER_FACTOR = 2.0
CONDITION_FACTOR = 4.0
# Conditions are squares until the last step: below this number, in fp64 alone, they are 0. What the floor lets pass is
# an error below 4e-170, an eps of it.
LEAST_SQUARED = torch.finfo(torch.float64).smallest_normal ** 0.5
Results = dict[str, Tensor]


@dataclass(frozen=True)
class Row:
    """One judgement: a result in one norm.

    Attributes:
        name: for example "dq max" or "out rms".
        error: of the backend against fp64.
        eager_error: of same-dtype eager attention against fp64.
        bound: the most that ``error`` may be.
        ok: whether it is.
        factor: of ``eager_error`` in the bound.
        strain: the ratio of error to bound; infinity for NaN.
    """

    name: str
    error: float
    eager_error: float
    bound: float
    ok: bool
    factor: float = EAGER_FACTOR

    def is_within(self, eager_error: float) -> bool:
        """Whether the result were right, had eager erred by so much."""
        return self.error <= self.bound + self.factor * (eager_error - self.eager_error)

    @property
    def strain(self) -> float:
        if self.error != self.error:
            return math.inf
        return self.error / self.bound if self.bound else (math.inf if self.error else 0.0)


class Yardstick:
    """What the results of one sample are judged by. The parts are computed when first used, and once.

    Attributes:
        sample: the problem, as backends get it.
        factors: of eager's error and of the condition.
    """

    factors = (EAGER_FACTOR, CONDITION_FACTOR)

    def __init__(self, sample: Sample) -> None:
        self.sample = sample
        self._limits: dict[tuple[str, torch.dtype], Limits] = {}

    @functools.cached_property
    def exact(self) -> Results:
        """The results in fp64."""
        return _reference(in_float64(self.sample), None)

    @functools.cached_property
    def eager(self) -> Results:
        """Those of eager attention whose arithmetic is in the dtype of the inputs."""
        return _reference(self.sample, self.sample.inputs.q.dtype)

    @functools.cached_property
    def condition(self) -> Results:
        """What a relative error of one in each operation could move the results by."""
        return _condition(in_float64(self.sample), self.exact)

    def judge(self, found: Results, suffix: str = "") -> list[Row]:
        """Two rows, one for each norm, for each result that was found; ``suffix`` ends their names."""
        named = (name for name in self.condition if name in found)
        return [row for name in named for row in self._limits_of(name, found[name]).judge(name + suffix, found[name])]

    def _limits_of(self, name: str, found: Tensor) -> Limits:
        """The same for every backend whose result has this dtype."""
        if (limits := self._limits.get((name, found.dtype))) is None:
            compared = (self.exact[name], self.eager[name], self.condition[name])
            arithmetic = reference.compute_dtype(self.sample.inputs)
            limits = self._limits[name, found.dtype] = Limits.of(*compared, found.dtype, arithmetic, self.factors)
        return limits


def measure(
    backend: Backend | str,
    sample: Sample,
    backward_backend: Backend | str | None = None,
    *,
    yardstick: Yardstick | None = None,
) -> list[Row]:
    """Run a sample forward and backward, and judge out, lse and every gradient that the sample needs.

    Args:
        backend: a backend or its name.
        sample: from ``inputs.make``.
        backward_backend: the backend of the backward pass; None means the same.
        yardstick: of the sample, for several backends to share; None makes one.

    Raises:
        AssertionError: a result breaks the contract of ``backends.base`` in shape, dtype or memory.
    """
    forward = _load(backend)
    backward = forward if backward_backend is None else _load(backward_backend)
    return (yardstick or Yardstick(sample)).judge(run(forward, sample, backward))


def judge_forward(found: Results, exact_sample: Sample, rounded_sample: Sample, suffix: str = "") -> list[Row]:
    """Judge ``out`` and ``lse`` that were not computed by ``measure``, where the fp64 problem has values of its own.

    Args:
        found: ``out`` and ``lse``, in the shapes of the samples.
        exact_sample: the problem in fp64.
        rounded_sample: the same problem in the dtype of the call.
        suffix: appended to the names of the rows.
    """
    yardstick = Yardstick(rounded_sample)
    yardstick.exact = _reference(exact_sample, None)
    yardstick.condition = _condition(exact_sample, yardstick.exact)
    shaped = {name: x.view(yardstick.exact[name].shape) for name, x in found.items() if name in yardstick.condition}
    return yardstick.judge(shaped, suffix)


def assert_within(rows: Sequence[Row]) -> None:
    """Raise AssertionError, with a table of all rows, unless every row is ok."""
    if not all(row.ok for row in rows):
        raise AssertionError("outside the tolerance of fastattn/testing/tolerance.py\n" + table(rows))


def table(rows: Sequence[Row]) -> str:
    """The rows as text."""
    lines = [f"  {'':<10} {'error':>10} {'eager':>10} {'bound':>10}"]
    for row in rows:
        verdict = "" if row.ok else "  <-- wrong"
        lines.append(f"  {row.name:<10} {row.error:>10.3g} {row.eager_error:>10.3g} {row.bound:>10.3g}{verdict}")
    return "\n".join(lines)


def run(forward: Backend, sample: Sample, backward: Backend) -> Results:
    """Results by name, computed with poisoned memory and checked against the contract of backends."""
    inputs, spec = sample.inputs, sample.spec
    with poisoned():
        out, lse, lse_low = forward.forward(inputs, spec)
        check_contract("out", out, inputs.out_shape(), inputs.q.dtype, needs_contiguous=True)
        for name, x in (("lse", lse), ("lse_low", lse_low)):
            check_contract(name, x, inputs.lse_shape(), reference.lse_dtype(inputs.q.dtype), needs_contiguous=True)
        grads = backward.backward(sample.dout, sample.dlse, out, lse, lse_low, inputs, spec, sample.needs)
    results = {"out": out, "lse": lse} | _named(grads, sample.needs)
    for name in sample.needs:
        like = getattr(inputs, name)
        check_contract(f"d{name}", results[f"d{name}"], tuple(like.shape), like.dtype, needs_contiguous=False)
    return results


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Inside the context new memory holds NaN (integers: their largest value), so that unwritten results fail."""
    with _Poison():
        yield


_EMPTY = frozenset((
    torch.empty, torch.empty_like, torch.empty_strided, torch.empty_permuted, Tensor.new_empty, Tensor.new_empty_strided
))  # fmt: skip


class _Poison(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func not in _EMPTY:
            return result
        if result.is_floating_point():
            return result.fill_(float("nan"))
        return result.fill_(True if result.dtype == torch.bool else torch.iinfo(result.dtype).max)


def _load(backend: Backend | str) -> Backend:
    return load(backend) if isinstance(backend, str) else backend


def _named(grads: Grads, needs: Sequence[str]) -> Results:
    for name in needs:
        assert getattr(grads, f"d{name}") is not None, f"d{name} was asked for and is None"
    return {f"d{name}": getattr(grads, f"d{name}") for name in needs}


def check_contract(name: str, x: Tensor, shape: tuple[int, ...], dtype: torch.dtype, *, needs_contiguous: bool) -> None:
    assert tuple(x.shape) == shape, f"{name} has shape {tuple(x.shape)}, not {shape}"
    assert x.dtype == dtype, f"{name} is {x.dtype}, not {dtype}"
    assert x.is_contiguous() or not needs_contiguous, f"{name} is not contiguous, its strides are {x.stride()}"


def in_float64(sample: Sample) -> Sample:
    names = ("q", "k", "v", "bias", "sinks", "alibi_slopes")
    given = {name: getattr(sample.inputs, name) for name in names}
    inputs = sample.inputs.replace(**{name: x.double() for name, x in given.items() if x is not None})
    dlse = None if sample.dlse is None else sample.dlse.double()
    return Sample(sample.case, inputs, sample.spec, sample.dout.double(), dlse)


def _reference(sample: Sample, dtype: torch.dtype | None) -> Results:
    inputs, spec = sample.inputs, sample.spec
    out, lse, low = reference.forward(inputs, spec, dtype)
    grads = reference.backward(sample.dout, sample.dlse, out, lse, low, inputs, spec, sample.needs, dtype=dtype)
    return {"out": out, "lse": lse, "lse_low": low} | _named(grads, sample.needs)


@dataclass(frozen=True)
class Limits:
    """What a result is compared with: the exact one, and by norm the error of eager and the most that its own may be.

    Where the exact result is -inf (lse of an empty row), the result must be too.
    """

    exact: Tensor
    at_infinity: Tensor
    by_norm: dict[str, tuple[float, float]]
    factor: float

    @classmethod
    def of(
        cls,
        exact: Tensor,
        eager: Tensor,
        condition: Tensor,
        stored: torch.dtype,
        arithmetic: torch.dtype,
        factors: tuple[float, float] = (EAGER_FACTOR, CONDITION_FACTOR),
    ) -> Limits:
        """For a result of dtype ``stored``, computed in the dtype ``arithmetic``."""
        stored_eps, arithmetic_eps = torch.finfo(stored).eps, torch.finfo(arithmetic).eps
        least = stored_eps * max(torch.finfo(stored).smallest_normal, LEAST_SQUARED)  # steps of subnormal numbers
        at_infinity = exact == float("-inf")
        exact, eager, condition = (x.double().where(~at_infinity, 0) for x in (exact, eager, condition))
        is_held = exact.abs() <= torch.finfo(stored).max
        overflowed = bool((eager.isnan() | (eager.isinf() & is_held)).any())
        exact, eager = _as_stored(exact, stored), _as_stored(eager, stored)
        computations = 2 if arithmetic == torch.float64 else 1  # that of the exact result rounds as much
        counted = computations * factors[1] * arithmetic_eps
        by_norm = {}
        for name, norm in _NORMS.items():
            eager_error = norm(eager - exact)
            yardstick = stored_eps * norm(condition) if overflowed else eager_error
            rounding = stored_eps * norm(exact) + least + counted * norm(condition)
            by_norm[name] = (eager_error, factors[0] * yardstick + rounding)
        return cls(exact, at_infinity, by_norm, factors[0])

    def judge(self, name: str, found: Tensor) -> list[Row]:
        """A row for each norm."""
        agrees = bool((found == float("-inf"))[self.at_infinity].all())
        off = _as_stored(found.double().where(~self.at_infinity, 0), found.dtype) - self.exact
        rows = []
        for norm, (eager_error, bound) in self.by_norm.items():
            error = _NORMS[norm](off) if agrees else float("nan")
            ok = error <= bound  # False for NaN
            rows.append(Row(f"{name} {norm}", error, eager_error, bound, ok, self.factor))
        return rows


def _as_stored(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x`` without what ``dtype`` has no number for: the nearest that is finite. NaN stays."""
    largest = torch.finfo(dtype).max
    return x.clamp(-largest, largest)


def _largest(x: Tensor) -> float:
    return float(x.abs().max()) if x.numel() else 0.0


def _root_mean_square(x: Tensor) -> float:
    largest = _largest(x)
    scale = largest if largest > 1e100 or 0 < largest < 1e-100 else 1.0  # squares would overflow, or be 0
    return scale * float((x / scale).square().mean().sqrt()) if x.numel() else 0.0


_NORMS = {"max": _largest, "rms": _root_mean_square}


def _condition(sample: Sample, exact: Results) -> Results:
    """The condition of each result, defined at the top of this file. Computed with squares, until the last step."""
    inputs, spec = sample.inputs, sample.spec
    group = inputs.heads_q // inputs.heads_kv
    q, k, v, dout = (heads_first(x, inputs).square() for x in (inputs.q, inputs.k, inputs.v, sample.dout))
    k, v = (x.nan_to_num(0).repeat_interleave(group, dim=1) for x in (k, v))
    zeros, ones = torch.zeros_like(sample.dout), torch.ones_like(exact["lse"])
    p = score_gradient(sample, exact, zeros, ones)  # the derivative of lse with respect to the scores
    lse = exact["lse"].abs().nan_to_num(posinf=0).view(p.shape[:-1])
    dlse = torch.zeros_like(lse) if sample.dlse is None else sample.dlse.square().view(lse.shape)
    dtype = sample.case.dtype
    of_scores, of_products, of_rows = (roundings(n, dtype) for n in (q.shape[-1], v.shape[-1], p.shape[-2]))
    over_keys, over_rows, over_all = (unseen_roundings(n, dtype) for n in (p.shape[-1], group * p.shape[-2], p.numel()))
    products = of_products * dout @ v.transpose(-1, -2)
    raw = abs(spec.scale) * (of_scores * q @ k.transpose(-1, -2)).sqrt()
    magnified = (1 + raw + offset_of(lse[..., None], raw, dtype)).square()
    shared = (1 + offset_of(lse, largest(raw, -1), dtype)).square()
    weight = p.square() * magnified
    sink_weight = reference.sink_weights(inputs, exact["lse"], exact["lse_low"]).square()
    sink_weight = sink_weight * (1 + offset_of(lse, torch.zeros_like(lse), dtype)).square()
    dropped_weight = weight * max(1.0, spec.dropout_scale) ** 2
    exact_out = heads_first(exact["out"], inputs).square()
    out = over_keys * (dropped_weight @ v) + exact_out * shared[..., None]
    # delta reads out as it was stored: a rounding in its own dtype, here in units of the arithmetic's
    of_storing = stored_roundings(dtype, CONDITION_FACTOR)
    stored_out = exact_out * of_storing**2
    of_exponentials = p.sum(-1) * max(1.0, of_storing / 2)
    shift = of_products * (dout * (out + stored_out)).sum(-1) + dlse
    dt = score_gradient(sample, exact, sample.dout, sample.dlse).square() * magnified
    dt = dt + dropped_weight * products + p.square() * shift[..., None]
    gradients = {
        "dq": lambda: over_keys * spec.scale**2 * like_input(dt @ k, exact["dq"]),
        "dk": lambda: over_rows * spec.scale**2 * like_input(dt.transpose(-1, -2) @ q, exact["dk"]),
        "dv": lambda: of_rows * like_input(dropped_weight.transpose(-1, -2) @ dout, exact["dv"]),
        "dbias": lambda: over_all * dt.sum_to_size(exact["dbias"].shape),
        # one bound serves all heads and sequences
        "dsinks": lambda: over_all * (sink_weight * shift).sum((0, 2)).max().expand(exact["dsinks"].shape),
    }
    results = {
        "out": like_input(out, exact["out"]),
        "lse": lse.clamp(max=1e150).square() + over_keys * weight.sum(-1) + of_exponentials.square(),
    }
    results |= {name: gradient() for name, gradient in gradients.items() if name in exact}
    return {name: x.sqrt().view(exact[name].shape) for name, x in results.items()}


def roundings(terms: int, dtype: torch.dtype) -> float:
    """The roundings of each term of a sum: of a pairwise sum, or in fp64, on average, of a sum in order if greater."""
    pairwise = 1 + math.log2(max(1, terms))
    return max(pairwise, (terms + 1) / 2) if dtype == torch.float64 else pairwise


def unseen_roundings(terms: int, dtype: torch.dtype) -> float:
    """The roundings of each term of a sum that eager's error shows but in fp64."""
    return roundings(terms, dtype) if dtype == torch.float64 else 1.0


def stored_roundings(dtype: torch.dtype, factor: float) -> float:
    """The condition of a number stored in the dtype of the inputs: an eps of that, in units of the arithmetic's."""
    return torch.finfo(dtype).eps / torch.finfo(reference.lse_dtype(dtype)).eps / factor


def largest(x: Tensor, dim: int) -> Tensor:
    """The largest along a dimension; 0 where that is empty."""
    return x.amax(dim) if x.shape[dim] else x.sum(dim)


def offset_of(lse: Tensor, raw: Tensor, dtype: torch.dtype) -> Tensor:
    """How far the offset that the scores of a row share magnifies the errors of their exponentials.

    The rounded sum of a product and a bias is off by at most the product, however large the bias, because the bias
    itself is a number of the arithmetic.

    Args:
        lse: the offset, at least 0.
        raw: the condition of the products.
        dtype: of the inputs; it decides on the arithmetic.
    """
    return torch.minimum(lse, (1 + raw) / torch.finfo(reference.lse_dtype(dtype)).eps)


def score_gradient(sample: Sample, exact: Results, dout: Tensor, dlse: Tensor | None) -> Tensor:
    """The gradient of the finished scores, ``[B, H_q, S_q, S_kv]``, which is that of a bias of full shape."""
    inputs = sample.inputs
    batch = 1 if inputs.is_packed else inputs.batch
    full = (batch, inputs.heads_q, inputs.q.shape[-3], inputs.k.shape[-3])
    bias = inputs.q.new_zeros(full) if inputs.bias is None else inputs.bias.expand(full)
    inputs = inputs.replace(bias=bias)
    grads = reference.backward(dout, dlse, exact["out"], exact["lse"], exact["lse_low"], inputs, sample.spec, ("bias",))
    assert grads.dbias is not None
    return grads.dbias


def heads_first(x: Tensor, inputs: Inputs) -> Tensor:
    return (x[None] if inputs.is_packed else x).transpose(1, 2)


def like_input(x: Tensor, like: Tensor) -> Tensor:
    """``(B, H_q, S, D)`` -> the shape of ``like``, summing the query heads that share one of its heads."""
    return x.unflatten(1, (like.shape[-2], -1)).sum(2).transpose(1, 2).reshape(like.shape)
