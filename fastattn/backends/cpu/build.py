"""Build ``csrc/cpu/`` into one shared library: the kernel once for each instruction set, chosen from when it runs.

Only the standard library is imported; ``setup.py`` loads this file by its path. The library depends on no torch and no
Python, so one build serves them all.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

LIBRARY = "libfastattn_cpu.so"
SOURCES = ("common/mask.h", "cpu/params.h", "cpu/vector.h", "cpu/decode.h", "cpu/decode.cpp", "cpu/library.cpp")
ARITHMETIC = ("-O3", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast")
FLAGS = ("-std=c++17", *ARITHMETIC, "-fPIC", "-fvisibility=hidden")
WARNINGS = ("-Wall", "-Wextra", "-Wno-psabi")
# Instruction sets, the best first, and how the compiler is told of them; runs_here() in decode.cpp asks for the same.
AVX2 = ("-mavx2", "-mfma", "-mbmi", "-mbmi2")
AVX512 = (*AVX2, "-mavx512f", "-mavx512bw", "-mavx512cd", "-mavx512dq", "-mavx512vl")
MACHINES = {"x86_64": {"avx512": AVX512, "avx2": AVX2, "baseline": ()}}
ANYWHERE: dict[str, tuple[str, ...]] = {"baseline": ()}


class BuildError(Exception):
    """Why the library cannot be built here."""


def machines() -> dict[str, tuple[str, ...]]:
    """The instruction sets to compile for on this kind of machine."""
    return MACHINES.get(platform.machine(), ANYWHERE)


def find_compiler() -> str:
    """A C++ compiler, or BuildError."""
    if platform.system() != "Linux":
        raise BuildError(f"it is built on Linux alone, this is {platform.system()}")
    wished = os.environ.get("CXX")
    found = next(
        (path for name in ((wished,) if wished else ("c++", "g++", "clang++")) if (path := shutil.which(name))), ""
    )
    if not found:
        raise BuildError(f"no C++ compiler was found ({f'CXX={wished}' if wished else 'c++, g++, clang++'})")
    return found


def fingerprint(csrc: Path) -> str:
    """What the library is built from, in 24 digits."""
    digest = hashlib.sha256(repr((FLAGS, machines())).encode())
    for name in SOURCES:
        digest.update((csrc / name).read_bytes())
    return digest.hexdigest()[:24]


def build_library(target: Path, csrc: Path) -> None:
    """Write the shared library to ``target``. Raises BuildError with the compiler's words."""
    compiler, names = find_compiler(), machines()
    listed = " ".join(f"X({name})" for name in names)
    common = [compiler, *FLAGS, *WARNINGS, f"-I{csrc}"]
    with tempfile.TemporaryDirectory() as folder:
        objects = [str(Path(folder, f"{name}.o")) for name in (*names, "library")]
        kernel, library = str(csrc / "cpu" / "decode.cpp"), str(csrc / "cpu" / "library.cpp")
        commands = [[*common, *flags, f"-DFA_MACHINE={name}", "-c", kernel, "-o", path]
                    for (name, flags), path in zip(names.items(), objects, strict=False)]  # fmt: skip
        defined = (f"-DFA_MACHINES(X)={listed}", f'-DFA_SOURCES="{fingerprint(csrc)}"')
        commands.append([*common, *defined, "-c", library, "-o", objects[-1]])
        _run(commands)
        target.parent.mkdir(parents=True, exist_ok=True)
        _run([[compiler, "-shared", *objects, "-o", str(target)]])


def _run(commands: list[list[str]]) -> None:
    """All of them at once."""
    try:
        running = [
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            for command in commands
        ]
    except OSError as error:
        raise BuildError(str(error)) from None
    for process in running:
        said, _ = process.communicate()
        if process.returncode:
            raise BuildError(f"compiling csrc/cpu/ failed: {said.strip() or 'no message'}")
