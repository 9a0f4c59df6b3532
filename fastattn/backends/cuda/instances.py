"""Which kernels exist: ``csrc/sm90/instances.inc`` as objects, and which of them serves a problem.

Only the standard library is imported: ``setup.py``, the gates and the emulator read this before torch is there.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import ClassVar, TypeVar

DTYPES = ("bfloat16", "float16")  # in the order of Dtype in csrc/common/params.h
TAGS = {"bfloat16": "Bf16", "float16": "F16"}
ROW_THREADS = 256  # kRowThreads of csrc/sm90/rows.cuh
PADDED_ROWS = 128  # kPaddedRows of csrc/common/params.h


@dataclass(frozen=True)
class Tile:
    """A FORWARD line of ``instances.inc``; the fields are its numbers, in order."""

    d_qk: int
    d_v: int
    band: int
    softcap: int
    block_m: int
    block_n: int
    stages: int
    pingpong: int

    macro: ClassVar[str] = "FORWARD"
    header: ClassVar[str] = "sm90/forward.cuh"
    arguments: ClassVar[str] = "ForwardArgs"
    function: ClassVar[str] = "forward"
    launcher: ClassVar[str] = "launch_forward"
    launcher_arguments: ClassVar[str] = "fa::ForwardParams const&, fa::MakeMaps, int, cudaStream_t"

    @property
    def numbers(self) -> tuple[int, ...]:
        return astuple(self)

    @property
    def threads(self) -> int:
        """Of a block: one producer warpgroup, and a consumer for each 64 query rows."""
        return 128 * (self.block_m // 64 + 1)

    @property
    def label(self) -> str:
        """What tells its kernels from others of the same macro and dtype."""
        form = "softcap" if self.softcap else "band" if self.band else "full"
        return f"{self.d_qk}_{self.d_v}_{form}_{self.block_m}x{self.block_n}"

    def traits(self, tag: str) -> str:
        """The C++ type that stands for it: csrc/sm90/traits.h."""
        sizes = f"{self.d_qk}, {self.d_v}, {self.block_m}, {self.block_n}, {self.stages}"
        return f"fa::sm90::ForwardTraits<fa::sm90::{tag}, {sizes}, {_flags(self.pingpong, self.band, self.softcap)}>"

    def serves(self, d_qk: int, d_v: int, band: bool, softcap: bool) -> bool:
        return d_qk <= self.d_qk and d_v <= self.d_v and band <= self.band and softcap <= self.softcap


@dataclass(frozen=True)
class KeysTile:
    """A KEYS line: dk and dv of ``block_n`` keys, and if it is fused their part of dq."""

    d_qk: int
    d_v: int
    softcap: int
    block_m: int
    block_n: int
    stages: int
    fused: int

    macro: ClassVar[str] = "KEYS"
    header: ClassVar[str] = "sm90/keys.cuh"
    arguments: ClassVar[str] = "BackwardArgs"
    function: ClassVar[str] = "differentiate_keys"
    launcher: ClassVar[str] = "launch_keys"
    launcher_arguments: ClassVar[str] = "fa::BackwardParams const&, fa::MakeBackwardMaps, cudaStream_t"
    threads: ClassVar[int] = 384

    @property
    def numbers(self) -> tuple[int, ...]:
        return astuple(self)

    @property
    def is_split(self) -> bool:
        """Whether one consumer sums dv, the other dk."""
        return self.block_n == 64

    @property
    def label(self) -> str:
        form = ("fused" if self.fused else "alone") + ("_softcap" if self.softcap else "")
        return f"{self.d_qk}_{self.d_v}_{form}_{self.block_m}x{self.block_n}"

    def traits(self, tag: str) -> str:
        """The C++ type that stands for it: csrc/sm90/backward_traits.h."""
        sizes = f"{self.block_m}, {self.block_n}, {self.stages}, {_flags(self.fused)}"
        return f"fa::sm90::KeysTraits<fa::sm90::{tag}, {self.d_qk}, {self.d_v}, {_flags(self.softcap)}, {sizes}>"

    def serves(self, d_qk: int, d_v: int, softcap: bool, fused: bool) -> bool:
        return d_qk <= self.d_qk and d_v <= self.d_v and softcap <= self.softcap and fused == self.fused


@dataclass(frozen=True)
class QueriesTile:
    """A QUERIES line: dq of 128 query rows."""

    d_qk: int
    d_v: int
    softcap: int
    block_n: int
    k_stages: int
    v_stages: int

    macro: ClassVar[str] = "QUERIES"
    header: ClassVar[str] = "sm90/queries.cuh"
    arguments: ClassVar[str] = "BackwardArgs"
    function: ClassVar[str] = "differentiate_queries"
    launcher: ClassVar[str] = "launch_queries"
    launcher_arguments: ClassVar[str] = KeysTile.launcher_arguments
    threads: ClassVar[int] = 384
    block_m: ClassVar[int] = 128

    @property
    def numbers(self) -> tuple[int, ...]:
        return astuple(self)

    @property
    def label(self) -> str:
        form = "softcap" if self.softcap else "plain"
        return f"{self.d_qk}_{self.d_v}_{form}_{self.block_m}x{self.block_n}"

    def traits(self, tag: str) -> str:
        """The C++ type that stands for it: csrc/sm90/backward_traits.h."""
        sizes = f"{self.block_n}, {self.k_stages}, {self.v_stages}"
        return f"fa::sm90::QueriesTraits<fa::sm90::{tag}, {self.d_qk}, {self.d_v}, {_flags(self.softcap)}, {sizes}>"

    def serves(self, d_qk: int, d_v: int, softcap: bool) -> bool:
        return d_qk <= self.d_qk and d_v <= self.d_v and softcap <= self.softcap


@dataclass(frozen=True)
class RowsTile:
    """One of the small kernels of csrc/sm90/rows.cuh: "prepare", "sinks", or "finish" after a fused kernel."""

    function: str
    after: KeysTile | None = None

    header: ClassVar[str] = "sm90/rows.cuh"
    arguments: ClassVar[str] = "BackwardParams"
    macro: ClassVar[str] = "ROWS"
    launcher: ClassVar[str] = "launch_rows"
    launcher_arguments: ClassVar[str] = "fa::BackwardParams const&, cudaStream_t"
    threads: ClassVar[int] = ROW_THREADS

    @property
    def label(self) -> str:
        return self.function if self.after is None else f"{self.function}_{self.after.label}"

    def traits(self, tag: str) -> str:
        return f"fa::sm90::{tag}" if self.after is None else self.after.traits(tag)


@dataclass(frozen=True)
class DecodeTile:
    """A DECODE line: 64 query rows, or query heads of one K/V head, against a cache."""

    d_qk: int
    d_v: int
    softcap: int
    block_n: int
    stages: int

    macro: ClassVar[str] = "DECODE"
    header: ClassVar[str] = "sm90/decode.cuh"
    arguments: ClassVar[str] = "DecodeArgs"
    function: ClassVar[str] = "decode"
    launcher: ClassVar[str] = "launch_decode"
    launcher_arguments: ClassVar[str] = "fa::DecodeParams const&, fa::MakeDecodeMaps, cudaStream_t"
    threads: ClassVar[int] = 256
    block_m: ClassVar[int] = 64

    @property
    def numbers(self) -> tuple[int, ...]:
        return astuple(self)

    @property
    def label(self) -> str:
        form = "softcap" if self.softcap else "plain"
        return f"{self.d_qk}_{self.d_v}_{form}_{self.block_m}x{self.block_n}"

    def traits(self, tag: str) -> str:
        """The C++ type that stands for it: csrc/sm90/decode.h."""
        sizes = f"{self.block_n}, {self.stages}"
        return f"fa::sm90::DecodeTraits<fa::sm90::{tag}, {self.d_qk}, {self.d_v}, {_flags(self.softcap)}, {sizes}>"

    def serves(self, d_qk: int, d_v: int, softcap: bool) -> bool:
        return d_qk <= self.d_qk and d_v <= self.d_v and softcap <= self.softcap


@dataclass(frozen=True)
class CombineTile:
    """The kernel that puts splits together."""

    header: ClassVar[str] = "sm90/combine.cuh"
    arguments: ClassVar[str] = "DecodeParams"
    macro: ClassVar[str] = "COMBINE"
    function: ClassVar[str] = "combine"
    label: ClassVar[str] = "splits"
    launcher: ClassVar[str] = "launch_combine"
    launcher_arguments: ClassVar[str] = "fa::DecodeParams const&, cudaStream_t"
    threads: ClassVar[int] = 128

    def traits(self, tag: str) -> str:
        return f"fa::sm90::{tag}"


AnyTile = Tile | KeysTile | QueriesTile | RowsTile | DecodeTile | CombineTile
TABLED = TypeVar("TABLED", Tile, KeysTile, QueriesTile, DecodeTile)
PREPARE, SINKS = RowsTile("prepare_rows"), RowsTile("differentiate_sink")
COMBINE = CombineTile()


@dataclass(frozen=True)
class Instance:
    """A kernel: a tile for a dtype."""

    tile: AnyTile
    dtype: str

    @property
    def name(self) -> str:
        return f"{self.tile.macro.lower()}_{self.dtype}_{self.tile.label}"

    @property
    def traits(self) -> str:
        return self.tile.traits(TAGS[self.dtype])


def _flags(*flags: int) -> str:
    return ", ".join("true" if flag else "false" for flag in flags)


def _lines(kind: type[TABLED], folder: Path | None) -> list[TABLED]:
    if folder is None:
        from fastattn.backends.native import source_folder  # here, because setup.py reads this file alone

        folder = source_folder()
    text = (folder / "sm90" / "instances.inc").read_text()
    lines = re.findall(rf"^{kind.macro}\(([\d, ]+)\)$", text, flags=re.MULTILINE)
    return [kind(*map(int, line.split(","))) for line in lines]


def forward_tiles(folder: Path | None = None) -> list[Tile]:
    """Every FORWARD line of the table, in order."""
    return _lines(Tile, folder)


def keys_tiles(folder: Path | None = None) -> list[KeysTile]:
    return _lines(KeysTile, folder)


def queries_tiles(folder: Path | None = None) -> list[QueriesTile]:
    return _lines(QueriesTile, folder)


def decode_tiles(folder: Path | None = None) -> list[DecodeTile]:
    return _lines(DecodeTile, folder)


def forward_instances(folder: Path | None = None) -> list[Instance]:
    return [Instance(tile, dtype) for tile in forward_tiles(folder) for dtype in DTYPES]


def backward_instances(folder: Path | None = None) -> list[Instance]:
    """The large kernels of the backward pass."""
    tiles: Sequence[AnyTile] = [*keys_tiles(folder), *queries_tiles(folder)]
    return [Instance(tile, dtype) for tile in tiles for dtype in DTYPES]


def decode_instances(folder: Path | None = None) -> list[Instance]:
    return [Instance(tile, dtype) for tile in decode_tiles(folder) for dtype in DTYPES]


def library_instances(folder: Path | None = None) -> list[Instance]:
    """One for each file of the library: what ``launcher`` is instantiated for."""
    small = [Instance(tile, dtype) for tile in (PREPARE, COMBINE) for dtype in DTYPES]
    return [*forward_instances(folder), *backward_instances(folder), *decode_instances(folder), *small]


def select(tiles: list[Tile], d_qk: int, d_v: int, band: bool, softcap: bool) -> Tile:
    """The first line that holds the problem; the host code of the library chooses in the same way."""
    return next(tile for tile in tiles if tile.serves(d_qk, d_v, band, softcap))


def select_keys(tiles: list[KeysTile], d_qk: int, d_v: int, softcap: bool, fused: bool) -> KeysTile | None:
    """The first line that holds the problem; None if there is no fused kernel for it."""
    return next((tile for tile in tiles if tile.serves(d_qk, d_v, softcap, fused)), None)


def select_queries(tiles: list[QueriesTile], d_qk: int, d_v: int, softcap: bool) -> QueriesTile:
    return next(tile for tile in tiles if tile.serves(d_qk, d_v, softcap))


def select_decode(tiles: list[DecodeTile], d_qk: int, d_v: int, softcap: bool) -> DecodeTile:
    return next(tile for tile in tiles if tile.serves(d_qk, d_v, softcap))
