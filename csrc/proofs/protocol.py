"""The kernels' barrier protocols in every order: ``python csrc/proofs/protocol.py``. Builds and runs protocol.cpp."""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

CSRC = Path(__file__).parents[1]
sys.path.insert(0, str(CSRC / "emulator"))

from emulate import Emulator, compile_instance, config_of, link, run  # noqa: E402

# Lines of instances.inc, and random problems (their seeds) of which a block's steps are explored. The second one of the
# forward kernel has a tile without keys, and one whose values are cleared. That of the dk/dv kernel fills every stage
# again, so that the wait for an empty stage matters, and clears rows of keys and of queries.
KERNELS = {
    ("FORWARD", 128, 128, 1, 0): (10, 18),
    ("BACKWARD_DKDV", 128, 128, 0, 64, 128, 2, 1): (2,),
    ("BACKWARD_DQ", 256, 256, 0): (0, 2),
    ("DECODE", 128, 128, 0): (12,),
}
# Rows are cleared by other warps than the one that stands for its consumer: for the clocks of the emulator (sites.py).
OF_OTHER_WARPS = {("FORWARD", "consumers without meet at 7")}


def trace_of(emulator: Emulator, line: tuple[str | int, ...], seed: int) -> str:
    """What that block of a random problem did which did most."""
    folder = emulator.build / "traces"
    compiled = compile_instance(config_of(line), CSRC, folder / f"{line[0]}.o", "-O1", "-DFA_BFLOAT16_ONLY")
    printed = run(link([compiled, *emulator.common], folder / str(line[0])), 1, seed, "--trace").stdout
    blocks: dict[str, list[str]] = {}
    for text in printed.splitlines():
        if text[:1].isdigit():
            blocks.setdefault(text.partition(" ")[0], []).append(text)
    return "\n".join(max(blocks.values(), key=len))


def build_explorer(folder: Path) -> Path:
    program = folder / "protocol"
    folder.mkdir(parents=True, exist_ok=True)
    options = ("-std=c++17", "-O2", "-Wall", "-Wextra")
    subprocess.run(["g++", *options, str(CSRC / "proofs" / "protocol.cpp"), "-o", str(program)], check=True)
    return program


def explore(program: Path, traces: Sequence[str]) -> tuple[list[str], set[str], set[str]]:
    """What is wrong with a protocol, and the planted faults that were found, or missed in every trace."""
    wrong, found, planted = [], set[str](), set[str]()
    for trace in traces:
        lines = subprocess.run([str(program)], input=trace, capture_output=True, text=True).stdout.splitlines()
        wrong += [line for line in lines[:1] or ["no answer"] if not line.startswith("ok")]
        verdicts = [line.partition(":")[0].partition(" ") for line in lines[1:]]
        planted |= {name for _, _, name in verdicts}
        found |= {name for verdict, _, name in verdicts if verdict == "found"}
    return wrong, found, planted - found


def check(emulator: Emulator, program: Path, line: tuple[str | int, ...]) -> tuple[bool, str]:
    wrong, found, missed = explore(program, [trace_of(emulator, line, seed) for seed in KERNELS[line]])
    missed -= {name for kernel, name in OF_OTHER_WARPS if kernel == line[0]}
    text = f"{line[0].lower()}: {len(found)} of {len(found) + len(missed)} planted faults found"
    return not wrong and not missed, "; ".join([text, *wrong, *(f"MISSED {name}" for name in sorted(missed))])


def main() -> int:
    parser = argparse.ArgumentParser(description="Explore the barrier protocols of the CUDA kernels.")
    parser.add_argument("--build", type=Path, default=CSRC.parent / "build" / "emulator", help="where to build")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time")
    options = parser.parse_args()
    emulator = Emulator(options.build, options.jobs)
    program = build_explorer(options.build)
    is_good = True
    for is_right, text in emulator.map(lambda line: check(emulator, program, line), list(KERNELS)):
        print(text, flush=True)
        is_good = is_good and is_right
    return 0 if is_good else 1


if __name__ == "__main__":
    sys.exit(main())
