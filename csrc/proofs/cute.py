"""CuTe as a witness of the layouts: ``python csrc/proofs/cute.py [--headers DIR]``. Compiles and runs cute.cpp.

It needs nvcc, for the toolkit's headers, and those of CUTLASS. The package that holds these brings a dozen others
along, so that they are fetched without: ``pip install --no-deps --target build/cutlass nvidia-cutlass==4.2.0.0``.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from fastattn.backends.cuda.build import BuildError, find_nvcc

CSRC = Path(__file__).parents[1]
FETCHED = CSRC.parent / "build" / "cutlass"
INSIDE = Path("cutlass_library", "source", "include")  # of the package
OPTIONS = ("-x", "c++", "-std=c++17", "-O1", "-Xcompiler=-w", "-DFA_EMULATE")  # CuTe has warnings of its own


def find_headers(given: Path | None = None) -> Path:
    """The folder with ``cute/tensor.hpp``: given, fetched, or of an installed package."""
    installed = find_spec("cutlass_library")
    roots = [given, FETCHED / INSIDE, *(Path(root, "source", "include") for root in _locations(installed))]
    found = next((root for root in roots if root is not None and (root / "cute" / "tensor.hpp").exists()), None)
    if found is None:
        raise BuildError(
            "CuTe's headers were not found. Run: pip install --no-deps --target build/cutlass nvidia-cutlass==4.2.0.0"
        )
    return found


def _locations(spec: object) -> list[str]:
    return list(getattr(spec, "submodule_search_locations", None) or [])


def build(headers: Path, folder: Path, csrc: Path = CSRC, *options: str) -> Path:
    """The witness as a program in ``folder``; ``csrc`` may be a changed copy of the sources."""
    folder.mkdir(parents=True, exist_ok=True)
    machine = (csrc / "emulator" / f"{name}.cpp" for name in ("machine", "global", "races", "sites", "tma"))
    program = folder / "cute"  # nvcc hands C++ to the host's compiler, with the toolkit's folders
    command = [
        find_nvcc(),
        *OPTIONS,
        *options,
        f"-I{headers}",
        str(csrc / "proofs" / "cute.cpp"),
        *map(str, machine),
        "-o",
        str(program),
    ]
    subprocess.run(command, check=True)
    return program


def main() -> int:
    parser = argparse.ArgumentParser(description="Compare the layouts of kernels and emulator with CuTe's.")
    parser.add_argument("--headers", type=Path, help="the folder with cute/tensor.hpp")
    parser.add_argument("--build", type=Path, default=CSRC.parent / "build" / "proofs", help="where to build")
    options = parser.parse_args()
    try:
        program = build(find_headers(options.headers), options.build)
    except BuildError as error:
        print(error, file=sys.stderr)
        return 2
    return subprocess.run([str(program)]).returncode


if __name__ == "__main__":
    sys.exit(main())
