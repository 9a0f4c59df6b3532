"""``python -m benchmarks ptx``: run what Triton compiles for GPUs on this CPU, from its PTX, and judge the results."""

from __future__ import annotations

import argparse
import concurrent.futures
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
Judge = Callable[[], list[Row]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--arch", type=int, nargs="+", default=list(ARCHITECTURES), help="compute capabilities, as 80 or 90 (default)"
    )
    parser.add_argument("--quick", action="store_true", help="a few problems with the main features only")
    parser.add_argument("--only", default="", metavar="TEXT", help="problems whose name contains this")


def run(args: argparse.Namespace) -> int:
    try:
        import triton
    except ImportError:
        raise InputError("ptx: Triton is not installed, and compiles the kernels. Run: pip install triton") from None
    wrong = 0
    for arch in args.arch:
        names = [name for name in problems(arch, args.quick) if args.only in name]
        started, executed = time.perf_counter(), 0
        for name, said, count in tqdm(
            judged(arch, names, args.quick), total=len(names), desc=f"sm_{arch}", disable=None
        ):
            executed += count
            for line in said:
                wrong += 1
                print(f"WRONG sm_{arch} {name}: {line}")
        seconds = time.perf_counter() - started
        print(
            f"sm_{arch}: {len(names)} problems, {executed} instructions in {seconds:.0f} s, Triton {triton.__version__}"
        )
    print(f"{wrong} results are wrong" if wrong else "all results are right")
    return 1 if wrong else 0


def judged(arch: int, names: Sequence[str], quick: bool = False) -> Iterator[tuple[str, list[str], int]]:
    """For each problem its name, what is wrong with it, and the instructions executed; in a process of its own."""
    interpreting = os.environ.pop("TRITON_INTERPRET", None)  # Triton reads it when it is imported
    context = multiprocessing.get_context("spawn")
    try:
        with concurrent.futures.ProcessPoolExecutor(1, context, _start, (arch,)) as pool:
            yield from pool.map(functools.partial(_judge, arch, quick), names)
    finally:
        if interpreting is not None:
            os.environ["TRITON_INTERPRET"] = interpreting


def problems(arch: int, quick: bool = False) -> dict[str, Judge]:
    """The problems by name: of each row of the tile table, of the judge's grid and of caches."""
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


def _of_case(judge: Callable[..., list[Row]], case: Case) -> list[Row]:
    return judge("triton", make(case))


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


def _short(case: Case) -> Case:
    """With fewer rows: a derivative takes several kernels."""
    bias = case.bias and (1, 2, 30, 40)
    return dataclasses.replace(case, S_q=30, S_kv=40, bias=bias)


# --- in the process that runs compiled kernels --------------------------------------------------------------------

_executed: dict[str, int] = {}


def _start(arch: int) -> None:
    from fastattn.backends.triton.tools.ptx.launch import replace_launches

    torch.set_num_threads(1)
    replace_launches(arch, _executed)


def _judge(arch: int, quick: bool, name: str) -> tuple[str, list[str], int]:
    _executed.clear()
    try:
        rows = problems(arch, quick)[name]()
        said = [f"{row.name} is off by {row.error:.3g}, at most {row.bound:.3g}" for row in rows if not row.ok]
    except Exception as error:  # a fault of the compiled kernel, or an instruction that the interpreter lacks
        said = [f"{type(error).__name__}: {error}"[:500]]
    return name, said, sum(_executed.values())
