"""The CPU kernels in a program of their own: ``python csrc/cpu/check/check.py [--sanitize WHICH] [--cross]``.

Compiles them with a driver (main.cpp) that runs random problems against the formula on every instruction set that the
machine has. ``--sanitize address,undefined`` or ``thread`` lets a sanitizer watch. ``--cross`` compiles for arm64 with
Debian's cross compiler and runs under qemu's user mode, which shows what is right, not what is fast.

``--package`` puts the same objects into a copy of the package, too, and runs ``fastattn verify`` there, and the tests
with hostile lengths, pages and memory. It needs the address sanitizer. That for threads knows none of torch's, so races
show in the program alone, whose threads are its own.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from fastattn import compiled
from fastattn.backends.cpu import build

CSRC = Path(__file__).parents[2]
ROOT = CSRC.parent
HOSTILE = ROOT / "tests" / "backends" / "cpu" / "test_memory.py"
DRIVER = ("main", "problem", "formula", "statistics")
CROSS_COMPILER = "aarch64-linux-gnu-g++"
EMULATOR = ("qemu-aarch64", "-L", "/usr/aarch64-linux-gnu")


def flags_of(sanitize: str | None) -> list[str]:
    return [f"-fsanitize={sanitize}", "-fno-sanitize-recover=all", "-g1"] if sanitize else []


def build_driver(folder: Path, sanitize: str | None = None, *, cross: bool = False, baseline: bool = False) -> Path:
    """The program, compiled. Raises build.BuildError."""
    compiler = CROSS_COMPILER if cross else build.find_compiler()
    more = flags_of(sanitize)
    if baseline:
        more += ["-DFA_BASELINE_ALONE", "-O0"]
    kind = "aarch64" if cross else "any" if baseline else None
    commands = build.compile_commands(compiler, CSRC, folder, kind=kind, more=tuple(more))
    for name in DRIVER:
        source = str(CSRC / "cpu" / "check" / f"{name}.cpp")
        watched = [] if name == "formula" else more  # which touches no memory but its own
        commands.append([compiler, "-std=c++17", "-O2", *watched, "-c", source, "-o", str(folder / f"{name}.o")])
    build.run(commands)
    program = folder / "check"
    build.run([[compiler, *more, *(command[-1] for command in commands), "-pthread", "-o", str(program)]])
    return program


def run_package(objects: Path, sanitize: str) -> int:
    """Run the grid of cases and hostile calls in a copy of the package with the objects of ``build_driver``."""
    compiler = build.find_compiler()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for part in ("fastattn", "csrc"):  # the library is that of the sources beside the package
            shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
        shutil.copy(HOSTILE, folder)
        library = folder / "fastattn" / "backends" / "cpu" / build.LIBRARY
        kept = [str(path) for path in objects.glob("*.o") if path.stem not in DRIVER]
        build.run([[compiler, "-shared", *flags_of(sanitize), *kept, "-o", str(library)]])
        compiled.seal(library)
        # Python has no C++ runtime, and the sanitizer looks for that of the exceptions it watches when it starts.
        runtimes = [path_of(compiler, name) for name in ("libasan.so", "libstdc++.so.6")]
        environment = os.environ | {
            "LD_PRELOAD": ":".join(runtimes),
            "ASAN_OPTIONS": "detect_leaks=0",  # Python leaves memory to the system when it ends
            "PYTHONPATH": str(folder),
            "FASTATTN_CACHE": str(folder / "cache"),
        }
        for words in (
            ["fastattn", "verify", "--backend", "cpu"],
            ["pytest", "-q", "-p", "no:cacheprovider", HOSTILE.name],
        ):
            code = subprocess.run([sys.executable, "-m", *words], check=False, env=environment, cwd=folder).returncode
            if code:
                return code
    return 0


def path_of(compiler: str, library: str) -> str:
    """Where a compiler has a library of its own."""
    command = [compiler, f"-print-file-name={library}"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description="Run the CPU kernels on random problems, in a program of their own.")
    parser.add_argument("--sanitize", help="for g++ -fsanitize: address,undefined or thread")
    parser.add_argument("--cross", action="store_true", help="arm64, under qemu's user mode")
    parser.add_argument("--baseline", action="store_true", help="the baseline alone: compiled in a few seconds")
    parser.add_argument("--package", action="store_true", help="also the package's grid and hostile calls")
    parser.add_argument("--cases", type=int, default=200, help="problems for each instruction set (default: 200)")
    parser.add_argument("--seed", type=int, default=0, help="of the first problem (default: 0)")
    args = parser.parse_args()
    if args.package and "address" not in (args.sanitize or ""):
        parser.error("--package needs --sanitize address, or address,undefined")
    with tempfile.TemporaryDirectory() as folder:
        program = build_driver(Path(folder), args.sanitize, cross=args.cross, baseline=args.baseline)
        command = [*(EMULATOR if args.cross else ()), str(program), str(args.cases), str(args.seed)]
        code = subprocess.run(command, check=False).returncode
        if not code and args.package:
            code = run_package(Path(folder), args.sanitize)
        sys.exit(code)


if __name__ == "__main__":
    main()
