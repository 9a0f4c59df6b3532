"""``python -m benchmarks.gpu_compile``: every kernel into the caches, in as many processes as there are cores.

Triton's with their launchers, and through NVRTC those of CUDA C++. ``--rehearse`` compiles a few of Triton's for a GPU
that is not there.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence

from fastattn.backends.cuda.instances import backward_instances, decode_instances, forward_instances
from fastattn.testing import precompile

NVRTC = "--nvrtc"  # --nvrtc PART PARTS: one of the processes that compile CUDA C++
HOPPER = ("cuda", "90", "32")
REHEARSED = ("0", "400")  # one of so many parts


def main(arguments: Sequence[str]) -> int:
    if arguments[:1] == [NVRTC]:
        return _with_nvrtc(int(arguments[1]), int(arguments[2]))
    env = dict(os.environ)
    if arguments[:1] == ["--rehearse"]:  # the real compiler, so neither the interpreter nor the simulated device
        env.pop("TRITON_INTERPRET", None)
        env["PYTHONPATH"] = os.pathsep.join(
            p for p in env.get("PYTHONPATH", "").split(os.pathsep) if "simulated" not in p
        )
        commands = [[*precompile.COMMAND, precompile.GRID, *REHEARSED, *HOPPER]]
    else:
        commands = precompile.commands("cuda", precompile.GRID)
        parts = str(len(commands))
        commands += [
            [sys.executable, "-m", "benchmarks.gpu_compile", NVRTC, str(n), parts] for n in range(len(commands))
        ]
    codes = [process.wait() for process in [subprocess.Popen(command, env=env) for command in commands]]
    print(f"{codes.count(0)} of {len(codes)} processes compiled their part")
    return int(any(codes))


def _with_nvrtc(part: int, parts: int) -> int:
    from fastattn.backends.cuda import nvrtc

    try:
        nvrtc.load()
    except nvrtc.NvrtcError as error:
        print(error)
        return 0
    for instance in [*forward_instances(), *backward_instances(), *decode_instances()][part::parts]:
        nvrtc.cached_kernel(instance)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
