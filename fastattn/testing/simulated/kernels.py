"""Launches Triton's kernels on the simulated device: its interpreter runs them on the device's own memory.

Like Triton's launcher it refuses what lies in host memory; and what lies on another device than the current one, which
on a GPU is an illegal access.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from fastattn.testing.simulated.machine import Machine
from fastattn.testing.simulated.surface import Patch, alias_on_host


def patches(machine: Machine) -> list[Patch]:
    """As in ``surface``; none where Triton is missing or does not interpret."""
    try:
        from triton.runtime.interpreter import GridExecutor
    except ImportError:
        return []
    interpret = GridExecutor.__call__

    def launch(self: Any, *args: Any, **kwargs: Any) -> None:
        tensors = list(_tensors([*args, *kwargs.values()]))
        if not any(x.is_cuda for x in tensors):
            return interpret(self, *args, **kwargs)
        _check(tensors, machine.library.sim_device())
        given, options = _mapped(args), {name: _mapped(value) for name, value in kwargs.items()}

        def run() -> None:
            with _disable_current_modes(), torch.no_grad():
                interpret(self, *given, **options)

        return machine.launch(self.fn.__name__, tuple(self.grid) if isinstance(self.grid, tuple) else (), run)

    return [(GridExecutor, "__call__", launch)]


def _tensors(values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, tuple):
            yield from _tensors(value)


def _check(tensors: list[Tensor], current: int) -> None:
    for x in tensors:
        if not x.is_cuda:
            raise ValueError("Pointer argument cannot be accessed from Triton (cpu tensor?)")
        if x.device.index != current:
            where = f"an argument lies on {x.device}, the kernel runs on cuda:{current}"
            raise RuntimeError(f"Triton Error [CUDA]: an illegal memory access was encountered: {where}")


def _mapped(value: Any) -> Any:
    if isinstance(value, Tensor):
        return alias_on_host(value)
    if isinstance(value, tuple):
        inside = [_mapped(x) for x in value]
        return type(value)(*inside) if hasattr(value, "_fields") else type(value)(inside)
    return value


@contextlib.contextmanager
def fast_interpreter() -> Iterator[None]:
    """Make the interpreter fast enough for many cases: it prepares each function once, and checks no overflow.

    It patches ``triton.language`` anew on every call of a device function, which takes longer than the function; the
    kernel around it has already done it. Checking every operation on integers is half of what remains.
    """
    from triton.runtime.interpreter import InterpretedFunction, interpreter_builder

    called, before, options = set(), InterpretedFunction.__call__, interpreter_builder.options

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.fn in called:
            return self.rewrite()(*args, **kwargs)
        called.add(self.fn)
        return before(self, *args, **kwargs)

    interpreter_builder.options = dataclasses.replace(options, sanitize_overflow=False)
    InterpretedFunction.__call__ = call
    try:
        yield
    finally:
        InterpretedFunction.__call__, interpreter_builder.options = before, options
