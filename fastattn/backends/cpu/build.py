"""Build ``csrc/cpu/`` into one shared library: the kernel once for each instruction set, chosen from when it runs.

Nothing that imports torch is imported; ``setup.py`` builds with this module, too. The library depends on no torch and
no Python, so one build serves them all.
"""

from __future__ import annotations

import concurrent.futures
import hashlib
import os
import platform
import shutil
import tempfile
from pathlib import Path

from fastattn import compiled
from fastattn.compiled import BuildError

LIBRARY = "libfastattn_cpu.so"
SOURCES = (
    "common/mask.h", "cpu/params.h", "cpu/vector.h", "cpu/functions.h", "cpu/operand.h", "cpu/tile.h", "cpu/pack.h",
    "cpu/random.h", "cpu/attention.h", "cpu/intervals.h", "cpu/scores.h", "cpu/seen.h", "cpu/softmax.h", "cpu/rows.h",
    "cpu/forward.h", "cpu/gradient.h", "cpu/queries.h", "cpu/parts.h", "cpu/backward.h", "cpu/tangents.h", "cpu/jvp.h",
    "cpu/backward_jvp.h", "cpu/small.h", "cpu/statistics.h", "cpu/weights.h", "cpu/attention.cpp",
    "cpu/attention_library.cpp", "cpu/tree.h", "cpu/decode.h", "cpu/decode_products.h", "cpu/decode.cpp",
    "cpu/decode_library.cpp", "cpu/threads.h", "cpu/machines.h", "cpu/machines.cpp",
)  # fmt: skip
# -O2: the kernels are written in vectors; -O3 takes twice as long and makes them no faster. Nor do the passes that are
# left out here, a quarter of the time.
ARITHMETIC = (
    "-O2", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-fno-tree-vectorize",
    "-fno-tree-slp-vectorize", "-fno-schedule-insns2", "-fno-thread-jumps", "-fno-tree-vrp", "-fno-tree-dominator-opts",
    "-fno-tree-pre",
)  # fmt: skip
FLAGS = ("-std=c++17", "-fPIC", "-fvisibility=hidden")
WARNINGS = ("-Wall", "-Wextra", "-Wno-psabi", "-Wno-maybe-uninitialized")  # the last: GCC's own AVX-512 headers
# Instruction sets, the best first: the names in machines.cpp, which asks whether a machine has them.
AVX2 = ("-mavx2", "-mfma", "-mbmi", "-mbmi2", "-mf16c")
AVX512 = (*AVX2, "-mavx512f", "-mavx512bw", "-mavx512cd", "-mavx512dq", "-mavx512vl")
AVX512BF16 = (*AVX512, "-mavx512bf16")
ARM_BF16 = ("-march=armv8.2-a+bf16",)
MACHINES = {"x86_64": ("avx512bf16", "avx512", "avx2", "baseline"), "aarch64": ("bf16", "baseline")}
# What is compiled for each, by machine: a source, the operand of its products if it has one, instruction set, flags.
Unit = tuple[str, str, str, tuple[str, ...]]


def _baseline(*flags: str) -> tuple[Unit, ...]:
    sources = (("attention", "Single"), ("attention", "Double"), ("decode", ""))
    return tuple((source, operand, "baseline", flags) for source, operand in sources)


ANYWHERE = _baseline()
UNITS: dict[str, tuple[Unit, ...]] = {
    "x86_64": (
        ("attention", "Pairs", "avx512bf16", AVX512BF16),
        ("attention", "Single", "avx512", AVX512),
        ("attention", "Single", "avx2", AVX2),
        ("attention", "Double", "avx2", AVX2),
        *_baseline("-O1"),  # serves only processors without AVX2; compiles in three fifths of the time
        ("decode", "", "avx512bf16", AVX512BF16),
        ("decode", "", "avx512", AVX512),
        ("decode", "", "avx2", AVX2),
    ),
    "aarch64": (("attention", "Pairs", "bf16", ARM_BF16), *ANYWHERE),
}
LIBRARY_SOURCES = ("machines", "attention_library", "decode_library")


def machine() -> str:
    """The kind of machine to compile for: FASTATTN_MACHINE, where CXX is a cross compiler, else this one."""
    return os.environ.get("FASTATTN_MACHINE") or platform.machine()


def machines() -> tuple[str, ...]:
    """The instruction sets to compile for on this kind of machine."""
    return MACHINES.get(machine(), ("baseline",))


def units(kind: str | None = None) -> tuple[Unit, ...]:
    """The units to compile on a ``kind`` of machine, by default this one's."""
    return UNITS.get(kind or machine(), ANYWHERE)


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
    """A hash of the sources and options of the library, 24 digits."""
    digest = hashlib.sha256(repr((FLAGS, ARITHMETIC, machine(), units())).encode())
    for name in SOURCES:
        digest.update((csrc / name).read_bytes())
    return digest.hexdigest()[:24]


def is_current(library: Path, csrc: Path) -> bool:
    """Whether a sound library is there that was built from these sources with these options."""
    try:
        return fingerprint(csrc).encode() in compiled.unsealed(library)
    except OSError:
        return False


def build_library(target: Path, csrc: Path) -> None:
    """Write the shared library to ``target``. Raises BuildError with the compiler's words."""
    compiler = find_compiler()
    with tempfile.TemporaryDirectory() as folder:
        commands = compile_commands(compiler, csrc, Path(folder))
        run(commands)
        objects = [command[-1] for command in commands]
        target.parent.mkdir(parents=True, exist_ok=True)
        run([[compiler, "-shared", *objects, "-o", str(target)]])


def compile_commands(
    compiler: str, csrc: Path, folder: Path, *, kind: str | None = None, more: tuple[str, ...] = ()
) -> list[list[str]]:
    """One command for each object, whose path comes last; those that take longest come first."""
    common = [compiler, *FLAGS, *WARNINGS, f"-I{csrc}"]
    commands = []
    for source, operand, machine, flags in units(kind):
        defined = [f"-DFA_MACHINE={machine}", *([f"-DFA_OPERAND={operand}"] if operand else [])]
        path = str(folder / f"{source}{operand}-{machine}.o")
        commands.append(
            [*common, *ARITHMETIC, *flags, *defined, *more, "-c", str(csrc / "cpu" / f"{source}.cpp"), "-o", path]
        )
    for source in LIBRARY_SOURCES:
        defined = [f'-DFA_SOURCES="{fingerprint(csrc)}"']
        path = str(folder / f"{source}.o")
        commands.append([*common, "-O2", *defined, *more, "-c", str(csrc / "cpu" / f"{source}.cpp"), "-o", path])
    return commands


def run(commands: list[list[str]]) -> None:
    """As many at once as there are processors. Raises BuildError."""
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        for code, said in pool.map(compiled.run, commands):
            if code:
                raise BuildError(f"compiling csrc/cpu/ failed: {said.strip() or 'no message'}")
