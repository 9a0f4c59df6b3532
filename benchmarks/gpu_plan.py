"""The plan of ``make gpu`` as data: which processes run, together or in turn, and how long each may take.

The most informative steps come first, in case the run is cut short. Steps of one phase share the GPU; a phase that
measures time has one step.
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
WATCHDOG = {"FASTATTN_CUDA_WATCHDOG": "1"}  # of the first run: a kernel that would hang says where
# A rehearsal runs these instead, which take seconds in the interpreter.
REHEARSED_TESTS = "choice_is_explained"
REHEARSED_SUITE, REHEARSED_CASE = "first", "d64 causal"  # 64 tokens


@dataclass(frozen=True)
class Step:
    """One process.

    Attributes:
        name: the name of its row in the report.
        command: the command to run; its program may be missing.
        limit_s: seconds after which it is killed.
        record: an ops record whose verdicts become the note of the row.
        backend: the backend that it tests; if it crashes or hangs, later steps do not time this backend.
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
    """The settings of a run, and its steps.

    Attributes:
        out: the folder of all results.
        backends: those of ``KERNELS`` that can run.
        rehearses: it runs on the simulated device, with few and tiny problems.
    """

    out: Path
    backends: tuple[str, ...]
    rehearses: bool = False

    def phases(self, unsafe: Collection[str] = ()) -> Iterator[tuple[Step, ...]]:
        """The phases in order, each a tuple of steps that run at once.

        Backends in ``unsafe`` are not timed; the caller may add some while it iterates.
        """
        if "cuda" in self.backends:
            call = (sys.executable, "-m", "benchmarks.profile_call", "cuda", "cuda")
            yield (Step("first call, cuda, with watchdog", call, 16, None, "cuda", WATCHDOG, is_rehearsed=False),)
        for backend in self.backends:
            yield (self._ops(f"first numbers, {backend}", "telling", 22, backend, *RIVALS),)
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
        """A step of ``ops``, which checks and times ``contenders``, names of backends and of other peers."""
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
        """Run pytest in three processes, each replaced if a kernel crashes it, with a minute for each test."""
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
    """The steps that would not have ended after ``minute`` minutes."""
    return [
        step.name
        for begin, end, phase in timetable(plan, limit_s)
        for step in phase
        if begin >= limit_s or end > 60 * minute
    ]
