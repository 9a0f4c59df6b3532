"""Compile gates of the Triton backend: every tile of its table compiled for GPUs that need not be there.

The backend's own launch code runs, on tensors without memory and under a driver that only names its target, so what is
compiled is what a GPU would get. From the machine code come registers, stack (spills), shared memory, and the number
of tensor-core instructions, from the layouts of tiles how often products are computed. A gate fails on a spill, on too
much shared memory, where tensor cores are not used, and where a figure has moved away from the expected one.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import itertools
import json
import multiprocessing
import os
import random
import re
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fastattn.backends.triton.tools import compiler
from fastattn.kv_cache import FP8, CacheInputs
from fastattn.problem import Inputs
from fastattn.spec import AttentionSpec

if TYPE_CHECKING:
    from fastattn.backends.triton.configs import Tile


@dataclass(frozen=True)
class Target:
    """What Triton compiles for, and what must hold there."""

    backend: str
    arch: int | str
    warp_size: int
    shared_limit: int
    tensor_core: str


TARGETS = {
    "sm_80": Target("cuda", 80, 32, 166912, "HMMA"),
    "sm_90": Target("cuda", 90, 32, 232448, "HGMMA"),
    "sm_100": Target("cuda", 100, 32, 232448, "UTCHMMA|HMMA"),
    "gfx942": Target("hip", "gfx942", 64, 65536, "mfma"),
}
# The rows for GPUs without rows of their own must fit the smallest: consumer chips have 99 KiB, AMD's 64.
DEFAULT_SHARED_LIMITS = {"cuda": 101376, "hip": 65536}
# Registers of a multiprocessor: a kernel whose block needs more does not start.
CUDA_REGISTERS = 65536
TENSOR_MEMORY = 512  # columns; Blackwell's products are summed there. Triton compiles a stub if they do not suffice
KERNELS = ("forward", "dkdv", "dq", "dbias", "decode")
# What each row of the table is compiled for: features alone and together, the easy ones together at once.
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
OF_DBIAS = ("bias causal", "bias dropout causal", EVERYTHING)
# fp32 needs less: its products, without tensor cores, take most of the registers.
IN_FP32 = ("causal", "dropout causal", EVERYTHING)
DECODING_IN_FP32 = ("paged causal", "tokens paged bias softcap alibi sinks window causal")
# Head dims that are no power of two, or differ between q and v: they take the row of the next larger one.
BETWEEN_ROWS = ((40, None), (80, None), (96, None), (160, None), (192, 128))
FIGURES = ("registers", "stack", "shared", "tensor_core", "repeats")
# How far a figure may move from the expected one before the gate asks why: compilers differ a little.
TOLERANCE = {"registers": 16, "stack": 0, "shared": 1024, "tensor_core": 0, "repeats": 0}


@dataclass(frozen=True)
class Build:
    """One kernel to compile: the row of the table, what for, and for which problem."""

    row: str
    target: str
    kernel: str
    combination: str
    bits: int
    head_dim: int
    tile: tuple[int, ...] | None = None  # instead of that of the table
    head_dim_v: int | None = None  # where it is not head_dim

    @property
    def name(self) -> str:
        dims = f"D{self.head_dim}" + (f"/{self.head_dim_v}" if self.head_dim_v else "")
        return f"{self.row}@{self.target} {self.kernel} {self.bits} {dims} {self.combination}"


@dataclass(frozen=True)
class Figures:
    """What the machine code of a build says; ``error`` if there is none.

    ``repeats`` is how often tensor cores compute a product, on average: warps for which a tile has no rows or columns
    left repeat what others do.
    """

    registers: int = 0
    stack: int = 0
    shared: int = 0
    tensor_core: int = 0
    repeats: float = 1.0
    tile: tuple[int, ...] = ()
    seconds: float = 0.0
    error: str | None = None


def tile_of(build: Build) -> Tile:
    """The tile that a build is compiled with."""
    from fastattn.backends.triton import configs

    features = frozenset(build.combination.split())
    return configs.Tile(*build.tile or configs.tile_for(build.row, build.kernel, build.bits, build.head_dim, features))


def combinations_of(kernel: str, bits: int) -> tuple[str, ...]:
    """The problems for which a kernel is compiled, at every width."""
    if kernel == "decode":
        return DECODING if bits == 16 else DECODING_IN_FP32
    if kernel == "dbias":
        return OF_DBIAS
    return COMBINATIONS if bits == 16 else IN_FP32


def served_by(kind: str, bits: int) -> list[str]:
    """Those of them that take a kind of row, where the table has it."""
    from fastattn.backends.triton import configs, table

    kernel, kinds = kind.partition(" ")[0], {kind for _, kind, _, _ in table.TABLE}
    problems = {c: configs.kinds_of(kernel, c.split()) for c in combinations_of(kernel, bits)}
    return [c for c, preferred in problems.items() if kind == next(k for k in preferred if k in kinds)]


def builds(quick: bool = False) -> list[Build]:
    """Every row of the table, and in bf16 other head dims.

    Args:
        quick: those of ``cuda:90`` and ``hip`` that most people use.
    """
    from fastattn.backends.triton.table import TABLE

    found = set()
    for row, kind, bits, head_dim in TABLE:
        kernel = kind.partition(" ")[0]
        if row != "default":
            targets = [row]
        elif bits == 16:
            targets = ["sm_80"]  # for chips without rows of their own: like this one, but smaller
        else:
            targets = [t for t in TARGETS if (t, kernel, bits, head_dim) not in TABLE]
        for target, combination in itertools.product(targets, combinations_of(kernel, bits)):
            found.add(Build(row, target, kernel, combination, bits, head_dim))
    tensor_core_targets = ("sm_80", "sm_90", "sm_100")
    for target, kernel, head_dim in itertools.product(tensor_core_targets, KERNELS[:4], (128, 256)):
        found.add(Build("default", target, kernel, f"tf32 {combinations_of(kernel, 32)[0]}", 32, head_dim))
    for (d_qk, d_v), kernel in itertools.product(BETWEEN_ROWS, KERNELS[:3]):
        found.add(Build("sm_90", "sm_90", kernel, "causal", 16, d_qk, head_dim_v=d_v))
    if quick:
        found = {b for b in found if b in _quick()}
    return sorted(found, key=lambda build: build.name)


def sampled(count: int, seed: int = 0) -> list[Build]:
    """Up to as many more in bf16, features drawn at random: what ``builds`` may not have thought of."""
    from fastattn.backends.triton.table import TABLE

    draw = random.Random(seed)
    rows = sorted({(row, kind.partition(" ")[0], d) for row, kind, bits, d in TABLE if bits == 16 and row in TARGETS})
    found: dict[Build, None] = {}
    for _ in range(100 * count):  # draws may repeat
        row, kernel, head_dim = draw.choice(rows)
        words = "paged packed e4m3 bias softcap alibi sinks window" if kernel == "decode" else f"packed {EVERYTHING}"
        features = [word for word in words.split() if draw.random() < 0.5]
        if kernel == "decode":
            features += ["causal", *draw.choice(([], ["tokens"]))]
        elif "packed" in features:  # what has no rows of one length
            features = [word for word in features if word not in ("mask", "bias", "segments")]
        if kernel != "dbias" or "bias" in features:
            found[Build(row, row, kernel, " ".join(features) or "plain", 16, head_dim)] = None
        if len(found) == count:
            break
    return list(found)


def _quick() -> set[Build]:
    return {Build(row, row, kernel, "causal", 16, 128) for row in ("sm_90", "gfx942") for kernel in KERNELS[:3]}


def problems(build: Build, figures: Figures, expected: dict[str, Any] | None) -> list[str]:
    """Why a build does not pass; [] if it does.

    Args:
        build: what was compiled.
        figures: what came of it.
        expected: the figures of an earlier run with the same Triton, or None.
    """
    from fastattn.backends.triton import configs

    if figures.error is not None:
        return [figures.error]
    target = TARGETS[build.target]
    limit = DEFAULT_SHARED_LIMITS[target.backend] if build.row == "default" else target.shared_limit
    wrong = []
    if figures.stack:
        wrong.append(f"{figures.stack} bytes of stack: registers are spilled")
    of_block = figures.registers * configs.Tile(*figures.tile).num_warps * target.warp_size
    if target.backend == "cuda" and of_block > CUDA_REGISTERS:
        wrong.append(f"{of_block} registers in a block, at most {CUDA_REGISTERS}")
    if figures.shared > limit:
        wrong.append(f"{figures.shared} bytes of shared memory, at most {limit}")
    if build.bits == 16 and not figures.tensor_core:
        wrong.append(f"no {_tensor_core(build)}: tensor cores are not used")
    if expected is None:
        return wrong
    for name in FIGURES:
        was, now = expected[name], getattr(figures, name)
        if abs(now - was) > TOLERANCE[name] and list(figures.tile) == expected["tile"]:
            wrong.append(f"{name} was {was}, is {now}")
    return wrong


def _tensor_core(build: Build) -> str:
    """The instructions to look for. HGMMA multiplies 64 rows at a time, which decoding and small tiles do not have."""
    wanted = TARGETS[build.target].tensor_core
    tile = tile_of(build)
    rows = tile.block_n if build.kernel == "dkdv" else tile.block_m
    is_small = build.kernel == "decode" or rows < 64
    return f"{wanted}|HMMA" if is_small and wanted == "HGMMA" else wanted


def compiled(todo: Sequence[Build], processes: int = 2) -> Iterator[tuple[Build, Figures]]:
    """Compile, in processes of their own (Triton must not interpret there), and yield as they finish."""
    with _compilers(processes) as pool:
        running = {pool.submit(_compile, build): build for build in todo}
        for done in concurrent.futures.as_completed(running):
            yield running[done], done.result()


def table(results: Iterable[tuple[Build, Figures]]) -> str:
    """The figures as text."""
    lines = [f"{'build':<58} {'tile':<18} {'regs':>5} {'stack':>6} {'shared':>7} {'tensor':>7} {'repeats':>7} {'s':>5}"]
    for build, f in sorted(results, key=lambda result: result[0].name):
        tile = "x".join(map(str, f.tile))
        figures = f"{f.registers:>5} {f.stack:>6} {f.shared:>7} {f.tensor_core:>7} {f.repeats:>7g} {f.seconds:>5.1f}"
        lines.append(f"{build.name:<58} {tile:<18} {f.error or figures}")
    return "\n".join(lines)


def expected_figures(path: Path) -> dict[str, dict[str, Any]]:
    """The figures of an earlier run by name of the build; {} if there was none with this version of Triton."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def as_expected(results: Iterable[tuple[Build, Figures]]) -> dict[str, dict[str, Any]]:
    """The figures in the form of ``expected_figures``."""
    names = (*FIGURES, "tile")
    by_name = {build.name: {name: getattr(figures, name) for name in names} for build, figures in results}
    return {name: by_name[name] for name in sorted(by_name)}


