"""Automatic selection of a backend with kernels of its own: records, self-checks, and storage of verdicts."""

from __future__ import annotations

import json
import multiprocessing
import subprocess
import sys
import tempfile
import textwrap
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

import fastattn
from fastattn import dispatch, evidence, reference
from fastattn.backends import load
from fastattn.backends.base import Backend, Capabilities
from fastattn.evidence import Verdict
from fastattn.problem import Problem
from fastattn.testing import self_check

PROBLEM = Problem("cuda", 90, torch.bfloat16, 64, 64, 1, frozenset())


class Machine:
    """A GPU machine that is not there: counts self-checks and says how they end."""

    def __init__(self) -> None:
        self.facts = {"backend": "triton", "device": "a GPU", "index": 0, "driver": "1"}
        self.verdict = Verdict(None)
        self.checks = 0
        self.capturing = False

    def check(self, backend: str, facts: dict[str, Any]) -> Verdict:
        self.checks += 1
        return self.verdict


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Machine:
    machine = Machine()
    monkeypatch.setenv("FASTATTN_CACHE", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
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
    machine.verdict = Verdict("dq max is off")
    for reasons in (evidence.reasons_against("triton", PROBLEM), in_a_new_process(monkeypatch)):
        assert reasons == ["its self-check on this GPU failed: dq max is off"]
    assert machine.checks == 1


def test_a_check_that_could_not_run_is_tried_again(machine, monkeypatch):
    """By processes that start later; those of the same start agree."""
    machine.verdict = Verdict("it could not run", final=False)
    (reason,) = evidence.reasons_against("triton", PROBLEM)
    assert "it could not run" in reason and "verify --device cuda --record" in reason
    assert in_a_new_process(monkeypatch) == [reason] and machine.checks == 1
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + evidence.FAILURE_HOLDS_S + 1)
    machine.verdict = Verdict(None)
    assert in_a_new_process(monkeypatch) == [] and machine.checks == 2


def test_a_hang_is_remembered_for_a_day(machine, monkeypatch):
    machine.verdict = Verdict("it did not end in time while running", final=False, hung=True)
    now = time.time()
    assert evidence.reasons_against("triton", PROBLEM) != []
    monkeypatch.setattr(time, "time", lambda: now + 23 * 3600)
    assert in_a_new_process(monkeypatch) != [] and machine.checks == 1
    machine.verdict = Verdict(None)
    monkeypatch.setattr(time, "time", lambda: now + 25 * 3600)
    assert in_a_new_process(monkeypatch) == [] and machine.checks == 2


def test_on_request_it_is_repeated(machine, monkeypatch):
    machine.verdict = Verdict("dq max is off")
    assert evidence.reasons_against("triton", PROBLEM) != []
    machine.verdict = Verdict(None)
    assert evidence.check_again("triton", 90).failure is None
    assert evidence.reasons_against("triton", PROBLEM) == in_a_new_process(monkeypatch) == []


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


def kept(folder: Path) -> Path:
    (found,) = (folder / "self-check").glob("*.json")
    return found


def test_damaged_memory_does_no_harm(machine, monkeypatch, tmp_path):
    evidence.reasons_against("triton", PROBLEM)
    for damage in ("{", "[]", '{"failure": null, "of": "another version"}'):
        kept(tmp_path).write_text(damage, encoding="utf-8")
        checks = machine.checks
        assert in_a_new_process(monkeypatch) == [] and machine.checks == checks + 1


def test_without_a_home_temporary_files_serve(machine, monkeypatch):
    """As in containers that run under a number without an entry in passwd."""

    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("FASTATTN_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    assert evidence.reasons_against("triton", PROBLEM) == in_a_new_process(monkeypatch) == []
    assert machine.checks == 1


def test_without_any_place_to_write_each_process_checks(machine, monkeypatch, tmp_path, caplog):
    not_a_folder = tmp_path / "file"
    not_a_folder.write_text("", encoding="utf-8")
    monkeypatch.setenv("FASTATTN_CACHE", str(not_a_folder))
    monkeypatch.setattr(tempfile, "tempdir", str(not_a_folder))
    assert evidence.reasons_against("triton", PROBLEM) == in_a_new_process(monkeypatch) == []
    assert machine.checks == 2 and "FASTATTN_CACHE names one" in caplog.text


def test_a_folder_that_others_write_is_not_believed(machine, monkeypatch, tmp_path):
    evidence.reasons_against("triton", PROBLEM)
    tmp_path.chmod(0o777)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))
    (tmp_path / "none").write_text("", encoding="utf-8")
    assert evidence._folder() is None and in_a_new_process(monkeypatch) == []
    assert machine.checks == 2


@pytest.mark.parametrize("change", [{"frozen": True}, {"executable": None}, {"executable": ""}])
def test_a_frozen_application_checks_nothing(machine, monkeypatch, change):
    for name, value in change.items():
        monkeypatch.setattr(sys, name, value, raising=False)
    (reason,) = evidence.reasons_against("triton", PROBLEM)
    assert "frozen application" in reason and "verify --device cuda --record" in reason and machine.checks == 0
    assert evidence.check_again("triton", 90).failure is not None


def test_verdicts_are_written_whole(machine, tmp_path):
    evidence.reasons_against("triton", PROBLEM)
    assert json.loads(kept(tmp_path).read_text(encoding="utf-8")) == asdict(machine.verdict)
    assert not [path for path in (tmp_path / "self-check").iterdir() if path.suffix not in (".json", ".lock")]


