"""The builds of the compile gates: each row of the table with the GPUs and problems for which it is compiled."""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from fastattn.kv_cache import FP8, CacheInputs
from fastattn.problem import Inputs
from fastattn.spec import AttentionSpec

if TYPE_CHECKING:
    from fastattn.backends.triton.configs import Config


@dataclass(frozen=True)
class Target:
    """A GPU that Triton compiles for, and its limits."""

    backend: str
    arch: int | str
    warp_size: int
    shared_limit: int
    tensor_core: str
    most_warps: int = 64  # of a multiprocessor at a time


TARGETS = {
    "sm_80": Target("cuda", 80, 32, 166912, "HMMA"),
    "sm_90": Target("cuda", 90, 32, 232448, "HGMMA"),
    "sm_100": Target("cuda", 100, 32, 232448, "UTCHMMA|HMMA"),
    "gfx942": Target("hip", "gfx942", 64, 65536, "mfma"),
    "sm_86": Target("cuda", 86, 32, 101376, "HMMA", 48),
    "sm_89": Target("cuda", 89, 32, 101376, "HMMA", 48),
    "sm_120": Target("cuda", 120, 32, 101376, "HMMA", 48),
    "gfx950": Target("hip", "gfx950", 64, 163840, "mfma"),
}
DATA_CENTRE = ("sm_80", "sm_90", "sm_100", "gfx942")
# The others compile to nearly the same code as one of these, whose rows they take: with everything in use will do.
SMALL_CHIPS = ((16, 128), (16, 256))  # bits and head dims for which they are compiled
RELATIVES = {"default": ("sm_86", "sm_89", "sm_120"), "gfx942": ("gfx950",)}
# The rows for GPUs without rows of their own must fit the smallest: consumer chips have 99 KiB, AMD's 64.
DEFAULT_SHARED_LIMITS = {"cuda": 101376, "hip": 65536}
KERNELS = ("forward", "backward_dkdv", "backward_dq", "backward_dbias", "decode")
# The problems for which each row of the table is compiled: features alone and together, the cheap ones only together.
EVERYTHING = "mask bias softcap alibi sinks segments dropout window causal"
COMBINATIONS = (
    "causal", "packed window sinks causal", "mask", "bias", "softcap causal", "alibi causal", "segments causal",
    "dropout causal", "mask dropout", "bias softcap dropout causal", EVERYTHING,
)  # fmt: skip
# "tokens": many query rows, which fill the tile; else there is one in each sequence.
DECODING = (
    "causal", "tokens causal", "paged causal", "paged e4m3 causal", "tokens paged e4m3 causal", "bias causal",
    "tokens paged packed softcap alibi sinks causal", "tokens paged e4m3 bias softcap alibi sinks window causal",
)  # fmt: skip
# Forward, for many new rows against a cache; dk and dv, where several programs share the heads of a group.
PROMPTS = ("cached paged causal", "cached paged e4m3 bias softcap alibi sinks window causal")
SHARED_KEYS = ("multi-query causal",)
OF_DBIAS = ("bias causal", "bias dropout causal", EVERYTHING)
# fp32 needs less: its products, without tensor cores, take most of the registers.
IN_FP32 = ("causal", "dropout causal", EVERYTHING)
DECODING_IN_FP32 = ("paged causal", "tokens paged bias softcap alibi sinks window causal")
# Rows for head dims above 256 have small tiles for all features alike, so nothing and everything in use will do.
WIDE = ("causal", EVERYTHING, PROMPTS[-1], OF_DBIAS[0], "tokens paged e4m3 causal", DECODING[-1], *DECODING_IN_FP32)
# Head dims that are no power of two, or differ between q and v: they take the row of the next larger one.
BETWEEN_ROWS = ((40, None), (80, None), (96, None), (160, None), (192, 128))


@dataclass(frozen=True)
class Build:
    """One kernel to compile: the row of the table, the target, and the problem."""

    row: str
    target: str
    kernel: str
    combination: str
    bits: int
    head_dim: int
    config: tuple[int, ...] | None = None  # instead of that of the table
    head_dim_v: int | None = None  # where it is not head_dim

    @property
    def name(self) -> str:
        dims = f"D{self.head_dim}" + (f"/{self.head_dim_v}" if self.head_dim_v else "")
        return f"{self.row}@{self.target} {self.kernel} {self.bits} {dims} {self.combination}"


def config_of(build: Build) -> Config:
    """The configuration that a build is compiled with."""
    from fastattn.backends.triton import configs, derived_configs

    if (build.kernel, build.bits) in {row[:2] for row in derived_configs.TABLE}:
        return derived_configs.config_for(build.kernel, build.bits, build.head_dim, build.target)
    features = frozenset(build.combination.replace("intervals", "segments mask").split())  # as Flags.features says
    return configs.Config(
        *build.config or configs.config_for(build.row, build.kernel, build.bits, build.head_dim, features)
    )


