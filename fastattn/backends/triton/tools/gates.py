"""Compile gates of the Triton backend: every configuration of its table is compiled, without a GPU, and checked.

The backend's own launch code runs on meta tensors and under a driver that only names a target, so the compiled kernels
are those that a GPU would run. The machine code shows registers, stack (spills), shared memory, and the number of
tensor-core instructions; the layouts of tiles show how often products are computed. A gate fails on a spill, on too
much shared memory, if tensor cores are not used, and if a figure differs from the expected one.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fastattn.backends.triton.tools import compiler, derived
from fastattn.backends.triton.tools.builds import (
    DEFAULT_SHARED_LIMITS,
    TARGETS,
    Build,
    cache_problem_of,
    config_of,
    problem_of,
    tensor_core_of,
)
from fastattn.backends.triton.tools.figures import CUDA_REGISTERS, Figures, read
from fastattn.kv_cache import CacheInputs
from fastattn.problem import Inputs
from fastattn.spec import AttentionSpec

Known = tuple[str, tuple[int, ...]]  # the code of a build whose figures are known, and its configuration
TENSOR_MEMORY = 512  # columns; Blackwell's products are summed there. Triton compiles a stub if they do not suffice
FIGURES = ("registers", "stack", "shared", "tensor_core", "repeats", "sync_loads", "conversions", "programs")
# How far a figure may differ from the expected one, since compilers differ a little.
TOLERANCE = {
    "registers": 16,
    "stack": 0,
    "shared": 1024,
    "tensor_core": 0,
    "repeats": 0,
    "sync_loads": 0,
    "conversions": 1,
    "programs": 0,
}


def problems(build: Build, figures: Figures, expected: dict[str, Any] | None) -> list[str]:
    """Reasons why a build fails its gates; [] if it passes.

    Args:
        build: the build.
        figures: the figures of the compiled kernel.
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
    of_block = figures.registers * configs.Config(*figures.config).num_warps * target.warp_size
    if target.backend == "cuda" and of_block > CUDA_REGISTERS:
        wrong.append(f"{of_block} registers in a block, at most {CUDA_REGISTERS}: it does not start")
    if figures.shared > limit:
        wrong.append(f"{figures.shared} bytes of shared memory, at most {limit}")
    if loads_a_mask_alone(build) and figures.sync_loads:
        wrong.append(f"{figures.sync_loads} loads in the loop wait for memory: those of the mask are not pipelined")
    if build.bits <= 16 and not figures.tensor_core:
        wrong.append(f"no {tensor_core_of(build)}: tensor cores are not used")
    if expected is None:
        return wrong
    for name in FIGURES:
        was, now = expected.get(name), getattr(figures, name)  # a figure may be newer than the record
        if was is not None and abs(now - was) > TOLERANCE[name] and list(figures.config) == expected["config"]:
            wrong.append(f"{name} was {was}, is {now}")
    return wrong


def loads_a_mask_alone(build: Build) -> bool:
    """Whether the loop loads a mask and no bias or ids, whose loads need not be pipelined, on a GPU with a pipeline."""
    from fastattn.backends.triton import configs

    features = set(build.combination.split())
    pipelined = TARGETS[build.target].backend == "cuda" and configs.Config(*config_of(build)).num_stages > 1
    is_loop = build.bits == 16 and build.kernel in ("forward", "backward_dkdv", "backward_dq")
    return is_loop and pipelined and "mask" in features and not features & {"bias", "segments"}


def compiled(
    todo: Sequence[Build], processes: int = 2, known: Mapping[str, Known] | None = None
) -> Iterator[tuple[Build, Figures]]:
    """Compile in separate processes, in which Triton must not interpret, and yield results as they finish.

    Builds whose ``Figures.code`` and configuration are those in ``known``, by name, are not compiled and left out.
    """
    with _compilers(processes) as pool:
        running = {pool.submit(_compile, build, (known or {}).get(build.name)): build for build in todo}
        for done in concurrent.futures.as_completed(running):
            figures = done.result()
            if figures is not None:
                yield running[done], figures


