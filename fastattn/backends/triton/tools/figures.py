"""Figures of a compiled kernel, read from its machine code and its TTGIR."""

from __future__ import annotations

import re
import statistics
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastattn.backends.triton.tools.builds import Target


@dataclass(frozen=True)
class Figures:
    """Figures from the machine code of a build; ``error`` if it does not compile.

    ``repeats`` is how often tensor cores compute a product, on average: warps for which a tile has no rows or columns
    left repeat what others do.
    """

    registers: int = 0
    stack: int = 0
    shared: int = 0
    tensor_core: int = 0
    repeats: float = 1.0
    config: tuple[int, ...] = ()
    seconds: float = 0.0
    error: str | None = None


def read(kernel: Any, target: Target, tensor_core: str) -> Figures:
    repeats = repeats_in(kernel.asm["ttgir"])
    if target.backend == "hip":
        text = kernel.asm["amdgcn"]
        number = {name: int(re.search(rf"\.{name}:\s+(\d+)", text)[1]) for name in _HIP}  # type: ignore[index]
        # scalar registers spill into lanes of vector registers, which costs no memory
        stack = number["private_segment_fixed_size"] + 4 * number["vgpr_spill_count"]
        return Figures(number["vgpr_count"], stack, kernel.metadata.shared, text.count("v_mfma"), repeats)
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = subprocess.run([tools / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True)
        code = subprocess.run([tools / "nvdisasm", "-c", file.name], capture_output=True, text=True).stdout
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage.stdout + usage.stderr).groups())  # type: ignore[union-attr]
    products = len(re.findall(rf"\b({tensor_core})", code))
    return Figures(registers, stack, kernel.metadata.shared, products, repeats)


def repeats_in(ttgir: str) -> float:
    """See ``Figures``. Products on Blackwell, which no warp owns, are not looked at."""
    covered = {}  # by all warps of a layout together: rows, columns
    for name, *warps, rows, columns in re.findall(_LAYOUT, ttgir):
        covered[name] = int(warps[0]) * int(rows), int(warps[1]) * int(columns)
    found = []
    for rows, columns, layout in re.findall(_PRODUCT, ttgir):
        if layout in covered:
            of_rows, of_columns = covered[layout]
            found.append(max(1, of_rows / int(rows)) * max(1, of_columns / int(columns)))
    return round(statistics.mean(found), 2) if found else 1.0


_LAYOUT = r"(#\w+) = #ttg\.(?:nvidia_mma|amd_mfma)<.*warpsPerCTA = \[(\d+), (\d+)\].*instrShape = \[(\d+), (\d+)"
_PRODUCT = r"(?:tt\.dot|warp_group_dot) .*-> tensor<(\d+)x(\d+)xf32, (#\w+)>"
_HIP = ("vgpr_count", "private_segment_fixed_size", "vgpr_spill_count")
