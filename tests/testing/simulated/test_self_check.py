"""The self-check and ``fastattn verify`` on the simulated GPU: as a process, and by a call that selects a backend."""

from __future__ import annotations

import logging
import os
import warnings
from pathlib import Path

import pytest
import torch

import fastattn
from fastattn import dispatch, evidence
from fastattn.cli import main
from fastattn.files import cache_root
from fastattn.testing import simulated
from fastattn.testing import verify as verification


@pytest.fixture
def in_child(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other processes have the simulated GPUs, too."""
    root = Path(fastattn.__file__).parents[1]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(simulated.startup_folder()), str(root)]))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def qkv(device: str = "cuda") -> list[torch.Tensor]:
    return [torch.randn(1, 33, 2, 16, device=device, dtype=torch.bfloat16) for _ in range(3)]


def test_a_call_checks_once_and_is_served_by_triton(
    in_child: None, machine: simulated.Machine, caplog: pytest.LogCaptureFixture
) -> None:
    """The check runs in a process of its own, the whole of it."""
    with caplog.at_level(logging.WARNING, "fastattn"), warnings.catch_warnings():
        warnings.simplefilter("error")
        out = fastattn.attention(*qkv())
        fastattn.attention(*qkv(), causal=True)
    assert out.is_cuda and [launch.kernel for launch in machine.launches] == ["forward_kernel"] * 2
    assert sum("checking the triton backend" in record.message for record in caplog.records) == 1
    assert fastattn.explain(*qkv()).chosen == "triton"
    (kept,) = (cache_root() / "self-check").glob("*.json")
    assert '"failure": null' in kept.read_text()


def test_a_failed_check_is_said_once_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    failed = evidence.Verdict("dq max is off by 1", final=True)
    monkeypatch.setattr(evidence, "_self_check", lambda backend, facts: failed)
    dispatch._warn_slow.cache_clear()
    with pytest.warns(
        UserWarning, match=r"slow 'portable'.*triton: its self-check on this GPU failed: dq max.*backend="
    ):
        fastattn.attention(*qkv())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fastattn.attention(*qkv(), causal=True)


def test_verify_on_a_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    few = [case for case in verification.cases(quick=True) if "bfloat16" in case.id][1::7]
    monkeypatch.setattr(verification, "cases", lambda quick: few)
    assert main(["verify", "--device", "cuda", "--backend", "triton", "--backend", "portable"]) == 0
    assert f"{2 * len(few)} runs, all within the tolerance" in capsys.readouterr().out


def test_verify_records(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    verdicts = iter(
        [evidence.Verdict("it did not end in time while running", final=False, hung=True), evidence.Verdict(None)]
    )
    monkeypatch.setattr(evidence, "_self_check", lambda backend, facts: next(verdicts))
    assert main(["verify", "--device", "cuda", "--record"]) == 1
    assert "did not end in time" in capsys.readouterr().out
    monkeypatch.setattr(evidence, "_verdicts", {})
    assert fastattn.explain(*qkv()).chosen != "triton", "a hang is remembered"
    assert main(["verify", "--device", "cuda", "--record"]) == 0
    monkeypatch.setattr(evidence, "_verdicts", {})
    assert fastattn.explain(*qkv()).chosen == "triton"
