"""Fixtures of all tests: the interpreter without a GPU, skips with reasons, seeds, a header with the environment."""

import gc
import importlib.util
import os
import time
from collections.abc import Generator, Iterator

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when @triton.jit runs, so before any kernel is imported

import pytest

import fastattn
from fastattn import dispatch, state
from fastattn.testing import simulated

if not torch.cuda.is_available() and simulated.unavailable_reason() is None:
    simulated.load()  # torch has to know of the devices before its first backward pass

torch.set_num_threads(1)  # the problems are small, and xdist starts a process for each core


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--budget", type=float, metavar="SECONDS", help="start no test after that long (make quick)")


STARTED = time.monotonic()


def pytest_runtest_setup(item: pytest.Item) -> None:
    budget = item.config.getoption("--budget")
    if budget is not None and time.monotonic() - STARTED > budget:
        pytest.skip(f"not run: over the {budget:.0f} s of --budget")


def pytest_configure(config: pytest.Config) -> None:
    if config.pluginmanager.hasplugin("benchmark"):  # the tests of a GPU run without it
        config.option.benchmark_disable = True


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """What is collected, half a million objects, lives until the end: collections of garbage need not look at it."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def pytest_report_header() -> list[str]:
    try:
        import triton

        kernels = f"triton {triton.__version__}"
    except ImportError:
        kernels = "no triton"
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    interpreted = ", interpreted" if os.environ.get("TRITON_INTERPRET") == "1" else ""
    return [
        f"fastattn {fastattn.__version__} from {os.path.relpath(os.path.dirname(fastattn.__file__))}",
        f"torch {torch.__version__}, {kernels}{interpreted}, {device}, {torch.get_num_threads()} threads",
    ]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Without a GPU the tests that need one are skipped; of those that differ in parameters alone, the first."""
    if torch.cuda.is_available():
        return
    without_gpu = pytest.mark.skip(reason="needs a GPU, and torch.cuda.is_available() is False")
    runs_simulated = simulated.unavailable_reason() is None
    kept, repeated, skipped = [], [], set()
    for item in items:
        if "gpu" in item.keywords and not (runs_simulated and "simulated" in item.keywords):
            item.add_marker(without_gpu)
            function = item.nodeid.partition("[")[0]
            if function in skipped:
                repeated.append(item)
                continue
            skipped.add(function)
        kept.append(item)
    config.hook.pytest_deselected(items=repeated)
    items[:] = kept


@pytest.fixture(scope="session", autouse=True)
def interpreted_quickly() -> Iterator[None]:
    """Triton's interpreter without its checks of overflow, for which some tests ask (``overflow_is_an_error``)."""
    if os.environ.get("TRITON_INTERPRET") != "1" or importlib.util.find_spec("triton") is None:
        yield
        return
    from fastattn.testing.simulated.kernels import fast_interpreter

    with fast_interpreter():
        yield


@pytest.fixture(autouse=True)
def nothing_replayed() -> None:
    """Each test starts without plans and cached choices of earlier tests."""
    state.forget()


@pytest.fixture(autouse=True)
def seed() -> int:
    """Every test starts from the same seed, which is also its value."""
    torch.manual_seed(0)
    return 0


@pytest.fixture
def without_interpreter(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What is measured is what users run, so Triton's interpreter is off for the tests of measuring."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    dispatch.reasons.cache_clear()
    yield
    dispatch.reasons.cache_clear()
