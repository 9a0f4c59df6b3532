"""Jacobian-vector products of both passes, judged by the rule of ``tolerance``.

Every differentiable input moves, and so do ``dout`` and ``dlse``. The condition of a result is, as there, its formula
with each sum replaced by the root of the sum of its squared terms; a product of two rounded numbers has a term for the
rounding of each. The formulas are those at the top of ``backends/portable/derivatives.py``. The weights of a row share
the rounding of the lse that they were given, which moves the tangents of out and lse by their own relative size.

The factors are half of those there. A term moves with each of its factors, so every rounding of the first order is
counted twice in the condition; and eager, whose tangents torch derives, rounds in as many more places.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastattn import reference
from fastattn.backends import load
from fastattn.backends.base import Backend
from fastattn.problem import DIFFERENTIABLE, Rows, Tangents
from fastattn.testing.inputs import Sample
from fastattn.testing.tolerance import (
    CONDITION_FACTOR,
    EAGER_FACTOR,
    Results,
    Row,
    Yardstick,
    check_contract,
    heads_first,
    in_float64,
    largest,
    like_input,
    offset_of,
    poisoned,
    roundings,
    score_gradient,
    stored_roundings,
    unseen_roundings,
)

FACTORS = (EAGER_FACTOR / 2, CONDITION_FACTOR / 2)


@dataclass(frozen=True)
class Motion:
    """The tangents of the inputs of a sample, of ``dout`` and of ``dlse``."""

    tangents: Tangents
    dout: Tensor
    dlse: Tensor | None

    @classmethod
    def of(cls, sample: Sample, seed: int = 1) -> Motion:
        """Seeded tangents, drawn on the CPU, of the inputs whose gradients the sample needs."""
        generator = torch.Generator().manual_seed(seed)

        def draw(like: Tensor) -> Tensor:
            return torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like.device, like.dtype)

        tangents = Tangents(**{name: draw(getattr(sample.inputs, name)) for name in sample.needs})
        return cls(tangents, draw(sample.dout), None if sample.dlse is None else draw(sample.dlse))

    def of_inputs_alone(self) -> Motion:
        """The same, but ``dout`` and ``dlse`` stand still."""
        return dataclasses.replace(self, dout=torch.zeros_like(self.dout), dlse=None)

    def in_float64(self) -> Motion:
        given = {name: getattr(self.tangents, name) for name in DIFFERENTIABLE}
        tangents = Tangents(**{name: x.double() for name, x in given.items() if x is not None})
        return Motion(tangents, self.dout.double(), None if self.dlse is None else self.dlse.double())


class DerivativeYardstick(Yardstick):
    """What the derivatives of one sample are judged by, along ``motion``, by default seeded tangents."""

    factors = FACTORS

    def __init__(self, sample: Sample, motion: Motion | None = None) -> None:
        super().__init__(sample)
        self.motion = motion or Motion.of(sample)

    @functools.cached_property
    def exact(self) -> Results:
        """The tangents in fp64."""
        return _reference(in_float64(self.sample), self.motion.in_float64(), None)

    @functools.cached_property
    def eager(self) -> Results:
        """Those of eager attention whose arithmetic is in the dtype of the inputs."""
        return _reference(self.sample, self.motion, self.sample.inputs.q.dtype)

    @functools.cached_property
    def condition(self) -> Results:
        """What a relative error of one in each operation could move the tangents by."""
        return _Condition(in_float64(self.sample), self.motion.in_float64(), self.exact).results()


def measure_derivatives(
    backend: Backend | str, sample: Sample, *, yardstick: DerivativeYardstick | None = None
) -> list[Row]:
    """Judge the tangents of out, lse and every gradient that the sample needs.

    Args:
        backend: a backend that declares "jvp", or its name.
        sample: from ``inputs.make``.
        yardstick: of the sample, for several backends to share; None makes one.

    Raises:
        AssertionError: a result breaks the contract of ``backends.base`` in shape, dtype or memory.
    """
    able = load(backend) if isinstance(backend, str) else backend
    yardstick = yardstick or DerivativeYardstick(sample)
    return yardstick.judge(_run(able, sample, yardstick.motion), suffix="'")


def judge_derivatives(
    sample: Sample, motion: Motion, run: Callable[[Sample, Motion], Results], where: str = ""
) -> list[Row]:
    """Judge the tangents that ``run`` computes: of "out", "lse" and the gradients "dq", "dk" and so on.

    Args:
        sample: from ``inputs.make``.
        motion: tangents of what the sample holds.
        run: the computation.
        where: the end of the name of each row.
    """
    return DerivativeYardstick(sample, motion).judge(run(sample, motion), suffix=f"'{where}")


def _run(backend: Backend, sample: Sample, motion: Motion) -> Results:
    inputs, spec = sample.inputs, sample.spec
    with poisoned():
        rows = Rows(sample.dout, sample.dlse, *backend.forward(inputs, spec))
        out, lse = backend.jvp(motion.tangents, rows, inputs, spec)
        check_contract("out'", out, inputs.out_shape(), inputs.q.dtype, needs_contiguous=True)
        check_contract("lse'", lse, inputs.lse_shape(), reference.lse_dtype(inputs.q.dtype), needs_contiguous=True)
        moved = Rows(motion.dout, motion.dlse, out, lse)
        grads = backend.backward_jvp(rows, moved, motion.tangents, inputs, spec, sample.needs)
    results = {"out": out, "lse": lse}
    for name in sample.needs:
        like, found = getattr(inputs, name), getattr(grads, f"d{name}")
        assert found is not None, f"the tangent of d{name} was asked for and is None"
        check_contract(f"d{name}'", found, tuple(like.shape), like.dtype, needs_contiguous=False)
        results[f"d{name}"] = found
    return results


def _reference(sample: Sample, motion: Motion, dtype: torch.dtype | None) -> Results:
    inputs, spec, moved = sample.inputs, sample.spec, Rows(motion.dout, motion.dlse)
    rows = Rows(sample.dout, sample.dlse)
    out, lse = reference.jvp(motion.tangents, rows, inputs, spec, dtype=dtype)
    grads = reference.backward_jvp(rows, moved, motion.tangents, inputs, spec, sample.needs, dtype=dtype)
    return {"out": out, "lse": lse} | {f"d{name}": getattr(grads, f"d{name}") for name in sample.needs}


class _Condition:
    """How far independent relative errors of one could move each result. Tensors of squares end in ``2``."""

    def __init__(self, sample: Sample, motion: Motion, exact: Results) -> None:
        inputs, spec = sample.inputs, sample.spec
        self.sample, self.motion, self.exact = sample, motion, exact
        self.out, self.lse, self.low = reference.forward(inputs, spec)
        at = {"out": self.out, "lse": self.lse, "lse_low": self.low}
        self.p = score_gradient(sample, at, torch.zeros_like(sample.dout), torch.ones_like(self.lse))
        self.dt = score_gradient(sample, at, sample.dout, sample.dlse)
        self.row_shape = self.p.shape[:-1]
        dtype = sample.case.dtype
        of_scores, self.of_products = (roundings(x.shape[-1], dtype) for x in (inputs.q, inputs.v))
        t = motion.tangents
        group = inputs.heads_q // inputs.heads_kv
        sums = self.p.shape[-1], group * self.p.shape[-2], self.p.numel()
        self.over_keys, self.over_rows, self.over_all = (unseen_roundings(n, dtype) for n in sums)
        self.q2, self.tq2 = self._square(inputs.q), self._square(t.q, inputs.q)
        self.g2, self.tg2 = self._square(sample.dout), self._square(motion.dout)
        pairs = ((inputs.k, None), (t.k, inputs.k), (inputs.v, None), (t.v, inputs.v))
        keys = (self._square(x, like) for x, like in pairs)
        self.k2, self.tk2, self.v2, self.tv2 = (x.nan_to_num(0).repeat_interleave(group, dim=1) for x in keys)
        raw2 = spec.scale**2 * of_scores * (self.q2 @ self.k2.mT)
        self.moved2 = spec.scale**2 * of_scores * (self.tq2 @ self.k2.mT + self.q2 @ self.tk2.mT)
        lse = self.lse.abs().nan_to_num(posinf=0).view(self.row_shape)
        self.magnified = (1 + raw2.sqrt() + offset_of(lse[..., None], raw2.sqrt(), dtype)).square()
        of_row = 1 + offset_of(lse, largest(raw2, -1).sqrt(), dtype)
        self.bend2 = self.p.new_zeros(())
        if spec.softcap is not None:
            self.bend2 = (2 / spec.softcap) ** 2 * (raw2 + self.moved2)
            self.moved2 = self.moved2 * (1 + (2 / spec.softcap) ** 2 * raw2)
        if t.bias is not None:
            self.moved2 = self.moved2 + t.bias.square()
        offset = offset_of(lse, torch.zeros_like(lse), dtype)
        self.sink_weight = (reference.sink_weights(inputs, self.lse, self.low) * (1 + offset)).square()
        self.weight = self.p.square() * self.magnified
        self.dropped = max(1.0, spec.dropout_scale) ** 2
        self.stored, self.shared = stored_roundings(dtype, FACTORS[1]) ** 2, of_row.square()

    def _square(self, x: Tensor | None, like: Tensor | None = None) -> Tensor:
        """Heads first; what does not move has zeros ``like`` what could."""
        x = torch.zeros_like(like) if x is None and like is not None else x
        assert x is not None
        return heads_first(x, self.sample.inputs).square()

    def _of_rows(self, x: Tensor) -> Tensor:
        return heads_first(x, self.sample.inputs)

    def results(self) -> Results:
        sample = self.sample
        t = self._scores_moved()
        p2 = self.p.square()
        of_sink2 = self.sink_weight * _largest_square(self.motion.tangents.sinks)
        lse_moved, moved_weight2 = self.exact["lse"].view(self.row_shape), self.weight * t.square() + p2 * self.moved2
        lse2 = self.over_keys * moved_weight2.sum(-1) + of_sink2 + self.shared * lse_moved.square()
        out2 = self.dropped * self.over_keys * (self.weight @ self.v2) + self.stored * self._of_rows(self.out).square()
        moved_out2 = self.dropped * self.over_keys * (moved_weight2 @ self.v2 + self.weight @ self.tv2)
        moved_out2 = moved_out2 + self.shared[..., None] * self._of_rows(self.exact["out"]).square()
        moved_out2 = (
            moved_out2 + lse2[..., None] * self._of_rows(self.out).square() + lse_moved.square()[..., None] * out2
        )
        of_lse2 = lse2 + self.stored / 4 * lse_moved.square()  # half an eps of the exponentials, as in lse itself
        found = {"out": like_input(moved_out2, self.exact["out"]), "lse": of_lse2.view(self.exact["lse"].shape)}
        found |= self._gradients(t, lse2, out2, moved_out2)
        names = ("out", "lse", *(f"d{name}" for name in sample.needs))
        return {name: found[name].sqrt() for name in names}

    def _scores_moved(self) -> Tensor:
        """The tangent of the finished scores, 0 where a pair is not kept."""
        inputs, spec, tangents = self.sample.inputs, self.sample.spec, self.motion.tangents
        moving = [name for name in ("q", "k", "bias") if getattr(tangents, name) is not None]

        def finished(*values: Tensor) -> tuple[Tensor]:
            scores = reference.scores(inputs.replace(**dict(zip(moving, values, strict=True))), spec)
            return (torch.where(scores == float("-inf"), 0, scores),)

        primals, along = (tuple(getattr(x, name) for name in moving) for x in (inputs, tangents))
        return reference.jacobian_product(finished, primals, along)[0]

    def _gradients(self, t: Tensor, lse2: Tensor, out2: Tensor, moved_out2: Tensor) -> Results:
        sample, exact, spec = self.sample, self.exact, self.sample.spec
        dlse2, moved_dlse2 = (
            t.new_zeros(self.row_shape) if x is None else x.square().view(self.row_shape)
            for x in (sample.dlse, self.motion.dlse)
        )
        stored2 = self.stored * self._of_rows(exact["out"]).square()
        products2 = self.of_products * self.dropped * (self.g2 @ self.v2.mT)
        moved_products2 = self.of_products * self.dropped * (self.tg2 @ self.v2.mT + self.g2 @ self.tv2.mT)
        shift2 = self.of_products * (self.g2 * out2).sum(-1) + dlse2
        moved_shift2 = self.of_products * (self.tg2 * out2 + self.g2 * (moved_out2 + stored2)).sum(-1) + moved_dlse2
        apart = t - exact["lse"].view(self.row_shape)[..., None]
        apart2 = self.moved2 + lse2[..., None] + t.square() + exact["lse"].view(self.row_shape)[..., None].square()
        p2, moved_dt = self.p.square(), self._moved_score_gradient()
        dt2 = self.dt.square() * self.magnified + p2 * (products2 + shift2[..., None])
        moved_dt2 = apart.square() * dt2 + self.dt.square() * apart2
        moved_dt2 = moved_dt2 + (moved_dt - apart * self.dt).square() * self.magnified
        moved_dt2 = moved_dt2 + p2 * (moved_products2 + moved_shift2[..., None])
        moved_p2 = self.dropped * (self.weight * apart.square() + p2 * apart2)
        ds2 = moved_dt2 + self.bend2 * (dt2 + moved_dt.square())
        sink2 = self.sink_weight * (self._sink_apart2(lse2) * shift2 + moved_shift2)
        makers: dict[str, Any] = {
            "dq": lambda: self.over_keys * spec.scale**2 * like_input(ds2 @ self.k2 + dt2 @ self.tk2, exact["dq"]),
            "dk": lambda: (
                self.over_rows * spec.scale**2 * like_input(ds2.mT @ self.q2 + dt2.mT @ self.tq2, exact["dk"])
            ),
            "dv": lambda: (
                roundings(moved_p2.shape[-2], sample.case.dtype)
                * like_input(moved_p2.mT @ self.g2 + self.dropped * self.weight.mT @ self.tg2, exact["dv"])
            ),
            "dbias": lambda: self.over_all * moved_dt2.sum_to_size(exact["dbias"].shape),
            "dsinks": lambda: self.over_all * sink2.sum((0, 2)).max().expand(exact["dsinks"].shape),
        }
        return {name: make() for name, make in makers.items() if name in exact}

    def _sink_apart2(self, lse2: Tensor) -> Tensor:
        return _largest_square(self.motion.tangents.sinks) + lse2 + self.exact["lse"].view(self.row_shape).square()

    def _moved_score_gradient(self) -> Tensor:
        """The tangent of the gradient of the finished scores."""
        inputs, t = self.sample.inputs, self.motion.tangents
        full = self.p.shape
        bias = inputs.q.new_zeros(full) if inputs.bias is None else inputs.bias.expand(full)
        tangents = Tangents(t.q, t.k, t.v, None if t.bias is None else t.bias.expand(full), t.sinks)
        rows, moved = Rows(self.sample.dout, self.sample.dlse), Rows(self.motion.dout, self.motion.dlse)
        inputs = inputs.replace(bias=bias)
        grads = reference.backward_jvp(rows, moved, tangents, inputs, self.sample.spec, ("bias",))
        assert grads.dbias is not None
        return grads.dbias


def _largest_square(x: Tensor | None) -> float:
    return 0.0 if x is None or not x.numel() else float(x.square().amax())
