"""Gives each test the simulated GPUs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from _pytest.monkeypatch import MonkeyPatch

from fastattn import evidence
from fastattn.testing import simulated
from fastattn.testing.simulated.kernels import fast_interpreter

pytest.importorskip("triton")


@pytest.fixture(autouse=True)
def machine(tmp_path: Path, monkeypatch: MonkeyPatch) -> Iterator[simulated.Machine]:
    """Two GPUs; no verdict of any self-check is known."""
    if reason := simulated.unavailable_reason():
        pytest.skip(reason)
    library = Path(simulated.load()._name)
    (tmp_path / library.name).symlink_to(library)  # for other processes, which would compile it again
    monkeypatch.setenv("FASTATTN_CACHE", str(tmp_path))
    monkeypatch.setattr(evidence, "_verdicts", {})
    with simulated.present() as machine, fast_interpreter():
        yield machine


@pytest.fixture
def trusted(monkeypatch: MonkeyPatch) -> None:
    """There is a record that Triton passed on such a GPU."""
    monkeypatch.setattr(evidence, "RECORDS", {("triton", 90): "a record"})
