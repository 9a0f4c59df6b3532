"""The judges of derivatives and statistics must reject wrong results: each fault is planted in the right formula."""

import dataclasses
import functools

import pytest
import torch

from fastattn import reference
from fastattn.backends.base import Backend, Capabilities
from fastattn.backends.portable import derivatives as portable
from fastattn.testing import Case, assert_within, make
from fastattn.testing.derivatives import DerivativeYardstick, measure_derivatives
from fastattn.testing.statistics import measure_statistics

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CASE = {"H_kv": 2, "H_q": 4, "dlse": True}
FEATURES = {
    "softcap": {"softcap": 3.0, "magnitude": 2.0},
    "band": {"right": 0},
    "window": {"left": 6, "right": 2},
    "dropout": {"dropout_p": 0.3},
    "bias": {"bias": (1, 4, 37, 37)},
    "mask": {"mask": "random"},
    "alibi": {"alibi": True},
    "sinks": {"sinks": True},
    "segments": {"segments": 3},
    "packed": {"lengths": ((17, 20), (9, 9))},
}


def lacking(feature):
    """A change of ``(inputs, spec)`` that leaves a feature out."""

    def change(inputs, spec):
        scalars = {"softcap": {"softcap": None}, "band": {"right": None}, "window": {"left": 7},
                   "dropout": {"dropout_p": 0.0}}  # fmt: skip
        without = {
            "bias": lambda: {"bias": inputs.bias * 0}, "mask": lambda: {"mask": None},
            "alibi": lambda: {"alibi_slopes": None}, "sinks": lambda: {"sinks": inputs.sinks - 99},
            "segments": lambda: {"segment_ids_q": None, "segment_ids_kv": None},
            "packed": lambda: {"cu_seqlens_q": inputs.cu_seqlens_q.clamp(max=9).where(inputs.cu_seqlens_q < 26, 26)},
        }  # fmt: skip
        if feature in scalars:
            return inputs, dataclasses.replace(spec, **scalars[feature])
        return inputs.replace(**without[feature]()), spec

    return change


class Mutant(Backend):
    """The reference with faults: what goes into derivatives or statistics, or what comes out of them."""

    name = "mutant"
    capabilities = Capabilities()
    forward = staticmethod(reference.forward)

    def __init__(self, before=None, tangents=None, moved=None, out=None, grads=None):
        self.before = before or (lambda inputs, spec: (inputs, spec))
        self.tangents, self.moved = tangents or (lambda x: x), moved or (lambda x: x)
        self.out, self.grads = out or (lambda out, lse, rows: (out, lse)), grads or (lambda x: x)

    def jvp(self, tangents, results, inputs, spec):
        return self.out(*reference.jvp(self.tangents(tangents), results, *self.before(inputs, spec)), results)

    def backward_jvp(self, rows, moved, tangents, inputs, spec, needs):
        found = reference.backward_jvp(
            rows, self.moved(moved), self.tangents(tangents), *self.before(inputs, spec), needs
        )
        return self.grads(found)


class PortableMutant(Mutant):
    """The same around the formulas over tiles, which read what the reference computes again."""

    def jvp(self, tangents, results, inputs, spec):
        return self.out(*portable.jvp(self.tangents(tangents), results, inputs, spec), results)

    def backward_jvp(self, rows, moved, tangents, inputs, spec, needs):
        return self.grads(portable.backward_jvp(rows, self.moved(moved), tangents, inputs, spec, needs))


class Unbent(PortableMutant):
    """Forgets that the slope of softcap moves."""

    def backward_jvp(self, *args):
        scores = portable._Moving.scores
        portable._Moving.scores = lambda *args: dataclasses.replace(scores(*args), bend=None)
        try:
            return portable.backward_jvp(*args)
        finally:
            portable._Moving.scores = scores


def without(name):
    return lambda x: dataclasses.replace(x, **{name: None})


def scaled(name, factor):
    return lambda x: dataclasses.replace(x, **{name: getattr(x, name) * factor})


def by_heads(lse, out):
    return lse.transpose(-1, -2)[..., None].to(out.dtype)


