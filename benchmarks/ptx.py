"""``python -m benchmarks ptx``: run what Triton and nvcc compile for GPUs on this CPU, from PTX; judge the results."""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import dataclasses
import functools
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from tqdm import tqdm

from fastattn.errors import InputError
from fastattn.testing import Case, grid, make, measure
from fastattn.testing.caches import CacheCase, cache_grid, make_cache_sample, measure_cache
from fastattn.testing.derivatives import measure_derivatives
from fastattn.testing.fp8 import measure_fp8
from fastattn.testing.nvcc.launch import InterpretedKernels, interpreted_cuda, nvcc, split
from fastattn.testing.statistics import measure_statistics
from fastattn.testing.tolerance import Row

ARCHITECTURES = (80, 90)  # mma.sync with cp.async, and wgmma; the interpreter has no tensor memory of sm_100
WITH_E4M3 = 89
SIZES: dict[str, Any] = {"B": 1, "S_q": 70, "S_kv": 90, "H_q": 2, "H_kv": 1}
EVERYTHING: dict[str, Any] = {
    "softcap": 6.0, "left": 40, "right": 8, "bias": (1, 2, 70, 90), "mask": "random", "alibi": True, "sinks": True,
    "segments": 2, "dropout_p": 0.15, "dlse": True,
}  # fmt: skip
MASKED: dict[str, Any] = {"mask": "random", "dropout_p": 0.2}
NVCC = "nvcc"  # in place of an architecture: the CUDA kernels, which are for sm_90a
CUDA_SIZES: dict[str, Any] = {"B": 1, "S_q": 200, "S_kv": 230, "H_q": 2, "H_kv": 1, "dtype": torch.bfloat16}
CUDA_DIMS = ((64, 64), (96, 96), (128, 128), (192, 128), (192, 192), (256, 256))
CUDA_FEATURES: dict[str, dict[str, Any]] = {
    "full": {},
    "causal": {"right": 0, "dlse": True},
    "only dq": {"left": 90, "right": 20, "needs": ("q",)},
    "only dk and dv": {"right": 0, "needs": ("k", "v")},
    "softcap, sinks": {"softcap": 6.0, "right": 0, "sinks": True},
    "softcap, only dq": {"softcap": 6.0, "needs": ("q",)},
    "softcap, only dk and dv": {"softcap": 6.0, "needs": ("k", "v")},
    "alibi, dropout": {"alibi": True, "dropout_p": 0.2, "right": 0},
    "everything": EVERYTHING | {"bias": (1, 2, 200, 230), "right": 20},
}
CACHES: dict[str, dict[str, Any]] = {
    "pages of 16": {"page_size": 16},
    "pages of 24, softcap": {"page_size": 24, "softcap": 3.0},
    "pages of 1": {"page_size": 1, "softcap": 3.0},
    "window": {"left": 150},
    "e4m3": {"page_size": 16, "fp8": "page", "new": 0},
    "packed": {"packed": True, "s_q": (1, 7, 0)},
    "tree": {"page_size": 2, "tree": "each", "s_q": (40, 40, 40), "left": 200},
}
Judge = Callable[[], list[Row]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--arch",
        type=_target,
        nargs="+",
        default=[*ARCHITECTURES, NVCC],
        help="compute capabilities of Triton's kernels, as 80 or 90, and nvcc for the CUDA kernels (default: all)",
    )
    parser.add_argument("--quick", action="store_true", help="a few problems with the main features only")
    parser.add_argument("--jobs", type=int, default=1, help="how many problems run at a time (default: 1)")
    parser.add_argument("--only", default="", metavar="TEXT", help="problems whose name contains this")


def _target(text: str) -> int | str:
    return text if text == NVCC else int(text)


def run(args: argparse.Namespace) -> int:
    wrong = 0
    for arch in args.arch:
        compiler = _compiler(arch)
        names = [name for name in problems(arch, args.quick) if args.only in name]
        started, executed = time.perf_counter(), 0
        for name, said, count in tqdm(
            judged(arch, names, args.quick, args.jobs), total=len(names), desc=_of(arch), disable=None
        ):
            executed += count
            for line in said:
                wrong += 1
                print(f"WRONG {_of(arch)} {name}: {line}")
        seconds = time.perf_counter() - started
        print(f"{_of(arch)}: {len(names)} problems, {executed} instructions in {seconds:.0f} s, {compiler}")
    print(f"{wrong} results are wrong" if wrong else "all results are right")
    return 1 if wrong else 0


def _of(arch: int | str) -> str:
    return NVCC if arch == NVCC else f"sm_{arch}"


def _compiler(arch: int | str) -> str:
    """The name of the compiler, which is there."""
    if arch == NVCC:
        return nvcc()
    try:
        import triton
    except ImportError:
        raise InputError("ptx: Triton is not installed, and compiles the kernels. Run: pip install triton") from None
    return f"Triton {triton.__version__}"


def judged(
    arch: int | str, names: Sequence[str], quick: bool = False, jobs: int = 1
) -> Iterator[tuple[str, list[str], int]]:
    """For each problem its name, what is wrong with it, and the instructions executed; in processes of their own."""
    interpreting = os.environ.pop("TRITON_INTERPRET", None)  # Triton reads it when it is imported
    context = multiprocessing.get_context("spawn")
    try:
        with concurrent.futures.ProcessPoolExecutor(jobs, context, _start, (arch,)) as pool:
            yield from pool.map(functools.partial(_judge, arch, quick), names)
    finally:
        if interpreting is not None:
            os.environ["TRITON_INTERPRET"] = interpreting


