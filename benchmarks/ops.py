"""``python -m benchmarks ops``: speed and memory of attention itself, each peer checked before it is timed."""

from __future__ import annotations

import argparse
import dataclasses
import math
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks import ceilings, command_line, tables
from benchmarks.peers import chosen
from benchmarks.record import Record
from benchmarks.suites import SUITES, Suite
from fastattn.errors import InputError
from fastattn.testing import gate, memory
from fastattn.testing.peers import Forward, Peer, pass_call
from fastattn.testing.timing import compare, stopwatch
from fastattn.testing.workload import Operands, Workload


@dataclasses.dataclass(frozen=True)
class Effort:
    """How much is measured: rounds and seconds of timing for each pass of each workload."""

    rounds: int = 15
    round_s: float = 0.02
    budget_s: float = 4.0

    @classmethod
    def of(cls, device: torch.device, quick: bool) -> Effort:
        if quick:
            return cls(rounds=3, round_s=0.001, budget_s=0.2)
        return cls(rounds=25, budget_s=1.5) if device.type == "cuda" else cls()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    command_line.add_common(parser)
    parser.add_argument("--suite", nargs="+", metavar="NAME", help=f"of {', '.join(SUITES)} (default: cpu on a CPU, else paper)")
    parser.add_argument("--peers", nargs="+", metavar="NAME", help="whom to measure, or 'all'")
    parser.add_argument("--case", metavar="TEXT", default="", help="only cases whose line contains TEXT")
    parser.add_argument("--budget", type=float, default=math.inf, metavar="S", help="begin no case after S seconds")
    parser.add_argument("--no-memory", action="store_true", help="leave memory out")


def run(args: argparse.Namespace) -> int:
    device = command_line.device(args)
    suites = [_suite(name, args.quick) for name in args.suite or ["paper" if device.type == "cuda" else "cpu"]]
    peers = chosen(args.peers, device.type)
    cases = [(suite, w) for suite in suites for w in suite.cases if args.case in w.id]
    if not cases:
        raise InputError(f"--case: no case of {', '.join(s.name for s in suites)} contains {args.case!r}.")
    record = Record("ops", args.command_line, device, command_line.out(args, "-".join(s.name for s in suites)))
    dtypes = {w.dtype for _, w in cases}
    record.set(ceilings=ceilings.measure(device, dtypes, args.quick), peers=[peer.name for peer in peers])
    began = time.monotonic()
    for suite, workload in tqdm(cases, desc="ops", unit="case", disable=args.quiet):
        if time.monotonic() - began > args.budget:
            record.add(_head(suite, workload) | {"peers": {}, "why": f"the budget of {args.budget:g} s was spent"})
            continue
        result = measure(workload, peers, device, Effort.of(device, args.quick), wall=suite.wall, takes_memory=not args.no_memory)
        record.add(_head(suite, workload) | result)
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


def measure(
    workload: Workload,
    peers: Sequence[Peer],
    device: torch.device,
    effort: Effort,
    *,
    wall: bool = False,
    takes_memory: bool = True,
) -> dict[str, Any]:
    """Check, time and weigh every peer on one workload.

    Returns:
        ``{"peers": {name: {"why": reasons or None, "passes": {pass: what was found}}}}``. A pass has either ``error``
        (it raised, or the gate is red) or ``median_s, spread, rounds_s, tflops``; and ``gate`` and ``peak_bytes``
        where there is one.
    """
    found: dict[str, Any] = {peer.name: {"why": None, "passes": {}} for peer in peers}
    able = []
    for peer in peers:
        why = peer.reasons(workload, device.type) or _too_large(peer, workload, device)
        found[peer.name]["why"] = "; ".join(why) or None
        able += [] if why else [peer]
    if workload.passes:
        _time(workload, able, device, effort, wall, found, takes_memory)
    if workload.memory and takes_memory and device.type == "cpu":
        _weigh_on_cpu(workload, able, found)
    return {"peers": found}


def _time(
    workload: Workload,
    peers: Sequence[Peer],
    device: torch.device,
    effort: Effort,
    wall: bool,
    found: dict[str, Any],
    takes_memory: bool,
) -> None:
    operands = Operands.of(workload, device)
    forwards: dict[str, Forward] = {}
    for peer in peers:
        try:
            forwards[peer.name] = peer.prepare(operands)
        except Exception as error:
            found[peer.name]["why"] = _one_line(error)
    has_backward = {peer.name for peer in peers if peer.has_backward}
    for pass_name in workload.passes:
        calls = {}
        for name, forward in forwards.items():
            if pass_name != "forward" and name not in has_backward:
                found[name]["passes"][pass_name] = {"error": "forward only"}
                continue
            result = found[name]["passes"][pass_name] = {}
            try:
                verdict = gate.check(forward, operands, pass_name)
                result["gate"] = str(verdict)
                if not verdict.ok:
                    result["error"] = str(verdict)
                    continue
                call = pass_call(forward, operands, pass_name)
                if takes_memory and device.type == "cuda":
                    result["peak_bytes"] = memory.cuda_peak(call)
                calls[name] = call
            except Exception as error:
                result["error"] = _one_line(error)
        watch = stopwatch(device, wall)
        times = compare(calls, watch, rounds=effort.rounds, round_s=effort.round_s, budget_s=effort.budget_s)
        for name, timing in times.items():
            tflops = workload.flops()[pass_name] / timing.median / 1e12
            found[name]["passes"][pass_name] |= {**timing.to_dict(), "tflops": tflops}


def _weigh_on_cpu(workload: Workload, peers: Sequence[Peer], found: dict[str, Any]) -> None:
    passes = ("forward", "both")
    missing = memory.cannot_measure_process()
    names = [peer.name for peer in peers if peer.name in memory.PEERS]
    peaks = [] if missing else memory.in_fresh_process(workload, names, passes)
    measured = {(peak.peer, peak.pass_name): peak for peak in peaks}
    for name in names:
        for pass_name in passes:
            result = found[name]["passes"].setdefault(pass_name, {})
            peak = measured.get((name, pass_name))
            if peak is None:
                result.setdefault("error", missing or "its process died, probably out of memory")
            elif not peak.verdict.ok:
                result["error"] = result["gate"] = str(peak.verdict)
            else:
                result["peak_bytes"] = peak.bytes
                result.setdefault("gate", str(peak.verdict))


def _too_large(peer: Peer, workload: Workload, device: torch.device) -> list[str]:
    """Whether its score matrices would not fit, by a rough count; running out of memory may kill this process."""
    trains = workload.passes != ("forward",)
    needed = peer.scores_held[trains] * workload.score_bytes()
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else memory.available_bytes()
    if needed < 0.8 * free:
        return []
    return [f"its score matrices need about {needed / 1e9:.0f} GB, of {free / 1e9:.0f} GB free"]


def _one_line(error: Exception) -> str:
    message = re.sub(r"\s+", " ", str(error)).strip()
    return f"{type(error).__name__}: {message[:200]}" if message else type(error).__name__


def _device_is_lost(device: torch.device) -> bool:
    """After an illegal access every further CUDA call of the process fails."""
    if device.type != "cuda":
        return False
    try:
        torch.cuda.synchronize(device)
    except Exception:
        return True
    return False
