"""When a backend with kernels of its own may be chosen unasked: records, self-checks, and how verdicts are kept."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

import fastattn
from fastattn import dispatch, evidence, reference
from fastattn.backends import load
from fastattn.backends.base import Backend, Capabilities
from fastattn.problem import Problem
from fastattn.testing import self_check

PROBLEM = Problem("cuda", 90, torch.bfloat16, 64, 64, 1, frozenset())


class Machine:
    """A GPU machine that is not there: counts self-checks and says how they end."""

    def __init__(self) -> None:
        self.facts = {"backend": "triton", "device": "a GPU", "index": 0, "driver": "1"}
        self.verdict: dict[str, Any] = {"failure": None, "final": True}
        self.checks = 0
        self.capturing = False

    def check(self, backend: str, facts: dict[str, Any]) -> dict[str, Any]:
        self.checks += 1
        return self.verdict


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Machine:
    machine = Machine()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("FASTATTN_SELF_CHECK", raising=False)
    monkeypatch.setattr(evidence, "_facts", lambda backend, arch: machine.facts)
    monkeypatch.setattr(evidence, "_self_check", machine.check)
    monkeypatch.setattr(evidence, "_verdicts", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: machine.capturing)
    return machine


def in_a_new_process(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr(evidence, "_verdicts", {})
    return evidence.reasons_against("triton", PROBLEM)


def test_a_passed_check_is_run_once_and_kept(machine, monkeypatch):
    assert evidence.reasons_against("triton", PROBLEM) == evidence.reasons_against("triton", PROBLEM) == []
    assert in_a_new_process(monkeypatch) == []
    assert machine.checks == 1


def test_a_wrong_result_is_kept_too(machine, monkeypatch):
    machine.verdict = {"failure": "dq max is off", "final": True}
    for reasons in (evidence.reasons_against("triton", PROBLEM), in_a_new_process(monkeypatch)):
        assert reasons == ["its self-check on this GPU failed: dq max is off"]
    assert machine.checks == 1


def test_a_check_that_could_not_run_is_tried_again_by_the_next_process(machine, monkeypatch):
    machine.verdict = {"failure": "it could not run", "final": False}
    assert evidence.reasons_against("triton", PROBLEM) == evidence.reasons_against("triton", PROBLEM) != []
    assert machine.checks == 1
    machine.verdict = {"failure": None, "final": True}
    assert in_a_new_process(monkeypatch) == []


def test_any_change_of_the_facts_asks_again(machine):
    evidence.reasons_against("triton", PROBLEM)
    machine.facts = machine.facts | {"driver": "2"}
    evidence.reasons_against("triton", PROBLEM)
    assert machine.checks == 2


def test_a_committed_record_needs_no_check(machine, monkeypatch):
    monkeypatch.setattr(evidence, "RECORDS", {("triton", 90): "benchmarks/results/a-record.json"})
    assert evidence.reasons_against("triton", PROBLEM) == [] and machine.checks == 0


def test_records_are_files_of_the_repository():
    root = Path(fastattn.__file__).parents[1]
    assert all((root / path).exists() for path in evidence.RECORDS.values())


def test_the_environment_can_forbid_it(machine, monkeypatch):
    monkeypatch.setenv("FASTATTN_SELF_CHECK", "0")
    (reason,) = evidence.reasons_against("triton", PROBLEM)
    assert "FASTATTN_SELF_CHECK=0" in reason and "9.0" in reason and machine.checks == 0


def test_never_during_graph_capture(machine):
    machine.capturing = True
    (reason,) = evidence.reasons_against("triton", PROBLEM)
    assert "capture" in reason and machine.checks == 0
    machine.capturing = False
    assert evidence.reasons_against("triton", PROBLEM) == [] and machine.checks == 1


def test_damaged_or_unwritable_memory_does_no_harm(machine, monkeypatch, tmp_path):
    evidence.reasons_against("triton", PROBLEM)
    (kept,) = (tmp_path / "fastattn" / "self-check").iterdir()
    kept.write_text("{", encoding="utf-8")
    assert in_a_new_process(monkeypatch) == [] and machine.checks == 2
    not_a_folder = tmp_path / "file"
    not_a_folder.write_text("", encoding="utf-8")
    monkeypatch.setenv("XDG_CACHE_HOME", str(not_a_folder))
    assert in_a_new_process(monkeypatch) == [] and machine.checks == 3


def test_verdicts_are_written_whole(machine, tmp_path):
    evidence.reasons_against("triton", PROBLEM)
    (kept,) = (tmp_path / "fastattn" / "self-check").iterdir()
    assert kept.suffix == ".json" and json.loads(kept.read_text(encoding="utf-8")) == machine.verdict


def test_a_cpu_needs_no_evidence(machine):
    assert evidence.reasons_against("triton", Problem("cpu", 0, torch.float32, 8, 8, 1, frozenset())) == []
    assert machine.checks == 0


@pytest.mark.parametrize(
    ("code", "output", "verdict"),
    [
        (0, "passed", {"failure": None, "final": True}),
        (3, "dq max is off", {"failure": "dq max is off", "final": True}),
        (-11, "", {"failure": "it said nothing", "final": False}),
        (1, "Traceback\nRuntimeError: no memory", {"failure": "RuntimeError: no memory", "final": False}),
    ],
)
def test_how_a_check_may_end(monkeypatch, code, output, verdict):
    asked = []

    def run(command, **_):
        asked.append(command)
        return subprocess.CompletedProcess(command, code, output, "")

    monkeypatch.setattr(subprocess, "run", run)
    assert evidence._self_check("triton", {"device": "a GPU", "index": 1}) == verdict
    assert asked[0][-2:] == ["triton", "cuda:1"] and asked[0][1:3] == ["-m", "fastattn.testing.self_check"]


def test_a_check_that_hangs(monkeypatch):
    def run(command, timeout, **_):
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(subprocess, "run", run)
    verdict = evidence._self_check("triton", {"device": "a GPU", "index": 0})
    assert "could not run" in verdict["failure"] and not verdict["final"]


class Wrong(Backend):
    """Right but for its dq."""

    name = "wrong"
    capabilities = Capabilities()
    forward = staticmethod(reference.forward)

    def backward(self, *args):
        grads = reference.backward(*args)
        return type(grads)(**(vars(grads) | {"dq": grads.dq * 1.05}))


def test_the_check_itself(monkeypatch, capsys):
    assert self_check.main(["eager", "cpu"]) == 0
    monkeypatch.setattr(self_check, "load", lambda name: Wrong())
    assert self_check.main(["wrong", "cpu"]) == evidence.WRONG_RESULT
    assert "dq" in capsys.readouterr().out.splitlines()[-1]


class Shy(Backend):
    """Can do everything, and does nothing unasked."""

    name = "shy"
    capabilities = Capabilities()
    forward = staticmethod(reference.forward)
    backward = staticmethod(reference.backward)

    def automatic_reasons(self, problem):
        return ["it is shy"]


def test_dispatch_asks_and_explains(monkeypatch):
    monkeypatch.setattr(dispatch, "BACKENDS", ("shy", "eager"))
    monkeypatch.setattr(dispatch, "load", lambda name: Shy() if name == "shy" else load(name))
    dispatch.reasons.cache_clear()
    problem = Problem("cpu", 0, torch.float32, 8, 8, 1, frozenset())
    assert dispatch.select(problem).name == "eager"
    assert dispatch.select(problem, "shy").name == "shy"
    explanation = dispatch.Explanation.of(problem)
    assert explanation.chosen == "eager" and explanation.reasons["shy"] == []
    assert "only when asked by name: it is shy" in str(explanation)
    dispatch.reasons.cache_clear()


def test_the_interpreter_is_never_chosen_unasked():
    q = torch.randn(1, 16, 2, 16)
    explanation = fastattn.explain(q, q, q)
    assert explanation.chosen != "triton"
