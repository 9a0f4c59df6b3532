"""``fastattn info``: versions, devices, backends and how fastattn is installed."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import platform
import re
import shutil
import subprocess
from pathlib import Path

_OPTIONAL = ("triton", "safetensors", "tokenizers", "tqdm", "matplotlib")

Facts = dict[str, dict[str, str]]


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    text = "print versions, devices, every backend with the reason if it cannot run, and the state of the installation"
    parser = commands.add_parser("info", help="versions, devices, backends", description=text)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    print(as_text(facts()))
    return 0


def facts() -> Facts:
    """Everything that ``info`` prints, by section."""
    import torch

    import fastattn
    from fastattn.backends import cpu, cuda

    versions = {
        "fastattn": fastattn.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "CUDA of torch": torch.version.cuda or torch.version.hip or "none: a CPU build of torch",
        "nvcc": _nvcc(),
    }
    versions |= {name: _version(name) for name in _OPTIONAL}
    devices = {"cpu": f"{platform.machine()}, {torch.get_num_threads()} threads used by torch"}
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        devices[f"cuda:{index}"] = f"{gpu.name}, sm_{gpu.major}{gpu.minor}, {gpu.total_memory / 2**30:.0f} GiB"
    if torch.backends.mps.is_available():
        devices["mps"] = "Apple GPU"
    backends = {name: reason or "ready" for name, reason in fastattn.backends().items()}
    package = Path(fastattn.__file__).parent
    installation = {"folder": str(package), "CUDA kernels": cuda.delivery(), "CPU kernels": cpu.delivery()}
    return {"versions": versions, "devices": devices, "backends": backends, "installation": installation}


def as_text(sections: Facts) -> str:
    width = max(len(name) for section in sections.values() for name in section)
    lines: list[str] = []
    for title, section in sections.items():
        lines += [title, *(f"  {name:<{width}}  {value}" for name, value in section.items())]
    return "\n".join(lines)


def _version(name: str) -> str:
    if importlib.util.find_spec(name) is None:
        return "not installed"
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "installed, version unknown"


def _nvcc() -> str:
    path = shutil.which("nvcc")
    if path is None:
        return "not found"
    try:
        output = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        return f"{path} does not run ({error})"
    release = re.search(r"release ([\d.]+)", output)
    return f"{release[1] if release else 'unknown release'} ({path})"
