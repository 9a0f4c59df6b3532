"""Compile Triton kernels for known problems into Triton's cache, in several processes, none of which uses the GPU.

``python -m fastattn.testing.precompile SET PART PARTS BACKEND ARCH WARP_SIZE`` is one of them; it compiles the kernels
whose signature belongs to its part. They serve later calls with the same dtypes, head dims and features.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from fastattn.backends import load
from fastattn.problem import Rows, StatisticsGradient, Tangents
from fastattn.quantized import quantize
from fastattn.testing.caches import CacheCase, cache_grid, make_cache_sample
from fastattn.testing.cases import Case, grid
from fastattn.testing.check_cases import CACHE_CASES, CASES, DERIVED
from fastattn.testing.inputs import make

NVRTC = "nvrtc"
CHECK, GRID = "check", "grid"  # the sets: what the self-check runs; the whole grid and the shapes of the benchmarks
MOST_PROCESSES = 16
COMMAND = (sys.executable, "-m", "fastattn.testing.precompile")


def compile_ahead(device: str, what: str) -> None:
    """Compile a set for the GPU ``device``. Failures are ignored: such a kernel fails again, with an error, in use."""
    for process in [subprocess.Popen(command, stdout=subprocess.DEVNULL) for command in commands(device, what)]:
        process.wait()


def commands(device: str, what: str) -> list[list[str]]:
    """The commands of the processes, one for each core."""
    from fastattn.backends.triton.tools.compiler import present_target

    target = present_target(torch.device(device))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    parts = min(MOST_PROCESSES, cores)
    return [[*COMMAND, what, str(part), str(parts), *map(str, target)] for part in range(parts)]


def compile_part(what: str, part: int, parts: int, target: tuple[str, str, str]) -> list[str]:
    """Compile one part of a set and return the names of the kernels, in order."""
    from fastattn.backends.triton.tools import compiler

    backend, arch, warp_size = target
    seen: set[str] = set()  # the same in every process, in the same order
    compiled = []

    def launched(name: str, arguments: Any, compile_kernel: compiler.Compile) -> None:
        text = f"{name} {compiler.signature(arguments)}"
        if text in seen:
            return
        seen.add(text)
        if (len(seen) - 1) % parts == part:
            compiled.append(name)
            with contextlib.suppress(Exception):  # it fails again, with an error, when the kernel is used
                kernel = compile_kernel()
                _build_launcher(kernel)

    found = compiler.Target(backend, int(arch) if arch.isdigit() else arch, int(warp_size))
    compiler.compile_only(lambda: found, lambda: 0, launched)
    torch.set_num_threads(1)
    for case in _cases(what):
        with contextlib.suppress(NotImplementedError):
            _run_on_meta(case)
    return compiled


def _build_launcher(kernel: Any) -> None:
    """Build the launcher in C that Triton up to 3.6 compiles for each signature and caches beside the kernel."""
    from triton.backends.nvidia import driver

    if hasattr(driver, "make_launcher"):
        driver.CudaLauncher(kernel.src, kernel.metadata)


def _cases(what: str) -> Iterator[Case | CacheCase]:
    for case in (*CASES, DERIVED, *CACHE_CASES):
        yield dataclasses.replace(case, dtype=torch.bfloat16)
    if what == GRID:
        dtypes = (torch.bfloat16, torch.float16, torch.float32)
        for d in (64, 128, 256):
            for right in (0, None):
                yield Case(f"D {d}, {right}", D_qk=d, D_v=d, right=right, dtype=torch.bfloat16)
        widest = load("triton").capabilities.max_head_dim or 0
        every: tuple[Case | CacheCase, ...] = (*grid(dtypes), *cache_grid(dtypes))
        yield from (case for case in every if max(case.D_qk, case.D_v) <= widest)


def _run_on_meta(case: Case | CacheCase) -> None:
    """Run the launch code of all passes of a case, on meta tensors."""
    from fastattn.backends.triton.tools.compiler import on_meta

    backend = load("triton")
    if isinstance(case, CacheCase):
        of = make_cache_sample(case)
        given = dataclasses.replace(of.inputs, **{name: on_meta(x) for name, x in vars(of.inputs).items()})
        backend.attend_to_cache(given, of.spec)
        return
    sample = make(case)
    inputs = dataclasses.replace(sample.inputs, **{name: on_meta(x) for name, x in vars(sample.inputs).items()})
    dout, dlse, spec, needs = on_meta(sample.dout), on_meta(sample.dlse), sample.spec, sample.needs
    results = backend.forward(inputs, spec)
    backend.backward(dout, dlse, *results, inputs, spec, needs)
    if case.id == DERIVED.id:
        rows, tangents = Rows(dout, dlse, *results), Tangents(**{name: getattr(inputs, name) for name in needs})
        out, lse = backend.jvp(tangents, rows, inputs, spec)
        backend.backward_jvp(rows, Rows(dout, dlse, out, lse), tangents, inputs, spec, needs)
        found = backend.statistics(inputs, spec)
        gradient = StatisticsGradient(found.entropy, found.largest_logit, found.key_sum)
        backend.statistics_backward(gradient, inputs, spec, [name for name in needs if name != "v"])
        operands = quantize(inputs.q), quantize(inputs.k), quantize(inputs.v, role="value")
        backend.forward_fp8(*operands, inputs, spec)


def nvrtc_commands(parts: int) -> list[list[str]]:
    """The commands of processes that compile every CUDA C++ kernel through NVRTC, if it is installed."""
    return [[*COMMAND, NVRTC, str(part), str(parts)] for part in range(parts)]


def _compile_with_nvrtc(part: int, parts: int) -> list[str]:
    from fastattn.backends.cuda import nvrtc
    from fastattn.backends.cuda.instances import backward_instances, decode_instances, forward_instances

    try:
        nvrtc.load()
    except nvrtc.NvrtcError as error:
        return [str(error)]
    mine = [*forward_instances(), *backward_instances(), *decode_instances()][part::parts]
    for instance in mine:
        nvrtc.cached_kernel(instance)
    return [instance.name for instance in mine]


def main(arguments: Sequence[str]) -> int:
    what, part, parts, *target = arguments
    if what == NVRTC:
        print("\n".join(_compile_with_nvrtc(int(part), int(parts))))
        return 0
    backend, arch, warp_size = target
    print("\n".join(compile_part(what, int(part), int(parts), (backend, arch, warp_size))))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
