"""``compare_peers``: check, time and measure the memory of peers on one workload, for ``benchmarks`` and the demo."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fastattn.measure import correctness, memory
from fastattn.measure.peers import Forward, Peer, pass_call
from fastattn.measure.timing import compare, stopwatch
from fastattn.measure.workload import Operands, Workload

Found = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Effort:
    """The effort of a measurement: rounds and seconds of timing for each pass of each workload."""

    rounds: int = 15
    round_s: float = 0.02
    budget_s: float = 2.5

    @classmethod
    def of(cls, device: torch.device, quick: bool) -> Effort:
        if quick:
            return cls(rounds=3, round_s=0.001, budget_s=0.2)
        return cls(rounds=25, budget_s=1.5) if device.type == "cuda" else cls()


def compare_peers(
    workload: Workload,
    peers: Sequence[Peer],
    device: torch.device,
    effort: Effort,
    *,
    wall: bool = False,
    takes_memory: bool = True,
) -> dict[str, Any]:
    """Check every peer on one workload, time it, and measure its peak memory.

    Returns:
        ``{"peers": {name: {"why": reasons or None, "passes": {pass: findings}}}}``. A pass has either ``error``
        (it raised, or the correctness gate failed) or ``median_s, spread, rounds_s, tflops``, and ``gate`` and
        ``peak_bytes`` if measured.
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
    return found


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
            result: dict[str, Any] = {}
            found[name]["passes"][pass_name] = result
            try:
                verdict = correctness.check(forward, operands, pass_name)
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
    passes = ("forward", "both") if workload.passes else ("both",)  # without timing it is long: one pass is enough
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
    """Whether its score matrices would exceed free memory, by a rough count; running out may kill this process."""
    trains = workload.passes != ("forward",)
    needed = peer.scores_held[trains] * workload.score_bytes()
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else memory.available_bytes()
    if needed < 0.8 * free:
        return []
    return [f"its score matrices need about {needed / 1e9:.0f} GB, of {free / 1e9:.0f} GB free"]


def _one_line(error: Exception) -> str:
    message = re.sub(r"\s+", " ", str(error)).strip()
    return f"{type(error).__name__}: {message[:200]}" if message else type(error).__name__
