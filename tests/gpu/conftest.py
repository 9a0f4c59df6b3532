"""On a GPU: a test that breaks the context takes its process along. Without one: some tests run on the simulated GPU.

After an illegal access every further call of the process fails, so the process ends, pytest-xdist starts another, and
the tests that follow say something again.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import pytest
import torch

from fastattn import evidence
from fastattn.testing import simulated


@pytest.fixture(autouse=True)
def simulated_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The simulated GPUs for the tests marked as ``simulated``; the others are skipped before they come here."""
    if torch.cuda.is_available():
        yield
        return
    from fastattn.testing.simulated.kernels import fast_interpreter

    monkeypatch.setattr(evidence, "RECORDS", {("triton", 90): "a record"})
    with simulated.present(), fast_interpreter():
        yield


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    report = yield
    if call.when == "call" and report.failed and os.environ.get("PYTEST_XDIST_WORKER") and _device_is_lost():
        print(
            f"{item.nodeid}: {report.longreprtext}\nthe device failed; this process ends", file=sys.stderr, flush=True
        )
        os._exit(70)
    return report


def _device_is_lost() -> bool:
    try:
        torch.cuda.synchronize()
    except Exception:
        return torch.cuda.is_available()
    return False
