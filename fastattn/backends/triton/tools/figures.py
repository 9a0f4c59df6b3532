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

# Of a multiprocessor: registers, and bytes of shared memory that the system takes for each block.
CUDA_REGISTERS, RESERVED_SHARED = 65536, 1024


@dataclass(frozen=True)
class Figures:
    """Figures from the machine code of a build; ``error`` if it does not compile.

    ``repeats`` is how often tensor cores compute a product, on average: if a tile has too few rows or columns for all
    warps, some repeat the work of others. ``sync_loads`` counts loads in loops that are not pipelined, whose latency
    delays every step; ``conversions`` counts changes of layout in loops, which go through shared memory; ``programs``
    is the number of programs that a multiprocessor holds at a time, 0 if unknown (AMD). ``code`` is
    ``compiler.code_of`` the launch.
    """

    registers: int = 0
    stack: int = 0
    shared: int = 0
    tensor_core: int = 0
    repeats: float = 1.0
    sync_loads: int = 0
    conversions: int = 0
    programs: int = 0
    config: tuple[int, ...] = ()
    code: str = ""
    seconds: float = 0.0
    error: str | None = None


def read(kernel: Any, target: Target, tensor_core: str) -> Figures:
    if target.backend == "cuda" and (narrow := narrow_products_in(kernel.asm["ttgir"])):
        raise RuntimeError(f"a product over fewer elements than a row of threads holds is wrong: {narrow[0]}")
    loops = loops_in(kernel.asm["ttgir"])
    of_ttgir: dict[str, Any] = {
        "repeats": repeats_in(kernel.asm["ttgir"]),
        "sync_loads": sum("tt.load " in line for line in loops),
        "conversions": sum("ttg.convert_layout" in line for line in loops),
    }
    if target.backend == "hip":
        text = kernel.asm["amdgcn"]
        number = {name: int(re.search(rf"\.{name}:\s+(\d+)", text)[1]) for name in _HIP}  # type: ignore[index]
        # scalar registers spill into lanes of vector registers, which costs no memory
        stack = number["private_segment_fixed_size"] + 4 * number["vgpr_spill_count"]
        return Figures(number["vgpr_count"], stack, kernel.metadata.shared, text.count("v_mfma"), **of_ttgir)
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = subprocess.run([tools / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True)
        code = subprocess.run([tools / "nvdisasm", "-c", file.name], capture_output=True, text=True).stdout
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage.stdout + usage.stderr).groups())  # type: ignore[union-attr]
    products = len(re.findall(rf"\b({tensor_core})", code))
    shared, warps = kernel.metadata.shared, kernel.metadata.num_warps
    programs = programs_of(registers, shared, warps, target)
    return Figures(registers, stack, shared, products, **of_ttgir, programs=programs)


def programs_of(registers: int, shared: int, warps: int, target: Target) -> int:
    """The programs of a kernel that an NVIDIA multiprocessor holds; a warp takes registers in units of 256."""
    of_warp = -(-registers * target.warp_size // 256) * 256
    by_registers = CUDA_REGISTERS // (of_warp * warps)
    # each block takes a kilobyte of shared memory for the system
    by_shared = (target.shared_limit + RESERVED_SHARED) // (shared + RESERVED_SHARED)
    return min(by_registers, by_shared, target.most_warps // warps)


def loops_in(ttgir: str) -> list[str]:
    """The lines that stand in a loop; where loops nest, those of the innermost ones."""
    innermost, open_loops = [], list[tuple[str, list[str]]]()
    for line in ttgir.splitlines():
        indent = line[: len(line) - len(line.lstrip())]
        if open_loops and indent == open_loops[-1][0] and line.lstrip().startswith("}"):
            innermost += open_loops.pop()[1]
            for _, outer in open_loops:
                outer.clear()  # it contains a loop, so its own lines run less often
            continue
        if open_loops:
            open_loops[-1][1].append(line)
        if re.search(r"\bscf\.(for|while)\b", line):
            open_loops.append((indent, []))
    return innermost


def narrow_products_in(ttgir: str) -> list[str]:
    """Left operands of ``mma.sync`` with fewer than four times ``kWidth`` elements along the sum: Triton 3.6 and 3.7
    count some of them twice and others not at all. ``operands.left_operand`` avoids them."""
    found = re.findall(r"tensor<\d+x(\d+)x\w+, #ttg\.dot_op<\{opIdx = 0, parent = \S+, kWidth = (\d+)\}>>", ttgir)
    return [f"{size} elements, kWidth {width}" for size, width in found if int(size) < 4 * int(width)]


def repeats_in(ttgir: str) -> float:
    """``Figures.repeats``. Products on Blackwell do not belong to warps and are ignored."""
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
