"""``python -m fastattn.testing.self_check BACKEND DEVICE``: is the backend right on this GPU? Seconds; see evidence.py.

Exit code 0: right. 3: it ran and is wrong. Anything else: it could not run. The last line of output says why.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch

from fastattn.backends import load
from fastattn.backends.evidence import WRONG_RESULT
from fastattn.testing.cases import grid
from fastattn.testing.inputs import make
from fastattn.testing.tolerance import measure

CASES = ("gqa of three", "everything", "everything, packed")


def self_check(backend: str, device: str, dtype: torch.dtype = torch.bfloat16) -> list[str]:
    """What is wrong: a line for each result outside the tolerance; [] if the backend is right.

    Args:
        backend: its name.
        device: where to run it.
        dtype: of q, k and v.
    """
    wrong = []
    for case in grid((dtype,)):
        if case.id.removesuffix(f" [{str(dtype).removeprefix('torch.')}]") in CASES:
            rows = measure(load(backend), make(case, device=device))
            wrong += [
                f"{case.id}: {row.name} is off by {row.error:.3g}, at most {row.bound:.3g}"
                for row in rows
                if not row.ok
            ]
    return wrong


def main(arguments: Sequence[str]) -> int:
    backend, device = arguments
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
    wrong = self_check(backend, device)
    print("\n".join(wrong) if wrong else "passed")
    return WRONG_RESULT if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
