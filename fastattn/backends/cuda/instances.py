"""The kernels: ``csrc/sm90/instances.inc`` as objects, and the selection of one for a problem.

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
ROW_THREADS = 256  # kRowThreads of csrc/sm90/backward.h
PADDED_ROWS = 128  # kPaddedRows of csrc/common/params.h


@dataclass(frozen=True)
class ForwardConfig:
    """A FORWARD line of ``instances.inc``; the fields are its numbers, in order."""

    d_qk: int
    d_v: int
    band: int
    softcap: int
    block_m: int
    block_n: int
    stages: int
    pingpong: int
    terms: int

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
        """A name that differs from all others of the same macro and dtype."""
        form = "terms" if self.terms else "softcap" if self.softcap else "band" if self.band else "full"
        return f"{self.d_qk}_{self.d_v}_{form}_{self.block_m}x{self.block_n}"

    def traits(self, tag: str) -> str:
        """The C++ type that stands for it: csrc/sm90/traits.h."""
        sizes = f"{self.d_qk}, {self.d_v}, {self.block_m}, {self.block_n}, {self.stages}"
        flags = _flags(self.pingpong, self.band, self.softcap, self.terms)
        return f"fa::sm90::ForwardTraits<fa::sm90::{tag}, {sizes}, {flags}>"

    def serves(self, d_qk: int, d_v: int, band: bool, softcap: bool, terms: bool = False) -> bool:
        is_held = d_qk <= self.d_qk and d_v <= self.d_v and band <= self.band and softcap <= self.softcap
        return is_held and terms == self.terms


@dataclass(frozen=True)
class DkdvConfig:
    """A BACKWARD_DKDV line: dk and dv of ``block_n`` keys, and if it is fused their part of dq."""

    d_qk: int
    d_v: int
    softcap: int
    block_m: int
    block_n: int
    stages: int
    fused: int
    terms: int

    macro: ClassVar[str] = "BACKWARD_DKDV"
    header: ClassVar[str] = "sm90/backward_dkdv.cuh"
    arguments: ClassVar[str] = "BackwardArgs"
    function: ClassVar[str] = "backward_dkdv"
    launcher: ClassVar[str] = "launch_backward_dkdv"
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
        form = ("fused" if self.fused else "alone") + _form(self.softcap, self.terms)
        return f"{self.d_qk}_{self.d_v}_{form}_{self.block_m}x{self.block_n}"

    def traits(self, tag: str) -> str:
        """The C++ type that stands for it: csrc/sm90/backward_traits.h."""
        sizes = f"{self.block_m}, {self.block_n}, {self.stages}, {_flags(self.fused, self.terms)}"
        return (
            f"fa::sm90::BackwardDkdvTraits<fa::sm90::{tag}, {self.d_qk}, {self.d_v}, {_flags(self.softcap)}, {sizes}>"
        )

    def serves(self, d_qk: int, d_v: int, softcap: bool, fused: bool, terms: bool = False) -> bool:
        is_held = d_qk <= self.d_qk and d_v <= self.d_v and softcap <= self.softcap
        return is_held and fused == self.fused and terms == self.terms


@dataclass(frozen=True)
class DqConfig:
    """A BACKWARD_DQ line: dq of 128 query rows."""

    d_qk: int
    d_v: int
    softcap: int
    block_n: int
    k_stages: int
    v_stages: int
    terms: int

    macro: ClassVar[str] = "BACKWARD_DQ"
    header: ClassVar[str] = "sm90/backward_dq.cuh"
    arguments: ClassVar[str] = "BackwardArgs"
    function: ClassVar[str] = "backward_dq"
    launcher: ClassVar[str] = "launch_backward_dq"
    launcher_arguments: ClassVar[str] = DkdvConfig.launcher_arguments
    threads: ClassVar[int] = 384
    block_m: ClassVar[int] = 128

    @property
    def numbers(self) -> tuple[int, ...]:
        return astuple(self)

    @property
    def label(self) -> str:
        form = _form(self.softcap, self.terms) or "_plain"
        return f"{self.d_qk}_{self.d_v}{form}_{self.block_m}x{self.block_n}"

    def traits(self, tag: str) -> str:
        """The C++ type that stands for it: csrc/sm90/backward_traits.h."""
        sizes = f"{self.block_n}, {self.k_stages}, {self.v_stages}, {_flags(self.terms)}"
        return f"fa::sm90::BackwardDqTraits<fa::sm90::{tag}, {self.d_qk}, {self.d_v}, {_flags(self.softcap)}, {sizes}>"

    def serves(self, d_qk: int, d_v: int, softcap: bool, terms: bool = False) -> bool:
        return d_qk <= self.d_qk and d_v <= self.d_v and softcap <= self.softcap and terms == self.terms


@dataclass(frozen=True)
class RowwiseConfig:
    """A kernel around the large ones that works row by row.

    These are backward_preprocess and backward_dsinks before them; and after a kernel for dk and dv, which ``after``
    names, backward_postprocess if it is fused, and backward_sum_heads.
    """

    function: str
    after: DkdvConfig | None = None

    arguments: ClassVar[str] = "BackwardParams"
    macro: ClassVar[str] = "ROWWISE"
    launcher: ClassVar[str] = "launch_backward_preprocess"
    launcher_arguments: ClassVar[str] = "fa::BackwardParams const&, cudaStream_t"
    threads: ClassVar[int] = ROW_THREADS

    @property
    def header(self) -> str:
        return "sm90/backward_preprocess.cuh" if self.after is None else f"sm90/{self.function}.cuh"

    @property
    def label(self) -> str:
        return self.function if self.after is None else f"{self.function}_{self.after.label}"

    def traits(self, tag: str) -> str:
        return f"fa::sm90::{tag}" if self.after is None else self.after.traits(tag)


@dataclass(frozen=True)
class PrepareConfig:
    """The kernel before the large ones of a pass with terms: "forward" or "backward"."""

    of: str

    header: ClassVar[str] = "sm90/prepare_terms.cuh"
    macro: ClassVar[str] = "PREPARE"
    function: ClassVar[str] = "prepare_terms"
    launcher: ClassVar[str] = "launch_prepare"
    threads: ClassVar[int] = 256

    @property
    def arguments(self) -> str:
        return f"{self.of.capitalize()}Params"

    @property
    def launcher_arguments(self) -> str:
        return f"fa::{self.arguments} const&, cudaStream_t"

    @property
    def label(self) -> str:
        return self.of

    def traits(self, tag: str) -> str:
        """The C++ type that stands for it: csrc/sm90/prepare_terms.cuh."""
        return f"fa::sm90::PrepareTraits<fa::sm90::{tag}, fa::{self.arguments}>"


@dataclass(frozen=True)
class DecodeConfig:
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
class GatheredConfig:
    """A DECODE_GATHERED line: the same where threads copy the rows of the cache; with ``slots`` it is in e4m3."""

    d_qk: int
    d_v: int
    stages: int
    slots: int

    macro: ClassVar[str] = "DECODE_GATHERED"
    header: ClassVar[str] = "sm90/decode_gathered.cuh"
    arguments: ClassVar[str] = "DecodeParams"
    function: ClassVar[str] = "decode_gathered"
    launcher: ClassVar[str] = "launch_decode_gathered"
    launcher_arguments: ClassVar[str] = "fa::DecodeParams const&, cudaStream_t"
    threads: ClassVar[int] = 256
    block_m: ClassVar[int] = 64
    block_n: ClassVar[int] = 64

    @property
    def numbers(self) -> tuple[int, ...]:
        return astuple(self)

    @property
    def label(self) -> str:
        return f"{self.d_qk}_{self.d_v}_{'e4m3' if self.slots else 'rows'}_{self.block_m}x{self.block_n}"

    def traits(self, tag: str) -> str:
        """The C++ type that stands for it: csrc/sm90/decode.h."""
        return f"fa::sm90::GatheredTraits<fa::sm90::{tag}, {', '.join(map(str, self.numbers))}>"

    def serves(self, d_qk: int, d_v: int, is_e4m3: bool) -> bool:
        return d_qk <= self.d_qk and d_v <= self.d_v and is_e4m3 == (self.slots > 0)


@dataclass(frozen=True)
class CombineConfig:
    """The kernel that combines splits."""

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


@dataclass(frozen=True)
class AppendConfig(CombineConfig):
    """The kernel that stores new keys and values."""

    header: ClassVar[str] = "sm90/append.cuh"
    macro: ClassVar[str] = "APPEND"
    function: ClassVar[str] = "append"
    label: ClassVar[str] = "rows"
    launcher: ClassVar[str] = "launch_append"


AnyConfig = (
    ForwardConfig
    | DkdvConfig
    | DqConfig
    | RowwiseConfig
    | DecodeConfig
    | GatheredConfig
    | CombineConfig
    | PrepareConfig
)
TABLED = TypeVar("TABLED", ForwardConfig, DkdvConfig, DqConfig, DecodeConfig, GatheredConfig)
PREPROCESS, DSINKS = RowwiseConfig("backward_preprocess"), RowwiseConfig("backward_dsinks")
COMBINE, APPEND = CombineConfig(), AppendConfig()
PREPARE_FORWARD, PREPARE_BACKWARD = PrepareConfig("forward"), PrepareConfig("backward")


@dataclass(frozen=True)
class Instance:
    """A kernel: a config for a dtype."""

    config: AnyConfig
    dtype: str

    @property
    def name(self) -> str:
        return f"{self.config.macro.lower()}_{self.dtype}_{self.config.label}"

    @property
    def traits(self) -> str:
        return self.config.traits(TAGS[self.dtype])


def _form(softcap: int, terms: int) -> str:
    """The part of a label that names what a kernel serves besides plain attention."""
    return "_terms" if terms else "_softcap" if softcap else ""


def _flags(*flags: int) -> str:
    return ", ".join("true" if flag else "false" for flag in flags)


def _lines(kind: type[TABLED], folder: Path | None) -> list[TABLED]:
    if folder is None:
        from fastattn.backends.native import source_folder  # here, because setup.py reads this file alone

        folder = source_folder()
    text = (folder / "sm90" / "instances.inc").read_text()
    lines = re.findall(rf"^{kind.macro}\(([\d, ]+)\)$", text, flags=re.MULTILINE)
    return [kind(*map(int, line.split(","))) for line in lines]


def forward_configs(folder: Path | None = None) -> list[ForwardConfig]:
    """Every FORWARD line of the table, in order."""
    return _lines(ForwardConfig, folder)


def dkdv_configs(folder: Path | None = None) -> list[DkdvConfig]:
    return _lines(DkdvConfig, folder)


def dq_configs(folder: Path | None = None) -> list[DqConfig]:
    return _lines(DqConfig, folder)


def decode_configs(folder: Path | None = None) -> list[DecodeConfig]:
    return _lines(DecodeConfig, folder)


def gathered_configs(folder: Path | None = None) -> list[GatheredConfig]:
    return _lines(GatheredConfig, folder)


def forward_instances(folder: Path | None = None) -> list[Instance]:
    return [Instance(config, dtype) for config in forward_configs(folder) for dtype in DTYPES]


def backward_instances(folder: Path | None = None) -> list[Instance]:
    """The large kernels of the backward pass."""
    configs: Sequence[AnyConfig] = [*dkdv_configs(folder), *dq_configs(folder)]
    return [Instance(config, dtype) for config in configs for dtype in DTYPES]


def decode_instances(folder: Path | None = None) -> list[Instance]:
    configs: Sequence[AnyConfig] = [*decode_configs(folder), *gathered_configs(folder)]
    return [Instance(config, dtype) for config in configs for dtype in DTYPES]


def library_instances(folder: Path | None = None) -> list[Instance]:
    """One for each file of the library: what ``launcher`` is instantiated for."""
    others: Sequence[AnyConfig] = (PREPROCESS, PREPARE_FORWARD, PREPARE_BACKWARD, APPEND, COMBINE)
    small = [Instance(config, dtype) for config in others for dtype in DTYPES]
    return [*forward_instances(folder), *backward_instances(folder), *decode_instances(folder), *small]


def select(
    configs: list[ForwardConfig], d_qk: int, d_v: int, band: bool, softcap: bool, terms: bool = False
) -> ForwardConfig:
    """The first line that holds the problem; the host code of the library chooses in the same way."""
    return next(config for config in configs if config.serves(d_qk, d_v, band, softcap, terms))


def select_dkdv(
    configs: list[DkdvConfig], d_qk: int, d_v: int, softcap: bool, fused: bool, terms: bool = False
) -> DkdvConfig | None:
    """The first line that holds the problem; None if there is no fused kernel for it."""
    return next((config for config in configs if config.serves(d_qk, d_v, softcap, fused, terms)), None)


def select_dq(configs: list[DqConfig], d_qk: int, d_v: int, softcap: bool, terms: bool = False) -> DqConfig:
    return next(config for config in configs if config.serves(d_qk, d_v, softcap, terms))


def select_decode(configs: list[DecodeConfig], d_qk: int, d_v: int, softcap: bool) -> DecodeConfig:
    return next(config for config in configs if config.serves(d_qk, d_v, softcap))


def select_gathered(configs: list[GatheredConfig], d_qk: int, d_v: int, is_e4m3: bool) -> GatheredConfig:
    return next(config for config in configs if config.serves(d_qk, d_v, is_e4m3))
