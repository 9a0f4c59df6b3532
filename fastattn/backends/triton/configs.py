"""Which tile a kernel uses where: the lookup in ``table.py``.

How many kernels get compiled: one for each dtype, pair of head dims and set of features in use
(``arguments.Flags``), and nothing else. So a program that trains one causal model compiles four (forward, delta, dkdv,
dq), one that only runs it one. On top come dbias, dsinks, and for masks and segments the one or two small kernels of
``prescan.py``. Decoding compiles one kernel for each height of its tile that is asked for (16, 32 or 64 packed rows of
queries), twice if keys are cut into parts, with one that combines them, and one that stores new rows. Each takes
1 to 5 seconds, once for a machine (Triton keeps them on disk). Lengths, strides, batch and head counts, page sizes and
the number of parts are run-time arguments: they compile nothing anew (``tests/backends/triton/test_gates.py``). Two
facts about memory double the count where they vary: whether rows of q, k and v begin at multiples of 8 elements, and
whether those of bias or mask do.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable
from typing import NamedTuple

from fastattn.backends.triton.table import TABLE

# Features that hold registers: with one of them a kernel takes the row of its heavy kind, "forward heavy", with more
# that of its crowded kind, where the table has such a row.
CROWDING = frozenset({"mask", "bias", "softcap", "alibi", "segments", "dropout"})
DEFAULT = "default"


class Tile(NamedTuple):
    """``BLOCK_M`` query rows and ``BLOCK_N`` key rows; ``BLOCK_N`` is 16 or a multiple of 32, as dropout needs.

    Of decoding ``block_m`` is the most rows: fewer take a smaller power of two.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


INTERPRETED = Tile(64, 32, 4, 1)  # its time follows the number of tiles, not their size


@functools.cache
def tile_for(arch: str, kernel: str, bits: int, head_dim: int, features: frozenset[str] = frozenset()) -> Tile:
    """The tile of the row that ``row_for`` finds."""
    return INTERPRETED if arch == "interpreter" else Tile(*TABLE[row_for(arch, kernel, bits, head_dim, features)])


def row_for(arch: str, kernel: str, bits: int, head_dim: int, features: Iterable[str]) -> tuple[str, str, int, int]:
    """The row with the least head dim that is not below ``head_dim``.

    Args:
        arch: from ``arch_name``.
        kernel: "forward", "dkdv", "dq", "dbias" or "decode".
        bits: of an element of q.
        head_dim: the larger of ``D_qk`` and ``D_v``.
        features: those in use, as ``problem.FEATURES`` names them.
    """
    least = min((d for a, k, b, d in TABLE if (k, b) == (kernel, bits) and a in (arch, DEFAULT) and d >= head_dim))
    for where, kind in itertools.product((arch, DEFAULT), kinds_of(kernel, features)):
        if (where, kind, bits, least) in TABLE:
            return where, kind, bits, least
    raise KeyError((arch, kernel, bits, head_dim))


def kinds_of(kernel: str, features: Iterable[str]) -> list[str]:
    """The kinds of rows that serve a kernel with these features in use, the one to prefer first."""
    crowd = len(CROWDING.intersection(features))
    return [f"{kernel} crowded", f"{kernel} heavy", kernel][2 - min(crowd, 2) :]


def arch_name(backend: str, arch: int | str) -> str:
    """The rows of the table that serve a Triton target: its own, or the default ones."""
    name = chip_name(backend, arch)
    return name if any(name == of for of, *_ in TABLE) else DEFAULT


def chip_name(backend: str, arch: int | str) -> str:
    """The name under which the table may have rows for a Triton target: ``("cuda", 90)`` or ``("hip", "gfx942")``.

    Consumer chips have less shared memory than the data-centre chip of their generation, and names of their own.
    """
    if backend == "hip":
        return "gfx942" if str(arch).startswith(("gfx90a", "gfx94", "gfx95")) else str(arch)
    return "sm_100" if int(arch) == 103 else f"sm_{arch}"
