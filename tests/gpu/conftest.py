"""On a GPU a test that breaks the context ends its process. Without one, some tests run on the simulated GPU.

After an illegal access every further CUDA call of a process fails. So the process ends and pytest-xdist starts another,
which runs the remaining tests.
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
