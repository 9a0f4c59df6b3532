"""The CPU kernels in a program of their own: ``python csrc/cpu/check/check.py [--sanitize WHICH] [--cross]``.

Compiles them with a driver (main.cpp) that runs random problems against the formula on every instruction set that the
machine has. ``--sanitize address,undefined`` or ``thread`` lets a sanitizer watch. ``--cross`` compiles for arm64 with
Debian's cross compiler and runs under qemu's user mode, which shows what is right, not what is fast.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from fastattn.backends.cpu import build

CSRC = Path(__file__).parents[2]
DRIVER = ("main", "problem", "formula", "statistics")
CROSS_COMPILER = "aarch64-linux-gnu-g++"
EMULATOR = ("qemu-aarch64", "-L", "/usr/aarch64-linux-gnu")


def build_driver(folder: Path, sanitize: str | None = None, *, cross: bool = False, baseline: bool = False) -> Path:
    """The program, compiled. Raises build.BuildError."""
    compiler = CROSS_COMPILER if cross else build.find_compiler()
    more = [f"-fsanitize={sanitize}", "-fno-sanitize-recover=all", "-g1"] if sanitize else []
    if baseline:
        more += ["-DFA_BASELINE_ALONE", "-O1"]
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


def main() -> None:
    parser = argparse.ArgumentParser(description="Run the CPU kernels on random problems, in a program of their own.")
    parser.add_argument("--sanitize", help="for g++ -fsanitize: address,undefined or thread")
    parser.add_argument("--cross", action="store_true", help="arm64, under qemu's user mode")
    parser.add_argument("--baseline", action="store_true", help="the baseline alone: compiled in a few seconds")
    parser.add_argument("--cases", type=int, default=200, help="problems for each instruction set (default: 200)")
    parser.add_argument("--seed", type=int, default=0, help="of the first problem (default: 0)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        program = build_driver(Path(folder), args.sanitize, cross=args.cross, baseline=args.baseline)
        command = [*(EMULATOR if args.cross else ()), str(program), str(args.cases), str(args.seed)]
        sys.exit(subprocess.run(command, check=False).returncode)


if __name__ == "__main__":
    main()