def codes(expected: Mapping[str, Mapping[str, Any]]) -> dict[str, Known]:
    """``Figures.code`` and the configuration by name of the build, from figures that lack none."""
    complete = {name: known for name, known in expected.items() if {*FIGURES, "code"} <= known.keys()}
    return {name: (known["code"], tuple(known["config"])) for name, known in complete.items()}


def table(results: Iterable[tuple[Build, Figures]]) -> str:
    """The figures as text."""
    lines = [
        f"{'build':<58} {'config':<18} {'regs':>5} {'stack':>6} {'shared':>7} {'tensor':>7} {'repeats':>7} "
        f"{'sync loads':>10} {'conversions':>11} {'programs':>8} {'s':>5}"
    ]
    for build, f in sorted(results, key=lambda result: result[0].name):
        config = "x".join(map(str, f.config))
        figures = f"{f.registers:>5} {f.stack:>6} {f.shared:>7} {f.tensor_core:>7} {f.repeats:>7g} "
        figures += f"{f.sync_loads:>10} {f.conversions:>11} {f.programs:>8} {f.seconds:>5.1f}"
        lines.append(f"{build.name:<58} {config:<18} {f.error or figures}")
    return "\n".join(lines)


def expected_figures(path: Path) -> dict[str, dict[str, Any]]:
    """The figures of an earlier run by name of the build; {} if there was none with this version of Triton."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def as_expected(results: Iterable[tuple[Build, Figures]]) -> dict[str, dict[str, Any]]:
    """The figures in the form of ``expected_figures``."""
    names = (*FIGURES, "config", "code")
    by_name = {build.name: {name: getattr(figures, name) for name in names} for build, figures in results}
    return {name: by_name[name] for name in sorted(by_name)}


def kernels_for_lengths(lengths: Sequence[int], head_dim: int, layout: str) -> dict[str, int]:
    """The number of kernels compiled, by name, for forward, backward and decoding at all of ``lengths``."""
    with _compilers(1) as pool:
        return pool.submit(_kernels_for_lengths, lengths, head_dim, layout).result()


@contextlib.contextmanager
def _compilers(processes: int) -> Iterator[concurrent.futures.Executor]:
    """Processes that compile. They are started without TRITON_INTERPRET, which Triton reads when it is imported."""
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
_wanted = ""  # the only kernel to compile; all if empty
_known: str | None = None  # its code, if its figures are known
_code = ""


class _Unchanged(Exception):
    """A launch whose figures are known."""


def _start_compiler(cache: str) -> None:
    """Turn launches in this process into compilations for ``_target``."""
    os.environ["TRITON_CACHE_DIR"] = cache
    from fastattn.backends.triton import launch, launch_decode, launch_derivatives, launch_fp8, launch_statistics

    torch.set_num_threads(1)

    def launched(name: str, arguments: Any, compile_kernel: compiler.Compile) -> Any:
        global _code
        if _wanted and name != _wanted:
            return None
        if _wanted and not _launched:
            modules = (launch, launch_decode, launch_derivatives, launch_fp8, launch_statistics)
            kernel = next(vars(module)[name] for module in modules if name in vars(module))
            _code = compiler.code_of(kernel, arguments)
            if _code == _known:
                raise _Unchanged
        begin = time.perf_counter()
        kernel = compile_kernel()
        _launched.append((name, kernel, time.perf_counter() - begin))
        return kernel

    compiler.compile_only(
        lambda: compiler.Target(_target.backend, _target.arch, _target.warp_size),
        lambda: list(TARGETS.values()).index(_target),
        launched,
    )


def _compile(build: Build, known: Known | None = None) -> Figures | None:
    """The figures of a build; None if its code and configuration are ``known``."""
    global _target, _wanted, _known
    from fastattn.backends.triton import launch, launch_decode

    _target = TARGETS[build.target]
    launch.target.cache_clear()
    _launched.clear()
    config = config_of(build)
    _wanted, _known = f"{build.kernel}_kernel", known[0] if known is not None and known[1] == config else None
    torch.backends.cuda.matmul.fp32_precision = "tf32" if "tf32" in build.combination.split() else "ieee"
    try:
        if build.kernel == "decode":
            launch_decode.attend_to_cache(*cache_problem_of(build), config)
        elif "cached" in build.combination.split():
            prompt, spec = cache_problem_of(build)
            out, lse = (torch.empty(shape, device="meta") for shape in (prompt.out_shape(), prompt.lse_shape()))
            launch_decode.attend_as_prompt(prompt, spec, out.to(prompt.q.dtype), lse, config)
        elif build.kernel in derived.KERNELS:
            derived.launch(build)
        elif build.kernel == "forward":
            launch.forward(*problem_of(build), config)
        else:
            inputs, spec = problem_of(build)
            out, lse = (torch.empty(s, device="meta") for s in (inputs.out_shape(), inputs.lse_shape()))
            out = out.to(inputs.q.dtype)
            getattr(launch.Backward.of(out, None, out, lse, lse, inputs, spec), build.kernel.removeprefix("backward_"))(
                config
            )
        found = [_figures(kernel, seconds, build) for _, kernel, seconds in _launched]
        worst = max(found, key=lambda figures: (figures.stack, figures.registers))  # of a pass that launches it twice
        return dataclasses.replace(worst, config=tuple(config), code=_code)
    except _Unchanged:
        return None
    except Exception as error:  # an error of the compiler is the result
        return Figures(
            config=tuple(config), error=f"{type(error).__name__}: {str(error).strip().splitlines()[-1][:200]}"
        )


def _figures(kernel: Any, seconds: float, build: Build) -> Figures:
    columns = getattr(kernel.metadata, "tmem_size", 0)
    if columns > TENSOR_MEMORY:
        raise RuntimeError(f"{columns} columns of tensor memory, at most {TENSOR_MEMORY}")
    return dataclasses.replace(read(kernel, _target, tensor_core_of(build)), seconds=round(seconds, 2))


def _kernels_for_lengths(lengths: Sequence[int], head_dim: int, layout: str) -> dict[str, int]:
    global _wanted
    from fastattn.backends.triton import launch, launch_decode

    _wanted = ""
    for s in lengths:
        shape = (2, s, 4, head_dim) if layout == "BSHD" else (2, 4, s, head_dim)
        x = torch.empty(shape, device="meta", dtype=torch.bfloat16)
        x = x if layout == "BSHD" else x.transpose(1, 2)
        inputs, spec = Inputs(x, x, x, max_seqlen_q=s, max_seqlen_kv=s), AttentionSpec(1.0, left=s // 2, right=0)
        out, lse, low = launch.forward(inputs, spec)
        launch.backward(out, None, out, lse, low, inputs, spec, ("q", "k", "v"))
        launch_decode.attend_to_cache(_one_token(s, head_dim), spec)
    found: dict[str, set[int]] = {}
    for name, kernel, _ in _launched:
        found.setdefault(name, set()).add(id(kernel))
    return {name: len(kernels) for name, kernels in found.items()}


def _one_token(pages: int, head_dim: int) -> CacheInputs:
    """A token for each of two sequences, whose caches have ``pages`` of 8 rows; it is rotated and appended first."""

    def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(shape, device="meta", dtype=dtype)

    cache, new = empty(pages + 3, 8, 4, head_dim), empty(2, 1, 4, head_dim)
    lengths, table = empty(2, dtype=torch.int32), empty(2, pages, dtype=torch.int32)
    angles = empty(8 * pages, head_dim // 2, dtype=torch.float32)
    return CacheInputs(new, cache, cache, lengths, new, new, table, None, angles, angles, max_seqlen_q=1)
