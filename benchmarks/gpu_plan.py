"""The first nine minutes on a GPU, as data: which processes run, together or in turn, and how long each may take.

The most telling comes first, so a machine that is taken away early has told the most. Steps of one phase share the GPU;
phases that time have one step.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path

BENCH = (sys.executable, "-m", "benchmarks")
KERNELS = ("cuda", "triton")  # backends with kernels of their own for a GPU
RIVALS = ("sdpa-cudnn", "sdpa-flash")
WATCHDOG = {"FASTATTN_NVRTC_OPTIONS": "-DFA_WATCHDOG=20000000"}
# What a rehearsal runs instead, in seconds of the interpreter.
REHEARSED_TESTS = "choice_is_explained"
REHEARSED_SUITE, REHEARSED_CASE = "first", "d64 causal"  # 64 tokens


@dataclass(frozen=True)
class Step:
    """One process.

    Attributes:
        name: its row.
        command: what to run; its program may be missing.
        limit_s: ended after this long.
        record: an ops record whose verdicts become the note of the row.
        backend: if this crashes or hangs, the backend takes no part in what is timed later.
        env: added to the environment.
        is_rehearsed: it can run on the simulated device.
    """

    name: str
    command: tuple[str, ...]
    limit_s: float
    record: Path | None = None
    backend: str | None = None
    env: dict[str, str] = field(default_factory=dict)
    is_rehearsed: bool = True


@dataclass(frozen=True)
class Plan:
    """What the steps need to know.

    Attributes:
        out: where everything goes.
        backends: those of ``KERNELS`` that can run.
        rehearses: on the simulated device: tiny problems, few of them.
    """

    out: Path
    backends: tuple[str, ...]
    rehearses: bool = False

    def phases(self, unsafe: Collection[str] = ()) -> Iterator[tuple[Step, ...]]:
        """Steps that run at once, in order. ``unsafe`` backends, which may become more on the way, are not timed."""
        for backend in self.backends:
            yield (self._ops(f"first numbers, {backend}", "telling", 25, backend, *RIVALS),)
        yield (self._compile(),)
        yield tuple(self._watched(backend) for backend in self.backends if backend == "cuda") or ()
        yield tuple(self._tests(backend) for backend in self.backends)
        for suite, limit in (("cells", 75), ("llm", 45), ("features", 40)):
            safe = [backend for backend in self.backends if backend not in unsafe]
            yield (self._ops(f"ops, {suite}", suite, limit, *safe, *RIVALS),)
        yield (self._bench("decode", "decode", 40, is_rehearsed=False),)
        yield tuple(self._staged() for backend in self.backends if backend == "cuda" and backend not in unsafe) or ()
        if "triton" in self.backends and "triton" not in unsafe:
            table = str(self.out / "table.py")
            kernels = ("--kernels", "forward", "dkdv", "dq", "decode", "--head-dims", "128", "--table", table)
            yield (Step("tune D 128", (*BENCH, "tune", *kernels, "--processes", "14"), 90, is_rehearsed=False),)
        yield (self._ops("ops, small, flex", "small", 30, *self.backends, *RIVALS, "flex"),)
        yield (self._bench("overhead", "overhead", 20, "--quick", is_rehearsed=False),)
        for backend in self.backends:
            profile = (sys.executable, "-m", "benchmarks.profile_call", "cuda", backend)
            yield (Step(f"profile, {backend}", profile, 30, is_rehearsed=False),)
            counters = ("ncu", "--clock-control", "none", "--launch-skip", "10", "--launch-count", "3")
            yield (Step(f"ncu, {backend}", (*counters, *profile), 45, is_rehearsed=False),)

    def _ops(self, name: str, suite: str, limit_s: float, *contenders: str) -> Step:
        """Backends by name, then other peers; each checked before it is timed."""
        peers = [f"fastattn-{x}" if x in KERNELS else x for x in contenders]
        path = self.out / f"{name.replace(', ', '-').replace(' ', '-')}.json"
        command = [*BENCH, "ops", "--device", "cuda", "--quiet", "--no-memory", "--out", str(path)]
        if self.rehearses:
            peers = [peer for peer in peers if peer.startswith("fastattn")] or ["sdpa"]
            command += [
                "--suite",
                REHEARSED_SUITE,
                "--case",
                REHEARSED_CASE,
                "--quick",
                "--effort",
                "0.01",
                "--budget",
                "1",
            ]
        else:
            command += ["--suite", suite, "--effort", "0.25", "--budget", str(limit_s - 10)]
        backend = contenders[0] if suite == "telling" else None
        return Step(name, (*command, "--peers", *peers), limit_s, path, backend)

    def _compile(self) -> Step:
        rehearse = ("--rehearse",) if self.rehearses else ()
        return Step("compile", (sys.executable, "-m", "benchmarks.gpu_compile", *rehearse), 65)

    def _watched(self, backend: str) -> Step:
        command = (*self._pytest(f"tests/gpu/test_{backend}_forward.py"), "-k", "alone_in_a_process")
        return Step(f"tests, {backend}, with watchdog", command, 40, env=WATCHDOG)

    def _tests(self, backend: str) -> Step:
        files = sorted(path.as_posix() for path in Path("tests/gpu").glob(f"test_{backend}*.py"))
        selected = ("-k", REHEARSED_TESTS) if self.rehearses else ()
        return Step(f"tests, {backend}", (*self._pytest(*files), *selected), 100)

    def _pytest(self, *files: str) -> tuple[str, ...]:
        """In three processes, which are replaced when a kernel takes one along; a minute for each test."""
        options = ["-m", "gpu", "-v", "--no-header", "-p", "no:cacheprovider", "-n", "1" if self.rehearses else "3"]
        if importlib.util.find_spec("pytest_timeout"):
            options += ["--timeout", "60", "--timeout-method", "thread"]
        return (sys.executable, "-m", "pytest", *files, *options, "--max-worker-restart", "20")

    def _staged(self) -> Step:
        step = self._ops("ops, cuda with dq staged", "telling", 25, "cuda")
        return Step(step.name, step.command, step.limit_s, step.record, env={"FASTATTN_NVRTC_OPTIONS": "-DFA_STAGED=1"})

    def _bench(self, name: str, command: str, limit_s: float, *options: str, is_rehearsed: bool = True) -> Step:
        out = ("--out", str(self.out / f"{name}.json"))
        return Step(
            name, (*BENCH, command, "--device", "cuda", "--quiet", *options, *out), limit_s, is_rehearsed=is_rehearsed
        )


def timetable(plan: Plan, limit_s: float) -> list[tuple[float, float, tuple[Step, ...]]]:
    """``(begin, end, steps)`` of each phase if every step takes all of its time."""
    table, now = [], 0.0
    for phase in plan.phases():
        if phase:
            end = min(limit_s, now + max(step.limit_s for step in phase))
            table.append((now, end, phase))
            now = max(now, end)
    return table


def undone(plan: Plan, limit_s: float, minute: int) -> list[str]:
    """The steps that have not ended, should the machine be taken away after so many minutes."""
    return [
        step.name
        for begin, end, phase in timetable(plan, limit_s)
        for step in phase
        if begin >= limit_s or end > 60 * minute
    ]
