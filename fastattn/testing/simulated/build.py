"""Compiles ``device.cpp`` against torch's headers at first use, and loads it."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import shutil
from pathlib import Path

import torch

from fastattn import compiled

SOURCE = Path(__file__).with_name("device.cpp")
TORCH = Path(torch.__file__).parent
OPTIONS = ("-std=c++20", "-O1", "-shared", "-fPIC", "-w")


def unavailable_reason() -> str | None:
    """The reason why this machine cannot simulate a device, or None if it can."""
    if torch.version.cuda is not None or torch.version.hip is not None:
        return "the simulated GPU needs a CPU build of torch: this build has registered its own operators for GPUs"
    if not (TORCH / "include" / "ATen").is_dir():
        return "the simulated GPU needs the C++ headers of torch, which this installation lacks"
    if shutil.which("g++") is None:
        return "the simulated GPU needs g++"
    return None


def startup_folder() -> Path:
    """The folder that, on ``PYTHONPATH``, makes the simulated devices present from the start of a program."""
    return Path(__file__).with_name("startup")


@functools.cache
def load() -> ctypes.CDLL:
    """Load the library and register it with torch; nothing changes before ``present``.

    Call it before the first backward pass of the process: that is when torch starts one thread for each device.

    Raises:
        RuntimeError: this machine cannot simulate a device, or the library does not compile.
    """
    reason = unavailable_reason()
    if reason is not None:
        raise RuntimeError(reason)
    library = compiled.load(_built())
    library.sim_stream.restype = library.sim_held.restype = library.sim_peak.restype = ctypes.c_longlong
    library.sim_begin_capture.restype = ctypes.c_void_p
    library.sim_set_stream.argtypes = (ctypes.c_int, ctypes.c_longlong)
    library.sim_replay.argtypes = library.sim_free_graph.argtypes = (ctypes.c_void_p,)
    library.sim_device_of.argtypes = (ctypes.c_ulonglong,)
    library.sim_capture_call.argtypes = (ctypes.c_void_p, ctypes.c_longlong)
    for name in _unchecked_operators():
        library.sim_set_unchecked(name.encode())
    return library


def _built() -> Path:
    sources = [path.read_text(encoding="utf-8") for path in (SOURCE, SOURCE.with_name("memory.h"))]
    key = hashlib.sha256("\0".join([*sources, torch.__version__, *OPTIONS]).encode())
    return compiled.kept(f"simulated-{key.hexdigest()[:24]}.so", _compile)


def _compile(path: Path) -> None:
    includes = (TORCH / "include", TORCH / "include" / "torch" / "csrc" / "api" / "include")
    command = ["g++", *OPTIONS, str(SOURCE), *(f"-I{path}" for path in includes), f"-L{TORCH / 'lib'}"]
    code, said = compiled.run([*command, f"-Wl,-rpath,{TORCH / 'lib'}", "-lc10", "-ltorch_cpu", "-o", str(path)])
    if code:
        raise RuntimeError(f"the simulated GPU does not compile against torch {torch.__version__}:\n{said}")


def _unchecked_operators() -> list[str]:
    """Operators that accept operands on several devices under CUDA, read from torch's own table of operators."""
    import torchgen

    table = Path(torchgen.__file__).parent / "packaged" / "ATen" / "native" / "native_functions.yaml"
    entries = table.read_text(encoding="utf-8").split("- func: ")[1:]
    return [f"aten::{entry[: entry.index('(')]}" for entry in entries if "device_check: NoCheck" in entry]