def rank(folder: str, failure: str | None, answers: Any) -> None:
    """One process of several that start together."""
    patch = pytest.MonkeyPatch()
    patch.setenv("FASTATTN_CACHE", folder)
    patch.setattr(evidence, "_facts", lambda backend, arch: {"backend": "triton", "device": "a GPU", "index": 0})
    patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)

    def check(backend: str, facts: dict[str, Any]) -> Verdict:
        time.sleep(0.5)
        answers.put("checked")
        return Verdict(failure, final=failure is None)

    patch.setattr(evidence, "_self_check", check)
    answers.put(str(evidence.reasons_against("triton", PROBLEM)))


@pytest.mark.parametrize("failure", [None, "no memory is left"])
def test_ranks_check_once_and_agree(tmp_path, failure):
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    ranks = [context.Process(target=rank, args=(str(tmp_path), failure, answers)) for _ in range(4)]
    for process in ranks:
        process.start()
    found = [answers.get(timeout=60) for _ in range(5)]
    for process in ranks:
        process.join()
    assert found.count("checked") == 1
    assert len(set(found) - {"checked"}) == 1, "ranks disagree"


def test_a_cpu_needs_no_evidence(machine):
    assert evidence.reasons_against("triton", Problem("cpu", 0, torch.float32, 8, 8, 1, frozenset())) == []
    assert machine.checks == 0


def checked_by(program: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Verdict:
    """How a check ends whose process runs ``program``."""
    script = tmp_path / "check.py"
    script.write_text(textwrap.dedent(program), encoding="utf-8")
    popen = subprocess.Popen

    def start(command: list[str], **options: Any) -> subprocess.Popen[str]:
        assert command[1:] == ["-m", "fastattn.testing.self_check", "triton", "cuda:1"]
        assert options["env"]["FASTATTN_SELF_CHECK"] == "0", "a check must not check"
        return popen([sys.executable, "-S", str(script)], **options)

    monkeypatch.setattr(subprocess, "Popen", start)
    return evidence._self_check("triton", {"device": "a GPU", "index": 1})


@pytest.mark.parametrize(
    ("program", "failure", "final", "hung"),
    [
        ("print('started'); print('compiled'); print('passed')", None, True, False),
        ("print('compiled'); print('dq max is off'); raise SystemExit(3)", "dq max is off", True, False),
        ("print('no memory is left'); raise SystemExit(1)", "no memory is left", False, False),
        ("raise SystemExit(1)", "it said nothing", False, False),
        ("import os; os.kill(os.getpid(), 11)", "it was ended by SIGSEGV while starting", False, False),
        (
            "import os; print('compiled', flush=True); os.kill(os.getpid(), 11)",
            "it was ended by SIGSEGV while running", False, True,
        ),
    ],
)  # fmt: skip
def test_how_a_check_may_end(monkeypatch, tmp_path, program, failure, final, hung):
    verdict = checked_by(program, monkeypatch, tmp_path)
    assert (verdict.failure, verdict.final, verdict.hung) == (failure, final, hung)


@pytest.mark.parametrize(
    ("said", "limit", "stage"),
    [("", "START_S", "starting"), ("started", "COMPILE_S", "compiling"), ("compiled", "RUN_S", "running")],
)
def test_a_check_that_hangs_costs_the_limit_of_its_stage(monkeypatch, tmp_path, said, limit, stage):
    """And ends with everything that it started."""
    for name in ("START_S", "COMPILE_S", "RUN_S"):
        monkeypatch.setattr(evidence, name, 0.5 if name == limit else 60)
    pid = tmp_path / "pid"
    program = f"""
        import os, subprocess, time
        open({str(pid)!r}, "w").write(str(subprocess.Popen(["sleep", "60"]).pid))
        print({said!r}, flush=True)
        time.sleep(60)
    """
    before = time.monotonic()
    if limit == "START_S":
        monkeypatch.setattr(evidence, "START_S", 3)  # Python itself has to start
    verdict = checked_by(program, monkeypatch, tmp_path)
    assert verdict.failure == f"it did not end in time while {stage}" and not verdict.final
    assert verdict.hung == (stage == "running") and time.monotonic() - before < 10
    assert is_gone(int(pid.read_text()))


def is_gone(pid: int) -> bool:
    for _ in range(50):
        try:
            if Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z":  # dead, and nobody has asked for its exit code
                return True
        except OSError:
            return True
        time.sleep(0.1)
    return False


def test_a_check_that_cannot_be_killed_is_left(monkeypatch, tmp_path):
    monkeypatch.setattr(evidence, "START_S", 0.2)
    monkeypatch.setattr(evidence, "KILL_S", 0.1)
    monkeypatch.setattr(evidence.os, "killpg", lambda *_: None)
    verdict = checked_by("import time; time.sleep(3)", monkeypatch, tmp_path)
    assert "stuck in the driver" in (verdict.failure or "")


def test_a_check_that_does_not_start(monkeypatch):
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError("no more processes")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    verdict = evidence._self_check("triton", {"device": "a GPU", "index": 0})
    assert verdict.failure == "it could not be started: no more processes" and not verdict.final


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (RuntimeError("CUDA error: CUDA-capable device(s) is/are busy or unavailable\nmore"), "exclusive compute mode"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried"), "no memory is left on this GPU"),
        (RuntimeError("CUDA error: out of memory"), "no memory is left on this GPU"),
        (ValueError("odd\nmore"), "it could not run: ValueError: odd"),
    ],
)
def test_every_obstacle_is_a_sentence(monkeypatch, capsys, error, sentence):
    def refuse(*_: object) -> None:
        raise error

    monkeypatch.setattr(self_check, "self_check", refuse)
    assert self_check.main(["eager", "cpu"]) == 1
    last = capsys.readouterr().out.splitlines()[-1]
    assert sentence in last and ("--record" in last or "could not run" in last)


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
