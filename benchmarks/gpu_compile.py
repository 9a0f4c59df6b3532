"""``python -m benchmarks.gpu_compile``: compile every kernel into the caches, in as many processes as there are cores.

These are the Triton kernels with their launchers, and through NVRTC the CUDA C++ kernels. ``--rehearse`` compiles a few
Triton kernels without a GPU.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence

from fastattn.testing import precompile

HOPPER = ("cuda", "90", "32")
REHEARSED = ("0", "400")  # part 0 of 400


def main(arguments: Sequence[str]) -> int:
    env = dict(os.environ)
    if arguments[:1] == ["--rehearse"]:  # runs the real compiler, not the interpreter or the simulated device
        env.pop("TRITON_INTERPRET", None)
        paths = env.get("PYTHONPATH", "").split(os.pathsep)
        env["PYTHONPATH"] = os.pathsep.join(path for path in paths if "simulated" not in path)
        commands = [[*precompile.COMMAND, precompile.GRID, *REHEARSED, *HOPPER]]
    else:
        commands = precompile.commands("cuda", precompile.GRID)
        commands += precompile.nvrtc_commands(len(commands))
    codes = [process.wait() for process in [subprocess.Popen(command, env=env) for command in commands]]
    print(f"{codes.count(0)} of {len(codes)} processes compiled their part")
    return int(any(codes))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