def combinations_of(kernel: str, bits: int, head_dim: int = 0) -> tuple[str, ...]:
    """The problems for which a kernel is compiled, at a width; without one those of any width."""
    found = _combinations(kernel, bits)
    return found if head_dim <= 256 else tuple(c for c in found if c in WIDE)


def _combinations(kernel: str, bits: int) -> tuple[str, ...]:
    if kernel == "decode":
        return DECODING if bits == 16 else DECODING_IN_FP32
    if kernel == "backward_dbias":
        return OF_DBIAS
    if bits == 32:
        return IN_FP32
    first, *others = COMBINATIONS
    return (first, *{"forward": PROMPTS, "backward_dkdv": SHARED_KEYS}.get(kernel, ()), *others)


def served_by(kind: str, bits: int) -> list[str]:
    """The problems that use a kind of row, if the table has it."""
    from fastattn.backends.triton import configs, table

    kernel, kinds = kind.partition(" ")[0], {kind for _, kind, _, _ in table.TABLE}
    problems = {c: configs.kinds_of(kernel, c.split()) for c in combinations_of(kernel, bits)}
    return [c for c, preferred in problems.items() if kind == next(k for k in preferred if k in kinds)]


def all_builds(quick: bool = False) -> list[Build]:
    """Every row of the table, and in bf16 other head dims.

    Args:
        quick: the most common builds for ``cuda:90`` and ``hip`` only.
    """
    from fastattn.backends.triton.table import TABLE

    found = set()
    for row, kind, bits, head_dim in TABLE:
        kernel = kind.partition(" ")[0]
        combinations, targets = combinations_of(kernel, bits, head_dim), [row]
        if row == "default":
            targets = [t for t in DATA_CENTRE if (t, kernel, bits, head_dim) not in TABLE]
            if bits == 16 and "sm_80" not in targets:
                targets.append("sm_80")  # for chips without rows of their own: like this one, but smaller
            if bits == 32 and head_dim > 256:
                targets = ["sm_80", "gfx942"]  # without tensor cores NVIDIA's GPUs compile alike
        for target, combination in itertools.product(targets, combinations):
            # at large head dims an architecture may have a row of its own for some of the problems
            of = target if head_dim > 256 and target != "sm_80" else row
            found.add(Build(of, target, kernel, combination, bits, head_dim))
        for target in RELATIVES.get(row, ()) if (bits, head_dim) in SMALL_CHIPS else ():
            found.add(Build(row, target, kernel, combinations[-1], bits, head_dim))
    tensor_core_targets = ("sm_80", "sm_90", "sm_100")
    for target, kernel, head_dim in itertools.product(tensor_core_targets, KERNELS[:4], (128, 256)):
        found.add(Build("default", target, kernel, f"tf32 {combinations_of(kernel, 32)[0]}", 32, head_dim))
    for (d_qk, d_v), kernel in itertools.product(BETWEEN_ROWS, KERNELS[:3]):
        found.add(Build("sm_90", "sm_90", kernel, "causal", 16, d_qk, head_dim_v=d_v))
    if quick:
        found = {b for b in found if b in _quick()}
    return sorted(found, key=lambda build: build.name)


def sampled(count: int, seed: int = 0) -> list[Build]:
    """Up to ``count`` builds in bf16 with features drawn at random, beyond the combinations of ``all_builds``."""
    from fastattn.backends.triton.table import TABLE

    draw = random.Random(seed)
    rows = sorted({(row, kind.partition(" ")[0], d) for row, kind, bits, d in TABLE if bits == 16 and row in TARGETS})
    found: dict[Build, None] = {}
    for _ in range(100 * count):  # draws may repeat
        row, kernel, head_dim = draw.choice(rows)
        words = (
            "paged packed e4m3 bias softcap alibi sinks window"
            if kernel == "decode"
            else f"packed intervals {EVERYTHING}"
        )
        features = [word for word in words.split() if draw.random() < 0.5]
        if kernel == "decode":
            features += ["causal", *draw.choice(([], ["tokens"]))]
        elif "packed" in features:  # what has no rows of one length
            features = [word for word in features if word not in ("mask", "bias", "segments")]
        if kernel != "backward_dbias" or "bias" in features:
            found[Build(row, row, kernel, " ".join(features) or "plain", 16, head_dim)] = None
        if len(found) == count:
            break
    return list(found)


def _quick() -> set[Build]:
    return {Build(row, row, kernel, "causal", 16, 128) for row in ("sm_90", "gfx942") for kernel in KERNELS[:3]}


