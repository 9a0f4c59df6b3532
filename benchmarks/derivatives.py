"""``python -m benchmarks derivatives``: forward mode, second and per-sample gradients, statistics, beside torch's own.

Each derivative is measured beside the pass that it derives, in turns: a Jacobian-vector product (and ``out`` with it)
beside the forward pass, a double backward beside the first, per-sample gradients beside those of the batch; statistics
of the weights beside the forward pass, and their gradients beside its own.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.func import grad, jvp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

import fastattn
from benchmarks import command_line, tables
from fastattn.inspection import attention_statistics
from fastattn.measure.memory import cannot_measure_process, cuda_peak, process_peak
from fastattn.measure.timing import Timing, compare, stopwatch

COLUMNS = ["what", "value", "beside", "memory", "note"]
WINDOW = 256
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
Row = dict[str, str]
# The names of what is measured; the first of each group is what the others stand beside.
GROUPS = (
    ("forward", "jvp", "statistics"),
    ("backward", "double backward", "gradients of statistics"),
    ("gradients of the batch", "gradients of each sample"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    command_line.add_common(parser)
    parser.add_argument("--length", type=int, default=2048, help="tokens (default: 2048)")
    parser.add_argument("--heads", type=int, default=8, help="heads, of 64 dims (default: 8)")


def run(args: argparse.Namespace) -> int:
    device = command_line.device(args)
    record = command_line.record(args, device.type, device)
    record.set(columns=COLUMNS)
    length, heads = (128, 2) if args.quick else (args.length, args.heads)
    problems: dict[str, dict[str, Any]] = {
        f"{length} tokens": {},
        f"{length} tokens, window of {WINDOW}": {"causal": True, "window": (WINDOW, 0)},
    }
    for name, options in tqdm(problems.items(), desc="derivatives", disable=args.quiet):
        for row in _rows(name, _contenders(length, heads, options, device), device, args.quick):
            record.add(row)
    record.finish(device)
    print(tables.table(record.data))
    return 0


def _contenders(
    length: int, heads: int, options: dict[str, Any], device: torch.device
) -> dict[str, dict[str, Callable[[], object]]]:
    """Calls by peer and name."""
    q, k, v, *moved = (torch.randn(1, length, heads, 64, device=device) for _ in range(7))
    peers: dict[str, Attend] = {"fastattn": partial(fastattn.attention, **options)}
    if not options:  # torch has no window but by a matrix
        peers["torch math"] = _torch_math
    found = {name: _passes(attend, (q, k, v), tuple(moved)) for name, attend in peers.items()}
    samples = tuple(torch.randn(16, 1, max(16, length // 16), heads, 64, device=device) for _ in range(3))
    found["fastattn"] |= _of_samples(peers["fastattn"], samples) | _statistics((q, k), options)
    return found


def _torch_math(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(SDPBackend.MATH):
        return torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


def _passes(attend: Attend, qkv: tuple[Tensor, ...], moved: tuple[Tensor, ...]) -> dict[str, Callable[[], object]]:
    *along, dout = moved
    leaves = [x.detach().clone().requires_grad_() for x in qkv]
    out = attend(*leaves)
    gradients = torch.autograd.grad(out, leaves, dout, create_graph=True)
    return {
        "forward": lambda: attend(*qkv),
        "jvp": lambda: jvp(attend, qkv, tuple(along)),
        "backward": lambda: torch.autograd.grad(out, leaves, dout, retain_graph=True),
        "double backward": lambda: torch.autograd.grad(gradients, leaves, along, retain_graph=True),
    }


def _statistics(qk: tuple[Tensor, ...], options: dict[str, Any]) -> dict[str, Callable[[], object]]:
    leaves = [x.detach().clone().requires_grad_() for x in qk]
    found = attention_statistics(*leaves, **options)
    total = found.entropy.sum() + found.largest_logit.sum() + found.key_sum.square().sum()
    return {
        "statistics": lambda: attention_statistics(*qk, **options),
        "gradients of statistics": lambda: torch.autograd.grad(total, leaves, retain_graph=True),
    }


def _of_samples(attend: Attend, samples: tuple[Tensor, ...]) -> dict[str, Callable[[], object]]:
    def loss(*qkv: Tensor) -> Tensor:
        return attend(*qkv).square().sum()

    batch = tuple(x.flatten(0, 1) for x in samples)
    return {
        "gradients of the batch": lambda: grad(loss, (0, 1, 2))(*batch),
        "gradients of each sample": lambda: vmap(grad(loss, (0, 1, 2)))(*samples),
    }


def _rows(
    problem: str, contenders: dict[str, dict[str, Callable[[], object]]], device: torch.device, quick: bool
) -> Iterator[Row]:
    calls = {f"{name}, {peer}": call for peer, each in contenders.items() for name, call in each.items()}
    for call in calls.values():
        call()
    watch = stopwatch(device, wall=False)
    times = compare(calls, watch, rounds=3 if quick else 15, round_s=0.01 if quick else 0.2)
    peaks = {name: _peak(call, device) for name, call in calls.items()}
    for (first, *others), peer in ((group, peer) for group in GROUPS for peer in contenders):
        for name in (first, *others):
            key, base = f"{name}, {peer}", f"{first}, {peer}"
            if key in times:
                ratio = "" if name == first else f"{_ratio(times[base], times[key]):.2f}× {first}"
                beside = times.get(f"{name}, torch math")
                faster = (
                    "" if beside is None or peer == "torch math" else f"{times[key].times_faster_than(beside):.1f}×"
                )
                yield {
                    "what": f"{problem}: {key}",
                    "value": f"{tables.seconds(times[key].median)} ±{times[key].spread:.0%}",
                    "beside": ratio,
                    "memory": peaks[key],
                    "note": faster and f"{faster} as fast as torch math",
                }


def _ratio(base: Timing, derived: Timing) -> float:
    return 1 / derived.times_faster_than(base)


def _peak(call: Callable[[], object], device: torch.device) -> str:
    """Peak memory of a call above what was held before."""
    if device.type == "cuda":
        return tables.size(cuda_peak(call))
    return "" if cannot_measure_process() else tables.size(process_peak(call)[0])
