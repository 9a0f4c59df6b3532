"""A short comparison of fastattn's automatic choice with eager and torch's attention, for ``fastattn demo``.

It uses the timer, correctness gate, memory measurement and peers of ``python -m benchmarks``, which measures more.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastattn.files import replaced_file
from fastattn.measure.comparison import Effort, compare_peers
from fastattn.measure.peers import EAGER, SDPA, fastattn_peer
from fastattn.measure.timing import Timing
from fastattn.measure.workload import Workload

PEERS = {"fastattn": fastattn_peer(None), "eager": EAGER, "sdpa": SDPA}
KINDS = ("full", "causal", "window")
COLOURS = {"fastattn": "#d62728", "eager": "#7f7f7f", "sdpa": "#1f77b4"}


@dataclass(frozen=True)
class Entry:
    """One length of one kind of attention, forward and backward together.

    Attributes:
        kind: "full", "causal" or "window", which is causal too.
        length: S.
        times: of each peer that passed the gate.
        peak_bytes: of each peer whose memory was measured, above the operands.
        missing: why a peer has no number.
    """

    kind: str
    length: int
    times: dict[str, Timing]
    peak_bytes: dict[str, int]
    missing: dict[str, str]

    def times_faster_than(self, peer: str) -> float | None:
        """The ratio of the peer's time to that of fastattn; None if either has no number."""
        if peer not in self.times or "fastattn" not in self.times:
            return None
        return self.times["fastattn"].times_faster_than(self.times[peer])


@dataclass(frozen=True)
class SpeedReport:
    """The result of ``speed_table``.

    Attributes:
        title: shapes and device, in words.
        entries: by kind, then length.
    """

    title: str
    entries: tuple[Entry, ...]

    def table(self) -> str:
        """Text with times, speed-ups of fastattn and peak memory."""
        lines = [
            self.title,
            "",
            f"{'':8}{'S':>6}  {'fastattn':>10}  {'vs eager':>9}  {'vs sdpa':>9}   peak memory: fastattn / eager / sdpa",
        ]
        for entry in self.entries:
            own = entry.times.get("fastattn")
            time = f"{own.median * 1e3:.2f} ms" if own else "-"
            ratios = [_times(entry.times_faster_than(peer)) for peer in ("eager", "sdpa")]
            peaks = " / ".join(_megabytes(entry.peak_bytes.get(peer)) for peer in PEERS) if entry.peak_bytes else ""
            lines.append(
                f"{entry.kind:8}{entry.length:>6}  {time:>10}  {ratios[0]:>9}  {ratios[1]:>9}   {peaks}".rstrip()
            )
        lines += ["", "2.0x: fastattn takes half the time. Every result was checked against fp64 before it was timed."]
        reasons = {f"{peer}: {why}": None for entry in self.entries for peer, why in entry.missing.items()}
        return "\n".join([*lines, *(f"no number: {reason}" for reason in reasons)])

    def to_dict(self) -> dict[str, Any]:
        """A dictionary for JSON, with the seconds of every round."""
        entries = [
            {
                "kind": entry.kind,
                "length": entry.length,
                "times": {peer: timing.to_dict() for peer, timing in entry.times.items()},
                "times_faster_than": {peer: entry.times_faster_than(peer) for peer in ("eager", "sdpa")},
                "peak_bytes": entry.peak_bytes,
                "missing": entry.missing,
            }
            for entry in self.entries
        ]
        return {"title": self.title, "entries": entries}

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw time by length for each kind, and peak memory at the longest, to a PNG. Needs matplotlib."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=(12, 3.6), dpi=120, layout="constrained")
        FigureCanvasAgg(figure)
        figure.suptitle(self.title, fontsize=10)
        panels = figure.subplots(1, len(KINDS) + 1)
        for panel, kind in zip(panels, KINDS, strict=False):
            entries = [entry for entry in self.entries if entry.kind == kind]
            panel.set_visible(any(entry.times for entry in entries))
            if not panel.get_visible():
                continue
            for peer in PEERS:
                points = [(entry.length, entry.times[peer].median * 1e3) for entry in entries if peer in entry.times]
                panel.plot(*zip(*points, strict=True) if points else ([], []), "o-", color=COLOURS[peer], label=peer)
            panel.set(title=kind, xlabel="length", xscale="log", yscale="log")
            lengths = [entry.length for entry in entries]
            panel.set_xticks(lengths, [str(length) for length in lengths])
            panel.minorticks_off()
            panel.grid(alpha=0.3)
        panels[0].set_ylabel("ms, forward and backward")
        panels[0].legend()
        _memory_panel(panels[-1], self.entries)
        with replaced_file(Path(path)) as temporary:
            figure.savefig(temporary, format="png")


