"""Why a backend with kernels of its own may be chosen unasked on a GPU: a committed record, or a passed self-check.

A record is a file under ``benchmarks/results/``, of a run of the tests on a GPU of that architecture. Where there is
none, ``python -m fastattn.testing.self_check`` runs a few small cases, forward and backward, in a process of its own (a
kernel that crashes takes only that with it), once for each version of the backend, GPU and driver. The verdict is kept
in the user's cache directory. ``FASTATTN_SELF_CHECK=0`` turns self-checks off.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from fastattn.files import cache_root, replaced_file
from fastattn.problem import Problem
from fastattn.version import __version__

# (backend, architecture) -> the record that shows it passed there. There is none yet.
RECORDS: dict[tuple[str, int], str] = {}
TIMEOUT = 300  # seconds; the first compilation of the kernels is most of it
log = logging.getLogger("fastattn")
_verdicts: dict[str, str | None] = {}  # of this process: the key of a self-check -> why it failed, None if it passed


def reasons_against(backend: str, problem: Problem) -> list[str]:
    """Why ``backend`` must not be chosen unasked for ``problem``; [] with evidence. May run a self-check."""
    if problem.device != "cuda" or (backend, problem.arch) in RECORDS:
        return []
    facts = _facts(backend, problem.arch)
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:24]
    if key not in _verdicts:
        verdict = _remembered(key)
        if verdict is None:
            where = f"on compute capability {problem.arch / 10:.1f} there is no record of a passed test"
            if os.environ.get("FASTATTN_SELF_CHECK") == "0":
                return [f"{where}, and FASTATTN_SELF_CHECK=0 forbids a self-check"]
            if torch.compiler.is_compiling() or torch.cuda.is_current_stream_capturing():
                return [
                    f"{where}, and a self-check cannot run during compilation or graph capture: call it once before"
                ]
            verdict = _self_check(backend, facts)
            _remember(key, verdict)
        _verdicts[key] = verdict["failure"]
    failure = _verdicts[key]
    return [] if failure is None else [f"its self-check on this GPU failed: {failure}"]


@functools.cache
def _facts(backend: str, arch: int) -> dict[str, Any]:
    """What a verdict holds for: it is asked for again when any of it changes."""
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


def _self_check(backend: str, facts: dict[str, Any]) -> dict[str, Any]:
    """Run the self-check; ``{"failure": why or None, "final": whether another run would say the same}``."""
    log.warning("fastattn: checking the %s backend on %s, once; this takes a while", backend, facts["device"])
    command = [sys.executable, "-m", "fastattn.testing.self_check", backend, f"cuda:{facts['index']}"]
    package = str(Path(__file__).parents[1])
    paths = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=TIMEOUT, env=os.environ | {"PYTHONPATH": paths}
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return {"failure": f"it could not run: {error}", "final": False}
    if done.returncode == 0:
        return {"failure": None, "final": True}
    said = (done.stdout + done.stderr).strip().splitlines() or ["it said nothing"]
    return {"failure": said[-1], "final": done.returncode == WRONG_RESULT}


WRONG_RESULT = 3  # exit code of the self-check where the backend ran, and its results are wrong


def _path(key: str) -> Path:
    return cache_root() / "self-check" / f"{key}.json"


def _remembered(key: str) -> dict[str, Any] | None:
    try:
        verdict = json.loads(_path(key).read_text(encoding="utf-8"))
        return verdict if "failure" in verdict else None
    except (OSError, ValueError):
        return None


def _remember(key: str, verdict: dict[str, Any]) -> None:
    """Write the verdict, whole or not at all. Without a place to write, it is found again in the next process."""
    if not verdict["final"]:
        return
    try:
        with replaced_file(_path(key)) as temporary:
            temporary.write_text(json.dumps(verdict), encoding="utf-8")
    except OSError as error:
        log.warning("fastattn: the verdict of the self-check could not be kept: %s", error)