def kernels_for_lengths(lengths: Sequence[int], head_dim: int, layout: str) -> dict[str, int]:
    """How many kernels are compiled, by name, for forward, backward and decoding at all of ``lengths``."""
    with _compilers(1) as pool:
        return pool.submit(_kernels_for_lengths, lengths, head_dim, layout).result()


@contextlib.contextmanager
def _compilers(processes: int) -> Iterator[concurrent.futures.Executor]:
    """Processes that compile. They must be born without TRITON_INTERPRET: Triton reads it when it is imported."""
    interpreting = os.environ.pop("TRITON_INTERPRET", None)
    context = multiprocessing.get_context("spawn")
    try:
        with (
            tempfile.TemporaryDirectory(prefix="fastattn-gates-") as cache,
            concurrent.futures.ProcessPoolExecutor(processes, context, _start_compiler, (cache,)) as pool,
        ):
            yield pool
    finally:
        if interpreting is not None:
            os.environ["TRITON_INTERPRET"] = interpreting


# --- in the compiling process -------------------------------------------------------------------------------------

_launched: list[tuple[str, Any, float]] = []  # kernels in the order in which the launch code asked for them
_target = TARGETS["sm_90"]


def _start_compiler(cache: str) -> None:
    """Make this process one in which launching a kernel compiles it, for ``_target``, and does no more."""
    os.environ["TRITON_CACHE_DIR"] = cache
    torch.set_num_threads(1)

    def launched(name: str, arguments: Any, compile_kernel: compiler.Compile) -> Any:
        begin = time.perf_counter()
        kernel = compile_kernel()
        _launched.append((name, kernel, time.perf_counter() - begin))
        return kernel

    compiler.compile_only(
        lambda: compiler.Target(_target.backend, _target.arch, _target.warp_size),
        lambda: list(TARGETS.values()).index(_target),
        launched,
    )


