"""The configuration of each kernel: the lookup in ``table.py``.

Triton compiles one kernel for each dtype, pair of head dims and set of features in use (``arguments.Flags``). A
program that trains one causal model compiles four (forward, backward_preprocess, backward_dkdv, backward_dq), one
that only runs it compiles one. dbias and dsinks add one each, masks, segments and intervals the one to three small
kernels of ``prescan.py``; rows with 1, 2, up to 4 and more intervals are compiled apart. Decoding compiles one kernel
for each height of its tile (16, 32 or 64 packed query rows), another one for several splits with the one that combines
them, and one that stores new rows. Each takes 1 to 5 seconds, once per machine (Triton caches them on disk). Lengths,
strides, batch and head counts, page sizes and the number of splits are run-time arguments and recompile nothing, as
``tests/backends/triton/test_gates.py`` asserts. Two properties of memory double the count where they vary: whether rows
of q, k and v begin at multiples of 8 elements, and whether those of bias or mask do. Programs that share a group of
query heads add two kernels, head dims above 256 one, prompts against a cache one.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable
from typing import NamedTuple

from fastattn.backends.triton.table import TABLE

# Features that need registers. A kernel with one of them in use takes the row "<kernel> one", with two or three
# "<kernel> several", with more "<kernel> many", if the table has such a row, or else the one with fewer of them.
REGISTER_HEAVY = frozenset({"mask", "bias", "softcap", "alibi", "segments", "dropout"})
DEFAULT = "default"
ALWAYS = {"enable_fp_fusion": True}  # compiler options; the default of this one changes between versions of Triton


class Config(NamedTuple):
    """A kernel's tile, ``block_m`` query rows and ``block_n`` key rows, and its warps and pipeline stages.

    ``block_n`` is 16 or a multiple of 32, as dropout needs. In decoding ``block_m`` is an upper limit: fewer rows take
    a smaller power of two.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


INTERPRETED = Config(64, 32, 4, 1)  # its time follows the number of tiles, not their size


@functools.cache
def config_for(arch: str, kernel: str, bits: int, head_dim: int, features: frozenset[str] = frozenset()) -> Config:
    """The configuration of the row that ``row_for`` finds."""
    return INTERPRETED if arch == "interpreter" else Config(*TABLE[row_for(arch, kernel, bits, head_dim, features)])


def row_for(arch: str, kernel: str, bits: int, head_dim: int, features: Iterable[str]) -> tuple[str, str, int, int]:
    """The row with the least head dim that is not below ``head_dim``.

    Args:
        arch: from ``arch_name``.
        kernel: "forward", "backward_dkdv", "backward_dq", "backward_dbias" or "decode".
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
    """The kinds of rows that serve a kernel with these features in use, in order of preference."""
    features = frozenset(features)
    count = len(REGISTER_HEAVY & features)
    if "paged" in features and "e4m3" not in features and not count:
        return [f"{kernel} paged", kernel]  # the look-up of pages takes a stage of the pipeline
    if kernel == "forward" and "e4m3" in features and count:
        return [f"{kernel} e4m3", *kinds_of(kernel, features - {"e4m3"})]  # decoding its bytes takes registers, too
    kinds = [f"{kernel} many", f"{kernel} several", f"{kernel} one", kernel]
    return kinds[0 if count > 3 else 3 - min(count, 2) :]


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
