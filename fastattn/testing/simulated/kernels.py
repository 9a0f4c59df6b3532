"""Runs Triton's kernels on the simulated device: Triton's interpreter reads and writes the device's memory directly.

Like Triton's launcher it refuses arguments in host memory. It also refuses arguments on another device than the current
one, which on a GPU are illegal accesses.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from fastattn.testing.simulated.machine import Machine
from fastattn.testing.simulated.surface import Patch, alias_on_host


def patches(machine: Machine) -> list[Patch]:
    """``(owner, name, value)`` as in ``surface.patches``; empty if Triton is missing or has no interpreter."""
    try:
        from triton.runtime.interpreter import GridExecutor, InterpretedFunction
    except ImportError:
        return []
    interpret, compile_or_run = GridExecutor.__call__, InterpretedFunction.run

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

    def run_or_compile(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        if not warmup:
            return compile_or_run(self, *args, grid=grid, warmup=False, **options)
        named = (options[name] for name in self.arg_names[len(args) :])
        return _Compiled(machine, self, (*args, *named), interpret)

    return [(GridExecutor, "__call__", launch), (InterpretedFunction, "run", run_or_compile)]


class _Compiled:
    """Stands for a compiled kernel: it is launched with addresses instead of the tensors it was compiled for."""

    def __init__(self, machine: Machine, kernel: Any, compiled_for: tuple[Any, ...], interpret: Any) -> None:
        self.machine, self.kernel, self.interpret = machine, kernel, interpret
        self.compiled_for = _described(compiled_for)

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        from triton.runtime.interpreter import GridExecutor

        _check_devices(self.compiled_for, self.machine.library.sim_device())  # on which Triton loads it now
        executor = GridExecutor(self.kernel.rewrite(), self.kernel.arg_names, grid, [])
        executor._init_args_hst = lambda args, kwargs: (args, kwargs)  # addresses are those of this memory already
        executor._restore_args_dev = lambda *_: None

        def launch(*args: Any) -> None:
            given = _with_types(args, self.compiled_for)
            _check_devices(given, self.machine.library.sim_device())

            def run() -> None:
                with _disable_current_modes(), torch.no_grad():
                    self.interpret(executor, *given)

            self.machine.launch(self.kernel.fn.__name__, tuple(grid), run)

        return launch


@dataclasses.dataclass(frozen=True)
class _Pointer:
    """An address and the type that the kernel was compiled for, with the part of Tensor that Triton uses."""

    dtype: torch.dtype
    device: torch.device
    is_aligned: bool
    address: int = 0

    def data_ptr(self) -> int:
        return self.address


def _described(value: Any) -> Any:
    if isinstance(value, Tensor):
        return _Pointer(value.dtype, value.device, value.data_ptr() % 16 == 0)
    return _like(value, map(_described, value)) if isinstance(value, tuple) else value


def _with_types(value: Any, compiled_for: Any) -> Any:
    if isinstance(compiled_for, _Pointer):
        if compiled_for.is_aligned and value % 16:
            raise RuntimeError(
                "Triton Error [CUDA]: misaligned address: the kernel was compiled for multiples of 16 bytes"
            )
        return dataclasses.replace(compiled_for, address=value)
    if isinstance(compiled_for, tuple):
        return _like(compiled_for, (_with_types(x, y) for x, y in zip(value, compiled_for, strict=True)))
    return value


def _check_devices(values: Any, current: int) -> None:
    for value in values:
        if isinstance(value, tuple):
            _check_devices(value, current)
        elif isinstance(value, _Pointer) and value.device.index != current:
            where = f"compiled for {value.device}, launched on cuda:{current}"
            raise RuntimeError(f"Triton Error [CUDA]: invalid device context: {where}")


def _like(value: tuple[Any, ...], inside: Iterable[Any]) -> tuple[Any, ...]:
    return type(value)(*inside) if hasattr(value, "_fields") else type(value)(inside)


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
    return _like(value, map(_mapped, value)) if isinstance(value, tuple) else value


@contextlib.contextmanager
def fast_interpreter() -> Iterator[None]:
    """Speed up Triton's interpreter: prepare each device function once, and skip the checks of integer overflow.

    The interpreter patches ``triton.language`` again on every call of a device function, although the kernel that calls
    it has done so; that takes longer than the function itself. The checks of overflow take half of the remaining time.
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
