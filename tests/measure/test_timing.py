"""The timer, on made-up clocks and contenders."""

import gc

import pytest
import torch

from fastattn.measure import timing
from fastattn.measure.timing import HostStopwatch, Timing, compare


class Clock:
    """A clock that only moves when a contender runs."""

    def __init__(self):
        self.now = 0.0
        self.log = []

    def __call__(self):
        return self.now

    def contender(self, name, seconds):
        durations = iter(seconds) if isinstance(seconds, list) else None

        def run():
            self.log.append(name)
            self.now += next(durations) if durations else seconds

        return run


def test_rounds_are_interleaved():
    clock = Clock()
    contenders = {name: clock.contender(name, 1.0) for name in "abc"}
    times = compare(contenders, HostStopwatch(clock), rounds=3, round_s=0.1)
    assert clock.log == list("abc") * 4  # one turn to find out how long they take
    assert all(timing.rounds == (1.0, 1.0, 1.0) for timing in times.values())


def test_drift_cancels_in_ratios():
    """A machine that slows down threefold must not change what is said of two contenders."""
    clock = Clock()
    drift = [1.0, 1.0, 1.5, 2.0, 2.5, 3.0]
    contenders = {"fast": clock.contender("fast", list(drift)), "slow": clock.contender("slow", [2 * x for x in drift])}
    times = compare(contenders, HostStopwatch(clock), rounds=5, round_s=0.1)
    assert times["fast"].spread >= 0.5
    assert times["fast"].times_faster_than(times["slow"]) == pytest.approx(2.0)


def test_short_calls_are_repeated_within_a_turn():
    clock = Clock()
    times = compare({"a": clock.contender("a", 0.001)}, HostStopwatch(clock), rounds=2, round_s=0.01)
    assert len(clock.log) == 2 + 2 * 10
    assert times["a"].median == pytest.approx(0.001)


def test_a_slow_first_call_does_not_count():
    clock = Clock()
    times = compare({"a": clock.contender("a", [5.0] + [1.0] * 5)}, HostStopwatch(clock), rounds=5, round_s=0.1)
    assert times["a"].rounds == (1.0,) * 5


def test_the_budget_ends_the_rounds_but_not_before_the_least():
    clock = Clock()
    measure = HostStopwatch(clock)
    assert len(compare({"a": clock.contender("a", 1.0)}, measure, rounds=50, budget_s=10.0)["a"].rounds) == 10
    assert (
        len(compare({"a": clock.contender("a", 99.0)}, measure, rounds=50, least_rounds=3, budget_s=1)["a"].rounds) == 3
    )


def test_median_and_spread():
    measured = Timing((1.0, 2.0, 3.0, 4.0, 100.0))
    assert measured.median == 3.0
    assert measured.spread == pytest.approx((4.0 - 2.0) / 3.0)
    assert Timing((2.0,)).spread == 0.0
    assert measured.to_dict()["rounds_s"] == [1.0, 2.0, 3.0, 4.0, 100.0]


def test_the_host_stopwatch_waits_for_the_device_before_and_after():
    order = []
    clock = lambda: order.append("clock") or 0.0  # noqa: E731
    HostStopwatch(clock, wait=lambda: order.append("wait"))(lambda: order.append("call"), 2)
    assert order == ["wait", "clock", "call", "call", "wait", "clock"]


def test_garbage_collection_is_off_inside_and_restored_even_after_an_error():
    seen = []

    def measure(contender, calls):
        contender()
        return 1.0

    compare({"a": lambda: seen.append(gc.isenabled())}, measure, rounds=1)
    assert seen[-1] is False and gc.isenabled()

    def fails():
        if not gc.isenabled():
            raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        compare({"a": fails}, measure, rounds=1)
    assert gc.isenabled()


def test_the_stopwatch_of_a_cpu_is_the_wall_clock():
    assert isinstance(timing.stopwatch("cpu"), HostStopwatch)
    assert timing.stopwatch(torch.device("cpu"))(lambda: None, 3) >= 0.0


@pytest.mark.gpu
def test_cuda_events_agree_with_the_wall_clock():
    x = torch.randn(4096, 4096, device="cuda")
    for _ in range(3):
        x @ x
    device_s = timing.stopwatch("cuda")(lambda: x @ x, 20) / 20
    wall_s = timing.stopwatch("cuda", wall=True)(lambda: x @ x, 20) / 20
    assert device_s == pytest.approx(wall_s, rel=0.3)