FAULTS = {
    **{f"{name} forgotten": (Mutant(lacking(name)), changes) for name, changes in FEATURES.items()},
    **{f"{name}' dropped": (Mutant(tangents=without(name)), {}) for name in ("q", "k", "v")},
    "bias' dropped": (Mutant(tangents=without("bias")), FEATURES["bias"]),
    "sinks' dropped": (Mutant(tangents=without("sinks")), FEATURES["sinks"]),
    **{f"{name}' dropped": (Mutant(moved=without(name)), {}) for name in ("dout", "dlse")},
    **{f"{name}' dropped": (PortableMutant(moved=without(name)), {}) for name in ("out", "lse")},
    **{f"{name}' with the wrong sign": (Mutant(tangents=scaled(name, -1)), {}) for name in ("q", "k", "v")},
    "slope of softcap stands still": (Unbent(), {"softcap": 1.0, "magnitude": 2.0}),
    "lse' out added": (Mutant(out=lambda out, lse, rows: (out + 2 * by_heads(lse, out) * rows.out, lse)), {}),
    "lse' out forgotten": (Mutant(out=lambda out, lse, rows: (out + by_heads(lse, out) * rows.out, lse)), {}),
    "out' off by five percent": (Mutant(out=lambda out, lse, rows: (out * 1.05, lse)), {}),
    "lse' with the wrong sign": (Mutant(out=lambda out, lse, rows: (out, -lse)), {}),
    **{f"d{name}' with the wrong sign": (Mutant(grads=scaled(f"d{name}", -1)), {}) for name in ("q", "k", "v")},
    **{f"d{name}' off by five percent": (Mutant(grads=scaled(f"d{name}", 1.05)), {}) for name in ("q", "k", "v")},
    "dbias' with the wrong sign": (Mutant(grads=scaled("dbias", -1)), FEATURES["bias"]),
    "dsinks' with the wrong sign": (Mutant(grads=scaled("dsinks", -1)), FEATURES["sinks"]),
}


def case(dtype, changes):
    return Case(id="fault", dtype=dtype, **(CASE | changes))


@functools.cache
def right(dtype, changes):
    """A case whose derivatives without a fault pass, and its yardstick."""
    sample = make(case(dtype, dict(changes)))
    yardstick = DerivativeYardstick(sample)
    for without_fault in (Mutant(), PortableMutant()):
        assert_within(measure_derivatives(without_fault, sample, yardstick=yardstick))
    return sample, yardstick


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_in_derivatives_is_found(name, dtype):
    mutant, changes = FAULTS[name]
    sample, yardstick = right(dtype, tuple(changes.items()))
    with pytest.raises(AssertionError, match="outside the tolerance"):
        assert_within(measure_derivatives(mutant, sample, yardstick=yardstick))


# --- statistics -----------------------------------------------------------------------------------------------------


class WrongStatistics(Backend):
    """The reference with faults in statistics or in their gradients."""

    name = "wrong statistics"
    capabilities = Capabilities()

    def __init__(self, before=None, found=None, gradient=None, grads=None):
        self.before = before or (lambda inputs, spec: (inputs, spec))
        self.found, self.gradient, self.grads = (f or (lambda x: x) for f in (found, gradient, grads))

    def statistics(self, inputs, spec):
        return self.found(reference.statistics(*self.before(inputs, spec)))

    def statistics_backward(self, gradient, inputs, spec, needs):
        return self.grads(reference.statistics_backward(self.gradient(gradient), *self.before(inputs, spec), needs))


def changed(name, change):
    return lambda found: found._replace(**{name: change(getattr(found, name))})


SEEN = {name: changes for name, changes in FEATURES.items() if name not in ("dropout", "packed")}
WRONG = {
    **{f"{name} forgotten": (WrongStatistics(lacking(name)), changes) for name, changes in SEEN.items()},
    "entropy with the wrong sign": (WrongStatistics(found=changed("entropy", torch.neg)), {}),
    "entropy in bits": (WrongStatistics(found=changed("entropy", lambda x: x / 0.6931)), {}),
    **{f"{n} off by five percent": (WrongStatistics(found=changed(n, lambda x: x * 1.05)), {})
       for n in ("entropy", "largest_logit", "key_sum", "key_max")},
    "the key after the largest": (WrongStatistics(found=changed("largest_key", lambda x: (x + 1) % 37)), {}),
    "maxima for sums": (WrongStatistics(found=lambda x: x._replace(key_sum=x.key_max)), {}),
    **{f"gradient of {n} dropped": (WrongStatistics(gradient=without(n)), {})
       for n in ("entropy", "largest_logit", "key_sum")},
    **{f"gradient of {n} with the wrong sign": (WrongStatistics(gradient=scaled(n, -1)), {})
       for n in ("entropy", "largest_logit", "key_sum")},
    **{f"d{n} off by five percent": (WrongStatistics(grads=scaled(f"d{n}", 1.05)), {}) for n in ("q", "k")},
    "dbias with the wrong sign": (WrongStatistics(grads=scaled("dbias", -1)), FEATURES["bias"]),
    "dsinks with the wrong sign": (WrongStatistics(grads=scaled("dsinks", -1)), FEATURES["sinks"]),
}  # fmt: skip


@functools.cache
def assert_right_without_fault(dtype, changes):
    assert_within(measure_statistics(WrongStatistics(), make(case(dtype, dict(changes)))))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", WRONG)
def test_a_fault_in_statistics_is_found(name, dtype):
    mutant, changes = WRONG[name]
    sample = make(case(dtype, changes))
    with pytest.raises(AssertionError, match="outside the tolerance"):
        assert_within(measure_statistics(mutant, sample))
    assert_right_without_fault(dtype, tuple(changes.items()))
