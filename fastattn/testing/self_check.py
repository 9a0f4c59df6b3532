"""``python -m fastattn.testing.self_check BACKEND DEVICE``: check a backend on this GPU; ``evidence.py`` runs it.

Its problems have the most common head dims and features, so the kernels that it compiles, in several processes, are
those that first calls need. Exit code 0: all results are right. 3: the backend ran and a result is wrong. Any other: it
could not run. The last line of output gives the reason.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Iterator, Sequence

import torch

from fastattn.backends import load
from fastattn.backends.base import Backend
from fastattn.evidence import AHEAD, COMPILED, STARTED, WRONG_RESULT
from fastattn.problem import Problem
from fastattn.testing.caches import make_cache_sample, measure_cache
from fastattn.testing.check_cases import CACHE_CASES, CASES, DERIVED
from fastattn.testing.derivatives import measure_derivatives
from fastattn.testing.fp8 import measure_fp8
from fastattn.testing.inputs import make
from fastattn.testing.precompile import CHECK, compile_ahead
from fastattn.testing.statistics import measure_statistics
from fastattn.testing.tolerance import Row, measure

TRITON_INTERPRETS = os.environ.get("TRITON_INTERPRET") == "1"


def self_check(backend: str, device: str, dtype: torch.dtype = torch.bfloat16) -> list[str]:
    """Run the self-check and return a line for each result outside the tolerance.

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
    of_derived = make(dataclasses.replace(DERIVED, dtype=dtype), device=device)
    judges = {"jvp": measure_derivatives, "statistics": measure_statistics, "fp8": measure_fp8}
    for feature, judged in judges.items():
        if not backend.unsupported_reasons(Problem.of(of_derived.inputs, of_derived.spec, also=(feature,))):
            yield f"{feature}, {DERIVED.id}", judged(backend, of_derived)
    if "cache" in backend.capabilities.features:
        for of_cache in CACHE_CASES:
            sample = make_cache_sample(dataclasses.replace(of_cache, dtype=dtype), device)
            yield of_cache.id, measure_cache(backend, sample)


# --- the process --------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str]) -> int:
    backend, device = arguments
    try:
        if device.startswith("cuda"):
            torch.cuda.set_device(device)
            torch.zeros(1, device=device)  # creates a context, which may fail
        print(STARTED, flush=True)
        if backend == "triton" and not TRITON_INTERPRETS:
            compile_ahead(device, CHECK)
        print(COMPILED, flush=True)
        wrong = self_check(backend, device)
    except Exception as error:  # the process that started this one reports the last line
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
