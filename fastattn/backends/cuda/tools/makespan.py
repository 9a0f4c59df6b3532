"""How evenly the kernels' schedulers share out work, by their own code: ``csrc/proofs/makespan.cpp``, made by g++."""

from __future__ import annotations

import functools
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fastattn import compiled
from fastattn.backends import native
from fastattn.backends.cuda.abi import even_passes
from fastattn.compiled import BuildError

MULTIPROCESSORS = 132  # of an H200
FLAGS = ("-std=c++17", "-O1", "-DFA_EMULATE")
NAME = "makespan.cpp"


@dataclass(frozen=True)
class Shape:
    """Sizes of a problem in 16 bits. ``left`` and ``right`` are the band, from the lower right corner; None: no limit.

    Attributes:
        lengths: of queries and keys of each packed sequence; None for a dense batch.
        terms: names of terms that the kernels look up pair by pair, as in ``problem.FEATURES``.
    """

    batch: int
    s_q: int
    s_kv: int
    heads_q: int
    heads_kv: int
    d_qk: int
    d_v: int
    left: int | None = None
    right: int | None = None
    softcap: bool = False
    lengths: tuple[tuple[int, int], ...] | None = None
    terms: tuple[str, ...] = ()

    @property
    def pairs(self) -> tuple[tuple[int, int], ...]:
        """The lengths of queries and keys of each sequence."""
        return self.lengths or ((self.s_q, self.s_kv),) * self.batch

    def heads_per_pass(self, of_keys: bool) -> int:
        """Heads worked on together, as ``abi`` has them: query heads, or of a kernel that owns keys, K/V heads."""
        group = self.heads_q // self.heads_kv
        rows = max(q * group if of_keys else kv for q, kv in self.pairs)
        heads = self.heads_kv * (1 if self.lengths else self.batch)
        return even_passes(heads, rows * (self.d_qk + self.d_v) * 2) * (1 if of_keys else group)


@dataclass(frozen=True)
class Work:
    """A kernel's tiles of a problem: ``kernel`` is forward, dkdv or dq, ``rows`` and ``keys`` are the sizes of a tile.

    Attributes:
        blocks: thread blocks that run at a time.
        overhead: what a tile costs besides its blocks of the other side, in such blocks.
        parts: dkdv has a block for every query head.
    """

    kernel: str
    shape: Shape
    rows: int
    keys: int
    blocks: int = MULTIPROCESSORS
    overhead: float = 1.0
    parts: bool = False

    def line(self) -> str:
        """The problem as the program reads it."""
        x = self.shape
        band = [-1 if side is None else side for side in (x.left, x.right)]
        lengths = x.lengths or ((x.s_q, x.s_kv),)
        numbers = [self.blocks, self.rows, self.keys, int(x.lengths is not None), len(x.pairs), x.heads_q, x.heads_kv]
        numbers += [*band, x.heads_per_pass(self.kernel == "dkdv"), int(self.parts)]
        text = [self.kernel, *map(str, numbers), str(self.overhead), *(str(n) for pair in lengths for n in pair)]
        return " ".join(text)


@dataclass(frozen=True)
class Share:
    """How work is shared out, in blocks: the longest share and the mean; and the ideal, since a tile is not divided.

    ``ideal`` is the largest of the mean, the longest tile, and the shortest tile times the tiles that some block takes.
    """

    tiles: int
    most_taken: int
    makespan: float
    mean: float
    ideal: float

    @property
    def imbalance(self) -> float:
        """The makespan as a multiple of the mean."""
        return self.makespan / self.mean if self.mean else 1.0


@functools.cache
def _program() -> tuple[tempfile.TemporaryDirectory[str], Path]:
    source = native.source_folder()
    folder = tempfile.TemporaryDirectory()
    program = Path(folder.name, "makespan")
    command = ["g++", *FLAGS, f"-I{source}", str(source / "proofs" / NAME), "-o", str(program)]
    try:
        code, said = compiled.run(command)
    except FileNotFoundError:
        raise BuildError("g++ was not found, which compiles the schedulers for a CPU") from None
    if code:
        raise BuildError(f"{NAME} does not compile:\n{said}")
    return folder, program


def shares(works: Sequence[Work]) -> list[Share]:
    """The share of each, in order.

    Raises:
        BuildError: the program cannot be compiled here.
    """
    _, program = _program()
    text = "\n".join(work.line() for work in works)
    printed = subprocess.run([program], input=text, capture_output=True, text=True, check=True).stdout
    rows = [line.split() for line in printed.splitlines()]
    return [Share(int(row[0]), int(row[1]), *map(float, row[2:])) for row in rows]