def problems(arch: int | str, quick: bool = False) -> dict[str, Judge]:
    """The problems by name: of each row of the tile table, of the judge's grid and of caches; or of CUDA's kernels."""
    if isinstance(arch, str):
        of_cuda = {case.id: functools.partial(_of_case, measure, case, "cuda") for case in _of_cuda(quick)}
        caches = {case.id: functools.partial(_of_cuda_cache, case, n % 3 + 1) for n, case in enumerate(_cuda_caches())}
        return of_cuda | ({} if quick else caches)
    found: dict[str, Judge] = {}
    for case in _of_rows(quick):
        is_half, is_wide = case.dtype == torch.bfloat16, case.D_qk > 256
        found[case.id] = functools.partial(_of_case, measure, case)
        if is_half and not is_wide and not quick and case.dropout_p:
            found[f"derivatives, {case.id}"] = functools.partial(_of_case, measure_derivatives, _short(case))
            found[f"statistics, {case.id}"] = functools.partial(_of_case, measure_statistics, _short(case))
        if arch >= WITH_E4M3 and is_half and not is_wide and not case.dropout_p:
            found[f"e4m3, {case.id}"] = functools.partial(_of_case, measure_fp8, case)
    if not quick:
        found |= {case.id: functools.partial(_of_case, measure, case) for case in grid((torch.bfloat16,))}
        caches = cache_grid((torch.bfloat16,))
        found |= {f"cache, {case.id}": functools.partial(_of_cache, case) for case in caches}
    return found


def _of_case(judge: Callable[..., list[Row]], case: Case, backend: str = "triton") -> list[Row]:
    return judge(backend, make(case))


def _of_cache(case: CacheCase) -> list[Row]:
    return measure_cache("triton", make_cache_sample(case))


def _of_rows(quick: bool) -> Iterator[Case]:
    """Problems for the head dims and kinds of features that have rows of their own."""
    dims = (64,) if quick else (64, 128, 256, 512)
    features: dict[str, dict[str, Any]] = {
        "causal": {"right": 0},
        "mask": {"mask": "random"},
        "mask, dropout": MASKED,
        "everything of a row": EVERYTHING,
    }
    for dtype in (torch.bfloat16,) if quick else (torch.bfloat16, torch.float32):
        for dim in dims:
            for name, more in features.items():
                of = str(dtype).removeprefix("torch.")
                yield Case(f"{name}, D {dim} [{of}]", D_qk=dim, D_v=dim, dtype=dtype, **SIZES, **more)


def _of_cuda(quick: bool) -> Iterator[Case]:
    """Problems for every kernel of a head dim; packed ones, and with few heads of keys, for one."""
    for dim_qk, dim_v in CUDA_DIMS[:1] if quick else CUDA_DIMS:
        for name, more in CUDA_FEATURES.items():
            if not quick or name in ("full", "causal"):
                yield Case(f"{name}, D {dim_qk}/{dim_v}", D_qk=dim_qk, D_v=dim_v, **CUDA_SIZES, **more)
    if not quick:
        sizes: dict[str, Any] = {**CUDA_SIZES, "D_qk": 64, "D_v": 64, "right": 0}
        yield Case("parts of dk and dv", **(sizes | {"H_q": 8}))
        yield Case("float16, D 64/64", **(sizes | {"dtype": torch.float16}))
        yield Case("float16, softcap, D 64/64", **(sizes | {"dtype": torch.float16, "softcap": 6.0}))
        lengths = ((70, 70), (0, 9), (133, 180), (9, 0))
        for name, more in {"packed": {}, "packed, alibi": {"alibi": True}}.items():
            yield Case(name, lengths=lengths, nan_rows=True, **sizes, **more)


def _of_cuda_cache(case: CacheCase, parts: int) -> list[Row]:
    with split(parts):
        return measure_cache("cuda", make_cache_sample(case))


def _cuda_caches() -> Iterator[CacheCase]:
    """Problems for every kernel that attends to a cache, and what the kernels take of the grid."""
    for case in cache_grid((torch.bfloat16,)):
        if case.dtype == torch.bfloat16 and not (case.alibi or case.bias or case.D_qk % 8 or case.D_v % 8):
            yield dataclasses.replace(case, id=f"cache, {case.id}")
    for dim in (64, 128, 192, 256):
        long = CacheCase("", before=(300, 0, 170), s_q=(2, 2, 2), sinks=True, D_qk=dim, D_v=dim, dtype=torch.bfloat16)
        for name, more in CACHES.items():
            yield dataclasses.replace(long, id=f"cache, {name}, D {dim}", **more)


def _short(case: Case) -> Case:
    """With fewer rows: a derivative takes several kernels."""
    bias = case.bias and (1, 2, 30, 40)
    return dataclasses.replace(case, S_q=30, S_kv=40, bias=bias)


# --- in the process that runs compiled kernels --------------------------------------------------------------------

_executed: dict[str, int] = {}


def _start(arch: int | str) -> None:
    torch.set_num_threads(1)
    if isinstance(arch, int):
        from fastattn.backends.triton.tools.ptx.launch import replace_launches

        replace_launches(arch, _executed)


def _judge(arch: int | str, quick: bool, name: str) -> tuple[str, list[str], int]:
    _executed.clear()
    interpreted = interpreted_cuda(InterpretedKernels(_executed)) if arch == NVCC else contextlib.nullcontext()
    try:
        with interpreted:
            rows = problems(arch, quick)[name]()
        said = [f"{row.name} is off by {row.error:.3g}, at most {row.bound:.3g}" for row in rows if not row.ok]
    except Exception as error:  # a fault of the compiled kernel, or an instruction that the interpreter lacks
        said = [f"{type(error).__name__}: {error}"[:500]]
    return name, said, sum(_executed.values())
