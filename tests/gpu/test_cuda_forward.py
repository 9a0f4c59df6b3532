"""The CUDA forward kernels on a Hopper GPU: every kernel first alone in a process, then over the grid of cases.

``python tests/gpu/test_cuda_forward.py NAME`` runs the cases of one kernel; one that hangs or breaks the context ends
only that process.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fastattn.backends import cuda
from fastattn.backends.cuda.instances import Instance, forward_instances
from fastattn.problem import Problem
from fastattn.testing.cases import Case, grid
from fastattn.testing.inputs import make
from fastattn.testing.tolerance import assert_within, measure

ROOT = Path(__file__).parents[2]
TIMEOUT = 120  # seconds: import, compile at first use, and a dozen small launches
KERNELS = forward_instances()

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module", autouse=True)
def _on_hopper() -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs compute capability 9.0")
    if reason := cuda.BACKEND.unavailable_reason():
        pytest.fail(f"the cuda backend is {reason}")


def cases_of(instance: Instance) -> list[Case]:
    """Problems that the kernel serves: several configs of rows and keys, with neither a multiple of a block."""
    config = instance.config
    sizes = {"D_qk": config.d_qk, "D_v": config.d_v, "H_q": 4, "H_kv": 2, "dtype": getattr(torch, instance.dtype)}
    terms: dict[str, Any] = {"softcap": 8.0} if config.softcap else {}
    terms |= {"alibi": True, "dropout_p": 0.2} if config.terms else {}
    bands: dict[str, dict[str, Any]] = {"no band": {}}
    if config.band:
        bands = {
            "causal": {"right": 0},
            "causal, upper left": {"right": 0, "anchor": "upper_left"},
            "window": {"left": 70, "right": 20},
        }
    cases = []
    for name, band in bands.items():
        more = {**sizes, **terms, **band, "needs": ()}
        some_unkept = "left" in band or "anchor" in band  # with fewer queries than keys
        cases += [
            Case(f"{name}, fewer queries", S_q=333, S_kv=700, nan_rows=some_unkept, **more),
            Case(f"{name}, fewer keys", S_q=700, S_kv=333, sinks=True, **more),
            Case(f"{name}, one tile", S_q=64, S_kv=64, **more),
            Case(f"{name}, no keys", S_q=70, S_kv=0, **more),
            Case(f"{name}, heads first", S_q=300, S_kv=300, memory="BHSD", **more),
            Case(f"{name}, packed", lengths=((300, 300), (0, 5), (1, 400), (130, 7), (64, 0)), nan_rows=True, **more),
        ]
    smaller = {**sizes, "D_qk": config.d_qk - 8, "D_v": config.d_v - 8}
    cases.append(Case("smaller head dims", S_q=200, S_kv=200, needs=(), **{**smaller, **terms, **band}))
    return cases


def check(case: Case) -> None:
    assert_within(measure(cuda.BACKEND, make(case, "cuda"), backward_backend="eager"))


@pytest.mark.parametrize("instance", KERNELS, ids=lambda instance: instance.name)
def test_kernel_alone_in_a_process(instance: Instance) -> None:
    command = [sys.executable, __file__, instance.name]
    try:
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        pytest.fail(f"{instance.name} hangs: nothing within {TIMEOUT} s")
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("case", grid([torch.float16, torch.bfloat16]), ids=lambda case: case.id)
def test_grid(case: Case) -> None:
    sample = make(case, "cuda")
    reasons = cuda.BACKEND.unsupported_reasons(Problem.of(sample.inputs, sample.spec))
    if reasons:
        pytest.skip("; ".join(reasons))
    check(case)


@pytest.mark.parametrize("scale", [-0.3, 0.0])
def test_scales_that_are_not_positive(scale: float) -> None:
    check(Case("scale", S_q=200, S_kv=200, D_qk=64, D_v=64, dtype=torch.float16, scale=scale, needs=()))


def test_same_bits_every_time() -> None:
    sample = make(Case("large", B=4, S_q=2048, S_kv=2048, D_qk=128, D_v=128, dtype=torch.bfloat16, right=0), "cuda")
    first = cuda.BACKEND.forward(sample.inputs, sample.spec)
    for _ in range(5):
        again = cuda.BACKEND.forward(sample.inputs, sample.spec)
        assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))


def test_runs_in_a_cuda_graph() -> None:
    sample = make(Case("graph", S_q=256, S_kv=256, D_qk=64, D_v=64, dtype=torch.float16, right=0), "cuda")
    eager = cuda.BACKEND.forward(sample.inputs, sample.spec)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = cuda.BACKEND.forward(sample.inputs, sample.spec)
    for x in captured:
        x.fill_(float("nan"))
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(x, y) for x, y in zip(eager, captured, strict=True))


def main(name: str) -> None:
    (instance,) = (instance for instance in KERNELS if instance.name == name)
    for case in cases_of(instance):
        print(case.id, flush=True)
        check(case)
        torch.cuda.synchronize()


if __name__ == "__main__":
    main(sys.argv[1])
