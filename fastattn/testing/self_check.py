"""``python -m fastattn.testing.self_check BACKEND DEVICE``: is the backend right on this GPU? Seconds; see evidence.py.

Its problems have the head dims and features that most people use, so the kernels that it compiles, several at a time,
are those of their first call. Exit code 0: right. 3: it ran and is wrong. Anything else: it could not run. The last
line of output says why.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from fastattn.backends import load
from fastattn.backends.base import Backend
from fastattn.evidence import AHEAD, COMPILED, STARTED, WRONG_RESULT
from fastattn.testing.caches import CacheCase, cache_grid, make_cache_sample, measure_cache
from fastattn.testing.cases import Case, grid
from fastattn.testing.inputs import make
from fastattn.testing.tolerance import Row, measure

MOST_COMPILERS = 16
COMPILE_FLAG = "--compile"  # --compile PART PARTS BACKEND ARCH WARP_SIZE: one of the processes that only compile
_GROUPED: dict[str, Any] = {"B": 1, "S_q": 140, "S_kv": 140, "H_q": 2, "H_kv": 1}
_D128, _D64 = {"D_qk": 128, "D_v": 128}, {"D_qk": 64, "D_v": 64}
_DECODE: dict[str, Any] = {"page_size": 16, "before": (40, 200), "H_q": 8, "H_kv": 2}
_EVERYTHING = next(case for case in grid((torch.bfloat16,)) if case.id.startswith("everything ["))
_EVERY_CACHE = next(case for case in cache_grid((torch.bfloat16,)) if case.id.startswith("e4m3, ragged [pages"))
CASES = (
    Case("causal, D 128", right=0, **_GROUPED, **_D128),
    Case("causal, D 64", right=0, **_GROUPED, **_D64),
    Case("packed, D 128", right=0, **_GROUPED, **_D128, lengths=((70, 70), (1, 1), (9, 20))),
    dataclasses.replace(_EVERYTHING, id="everything, D 64", **_D64),
)
CACHE_CASES = (
    CacheCase("one token, D 128", s_q=(1, 1), **_DECODE, **_D128),
    CacheCase("some tokens, D 64", s_q=(9, 9), **_DECODE, **_D64),
    dataclasses.replace(_EVERY_CACHE, id="everything, e4m3, D 64", **_D64),
)


def self_check(backend: str, device: str, dtype: torch.dtype = torch.bfloat16) -> list[str]:
    """What is wrong: a line for each result outside the tolerance; [] if the backend is right.

    Args:
        backend: its name.
        device: where to run it.
        dtype: of q, k and v.
    """
    return [
        f"{name}: {row.name} is off by {row.error:.3g}, at most {row.bound:.3g}"
        for name, rows in _judged(load(backend), device, dtype)
        for row in rows
        if not row.ok
    ]


def _judged(backend: Backend, device: str, dtype: torch.dtype) -> Iterator[tuple[str, list[Row]]]:
    for case in CASES:
        yield case.id, measure(backend, make(dataclasses.replace(case, dtype=dtype), device=device))
    if "cache" in backend.capabilities.features:
        for of_cache in CACHE_CASES:
            sample = make_cache_sample(dataclasses.replace(of_cache, dtype=dtype), device)
            yield of_cache.id, measure_cache(backend, sample)


# --- compiling ahead ----------------------------------------------------------------------------------------------


def compile_ahead(backend: str, device: torch.device) -> None:
    """Compile what the check needs into Triton's cache, in as many processes as there are cores for them."""
    if backend != "triton" or os.environ.get("TRITON_INTERPRET") == "1":
        return  # other backends compile fast, or ahead of any use
    from fastattn.backends.triton.tools.compiler import present_target

    kind, arch, warp_size = present_target(device)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    parts = min(MOST_COMPILERS, cores)
    command = [sys.executable, "-m", "fastattn.testing.self_check", COMPILE_FLAG]
    running = [
        subprocess.Popen([*command, str(part), str(parts), kind, str(arch), str(warp_size)], stdout=subprocess.DEVNULL)
        for part in range(parts)
    ]
    for process in running:
        process.wait()  # whatever went wrong there goes wrong again below, and is told there


def compile_part(part: int, parts: int, kind: str, arch: str, warp_size: str) -> list[str]:
    """Compile every ``parts``-th kernel of the check, beginning with number ``part``; their names."""
    from fastattn.backends.triton.tools import compiler

    target = compiler.Target(kind, int(arch) if arch.isdigit() else arch, int(warp_size))
    count, compiled = 0, []

    def launched(name: str, compile_kernel: compiler.Compile) -> None:
        nonlocal count
        if count % parts == part:
            compile_kernel()
            compiled.append(name)
        count += 1

    compiler.compile_only(lambda: target, lambda: 0, launched)
    torch.set_num_threads(1)
    _run_on_meta(load("triton"), compiler.on_meta)
    return compiled


def _run_on_meta(backend: Backend, on_meta: Any) -> None:
    for case in CASES:
        sample = make(dataclasses.replace(case, dtype=torch.bfloat16))
        inputs = dataclasses.replace(sample.inputs, **{k: on_meta(x) for k, x in vars(sample.inputs).items()})
        dout, dlse = on_meta(sample.dout), on_meta(sample.dlse)
        backend.backward(dout, dlse, *backend.forward(inputs, sample.spec), inputs, sample.spec, sample.needs)
    for of_cache in CACHE_CASES:
        of = make_cache_sample(dataclasses.replace(of_cache, dtype=torch.bfloat16))
        given = dataclasses.replace(of.inputs, **{k: on_meta(x) for k, x in vars(of.inputs).items()})
        backend.attend_to_cache(given, of.spec)


# --- the process --------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str]) -> int:
    if arguments[0] == COMPILE_FLAG:
        part, parts, *target = arguments[1:]
        print(compile_part(int(part), int(parts), *target))
        return 0
    backend, device = arguments
    try:
        if device.startswith("cuda"):
            torch.cuda.set_device(device)
            torch.zeros(1, device=device)  # a context, which may be refused
        print(STARTED, flush=True)
        compile_ahead(backend, torch.device(device))
        print(COMPILED, flush=True)
        wrong = self_check(backend, device)
    except Exception as error:  # whatever it is, the process that asked has to say it in a line
        print(_sentence(error))
        return 1
    print("\n".join(wrong) if wrong else "passed")
    return WRONG_RESULT if wrong else 0


def _sentence(error: Exception) -> str:
    said = next(iter(str(error).strip().splitlines()), "")
    if "busy or unavailable" in said:
        return f"this GPU is in exclusive compute mode, and another process has it: {AHEAD}"
    if isinstance(error, torch.OutOfMemoryError) or "out of memory" in said:
        return f"no memory is left on this GPU for a second process, which needs about 1 GiB: {AHEAD}"
    return f"it could not run: {type(error).__name__}: {said[:300]}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
