"""The CUDA kernels for decoding on a Hopper GPU: every kernel first alone in a process, then over the grid of cases.

``python tests/gpu/test_cuda_decode.py NAME`` runs the cases of one kernel; one that hangs or breaks the context ends
only that process.
"""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastattn.backends import cuda
from fastattn.backends.cuda import decode
from fastattn.backends.cuda.instances import DecodeConfig, GatheredConfig, Instance, decode_instances
from fastattn.kv_cache import CACHE_TENSORS, CacheInputs, facts_of
from fastattn.spec import AttentionSpec
from fastattn.testing.caches import CacheCase, cache_grid, make_cache_sample, measure_cache
from fastattn.testing.tolerance import assert_within

ROOT = Path(__file__).parents[2]
TIMEOUT = 120  # seconds: import, compile at first use, and a dozen small launches
KERNELS = decode_instances()

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module", autouse=True)
def _on_hopper() -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs compute capability 9.0")
    if reason := cuda.BACKEND.unavailable_reason():
        pytest.fail(f"the cuda backend is {reason}")


def on_gpu(inputs: CacheInputs) -> CacheInputs:
    """The same tensors there, with the same strides."""
    tensors = {name: x for name in CACHE_TENSORS if (x := getattr(inputs, name)) is not None}
    there = {
        name: torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda").copy_(x)
        for name, x in tensors.items()
    }
    return inputs.replace(**there)


class OnGpu(cuda.CudaBackend):
    """Takes tensors of the CPU, on which results are judged."""

    def attend_to_cache(self, inputs: CacheInputs, spec: AttentionSpec) -> tuple[Tensor, Tensor]:
        there = on_gpu(inputs)
        out, lse = super().attend_to_cache(there, spec)
        inputs.k_cache.copy_(there.k_cache)
        inputs.v_cache.copy_(there.v_cache)
        return out.cpu(), lse.cpu()


def check(case: CacheCase) -> None:
    assert_within(measure_cache(OnGpu(), make_cache_sample(case)))


def cases_of(instance: Instance) -> list[CacheCase]:
    """Problems that the kernel serves: short and long caches, one split and many, every way to hold pages."""
    config = instance.config
    assert isinstance(config, (DecodeConfig, GatheredConfig))
    more: dict[str, Any] = {"D_qk": config.d_qk, "D_v": config.d_v, "dtype": getattr(torch, instance.dtype)}
    more |= {"softcap": 8.0} if isinstance(config, DecodeConfig) and config.softcap else {}
    if isinstance(config, GatheredConfig):
        return gathered_cases(config, more)
    long: dict[str, Any] = {**more, "before": (5000, 0, 3111), "sinks": True}
    cases = [
        CacheCase("one token", **more),
        CacheCase("long", **long),
        CacheCase("long, tokens", s_q=(40, 40, 40), **long),
        CacheCase("long, window", left=1000, page_size=64, **long),
        CacheCase("long, reads only", new=0, **long),
        CacheCase("packed", packed=True, page_size=16, **{**long, "s_q": (1, 70, 0)}),
        CacheCase("many heads", page_size=16, **{**long, "before": (300, 0, 77), "H_q": 140, "H_kv": 2}),
    ]
    cases += [CacheCase(f"pages of {size}", page_size=size, **long) for size in (1, 2, 8, 24, 100, 128, 256)]
    smaller = {**long, "D_qk": config.d_qk - 8, "D_v": config.d_v - 8}
    return [*cases, CacheCase("smaller head dims", page_size=32, **smaller)]


def gathered_cases(config: GatheredConfig, more: dict[str, Any]) -> list[CacheCase]:
    """Small pages or e4m3, trees and softcap, in kernels whose threads copy the rows."""
    more = {**more, "fp8": "page"} if config.slots else {**more, "page_size": 2}
    long: dict[str, Any] = {**more, "before": (5000, 0, 3111), "sinks": True}
    step = 16 if config.slots else 8
    return [
        CacheCase("one token", **more),
        CacheCase("long", **long),
        CacheCase("long, window, softcap", **{**long, "left": 1000, "softcap": 8.0, "page_size": 1}),
        CacheCase("long, reads only", new=0, **{**long, "page_size": 4}),
        CacheCase("packed", packed=True, **{**long, "s_q": (1, 70, 0)}),
        CacheCase("trees", tree="each", **{**long, "s_q": (40, 40, 40), "left": 300}),
        CacheCase("smaller head dims", **{**long, "D_qk": config.d_qk - step, "D_v": config.d_v - step}),
    ]


@pytest.mark.parametrize("instance", KERNELS, ids=lambda instance: instance.name)
def test_kernel_alone_in_a_process(instance: Instance) -> None:
    command = [sys.executable, __file__, instance.name]
    try:
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        pytest.fail(f"{instance.name} hangs: nothing within {TIMEOUT} s")
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", cache_grid((torch.float32,)), ids=lambda case: case.id)
def test_grid(case: CacheCase, dtype: torch.dtype) -> None:
    case = dataclasses.replace(case, dtype=dtype)
    sample = make_cache_sample(case)
    problem = dataclasses.replace(facts_of(sample.inputs, sample.spec), device="cuda", arch=90)
    if reasons := cuda.BACKEND.unsupported_reasons(problem):
        pytest.skip("; ".join(reasons))
    check(case)


@pytest.mark.parametrize("splits", [1, 2, 7, 33, 128])
def test_any_number_of_splits(splits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "split_count", lambda *sizes: splits)
    check(CacheCase("splits", before=(9000, 17), s_q=(2, 2), D_qk=128, D_v=128, page_size=16, dtype=torch.bfloat16))


def test_same_bits_every_time() -> None:
    case = CacheCase("long", before=(30000, 100), s_q=(1, 1), D_qk=128, D_v=128, page_size=16, dtype=torch.bfloat16)
    sample = make_cache_sample(case)
    inputs = on_gpu(sample.inputs)
    first = cuda.BACKEND.attend_to_cache(inputs, sample.spec)
    for _ in range(5):
        again = cuda.BACKEND.attend_to_cache(inputs, sample.spec)
        assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))


def test_a_graph_follows_the_lengths() -> None:
    """The number of splits is fixed when a graph is captured; where they begin is not."""
    case = CacheCase("graph", before=(4000, 10), s_q=(1, 1), D_qk=64, D_v=64, new=0, dtype=torch.float16)
    sample = make_cache_sample(case)
    inputs = on_gpu(sample.inputs)
    cuda.BACKEND.attend_to_cache(inputs, sample.spec)  # compiled, and warm
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = cuda.BACKEND.attend_to_cache(inputs, sample.spec)
    for lengths in ((4000, 10), (333, 9)):
        inputs.cache_lengths.copy_(torch.tensor(lengths))
        graph.replay()
        torch.cuda.synchronize()
        eager = cuda.BACKEND.attend_to_cache(inputs, sample.spec)
        assert all(torch.equal(x, y) for x, y in zip(eager, captured, strict=True))


def main(name: str) -> None:
    (instance,) = (instance for instance in KERNELS if instance.name == name)
    for case in cases_of(instance):
        print(case.id, flush=True)
        check(case)


if __name__ == "__main__":
    main(sys.argv[1])
