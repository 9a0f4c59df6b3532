"""Build ``csrc/`` into one shared library: nvcc, driven by ninja, one kernel for each file, in parallel.

Nothing that imports torch is imported; ``setup.py`` builds with this module, too. The library depends on no torch, no
Python and no CUDA library (the runtime is linked statically), so one build serves them all.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from fastattn import compiled
from fastattn.backends.cuda.instances import Instance
from fastattn.compiled import BuildError

ARCHITECTURE = ("-gencode", "arch=compute_90a,code=sm_90a")
FLAGS = ("-std=c++17", "-O3", *ARCHITECTURE, "-Xptxas=-v", "-Xcompiler=-fPIC,-fvisibility=hidden")
LIBRARY = "libfastattn.so"
PROBE_LIMIT = 60.0  # seconds, for a compiler to show that it works


def find_nvcc() -> str:
    """The CUDA compiler, which works, or BuildError."""
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")]
    places = [str(Path(home, "bin", "nvcc")) for home in homes if home]
    found = next((path for path in (*places, "nvcc", "/usr/local/cuda/bin/nvcc") if shutil.which(path)), None)
    if found is None:
        raise BuildError("nvcc was not found (set CUDA_HOME, or put it on PATH)")
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cu")
        source.write_text("#include <cuda_runtime.h>\n__global__ void probe() {}\n")
        command = [found, *ARCHITECTURE, "-c", str(source), "-o", str(source.with_suffix(".o"))]
        code, said = compiled.run(command, PROBE_LIMIT)
    if code:
        raise BuildError(f"{found} cannot compile for sm_90a: {first_line(said)}")
    return found


def find_ninja() -> list[str]:
    """The command of ninja, or BuildError."""
    if shutil.which("ninja"):
        return ["ninja"]
    if compiled.run([sys.executable, "-m", "ninja", "--version"], PROBE_LIMIT)[0] == 0:
        return [sys.executable, "-m", "ninja"]
    raise BuildError("ninja was not found (pip install ninja)")


def first_line(text: str) -> str:
    return next((line for line in text.splitlines() if line.strip()), "no message")


def instance_source(instance: Instance) -> str:
    """A file that holds one kernel."""
    config = instance.config
    function = f"fa::{config.launcher}<{instance.traits}>({config.launcher_arguments})"
    return f'#include "sm90/launch.cuh"\ntemplate char const* {function};\n'


def fingerprint(csrc: Path) -> str:
    """A hash of the sources and options of the library, 24 digits."""
    digest = hashlib.sha256(repr(FLAGS).encode())
    for path in sorted(path for name in ("common", "sm90") for path in (csrc / name).iterdir()):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:24]


def write_if_new(path: Path, text: str) -> None:
    """Leave a file that is right as it is, with its time stamp."""
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


def write_ninja_file(
    folder: Path, nvcc: str, csrc: Path, instances: Sequence[Instance], options: Sequence[str]
) -> None:
    """``build.ninja`` and the sources of ``instances`` in ``folder``. Each object has a ``.log`` of what ptxas said."""
    csrc = csrc.resolve()
    escape = {ord("$"): "$$", ord(" "): "$ ", ord(":"): "$:"}
    flags = " ".join([*FLAGS, *options, f'-I"{csrc}"'])
    lines = [
        "ninja_required_version = 1.5",
        "rule compile",
        f'  command = "{nvcc}" {flags} -MD -MF $out.d -c $in -o $out > $out.log 2>&1 || (cat $out.log; false)',
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = nvcc $in",
        "rule link",
        f'  command = "{nvcc}" -shared -cudart static {" ".join(ARCHITECTURE)} '
        "-Xcompiler=-static-libstdc++,-static-libgcc $in -o $out",
        "  description = link $out",
        f"build host.o: compile {str(csrc / 'sm90' / 'host.cu').translate(escape)}",
    ]
    for instance in instances:
        write_if_new(folder / f"{instance.name}.cu", instance_source(instance))
        lines.append(f"build {instance.name}.o: compile {instance.name}.cu")
    objects = " ".join(f"{instance.name}.o" for instance in instances)
    lines += [f"build {LIBRARY}: link host.o {objects}", f"build objects: phony {objects}"]
    write_if_new(folder / "build.ninja", "\n".join(lines) + "\n")


def run_ninja(folder: Path, target: str, jobs: int | None = None) -> None:
    """Bring ``target`` up to date; BuildError with the compiler's words if it cannot be."""
    command = [*find_ninja(), "-C", str(folder), *(["-j", str(jobs)] if jobs else []), target]
    code, said = compiled.run(command)
    if code:
        raise BuildError(f"compiling csrc/ failed:\n{said}")


def build(
    folder: Path,
    target: str,
    csrc: Path,
    instances: Sequence[Instance],
    options: Sequence[str] = (),
    jobs: int | None = None,
) -> None:
    """Build in ``folder``: the library, if ``target`` is LIBRARY, or the instances' objects alone, if it is "objects".

    Only what has changed is compiled. Raises BuildError.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_ninja_file(folder, find_nvcc(), csrc, instances, options)
    run_ninja(folder, target, jobs)


def build_library(folder: Path, target: Path, csrc: Path, instances: Sequence[Instance]) -> None:
    """Write the shared library to ``target``; ``folder`` keeps what need not be compiled again."""
    build(folder, LIBRARY, csrc, instances)
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(folder / LIBRARY, target)
