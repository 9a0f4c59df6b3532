"""Evidence for selecting a GPU backend automatically: a committed record, or a passed self-check.

A record is a file under ``benchmarks/results/``, of a run of the tests on a GPU of that architecture. Without one,
``python -m fastattn.testing.self_check`` runs a few small cases, forward and backward, in a separate process (a crash
ends only that), once for each version of the backend, GPU and driver. One process of a machine runs the check, the
others wait for its verdict, which is kept in the user's cache folder. ``fastattn verify --device cuda --record`` checks
again; ``FASTATTN_SELF_CHECK=0`` turns self-checks off. No kernel is selected before its check has passed: see
docs/decisions/no_kernel_before_its_check.md.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import logging
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from fastattn import compiled, state
from fastattn.files import replaced_file
from fastattn.problem import Problem
from fastattn.version import __version__

# (backend, architecture) -> the record that shows it passed there. There is none yet.
RECORDS: dict[tuple[str, int], str] = {}
# Limits in seconds of the stages: creating a context, compiling, running. A kernel that hangs costs the last of them.
START_S, COMPILE_S, RUN_S = 60.0, 180.0, 40.0
KILL_S = 3.0  # to wait for a killed check to end; one that is stuck in the driver is left behind
HANG_HOLDS_S = 86400.0
# A failure that says nothing about the kernels, such as a full GPU, holds for the other processes of the same launch.
FAILURE_HOLDS_S = 60.0
WRONG_RESULT = 3  # exit code of the self-check if the backend ran, and its results are wrong
STARTED, COMPILED = "started", "compiled"  # lines that the self-check prints at the end of a stage
AHEAD = "'fastattn verify --device cuda --record' runs it by itself, ahead of time"
AGAIN = "'fastattn verify --device cuda --record' tries again"
log = logging.getLogger("fastattn")
_verdicts: dict[str, Verdict] = {}  # of this process, by the key of a self-check
state.on_forget(_verdicts.clear)


@dataclass(frozen=True)
class Verdict:
    """The result of a self-check.

    Attributes:
        failure: why it failed, a sentence; None if it passed.
        final: another run would give the same result.
        hung: it was killed while a kernel ran.
        at: time of the result, in seconds since the epoch.
    """

    failure: str | None
    final: bool = True
    hung: bool = False
    at: float = field(default_factory=time.time)

    def holds(self) -> bool:
        """Whether another process may rely on it."""
        return self.final or 0 <= time.time() - self.at < (HANG_HOLDS_S if self.hung else FAILURE_HOLDS_S)


def reasons_against(backend: str, problem: Problem) -> list[str]:
    """Reasons against selecting ``backend`` automatically for ``problem``; [] with evidence. May run a self-check."""
    if problem.device != "cuda" or (backend, problem.arch) in RECORDS:
        return []
    facts = _facts(backend, problem.arch)
    key = _key(facts)
    if key not in _verdicts:
        known = _remembered(key)
        if known is None:
            missing = f"on compute capability {problem.arch / 10:.1f} there is no record of a passed test"
            if obstacle := _obstacle():
                return [f"{missing}, and {obstacle}"]
            known = _agreed(backend, facts, key)
        _verdicts[key] = known
    verdict = _verdicts[key]
    if verdict.failure is None:
        return []
    return [f"its self-check on this GPU failed: {verdict.failure}" + ("" if verdict.final else f" ({AGAIN})")]


def check_again(backend: str, arch: int) -> Verdict:
    """Run the self-check now, even if there is a verdict, and store the new one."""
    facts = _facts(backend, arch)
    key = _key(facts)
    if _has_no_interpreter():
        return Verdict(_NO_INTERPRETER, final=False)
    with _only_one(key):
        _verdicts[key] = verdict = _self_check(backend, facts)
        _remember(key, verdict)
    return verdict


_NO_INTERPRETER = f"a self-check needs a Python interpreter to run in, which a frozen application has not: {AHEAD}"


def _obstacle() -> str | None:
    """The reason why no self-check can run now; None if one can."""
    if os.environ.get("FASTATTN_SELF_CHECK") == "0":
        return "FASTATTN_SELF_CHECK=0 forbids a self-check"
    if _has_no_interpreter():
        return _NO_INTERPRETER
    if torch.compiler.is_compiling() or torch.cuda.is_current_stream_capturing():
        return f"a self-check cannot run during compilation or graph capture: call it once before, or {AHEAD}"
    return None


def _has_no_interpreter() -> bool:
    return bool(getattr(sys, "frozen", False)) or not sys.executable


def _key(facts: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:24]


@functools.cache
def _facts(backend: str, arch: int) -> dict[str, Any]:
    """The facts that a verdict depends on; if any of them changes, the check runs again."""
    devices = range(torch.cuda.device_count())
    index = next(i for i in devices if arch == 10 * (c := torch.cuda.get_device_capability(i))[0] + c[1])
    source = hashlib.sha256()
    for path in sorted((Path(__file__).parent / "backends" / backend).rglob("*.py")):
        source.update(path.read_bytes())
    return {
        "backend": backend,
        "version": f"{__version__} {source.hexdigest()[:16]}",
        "device": torch.cuda.get_device_name(index),
        "index": index,
        "driver": _driver_version(),
        "torch": torch.__version__,
        "triton": _version_of("triton"),
    }


def _driver_version() -> str:
    """The version of the installed GPU driver, as its kernel module states it; "unknown" elsewhere."""
    for path in ("/proc/driver/nvidia/version", "/sys/module/amdgpu/version"):
        try:
            return Path(path).read_text(encoding="utf-8").splitlines()[0]
        except (OSError, IndexError):
            continue
    return "unknown"


def _version_of(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


# --- one check for a machine --------------------------------------------------------------------------------------


def _agreed(backend: str, facts: dict[str, Any], key: str) -> Verdict:
    """The verdict of this machine. The first process that asks runs the check, the others wait for it."""
    asked = time.time()
    with _only_one(key):
        known = _remembered(key, since=asked)
        if known is None:
            known = _self_check(backend, facts)
            _remember(key, known)
    return known


@contextlib.contextmanager
def _only_one(key: str) -> Iterator[None]:
    """Hold the lock of a check. Without a folder for it, or after its time limit, go on without the lock."""
    from filelock import FileLock, Timeout

    folder = _folder()
    if folder is None:
        yield
        return
    lock = FileLock(folder / f"{key}.lock", timeout=START_S + COMPILE_S + RUN_S + KILL_S)
    try:
        lock.acquire()
    except (OSError, Timeout, NotImplementedError):  # a file system without locks
        yield
        return
    try:
        yield
    finally:
        lock.release()


def _folder() -> Path | None:
    """A folder for verdicts that this user can write; None without one. A verdict decides which code runs, as code."""
    for root in compiled.folders():
        with contextlib.suppress(OSError):
            folder = root / "self-check"
            folder.mkdir(exist_ok=True, mode=0o700)
            with tempfile.TemporaryFile(dir=folder):
                return folder
    return None


def _remembered(key: str, since: float = float("inf")) -> Verdict | None:
    """The verdict on disk, if it still holds or is newer than ``since``; None without one, or if it is damaged."""
    folder = _folder()
    if folder is None:
        return None
    try:
        verdict = Verdict(**json.loads((folder / f"{key}.json").read_text(encoding="utf-8")))
        return verdict if verdict.holds() or verdict.at >= since else None
    except (OSError, ValueError, TypeError):
        return None


def _remember(key: str, verdict: Verdict) -> None:
    """Write the verdict atomically. Without a folder to write to, the next process runs the check again."""
    folder = _folder()
    if folder is None:
        log.warning("fastattn: no folder to keep the verdict of the self-check in; FASTATTN_CACHE names one")
        return
    try:
        with replaced_file(folder / f"{key}.json") as temporary:
            temporary.write_text(json.dumps(asdict(verdict)), encoding="utf-8")
    except OSError as error:
        log.warning("fastattn: the verdict of the self-check could not be kept: %s", error)


# --- the check, in a process of its own ---------------------------------------------------------------------------


def _self_check(backend: str, facts: dict[str, Any]) -> Verdict:
    log.warning(
        "fastattn: checking the %s backend on %s, once for this machine; this takes a while (%s)",
        backend, facts["device"], AHEAD,
    )  # fmt: skip
    command = [sys.executable, "-m", "fastattn.testing.self_check", backend, f"cuda:{facts['index']}"]
    package = str(Path(__file__).parents[1])
    paths = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))
    try:  # in a session of its own, so that it ends with all that it started
        child = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, text=True,
            errors="replace", start_new_session=True,
            env=os.environ | {"PYTHONPATH": paths, "FASTATTN_SELF_CHECK": "0"},
        )  # fmt: skip
    except OSError as error:
        return Verdict(f"it could not be started: {error}", final=False)
    return _watched(child)


def _watched(child: subprocess.Popen[str]) -> Verdict:
    """Read the output of the check, with a time limit for each stage, and return its verdict."""
    lines: queue.Queue[str | None] = queue.Queue()
    threading.Thread(target=_read, args=(child, lines), daemon=True).start()
    stage, ends, said = "starting", time.monotonic() + START_S, "it said nothing"
    while True:
        try:
            line = lines.get(timeout=max(0.0, ends - time.monotonic()))
        except queue.Empty:
            gone = _kill(child)
            left = "" if gone else f"; process {child.pid}, stuck in the driver, could not be ended"
            return Verdict(f"it did not end in time while {stage}{left}", final=False, hung=stage == "running")
        if line is None:
            break
        if line == STARTED:
            stage, ends = "compiling", time.monotonic() + COMPILE_S
        elif line == COMPILED:
            stage, ends = "running", time.monotonic() + RUN_S
        elif line.strip():
            said = line.strip()
    code = _exit_code(child)
    if code == 0:
        return Verdict(None)
    if code is not None and code < 0:
        return Verdict(
            f"it was ended by {signal.Signals(-code).name} while {stage}", final=False, hung=stage == "running"
        )
    return Verdict(said, final=code == WRONG_RESULT)


def _read(child: subprocess.Popen[str], lines: queue.Queue[str | None]) -> None:
    assert child.stdout is not None
    with child.stdout:
        for line in child.stdout:
            lines.put(line.rstrip("\n"))
    lines.put(None)


def _exit_code(child: subprocess.Popen[str]) -> int | None:
    with contextlib.suppress(subprocess.TimeoutExpired):
        return child.wait(KILL_S)
    return None


def _kill(child: subprocess.Popen[str]) -> bool:
    """Kill the check and its children. False if it does not end: a process stuck in the driver cannot be killed."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, signal.SIGKILL) if hasattr(os, "killpg") else child.kill()
    return _exit_code(child) is not None