def _compile(build: Build) -> Figures:
    global _target
    from fastattn.backends.triton import launch, launch_cache

    _target = TARGETS[build.target]
    launch.target.cache_clear()
    _launched.clear()
    torch.backends.cuda.matmul.fp32_precision = "tf32" if "tf32" in build.combination.split() else "ieee"
    tile = tile_of(build)
    try:
        if build.kernel == "decode":
            launch_cache.attend_to_cache(*_cache_problem(build), tile)
        elif build.kernel == "forward":
            launch.forward(*_problem(build), tile)
        else:
            inputs, spec = _problem(build)
            out, lse = (torch.empty(s, device="meta") for s in (inputs.out_shape(), inputs.lse_shape()))
            out = out.to(inputs.q.dtype)
            getattr(launch.Backward.of(out, None, out, lse, inputs, spec), build.kernel)(tile)
        _, kernel, seconds = next(k for k in reversed(_launched) if k[0] == f"{build.kernel}_kernel")
        columns = getattr(kernel.metadata, "tmem_size", 0)
        if columns > TENSOR_MEMORY:
            raise RuntimeError(f"{columns} columns of tensor memory, at most {TENSOR_MEMORY}")
        figures = _read(kernel, _target, _tensor_core(build))
        return dataclasses.replace(figures, tile=tuple(tile), seconds=round(seconds, 2))
    except Exception as error:  # whatever the compiler raises is the finding
        return Figures(tile=tuple(tile), error=f"{type(error).__name__}: {str(error).strip().splitlines()[-1][:200]}")


