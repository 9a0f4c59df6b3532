"""Launches of Triton's kernels, compiled for a GPU and run by the interpreter of their PTX, on CPU tensors."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from fastattn.backends.triton.tools import compiler
from fastattn.backends.triton.tools.ptx.block import Block
from fastattn.backends.triton.tools.ptx.memory import Global
from fastattn.backends.triton.tools.ptx.operations import UNSIGNED, WIDTHS
from fastattn.backends.triton.tools.ptx.text import Program, parse

NUMBERS = {"i1": np.uint8, "i32": np.int32, "u32": np.uint32, "i64": np.int64, "u64": np.uint64, "fp32": np.float32}


def replace_launches(arch: int, counts: dict[str, int] | None = None) -> None:
    """Make every launch in this process compile for ``arch`` and run its PTX, for good.

    Args:
        arch: compute capability, major * 10 + minor.
        counts: how many instructions each kernel executed is added to it.
    """
    from triton.runtime.jit import JITFunction

    target = compiler.Target("cuda", arch, 32)
    compiler.compile_only(lambda: target, lambda: 0, lambda *_: None)
    compile_only = JITFunction.run

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        assert compile_only is not None
        kernel = compiled(self, args, grid, options)
        executed = run_kernel(kernel, _leaves(self, kernel, args, options), grid)
        if counts is not None:
            counts[self.__name__] = counts.get(self.__name__, 0) + executed
        return kernel

    compiled = _compiler()
    JITFunction.run = run


def _compiler() -> Any:
    """Triton's own function that compiles and launches, which only compiles when warming up."""
    import triton.runtime.jit as jit

    original = jit.JITFunction.run.__closure__
    run = next(c.cell_contents for c in original if getattr(c.cell_contents, "__name__", "") == "run")
    return lambda self, args, grid, options: run(self, *args, grid=grid, warmup=True, **options)


def _leaves(function: Any, kernel: Any, args: tuple[Any, ...], options: dict[str, Any]) -> list[Any]:
    """The values of the kernel's parameters: tensors and numbers in the order of its signature."""
    given = dict(zip(function.arg_names, args, strict=False)) | options
    found: list[Any] = []
    for name, kind in kernel.src.signature.items():
        _flatten(kind, given.get(name), found)
    return found


def _flatten(kind: Any, value: Any, found: list[Any]) -> None:
    if isinstance(kind, tuple):
        for inner, x in zip(kind, value, strict=True):
            _flatten(inner, x, found)
    elif kind != "constexpr":
        found.append(value if isinstance(value, torch.Tensor) else NUMBERS[kind](value))


def run_kernel(kernel: Any, leaves: list[Any], grid: Any) -> int:
    """Run every block of a launch; how many instructions that took."""
    program = _parsed(kernel.asm["ptx"])
    memory = Global(x for x in leaves if isinstance(x, torch.Tensor))
    parameters = [*_parameters(program, leaves)]
    sizes = (*grid, 1, 1)[:3]
    executed = 0
    for z, y, x in itertools.product(*(range(size) for size in reversed(sizes))):
        block = Block(program, parameters, memory, kernel.metadata.shared, (x, y, z), sizes)
        block.run()
        executed += block.executed
    return executed


_parsed = functools.lru_cache(maxsize=64)(parse)


def _parameters(program: Program, leaves: list[Any]) -> Iterator[np.ndarray[Any, Any]]:
    """What each thread reads from its parameters; those beyond the signature are scratch memory, which is null."""
    scratch = [0] * (len(program.parameters) - len(leaves))
    for (kind, _), value in zip(program.parameters, [*leaves, *scratch], strict=True):
        width = WIDTHS[kind]
        if isinstance(value, torch.Tensor):
            value = np.uint64(value.data_ptr())
        elif isinstance(value, np.float32):
            value = value.view(np.uint32)
        yield np.full(program.threads, int(value) & ((1 << 8 * width) - 1), UNSIGNED[width])
