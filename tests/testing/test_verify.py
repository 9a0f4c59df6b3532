"""The report of ``verify`` and the search of ``fuzz``, on right backends, wrong ones and ones that raise."""

import dataclasses
import json
import random

import pytest
import torch

import fastattn
from fastattn import ops, reference
from fastattn.backends import base, load
from fastattn.testing import Case, grid, make
from fastattn.testing import fuzz as fuzz_module
from fastattn.testing import verify as verify_module
from fastattn.testing.fuzz import fuzz, random_case
from fastattn.testing.verify import judge, verify
from fastattn.testing.ways import measure_way


class Broken(base.Backend):
    """The reference, but wrong with softcap, raising with sinks, and without ALiBi."""

    name = "broken"
    capabilities = base.Capabilities(features=frozenset(base.FEATURES) - {"alibi"})

    def forward(self, inputs, spec):
        if inputs.sinks is not None:
            raise RuntimeError("no sinks today")
        return reference.forward(inputs, dataclasses.replace(spec, softcap=None))

    backward = staticmethod(reference.backward)


@pytest.fixture
def broken(monkeypatch):
    for module in (verify_module, fastattn.testing.tolerance):
        monkeypatch.setattr(module, "load", lambda name: Broken())
    monkeypatch.setattr(verify_module.dispatch, "check_name", lambda name: None)


def test_a_right_backend():
    report = verify(quick=True, backends=["eager"])
    assert report.ok and len(report.results) == 62 and report.unavailable == {}
    lines = report.table().splitlines()
    assert lines[-1] == "62 runs, all within the tolerance"
    assert sum(line.startswith("eager") for line in lines) == len({result.case.group for result in report.results})
    saved = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert saved["ok"] and saved["versions"]["torch"] == torch.__version__
    assert all(set(row) == {"error", "eager", "bound"} for row in saved["results"][0]["rows"].values())


@pytest.mark.skipif(load("cpu").unavailable_reason() is not None, reason="no C++ compiler")
def test_the_kernels_in_cpp_serve_every_case_and_cache():
    report = verify(quick=True, backends=["cpu"])
    assert report.ok and sum(bool(result.rows) for result in report.results) == 44 + 18


@pytest.mark.usefixtures("broken")
def test_what_a_backend_lacks_is_skipped_and_counted():
    report = verify(quick=True, backends=["broken"])
    skipped = {result.case.id: result.skipped for result in report.results if result.skipped}
    assert skipped["everything [float32]"] == "no alibi" and len(skipped) == 8 + 18
    assert "no cache" in skipped["some tokens [contiguous, float32]"]
    assert report.table().endswith("36 runs, all within the tolerance")


@pytest.mark.usefixtures("broken")
def test_what_a_backend_raises_is_reported():
    result = judge("broken", Case(id="raises", sinks=True))
    assert not result.ok and result.broken == "RuntimeError: no sinks today" and result.worst is None
    wrong = judge("broken", Case(id="wrong", softcap=1.0))
    assert not wrong.ok and wrong.worst is not None and not wrong.worst.ok
    report = verify_module.Report("here", {"other": "not built"}, (result, wrong))
    text = report.table()
    assert "WRONG  broken, raises: RuntimeError: no sinks today" in text
    assert "WRONG  broken, wrong: out max" in text
    assert "other     cannot run: not built" in text
    assert text.endswith("1 runs, 2 wrong")


def test_nothing_that_ran_is_not_a_pass():
    case = Case(id="skipped")
    report = verify_module.Report("here", {}, (verify_module.Result("x", case, skipped="no GPU"),))
    assert not report.ok and report.table().endswith("0 runs, nothing ran")


def test_unknown_and_unavailable_backends_are_refused(monkeypatch):
    with pytest.raises(fastattn.InputError, match="backend: got 'x'"):
        verify(backends=["x"])
    monkeypatch.setattr(verify_module.dispatch, "backends", lambda: {"eager": "no electricity"})
    with pytest.raises(fastattn.UnsupportedError, match=r"cannot verify on this machine:\n  eager: no electricity"):
        verify(backends=["eager"])
    report = verify(quick=True)
    assert report.unavailable == {"eager": "no electricity"} and not report.ok


def test_random_cases_are_valid_and_cover_the_spec():
    draw = random.Random(1)
    cases = [random_case(draw) for _ in range(300)]
    for case in cases:
        make(case)
    of_scores = ("softcap", "dropout_p", "bias", "mask", "alibi", "sinks", "segments", "intervals")
    for name in (*of_scores, "left", "right", "lengths"):
        assert any(getattr(case, name) for case in cases), name
    assert {case.dtype for case in cases} == set(fuzz_module._DTYPES)


def test_fuzz_passes_what_is_right():
    assert fuzz(30, seed=11, backends=["eager"]) is None


def test_fuzz_in_processes():
    assert fuzz(30, seed=11, backends=["eager"], jobs=2) is None


@pytest.mark.parametrize("lengths", [None, ((3, 5), (4, 2))], ids=["dense", "packed"])
def test_returned_statistics_are_judged_with_their_gradients(monkeypatch, lengths):
    sample = make(Case(id="", H_q=2, H_kv=1, D_qk=8, D_v=8, lengths=lengths))
    assert all(row.ok for row in measure_way("return_stats", sample, "portable"))
    gradients = ops.statistics_backward
    monkeypatch.setattr(
        ops, "statistics_backward",
        lambda gradient, *rest: gradients(dataclasses.replace(gradient, key_sum=None), *rest),
    )  # fmt: skip
    wrong = {row.name for row in measure_way("return_stats", sample, "portable") if not row.ok}
    assert {name.split()[0] for name in wrong} == {"dq", "dk"}


@pytest.mark.slow
@pytest.mark.skipif(load("cpu").unavailable_reason() is not None, reason="no C++ compiler")
def test_500_random_problems():
    failure = fuzz(500, seed=12, backends=["cpu"])
    assert failure is None, failure


@pytest.mark.usefixtures("broken")
def test_fuzz_finds_minimises_and_prints_a_program(monkeypatch):
    found = fuzz(200, seed=5, backends=["broken"])
    assert found is not None
    case = found.result.case
    changed = {f.name for f in dataclasses.fields(Case) if getattr(case, f.name) != getattr(Case(id="fuzz"), f.name)}
    sizes = {"B", "S_q", "S_kv", "H_q", "H_kv", "D_qk", "D_v", "lengths"}
    assert changed - sizes in ({"softcap"}, {"sinks"})
    with pytest.raises((AssertionError, RuntimeError), match=r"outside the tolerance|no sinks today"):
        exec(str(found), {})


@pytest.mark.parametrize("case", [case for case in grid() if case.nan_rows], ids=lambda case: case.id)
def test_cases_with_nan_rows_have_some(case):
    inputs = make(case).inputs
    assert inputs.k.isnan().any() and inputs.v.isnan().any()
