"""The measured ceilings of a device: its fastest matrix product and copy in the same run."""

from __future__ import annotations

import functools

import torch

from fastattn.measure.timing import Contender, compare, stopwatch
from fastattn.measure.workload import DTYPES


def measure(device: torch.device, dtypes: set[str], quick: bool = False) -> dict[str, float]:
    """``matmul_<dtype>_tflops`` for each dtype and ``copy_gbps``, counting bytes read and written. Random data.

    fp32 is full fp32: on CUDA torch keeps TF32 off unless told otherwise.
    """
    on_gpu = device.type == "cuda"
    n = 512 if quick else 8192 if on_gpu else 2048
    megabytes = 16 if quick else 1024 if on_gpu else 256
    contenders: dict[str, Contender] = {}
    for name in sorted(dtypes):
        a, b = (torch.randn(n, n, device=device).to(DTYPES[name]) for _ in range(2))
        out = torch.empty_like(a)
        contenders[name] = functools.partial(torch.matmul, a, b, out=out)
    source = torch.randn(megabytes << 18, device=device)
    target = torch.empty_like(source)
    contenders["copy"] = functools.partial(target.copy_, source)
    for contender in contenders.values():
        contender()
    times = compare(contenders, stopwatch(device), rounds=7, round_s=0.02, budget_s=5)
    # a ceiling is the best time, not the median
    best = {name: min(timing.rounds) for name, timing in times.items()}
    ceilings = {f"matmul_{name}_tflops": 2 * n**3 / best[name] / 1e12 for name in sorted(dtypes)}
    return ceilings | {"copy_gbps": 2 * (megabytes << 20) / best["copy"] / 1e9}
