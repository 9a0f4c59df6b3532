"""Which tile a kernel uses where: the lookup in ``table.py``."""

from __future__ import annotations

from typing import NamedTuple

from fastattn.backends.triton.table import TABLE

KERNELS = ("forward", "dkdv", "dq", "dbias")
DEFAULT = "default"


class Tile(NamedTuple):
    """``BLOCK_M`` query rows and ``BLOCK_N`` key rows; ``BLOCK_N`` is a multiple of 32, as dropout needs."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


INTERPRETED = Tile(32, 32, 4, 1)


def tile_for(arch: str, kernel: str, bits: int, head_dim: int) -> Tile:
    """The tile of the row for ``(arch, kernel, bits)`` with the least head dim that is not below ``head_dim``."""
    if arch == "interpreter":
        return INTERPRETED
    for where in (arch, DEFAULT):
        dims = [d for (a, k, b, d) in TABLE if (a, k, b) == (where, kernel, bits) and d >= head_dim]
        if dims:
            return Tile(*TABLE[where, kernel, bits, min(dims)])
    raise KeyError((arch, kernel, bits, head_dim))


def arch_name(backend: str, arch: int | str) -> str:
    """The name that the table has for a Triton target: ``("cuda", 90)`` or ``("hip", "gfx942")``.

    Consumer chips have less shared memory than the data-centre chip of their generation, so they take the default.
    """
    if backend == "hip":
        return "gfx942" if str(arch).startswith(("gfx90a", "gfx94", "gfx95")) else DEFAULT
    return {80: "sm_80", 90: "sm_90", 100: "sm_100", 103: "sm_100"}.get(int(arch), DEFAULT)
