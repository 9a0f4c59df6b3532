"""The conditions of a measurement: code, versions, device, clocks. Unknown facts are None."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

import fastattn

REPOSITORY = Path(__file__).resolve().parent.parent
_SOURCES = ("fastattn/**/*.py", "csrc/**/*", "benchmarks/**/*.py")


def describe(device: torch.device) -> dict[str, Any]:
    """The conditions of a measurement, as JSON."""
    status = _output("git", "status", "--porcelain", "--untracked-files=no")
    return {
        "commit": _output("git", "rev-parse", "HEAD"),
        "dirty": None if status is None else bool(status),
        "source": _source_hash(),
        "versions": versions(),
        "device": device_name(device),
        "device_type": device.type,
        "device_facts": _gpu_facts(device) if device.type == "cuda" else _cpu_facts(),
        "clocks": clocks(device),
        "driver": _smi("driver_version") if device.type == "cuda" else None,
        "platform": platform.platform(),
    }


def versions() -> dict[str, str | None]:
    packages = ("triton", "numpy", "flash-attn", "xformers", "flashinfer-python")
    found: dict[str, str | None] = {"python": platform.python_version(), "fastattn": fastattn.__version__}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    # the package's metadata leave out which build this is
    return found | {"torch": torch.__version__, "cuda": torch.version.cuda, "hip": torch.version.hip}


def device_name(device: torch.device) -> str:
    """The name of the device in records and tables."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{_cpu_model()}, {threads} thread{'s' if threads > 1 else ''}"


def clocks(device: torch.device) -> dict[str, Any] | None:
    """SM and memory clocks, power limit and temperature, read now."""
    if device.type != "cuda":
        return None
    fields = ("clocks.sm", "clocks.mem", "clocks.max.sm", "power.draw", "power.limit", "temperature.gpu")
    return {field: _smi(field) for field in fields}


def _gpu_facts(device: torch.device) -> dict[str, Any]:
    p = torch.cuda.get_device_properties(device)
    return {
        "compute_capability": f"{p.major}.{p.minor}",
        "multiprocessors": p.multi_processor_count,
        "memory_bytes": p.total_memory,
        "l2_bytes": p.L2_cache_size,
    }


def _cpu_facts() -> dict[str, Any]:
    pages, page = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    return {
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "memory_bytes": pages * page,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "load_before": os.getloadavg()[0],
    }


def _cpu_model() -> str:
    try:
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()


def _smi(field: str) -> str | None:
    return _output("nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader", "--id=0")


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _source_hash() -> str:
    """A hash of the source, which identifies code without git or with uncommitted changes."""
    digest = hashlib.sha256()
    for path in sorted(path for pattern in _SOURCES for path in REPOSITORY.glob(pattern) if path.is_file()):
        digest.update(str(path.relative_to(REPOSITORY)).encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
