"""Gives each test the simulated GPUs."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from _pytest.monkeypatch import MonkeyPatch

from fastattn import evidence
from fastattn.backends import cpu
from fastattn.testing import simulated
from fastattn.testing.simulated.kernels import fast_interpreter
from fastattn.testing.simulated.recording import RecordingDriver, built_host

pytest.importorskip("triton")


@pytest.fixture(scope="session")
def libraries() -> list[Path]:
    """Those that tests load, compiled where they stay: a test has a cache folder of its own, and so its processes."""
    if reason := simulated.unavailable_reason():
        pytest.skip(reason)
    cpu.BACKEND.unavailable_reason()
    loaded = [Path(simulated.load()._name), RecordingDriver().path]
    if shutil.which("nvcc"):
        built_host(RecordingDriver())
    return [path for folder in {path.parent for path in loaded} for path in folder.glob("*.so*")]


@pytest.fixture(autouse=True)
def machine(libraries: list[Path], tmp_path: Path, monkeypatch: MonkeyPatch) -> Iterator[simulated.Machine]:
    """Two GPUs; no verdict of any self-check is known."""
    for path in libraries:
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.setenv("FASTATTN_CACHE", str(tmp_path))
    monkeypatch.setattr(evidence, "_verdicts", {})
    with simulated.present() as machine, fast_interpreter():
        yield machine


@pytest.fixture
def trusted(monkeypatch: MonkeyPatch) -> None:
    """There is a record that Triton passed on such a GPU."""
    monkeypatch.setattr(evidence, "RECORDS", {("triton", 90): "a record"})
