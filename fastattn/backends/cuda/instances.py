"""Which kernels exist: ``csrc/instances.inc`` as objects, and which of them serves a problem.

Only the standard library is imported: ``setup.py``, the gates and the emulator read this before torch is there.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

DTYPES = ("bfloat16", "float16")  # in the order of Dtype in csrc/params.h
TAGS = {"bfloat16": "Bf16", "float16": "F16"}


def source_folder() -> Path:
    """``csrc/``: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).parents[2]
    installed = package / "csrc"
    return installed if installed.is_dir() else package.parent / "csrc"


@dataclass(frozen=True)
class Tile:
    """A line of ``instances.inc``; the fields are its numbers, in order."""

    d_qk: int
    d_v: int
    band: int
    softcap: int
    block_m: int
    block_n: int
    stages: int
    pingpong: int

    @property
    def numbers(self) -> tuple[int, ...]:
        return (
            self.d_qk, self.d_v, self.band, self.softcap, self.block_m, self.block_n, self.stages, self.pingpong,
        )  # fmt: skip

    @property
    def threads(self) -> int:
        """Of a block: one producer warpgroup, and a consumer for each 64 query rows."""
        return 128 * (self.block_m // 64 + 1)

    def serves(self, d_qk: int, d_v: int, band: bool, softcap: bool) -> bool:
        return d_qk <= self.d_qk and d_v <= self.d_v and band <= self.band and softcap <= self.softcap


@dataclass(frozen=True)
class Instance:
    """A kernel: a tile for a dtype."""

    tile: Tile
    dtype: str

    @property
    def name(self) -> str:
        t = self.tile
        form = "softcap" if t.softcap else "band" if t.band else "full"
        return f"forward_{self.dtype}_{t.d_qk}_{t.d_v}_{form}_{t.block_m}x{t.block_n}"

    @property
    def traits(self) -> str:
        """The C++ type that stands for it: csrc/sm90/traits.h."""
        t = self.tile
        flags = ", ".join("true" if flag else "false" for flag in (t.pingpong, t.band, t.softcap))
        sizes = f"{t.d_qk}, {t.d_v}, {t.block_m}, {t.block_n}, {t.stages}"
        return f"fa::sm90::ForwardTraits<fa::sm90::{TAGS[self.dtype]}, {sizes}, {flags}>"


def forward_tiles(folder: Path | None = None) -> list[Tile]:
    """Every line of the table, in order."""
    text = ((folder or source_folder()) / "instances.inc").read_text()
    lines = re.findall(r"^FORWARD\(([\d, ]+)\)$", text, flags=re.MULTILINE)
    return [Tile(*map(int, line.split(","))) for line in lines]


def forward_instances(folder: Path | None = None) -> list[Instance]:
    return [Instance(tile, dtype) for tile in forward_tiles(folder) for dtype in DTYPES]


def select(tiles: list[Tile], d_qk: int, d_v: int, band: bool, softcap: bool) -> Tile:
    """The first line that holds the problem; the host code of the library chooses in the same way."""
    return next(tile for tile in tiles if tile.serves(d_qk, d_v, band, softcap))
