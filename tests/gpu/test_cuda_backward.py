"""The CUDA backward kernels on a Hopper GPU: every kernel first alone in a process, then over the grid of cases.

``python tests/gpu/test_cuda_backward.py NAME`` runs the cases of one kernel; one that hangs or breaks the context ends
only that process.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fastattn.backends import cuda
from fastattn.backends.cuda.instances import DkdvConfig, DqConfig, Instance, backward_instances
from fastattn.problem import Problem
from fastattn.testing.cases import Case, grid
from fastattn.testing.inputs import make
from fastattn.testing.tolerance import assert_within, measure, run

ROOT = Path(__file__).parents[2]
TIMEOUT = 120  # seconds: import, compile at first use, and two dozen small launches
KERNELS = backward_instances()
LARGE = {"B": 2, "S_q": 2048, "S_kv": 2048, "H_q": 4, "H_kv": 2, "dtype": torch.bfloat16, "right": 0}

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module", autouse=True)
def _on_hopper() -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs compute capability 9.0")
    if reason := cuda.BACKEND.unavailable_reason():
        pytest.fail(f"the cuda backend is {reason}")


@pytest.fixture
def deterministic() -> Iterator[None]:
    """Two kernels without atomics instead of the fused one."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def cases_of(instance: Instance) -> list[Case]:
    """Problems that reach the kernel: several configs of rows and keys, with neither a multiple of a block."""
    config = instance.config
    assert isinstance(config, (DkdvConfig, DqConfig))
    # A kernel that computes only some gradients is asked for those, else the fused one would serve.
    needs = ("q",) if isinstance(config, DqConfig) else ("q", "k", "v", "sinks") if config.fused else ("k", "v")
    sizes = {"D_qk": config.d_qk, "D_v": config.d_v, "H_q": 4, "H_kv": 2, "dtype": getattr(torch, instance.dtype)}
    common: dict[str, Any] = {**sizes, "needs": needs, **({"softcap": 8.0} if config.softcap else {})}
    common |= {"alibi": True, "dropout_p": 0.2} if config.terms else {}
    bands: dict[str, dict[str, Any]] = {
        "full": {},
        "causal": {"right": 0},
        "causal, upper left": {"right": 0, "anchor": "upper_left"},
        "window": {"left": 70, "right": 20},
    }
    cases = []
    for name, band in bands.items():
        more = {**common, **band}
        some_unkept = "left" in band or "anchor" in band  # with fewer queries than keys
        cases += [
            Case(f"{name}, fewer queries", S_q=333, S_kv=700, nan_rows=some_unkept, **more),
            Case(f"{name}, fewer keys", S_q=700, S_kv=333, sinks=True, dlse=True, **more),
            Case(f"{name}, one tile", S_q=64, S_kv=64, **more),
            Case(f"{name}, heads first", S_q=300, S_kv=300, memory="BHSD", **more),
            Case(f"{name}, packed", lengths=((300, 300), (0, 5), (1, 400), (130, 7), (64, 0)), nan_rows=True, **more),
        ]
    cases.append(
        Case("smaller head dims", S_q=200, S_kv=200, **{**common, "D_qk": config.d_qk - 8, "D_v": config.d_v - 8})
    )
    return cases


def check(case: Case, forward: str = "eager") -> None:
    assert_within(measure(forward, make(case, "cuda"), backward_backend=cuda.BACKEND))


@pytest.mark.parametrize("instance", KERNELS, ids=lambda instance: instance.name)
def test_kernel_alone_in_a_process(instance: Instance) -> None:
    command = [sys.executable, __file__, instance.name]
    try:
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        pytest.fail(f"{instance.name} hangs: nothing within {TIMEOUT} s")
    assert result.returncode == 0, result.stdout + result.stderr


def check_if_served(case: Case, forward: str) -> None:
    sample = make(case, "cuda")
    reasons = cuda.BACKEND.unsupported_reasons(Problem.of(sample.inputs, sample.spec, needs_grad=True))
    if reasons:
        pytest.skip("; ".join(reasons))
    check(case, forward)


@pytest.mark.parametrize("case", grid([torch.float16, torch.bfloat16]), ids=lambda case: case.id)
def test_grid(case: Case) -> None:
    check_if_served(case, "cuda")


@pytest.mark.parametrize("case", grid([torch.float16, torch.bfloat16]), ids=lambda case: case.id)
def test_grid_without_atomics(case: Case, deterministic: None) -> None:
    check_if_served(case, "cuda")


@pytest.mark.parametrize("forward", ["triton", "portable"])
@pytest.mark.parametrize("case", grid([torch.bfloat16], quick=True), ids=lambda case: case.id)
def test_forward_of_another_backend(case: Case, forward: str) -> None:
    check_if_served(case, forward)


@pytest.mark.parametrize("backward", ["triton", "portable"])
@pytest.mark.parametrize("case", grid([torch.bfloat16], quick=True), ids=lambda case: case.id)
def test_backward_of_another_backend(case: Case, backward: str) -> None:
    sample = make(case, "cuda")
    reasons = cuda.BACKEND.unsupported_reasons(Problem.of(sample.inputs, sample.spec))
    if reasons:
        pytest.skip("; ".join(reasons))
    assert_within(measure(cuda.BACKEND, sample, backward_backend=backward))


@pytest.mark.parametrize("scale", [-0.3, 0.0])
def test_scales_that_are_not_positive(scale: float) -> None:
    check(Case("scale", S_q=200, S_kv=200, D_qk=64, D_v=64, dtype=torch.float16, scale=scale))


@pytest.mark.parametrize("head_dim", [64, 96, 128, 192, 256])
def test_same_bits_every_time_without_atomics(head_dim: int, deterministic: None) -> None:
    sample = make(Case("large", D_qk=head_dim, D_v=head_dim, sinks=True, **LARGE), "cuda")
    first = run(cuda.BACKEND, sample, cuda.BACKEND)
    for _ in range(5):
        again = run(cuda.BACKEND, sample, cuda.BACKEND)
        assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize("needs", [("q",), ("k",), ("v",), ("k", "v"), ("q", "v")])
def test_some_gradients_are_those_of_all(needs: tuple[str, ...]) -> None:
    sample = make(Case("some", S_q=300, S_kv=300, D_qk=128, D_v=128, dtype=torch.float16, needs=needs), "cuda")
    assert_within(measure(cuda.BACKEND, sample))


def test_runs_in_a_cuda_graph() -> None:
    sample = make(Case("graph", D_qk=128, D_v=128, **LARGE), "cuda")
    out, lse = cuda.BACKEND.forward(sample.inputs, sample.spec)

    def gradients() -> tuple[torch.Tensor | None, ...]:
        grads = cuda.BACKEND.backward(sample.dout, None, out, lse, sample.inputs, sample.spec, ("k", "v", "q"))
        return grads.dk, grads.dv

    eager = gradients()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = gradients()
    for x in captured:
        assert x is not None
        x.fill_(float("nan"))
    graph.replay()
    torch.cuda.synchronize()
    assert all(x is not None and y is not None and torch.equal(x, y) for x, y in zip(eager, captured, strict=True))


def main(name: str) -> None:
    (instance,) = (instance for instance in KERNELS if instance.name == name)
    for case in cases_of(instance):
        print(case.id, flush=True)
        check(case)
        torch.cuda.synchronize()


if __name__ == "__main__":
    main(sys.argv[1])
