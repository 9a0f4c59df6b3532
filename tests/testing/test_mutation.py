"""The tolerance rule must reject wrong results: each fault is planted in a right backend, in every dtype."""

import dataclasses

import pytest
import torch

from fastattn import reference
from fastattn.backends.base import Backend, Capabilities
from fastattn.testing import Case, assert_within, make, measure, poisoned

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Mutant(Backend):
    """The reference with faults: functions that change what goes in, what comes out, or the gradients."""

    name = "mutant"
    capabilities = Capabilities()

    def __init__(self, before=None, after=None, gradients=None, in_forward=True):
        self.before = before or (lambda inputs, spec: (inputs, spec))
        self.after = after or (lambda *results: results)
        self.gradients = gradients or (lambda grads: grads)
        self.in_forward = in_forward

    def forward(self, inputs, spec):
        changed = self.before(inputs, spec) if self.in_forward else (inputs, spec)
        return self.after(*reference.forward(*changed))

    def backward(self, dout, dlse, out, lse, low, inputs, spec, needs):
        inputs, spec = self.before(inputs, spec)
        return self.gradients(reference.backward(dout, dlse, out, lse, low, inputs, spec, needs))


def with_spec(**changes):
    def before(inputs, spec):
        found = {name: value(getattr(spec, name)) if callable(value) else value for name, value in changes.items()}
        return inputs, dataclasses.replace(spec, **found)

    return before


def with_inputs(change):
    return lambda inputs, spec: (inputs.replace(**change(inputs)), spec)


def without_last_key(inputs):
    s_kv = inputs.k.shape[1]
    return {"mask": (torch.arange(s_kv) < s_kv - 1).expand(1, 1, 1, s_kv)}


def zero_row(x, dim=1):
    x = x.clone()
    x.select(dim, 5).zero_()
    return x


def unwritten_row(x):
    """As if a kernel had not stored the last row of its output."""
    found = torch.empty_like(x)
    found[:, :-1] = x[:, :-1]
    return found


def changed(grads, **changes):
    return dataclasses.replace(grads, **{name: change(getattr(grads, name)) for name, change in changes.items()})


# name -> the mutant, and the case that shows it
MUTANTS = {
    "scale off by five percent": (Mutant(with_spec(scale=lambda s: s * 1.05)), {}),
    "scale forgotten": (Mutant(with_spec(scale=1.0)), {}),
    "window one to the left": (Mutant(with_spec(left=lambda left: left + 1)), {"left": 8, "right": 0}),
    "window one to the right": (Mutant(with_spec(right=1)), {"right": 0}),
    "wrong anchor": (Mutant(with_spec(anchor="upper_left")), {"right": 0, "S_kv": 60}),
    "last key dropped": (Mutant(with_inputs(without_last_key)), {}),
    "softcap forgotten": (Mutant(with_spec(softcap=None)), {"softcap": 5.0, "magnitude": 2.0}),
    "wrong seed": (Mutant(with_inputs(lambda i: {"rng_state": i.rng_state + 2**33})), {"dropout_p": 0.2}),
    "dropout not rescaled": (Mutant(after=lambda out, *lse: (out * 0.8, *lse)), {"dropout_p": 0.2}),
    "bias forgotten": (Mutant(with_inputs(lambda i: {"bias": i.bias * 0})), {"bias": (1, 2, 37, 37)}),
    "slopes of other heads": (Mutant(with_inputs(lambda i: {"alibi_slopes": i.alibi_slopes.flip(1)})), {"alibi": True}),
    "sink ignored": (Mutant(with_inputs(lambda i: {"sinks": i.sinks - 99})), {"sinks": True}),
    "segments ignored": (
        Mutant(with_inputs(lambda i: {"segment_ids_q": i.segment_ids_q * 0, "segment_ids_kv": i.segment_ids_kv * 0})),
        {"segments": 3},
    ),
    "intervals one to the right": (
        Mutant(with_inputs(lambda i: {"intervals": i.intervals + 1})), {"intervals": "random"}
    ),
    "heads swapped": (Mutant(with_inputs(lambda i: {"k": i.k.flip(2), "v": i.v.flip(2)})), {"H_q": 4}),
    "out row dropped": (Mutant(after=lambda out, *lse: (zero_row(out), *lse)), {}),
    "out unwritten": (Mutant(after=lambda out, *lse: (unwritten_row(out), *lse)), {}),
    "lse unwritten": (Mutant(after=lambda out, lse, low: (out, unwritten_row(lse), low)), {}),
    "lse in base two": (Mutant(after=lambda out, lse, low: (out, lse * 1.4427, low)), {}),
    "lse of an empty row is finite": (
        Mutant(after=lambda out, lse, low: (out, lse.clamp(min=-1e30), low)),
        {"right": 0, "S_q": 60, "S_kv": 30},
    ),
    "empty row is NaN": (
        Mutant(after=lambda out, lse, low: (out.masked_fill((lse == -torch.inf).mT[..., None], torch.nan), lse, low)),
        {"right": 0, "S_q": 60, "S_kv": 30},
    ),
    "dq row dropped": (Mutant(gradients=lambda g: changed(g, dq=zero_row)), {}),
    "dk row dropped": (Mutant(gradients=lambda g: changed(g, dk=zero_row)), {}),
    "dv unwritten": (Mutant(gradients=lambda g: changed(g, dv=unwritten_row)), {}),
    "dk of half the group": (Mutant(gradients=lambda g: changed(g, dk=lambda x: x / 2)), {"H_q": 4}),
    "dbias row dropped": (
        Mutant(gradients=lambda g: changed(g, dbias=lambda x: zero_row(x, 2))),
        {"bias": (1, 1, 37, 37)},
    ),
    "dsinks with the wrong sign": (Mutant(gradients=lambda g: changed(g, dsinks=torch.neg)), {"sinks": True}),
}  # fmt: skip


