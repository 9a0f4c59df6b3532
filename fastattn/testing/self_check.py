"""``python -m fastattn.testing.self_check BACKEND DEVICE``: is the backend right on this GPU? Seconds; see evidence.py.

Exit code 0: it is. 3: it ran with a wrong result. Anything else: it could not run. The last line of output says why.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence

import torch

from fastattn.backends import load
from fastattn.backends.base import Backend
from fastattn.evidence import WRONG_RESULT
from fastattn.testing.caches import cache_grid, make_cache_sample, measure_cache
from fastattn.testing.cases import grid
from fastattn.testing.inputs import make
from fastattn.testing.tolerance import Row, measure

CASES = ("gqa of three", "everything", "everything, packed")
CACHE_CASES = ("everything", "ragged, everything", "e4m3, ragged")  # in pages


def self_check(backend: str, device: str, dtype: torch.dtype = torch.bfloat16) -> list[str]:
    """Run the self-check: a line for each result outside the tolerance; [] if the backend is right.

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
    short = str(dtype).removeprefix("torch.")
    for case in grid((dtype,)):
        if case.id.removesuffix(f" [{short}]") in CASES:
            yield case.id, measure(backend, make(case, device=device))
    if "cache" in backend.capabilities.features:
        for of_cache in cache_grid((dtype,)):
            if of_cache.id.removesuffix(f" [pages of 8, {short}]") in CACHE_CASES:
                yield of_cache.id, measure_cache(backend, make_cache_sample(of_cache, device))


def main(arguments: Sequence[str]) -> int:
    backend, device = arguments
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
    wrong = self_check(backend, device)
    print("\n".join(wrong) if wrong else "passed")
    return WRONG_RESULT if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