def tensor_core_of(build: Build) -> str:
    """A pattern of the tensor-core instructions of a build.

    HGMMA needs 64 rows, so smaller tiles use HMMA. Those of e4m3 have a Q in place of the H.
    """
    wanted = TARGETS[build.target].tensor_core
    config = config_of(build)
    rows = config.block_n if build.kernel == "backward_dkdv" else config.block_m
    is_small = build.kernel == "decode" or rows < 64
    wanted = f"{wanted}|HMMA" if is_small and wanted == "HGMMA" else wanted
    return re.sub("H(G?MMA)", r"Q\1", wanted) if build.bits == 8 else wanted


def problem_of(build: Build) -> tuple[Inputs, AttentionSpec]:
    """The problem of a build, with grouped heads and 16k tokens, on the meta device."""
    batch, s, heads_q, heads_kv, d, d_v = 2, 16384, 16, 4, build.head_dim, build.head_dim_v or build.head_dim
    features = build.combination.split()
    if "multi-query" in features:
        batch, s, heads_kv = 1, 4096, 1
    dtype = torch.bfloat16 if build.bits <= 16 else torch.float32

    def empty(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    rows: Callable[..., torch.Tensor] = lambda h, d: empty(batch, s, h, d)  # noqa: E731
    terms: dict[str, torch.Tensor] = {}
    if "packed" in features:
        rows = lambda h, d: empty(batch * s, h, d)  # noqa: E731
        terms["cu_seqlens_q"] = terms["cu_seqlens_kv"] = empty(batch + 1, dtype=torch.int32)
    if "bias" in features:
        terms["bias"] = empty(1, heads_q, s, s)
    if "mask" in features:
        terms["mask"] = empty(1, 1, s, s, dtype=torch.bool)
    if "alibi" in features:
        terms["alibi_slopes"] = empty(1, heads_q, dtype=torch.float32)
    if "sinks" in features:
        terms["sinks"] = empty(1, heads_q)
    if "segments" in features:
        terms["segment_ids_q"] = terms["segment_ids_kv"] = empty(batch, s, dtype=torch.int32)
    if "intervals" in features:
        lengths = (1, heads_q, batch * s) if "packed" in features else (batch, 1, s)
        terms["intervals"] = empty(*lengths, 3, 2, dtype=torch.int32)
    if "dropout" in features:
        terms["rng_state"] = empty(2, dtype=torch.int64)
    inputs = Inputs(rows(heads_q, d), rows(heads_kv, d), rows(heads_kv, d_v), **terms, max_seqlen_q=s, max_seqlen_kv=s)
    spec = AttentionSpec(
        scale=d**-0.5,
        left=1023 if "window" in features else None,
        right=0 if "causal" in features else None,
        softcap=30.0 if "softcap" in features else None,
        dropout_p=0.1 if "dropout" in features else 0.0,
    )
    return inputs, spec


def cache_problem_of(build: Build) -> tuple[CacheInputs, AttentionSpec]:
    """The problem of a build on caches, with grouped heads and 32k tokens each, on the meta device.

    A prompt ("cached") of 4096 tokens, 64 of them ("tokens") or one.
    """
    batch, s, heads_q, heads_kv, page_size, d = 2, 32768, 32, 4, 16, build.head_dim
    features = build.combination.split()
    dtype = torch.bfloat16 if build.bits == 16 else torch.float32
    s_q = 4096 if "cached" in features else 64 if "tokens" in features else 1

    def empty(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    terms: dict[str, Any] = {}
    if "packed" in features:
        terms["cu_seqlens_q"] = empty(batch + 1, dtype=torch.int32)
    if "paged" in features:
        terms["block_table"] = empty(batch, s // page_size, dtype=torch.int32)
    if "e4m3" in features:
        terms["k_scale"] = terms["v_scale"] = empty(1, heads_kv, dtype=torch.float32)
    if "bias" in features:
        terms["bias"] = empty(1, heads_q, s_q, s)
    if "alibi" in features:
        terms["alibi_slopes"] = empty(1, heads_q, dtype=torch.float32)
    if "sinks" in features:
        terms["sinks"] = empty(1, heads_q)
    pages = (batch * s // page_size, page_size) if "paged" in features else (batch, s)
    cache = empty(*pages, heads_kv, d, dtype=FP8 if "e4m3" in features else dtype)
    q = empty(batch * s_q, heads_q, d) if "packed" in features else empty(batch, s_q, heads_q, d)
    left = 1023 if "window" in features else None
    spec = AttentionSpec(d**-0.5, 30.0 if "softcap" in features else None, left=left, right=0)
    return CacheInputs(q, cache, cache, empty(batch, dtype=torch.int32), **terms, max_seqlen_q=s_q), spec