class StaleLse(Mutant):
    """Backward with the lse of another step."""

    def backward(self, dout, dlse, out, lse, low, inputs, spec, needs):
        return super().backward(dout, dlse, out, lse.roll(1, -1), low, inputs, spec, needs)


class NoDelta(Mutant):
    """Backward that forgets delta."""

    def backward(self, dout, dlse, out, lse, low, inputs, spec, needs):
        return super().backward(dout, dlse, out * 0, lse, low, inputs, spec, needs)


class NoDlse(Mutant):
    """Backward that forgets the gradient of lse."""

    def backward(self, dout, dlse, out, lse, low, inputs, spec, needs):
        return super().backward(dout, None, out, lse, low, inputs, spec, needs)


MUTANTS |= {
    "stale lse": (StaleLse(), {}),
    "delta forgotten": (NoDelta(), {}),
    "dlse forgotten": (NoDlse(), {"dlse": True}),
    "band forgotten in backward": (Mutant(with_spec(right=None), in_forward=False), {"right": 0}),
}


def case(dtype, **changes):
    return Case(id="mutation", dtype=dtype, **({"H_kv": 2} | changes))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", MUTANTS)
def test_a_fault_is_found(name, dtype):
    mutant, changes = MUTANTS[name]
    with pytest.raises(AssertionError, match="outside the tolerance"):
        assert_within(measure(mutant, make(case(dtype, **changes))))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", MUTANTS)
def test_without_the_fault_the_same_case_passes(name, dtype):
    _, changes = MUTANTS[name]
    assert_within(measure(Mutant(), make(case(dtype, **changes))))


def test_faults_of_one_side_are_found_by_the_other():
    """A forward pass that is wrong only in what it hands on, and a backward pass of another backend."""
    wrong_scale = Mutant(with_spec(scale=1.0))
    rows = measure(Mutant(), make(case(torch.float32)), backward_backend=wrong_scale)
    assert {row.name for row in rows if not row.ok} >= {"dq max", "dk max", "dv max"}
    assert all(row.ok for row in rows if row.name.startswith(("out", "lse")))


class WrongContract(Mutant):
    def __init__(self, out=lambda x: x, lse=lambda x: x, dq=lambda x: x):
        super().__init__(after=lambda o, m, low: (out(o), lse(m), low), gradients=lambda g: changed(g, dq=dq))


@pytest.mark.parametrize(
    ("mutant", "message"),
    [
        (WrongContract(out=lambda x: x.double()), r"out is torch.float64, not torch.float32"),
        (WrongContract(lse=lambda x: x.half()), r"lse is torch.float16"),
        (WrongContract(lse=lambda x: x[..., None]), r"lse has shape \(2, 2, 37, 1\), not \(2, 2, 37\)"),
        (WrongContract(out=lambda x: x.mT.contiguous().mT), r"out is not contiguous"),
        (WrongContract(dq=lambda x: None), r"dq was asked for and is None"),
        (WrongContract(dq=lambda x: x[:, :-1]), r"dq has shape"),
    ],
)
def test_breaking_the_contract_is_found(mutant, message):
    with pytest.raises(AssertionError, match=message):
        measure(mutant, make(case(torch.float32)))


def test_poison_reaches_every_way_to_get_memory():
    x = torch.zeros(3, 4)
    with poisoned():
        found = [torch.empty(3), torch.empty_like(x), x.new_empty(3), torch.empty_strided((3, 4), (1, 3))]
        found += [torch.empty(2, 3, dtype=torch.float16), x.new_empty_strided((2,), (1,))]
        counters, flags = torch.empty(3, dtype=torch.int32), torch.empty(3, dtype=torch.bool)
        assert torch.zeros(3).eq(0).all()
    assert all(x.isnan().all() for x in found)
    assert counters.eq(2**31 - 1).all() and flags.all()
    with poisoned(), pytest.raises(ZeroDivisionError):
        1 / 0  # noqa: B018
    torch.manual_seed(0)
    assert not torch.empty(3).fill_(1).isnan().any()


def test_overflow_of_eager_leaves_a_bound_that_still_judges():
    """In fp16 with scores beyond 65504, same-dtype eager is NaN; right backends pass and wrong ones do not."""
    overflowing = case(torch.float16, magnitude=60.0, scale=0.004)
    sample = make(overflowing)
    eager_out, *_ = reference.forward(sample.inputs, dataclasses.replace(sample.spec, scale=0.004), torch.float16)
    assert not eager_out.isfinite().all()
    assert_within(measure(Mutant(), sample))
    with pytest.raises(AssertionError, match="outside the tolerance"):
        assert_within(measure(Mutant(with_spec(scale=0.005)), sample))