def _kernels_for_lengths(lengths: Sequence[int], head_dim: int, layout: str) -> dict[str, int]:
    from fastattn.backends.triton import launch, launch_cache

    for s in lengths:
        shape = (2, s, 4, head_dim) if layout == "BSHD" else (2, 4, s, head_dim)
        x = torch.empty(shape, device="meta", dtype=torch.bfloat16)
        x = x if layout == "BSHD" else x.transpose(1, 2)
        inputs, spec = Inputs(x, x, x, max_seqlen_q=s, max_seqlen_kv=s), AttentionSpec(1.0, left=s // 2, right=0)
        out, lse = launch.forward(inputs, spec)
        launch.backward(out, None, out, lse, inputs, spec, ("q", "k", "v"))
        launch_cache.attend_to_cache(_one_token(s, head_dim), spec)
    found: dict[str, set[int]] = {}
    for name, kernel, _ in _launched:
        found.setdefault(name, set()).add(id(kernel))
    return {name: len(kernels) for name, kernels in found.items()}


def _one_token(pages: int, head_dim: int) -> CacheInputs:
    """A token for each of two sequences, whose caches have ``pages`` of 8 rows; it is turned and appended first."""

    def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(shape, device="meta", dtype=dtype)

    cache, new = empty(pages + 3, 8, 4, head_dim), empty(2, 1, 4, head_dim)
    lengths, table = empty(2, dtype=torch.int32), empty(2, pages, dtype=torch.int32)
    angles = empty(8 * pages, head_dim // 2, dtype=torch.float32)
    return CacheInputs(new, cache, cache, lengths, new, new, table, None, angles, angles, max_seqlen_q=1)


def _problem(build: Build) -> tuple[Inputs, AttentionSpec]:
    """Grouped heads, 16k tokens, no memory."""
    batch, s, heads_q, heads_kv, d, d_v = 2, 16384, 16, 4, build.head_dim, build.head_dim_v or build.head_dim
    features = build.combination.split()
    dtype = torch.bfloat16 if build.bits == 16 else torch.float32

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


def _cache_problem(build: Build) -> tuple[CacheInputs, AttentionSpec]:
    """Grouped heads, caches for 32k tokens each, no memory."""
    batch, s, heads_q, heads_kv, page_size, d = 2, 32768, 32, 4, 16, build.head_dim
    features = build.combination.split()
    dtype = torch.bfloat16 if build.bits == 16 else torch.float32
    s_q = 64 if "tokens" in features else 1

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


def _read(kernel: Any, target: Target, tensor_core: str) -> Figures:
    repeats = _repeats(kernel.asm["ttgir"])
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


def _repeats(ttgir: str) -> float:
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
