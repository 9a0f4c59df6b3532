"""The timer. Calls take turns, round after round, so that a disturbance affects all of them.

A round is A B C; rounds repeat. The time of a call is the median over rounds, its spread the interquartile range
divided by the median. Ratios are computed within each round, so drift of the machine (clocks, other jobs) cancels.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

Contender = Callable[[], object]


@dataclass(frozen=True)
class Timing:
    """Seconds of one call, one number for each round."""

    rounds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.rounds)

    @property
    def spread(self) -> float:
        """Interquartile range divided by the median; 0.05 means that the middle half of the rounds spans 5 %."""
        return _interquartile(self.rounds) / self.median if self.median else 0.0

    def times_faster_than(self, other: Timing) -> float:
        """The median over rounds of ``other / self``; 2 means that this one takes half the time."""
        pairs = zip(self.rounds, other.rounds, strict=True)
        return statistics.median(theirs / max(own, 1e-12) for own, theirs in pairs)

    def to_dict(self) -> dict[str, object]:
        return {"median_s": self.median, "spread": self.spread, "rounds_s": list(self.rounds)}


def _interquartile(values: tuple[float, ...]) -> float:
    if len(values) < 2:
        return 0.0
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return high - low


class Stopwatch(Protocol):
    def __call__(self, contender: Contender, calls: int) -> float:
        """Total seconds of ``calls`` calls."""


class HostStopwatch:
    """Wall clock. With ``wait`` (``torch.cuda.synchronize``) it includes both launches and the work of the device."""

    def __init__(self, now: Callable[[], float] = time.perf_counter, wait: Callable[[], object] | None = None) -> None:
        self._now = now
        self._wait = wait or (lambda: None)

    def __call__(self, contender: Contender, calls: int) -> float:
        self._wait()
        start = self._now()
        for _ in range(calls):
            contender()
        self._wait()
        return self._now() - start


SLEEP_PER_LAUNCH = 1.5  # times the host time of a call, because the flush and the events are queued too


class CudaStopwatch:
    """Device time between CUDA events, with the L2 cache flushed before each call.

    The device sleeps first while the host queues the calls, so that a slow launch is not counted as device time.
    """

    CYCLES_PER_SECOND = 2e9  # of the sleep kernel; only its order of magnitude matters
    LONGEST_SLEEP = 0.05

    def __init__(self, device: torch.device) -> None:
        l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size
        self._flush = torch.empty(max(2 * l2_bytes, 1 << 26), dtype=torch.int8, device=device)

    def __call__(self, contender: Contender, calls: int) -> float:
        torch.cuda.synchronize()
        queued = time.perf_counter()
        contender()
        launch_s = max(1e-6, time.perf_counter() - queued)
        at_once = max(1, int(self.LONGEST_SLEEP / (SLEEP_PER_LAUNCH * launch_s)))
        done, seconds = 0, 0.0
        while done < calls:  # at most as many at once as the longest sleep hides
            now = min(at_once, calls - done)
            seconds += self._batch(contender, now, SLEEP_PER_LAUNCH * launch_s * now)
            done += now
        return seconds

    def _batch(self, contender: Contender, calls: int, asleep_s: float) -> float:
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(calls)]
        torch.cuda.synchronize()
        torch.cuda._sleep(int(asleep_s * self.CYCLES_PER_SECOND))
        for start, end in events:
            self._flush.zero_()
            start.record()
            contender()
            end.record()
        torch.cuda.synchronize()
        return sum(start.elapsed_time(end) for start, end in events) / 1e3


def stopwatch(device: torch.device | str, wall: bool = False) -> Stopwatch:
    """The stopwatch for a device: CUDA events, or the wall clock on other devices or if ``wall`` is set."""
    device = torch.device(device)
    if device.type == "cuda" and not wall:
        return CudaStopwatch(device)
    return HostStopwatch(wait=torch.cuda.synchronize if device.type == "cuda" else None)


def compare(
    contenders: Mapping[str, Contender],
    measure: Stopwatch,
    *,
    rounds: int = 15,
    least_rounds: int = 3,
    round_s: float = 0.01,
    budget_s: float = math.inf,
) -> dict[str, Timing]:
    """Time several calls side by side.

    Args:
        contenders: the calls by name; already compiled and warm, since the correctness gate has run them.
        measure: from ``stopwatch``.
        rounds: number of rounds.
        least_rounds: rounds that run even if the budget is spent.
        round_s: short calls are repeated within a turn until it lasts about this long.
        budget_s: no further round starts once the rounds have taken this long in total.

    Returns:
        a ``Timing`` for each, all with the same number of rounds.
    """
    calls = {name: _calls_per_turn(contender, measure, round_s) for name, contender in contenders.items()}
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    spent = 0.0
    collects = gc.isenabled()
    gc.disable()
    try:
        for done in range(rounds):
            if done >= least_rounds and spent >= budget_s:
                break
            for name, contender in contenders.items():
                turn = measure(contender, calls[name])
                seconds[name].append(turn / calls[name])
                spent += turn
    finally:
        if collects:
            gc.enable()
    return {name: Timing(tuple(values)) for name, values in seconds.items()}


def _calls_per_turn(contender: Contender, measure: Stopwatch, round_s: float) -> int:
    once = measure(contender, 1)
    if once < round_s:
        once = min(once, measure(contender, 1))  # the first short call may include one-time costs
    return max(1, min(1000, round(round_s / max(once, 1e-9))))
