"""``python -m benchmarks ops``: speed and memory of attention itself, each peer checked before it is timed."""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import shlex
import sys
import time
from typing import Any

import torch
from tqdm import tqdm

from benchmarks import ceilings, command_line, tables
from benchmarks.peers import chosen
from benchmarks.suites import SUITES, Suite
from fastattn.errors import InputError
from fastattn.measure.comparison import Effort, compare_peers
from fastattn.measure.workload import Workload

# Environment variables that limit instruction sets, by the one that is allowed: of fastattn, of torch, and of the
# libraries of matrix products that torch calls.
LIMITS = {
    "avx2": {
        "FASTATTN_CPU_ISA": "avx2",
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    },
    "avx512": {
        "FASTATTN_CPU_ISA": "avx512",
        "ATEN_CPU_CAPABILITY": "avx512",
        "ONEDNN_MAX_CPU_ISA": "AVX512_CORE",
        "MKL_ENABLE_INSTRUCTIONS": "AVX512",
    },
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    command_line.add_common(parser)
    parser.add_argument(
        "--suite", nargs="+", metavar="NAME", help=f"of {', '.join(SUITES)} (default: cpu on a CPU, else paper)"
    )
    parser.add_argument("--peers", nargs="+", metavar="NAME", help="peers to measure, or 'all'")
    parser.add_argument("--case", metavar="TEXT", default="", help="only cases whose line contains TEXT")
    parser.add_argument("--budget", type=float, default=math.inf, metavar="S", help="begin no case after S seconds")
    parser.add_argument("--effort", type=float, metavar="S", help="seconds of timing for each pass of each case")
    parser.add_argument(
        "--isa", choices=list(LIMITS), help="the best instruction set of a CPU, for fastattn and torch alike"
    )
    parser.add_argument("--no-memory", action="store_true", help="leave memory out")


def run(args: argparse.Namespace) -> int:
    if args.isa and any(os.environ.get(name) != wish for name, wish in LIMITS[args.isa].items()):
        command = shlex.split(args.command_line)[1:]  # again from the start: these are read when torch is imported
        os.execve(sys.executable, [sys.executable, *command], os.environ | LIMITS[args.isa])
    device = command_line.device(args)
    suites = [_suite(name, args.quick) for name in args.suite or ["paper" if device.type == "cuda" else "cpu"]]
    peers = chosen(args.peers, device.type)
    cases = [(suite, w) for suite in suites for w in suite.cases if args.case in w.id]
    if not cases:
        raise InputError(f"--case: no case of {', '.join(s.name for s in suites)} contains {args.case!r}.")
    record = command_line.record(args, "-".join(s.name for s in suites), device)
    dtypes = {w.dtype for _, w in cases}
    measured = record.data.get("ceilings", {}) | ceilings.measure(device, dtypes, args.quick)
    names = dict.fromkeys([*record.data.get("peers", []), *(peer.name for peer in peers)])
    record.set(ceilings=measured, peers=list(names))
    effort = Effort.of(device, args.quick)
    if args.effort is not None:
        effort = dataclasses.replace(effort, budget_s=args.effort)
    began = time.monotonic()
    for suite, workload in tqdm(cases, desc="ops", unit="case", disable=args.quiet):
        if time.monotonic() - began > args.budget:
            record.add(_head(suite, workload) | {"peers": {}, "why": f"the budget of {args.budget:g} s was spent"})
            continue
        try:
            found = compare_peers(workload, peers, device, effort, wall=suite.wall, takes_memory=not args.no_memory)
            record.add(_head(suite, workload) | {"peers": found})
        except RuntimeError as error:  # the device failed; errors of a peer are rows of the result
            record.add(_head(suite, workload) | {"peers": {}, "why": f"{type(error).__name__}: {str(error)[:200]}"})
        if _device_is_lost(device):
            record.set(stopped=f"the device failed at {workload.id}; a process cannot go on after that")
            break
    record.finish(device)
    print(tables.table(record.data))
    if record.path:
        print(f"\nrecord: {record.path}")
    return 3 if "stopped" in record.data else 0


def _suite(name: str, quick: bool) -> Suite:
    if name not in SUITES:
        raise InputError(f"--suite: got {name!r}; allowed: {', '.join(SUITES)}.")
    return SUITES[name].quick() if quick else SUITES[name]


def _head(suite: Suite, workload: Workload) -> dict[str, Any]:
    return {
        "suite": suite.name,
        "id": workload.id,
        "workload": workload.to_dict(),
        "flops": workload.flops(),
        "clock": "wall" if suite.wall else "device",
    }


def _device_is_lost(device: torch.device) -> bool:
    """Whether the device has failed: after an illegal access every further CUDA call of the process raises."""
    if device.type != "cuda":
        return False
    try:
        torch.cuda.synchronize(device)
    except Exception:
        return True
    return False
