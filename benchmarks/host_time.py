"""A program: host time of calls that a GPU would serve, up to the driver, beside torch's SDPA on the CPU. Writes JSON.

``python -m benchmarks overhead`` runs it. The driver takes notes and returns: Triton's compiled launcher and the CUDA
backend's ctypes host do all that they do before a kernel starts, on tensors in host memory. A process of its own, since
Triton looks at the environment when it is imported.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import fastattn
from fastattn.measure.timing import compare, stopwatch
from fastattn.testing.simulated import launcher
from fastattn.testing.simulated.recording import recorded_cuda

BACKENDS = ("triton", "cuda")
Call = Callable[[], object]


def calls() -> dict[str, Call]:
    """By "kind, who". The kinds: forward, forward and backward, a step of decoding from pages with its append."""
    found: dict[str, Call] = {}
    attend = torch.nn.functional.scaled_dot_product_attention
    q, k, v = (torch.randn(1, 1, 16, 16) for _ in range(3))
    found["forward, sdpa"] = lambda: attend(q, k, v)
    found["both, sdpa"] = _with_gradient(attend, *(x.clone() for x in (q, k, v)))
    for backend in BACKENDS:
        found |= {f"{kind}, {backend}": call for kind, call in _of(backend).items()}
    return found


def _of(backend: str) -> dict[str, Call]:
    q, k, v = (torch.zeros(1, 16, 1, 16, dtype=torch.bfloat16) for _ in range(3))

    def attend(*tensors: Tensor) -> Tensor:
        out = fastattn.attention(*tensors, backend=backend)
        assert isinstance(out, Tensor)
        return out

    return {
        "forward": lambda: attend(q, k, v),
        "both": _with_gradient(attend, *(x.clone() for x in (q, k, v))),
        "decode": _step(backend),
    }


def _with_gradient(attend: Callable[..., Tensor], *tensors: Tensor) -> Call:
    leaves = [x.requires_grad_() for x in tensors]
    dout = torch.zeros_like(tensors[0])
    return lambda: torch.autograd.grad(attend(*leaves), leaves, dout)


def _step(backend: str) -> Call:
    q, k, v = (torch.zeros(2, 1, heads, 64, dtype=torch.bfloat16) for heads in (8, 2, 2))
    caches = [torch.zeros(16, 64, 2, 64, dtype=torch.bfloat16) for _ in range(2)]
    table, lengths = torch.arange(16, dtype=torch.int32).view(2, 8), torch.tensor([100, 7], dtype=torch.int32)
    return lambda: fastattn.attention_with_kv_cache(q, *caches, lengths, k, v, block_table=table, backend=backend)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("answer", type=Path, help="a file for the answer")
    parser.add_argument("--quick", action="store_true", help="few rounds")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rounds, round_s = (3, 0.002) if options.quick else (31, 0.02)
    with contextlib.ExitStack() as stack:
        launcher.use(stack.enter_context(recorded_cuda()))
        for backend in BACKENDS:
            stack.enter_context(launcher.host_tensors(backend))
        every = calls()
        for call in every.values():
            for _ in range(3):  # the first makes the plan of its kind
                call()
        times = compare(every, stopwatch(torch.device("cpu"), wall=True), rounds=rounds, round_s=round_s)
    rows = []
    for name, timing in times.items():
        kind, _, who = name.partition(", ")
        beside = "both, sdpa" if kind == "both" else "forward, sdpa"
        ratio = 1 / timing.times_faster_than(times[beside])
        rows.append({"kind": kind, "who": who, "seconds": timing.median, "spread": timing.spread, "ratio": ratio})
    options.answer.write_text(json.dumps(rows), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