def speed_table(device: str = "cpu", quick: bool = True) -> SpeedReport:
    """Measure full, causal and window attention at a few lengths, forward and backward.

    Args:
        device: "cpu" or "cuda".
        quick: shorter lengths and fewer rounds: under 40 seconds on two cores.

    Returns:
        a report with ``table()``, ``to_dict()`` and ``plot(path)``.

    Example:
        >>> from fastattn.measure.speed import speed_table
        >>> print(speed_table("cpu").table())  # doctest: +SKIP
    """
    target = torch.device(device)
    effort = Effort(rounds=7 if quick else 15, round_s=0.01, budget_s=1.0 if quick else 4.0)
    entries = tuple(_entry(kind, w, target, effort) for kind, w in _workloads(target, quick))
    shape = _workload("full", 1, target, False)
    return SpeedReport(
        f"attention, forward and backward: {shape.dtype}, batch {shape.batch}, {shape.heads_q} heads of {shape.d_qk}, "
        f"on {_device_name(target)}",
        entries,
    )


def _workloads(device: torch.device, quick: bool) -> list[tuple[str, Workload]]:
    lengths: tuple[int, ...] = (512, 1024, 2048) if quick else (512, 1024, 2048, 4096)
    lengths = tuple(8 * length for length in lengths) if device.type == "cuda" else lengths
    return [(kind, _workload(kind, s, device, memory=s == lengths[-1])) for kind in KINDS for s in lengths]


def _workload(kind: str, length: int, device: torch.device, memory: bool) -> Workload:
    on_gpu = device.type == "cuda"
    heads, d = (16, 128) if on_gpu else (4, 64)
    return Workload(
        s_q=length,
        s_kv=length,
        heads_q=heads,
        heads_kv=heads,
        d_qk=d,
        d_v=d,
        dtype="bf16" if on_gpu else "fp32",
        causal=kind != "full",
        window=(length // 16 - 1, 0) if kind == "window" else None,
        passes=("both",),
        memory=memory,
    )


def _entry(kind: str, workload: Workload, device: torch.device, effort: Effort) -> Entry:
    found = compare_peers(workload, list(PEERS.values()), device, effort)
    passes = {peer: found[peer]["passes"].get("both", {}) for peer in PEERS}
    missing = {peer: found[peer]["why"] or passes[peer].get("error") for peer in PEERS}
    return Entry(
        kind=kind,
        length=workload.s_q,
        times={peer: Timing(tuple(p["rounds_s"])) for peer, p in passes.items() if "rounds_s" in p},
        peak_bytes={peer: p["peak_bytes"] for peer, p in passes.items() if "peak_bytes" in p},
        missing={peer: why for peer, why in missing.items() if why},
    )


def _memory_panel(panel: Any, entries: tuple[Entry, ...]) -> None:
    weighed = [entry for entry in entries if entry.peak_bytes]
    if not weighed:
        panel.set_visible(False)
        return
    for n, peer in enumerate(PEERS):
        heights = [entry.peak_bytes.get(peer, 0) / 1e6 for entry in weighed]
        panel.bar([x + 0.27 * (n - 1) for x in range(len(weighed))], heights, 0.25, color=COLOURS[peer], label=peer)
    panel.set_xticks(range(len(weighed)), [f"{entry.kind}\n{entry.length}" for entry in weighed])
    panel.set(title="peak memory", ylabel="MB above the operands", yscale="log")


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"this CPU, {threads} thread{'s' if threads > 1 else ''}"


def _times(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}x"


def _megabytes(value: int | None) -> str:
    return "-" if value is None else f"{value / 1e6:.0f} MB"
