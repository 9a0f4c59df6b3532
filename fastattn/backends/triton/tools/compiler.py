"""Turns launches of kernels in a process into compilations, for a GPU that need not be present."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

Compile = Callable[[], Any]  # compiles the kernel that was to be launched, and returns it


class Target(NamedTuple):
    """The architecture that Triton compiles for."""

    backend: str
    arch: int | str
    warp_size: int


def present_target(device: torch.device) -> Target:
    """The target of a present GPU."""
    import triton

    with torch.cuda.device(device):
        found = triton.runtime.driver.active.get_current_target()
    return Target(found.backend, found.arch, found.warp_size)


def compile_only(
    target: Callable[[], Target], device: Callable[[], int], launched: Callable[[str, Any, Compile], Any]
) -> None:
    """Replace Triton's driver and its launches in this process, for good.

    Args:
        target: returns the current target.
        device: returns a number for the target, by which Triton caches compiled kernels.
        launched: called instead of a launch, with the kernel's name, its arguments and a function that compiles it.
    """
    from triton.backends.compiler import GPUTarget
    from triton.backends.driver import DriverBase
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    class NamesItsTarget(DriverBase):
        def __init__(self) -> None: ...

        is_active = classmethod(lambda cls: True)
        get_current_target = lambda self: GPUTarget(*target())  # noqa: E731
        get_current_device = lambda self: device()  # noqa: E731
        get_current_stream = lambda self, *_: 0  # noqa: E731
        get_active_torch_device = lambda self: torch.device("meta")  # noqa: E731
        get_benchmarker = map_python_to_cpp_type = lambda self, *_: None

    driver.set_active(NamesItsTarget())
    run = JITFunction.run

    def launch(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        return launched(self.__name__, (args, options), lambda: run(self, *args, grid=grid, warmup=True, **options))

    JITFunction.run = launch


def signature(value: Any) -> str:
    """The arguments of a launch as far as a kernel is compiled for them: of a number only its type counts."""
    if isinstance(value, torch.Tensor):
        return str(value.dtype)
    if isinstance(value, dict):
        return " ".join(f"{name}={value[name]!r}" if name[0].isupper() else signature(value[name]) for name in value)
    if isinstance(value, (tuple, list)):
        return f"({' '.join(map(signature, value))})"
    return repr(value) if value is None else type(value).__name__


def code_of(kernel: Any, arguments: tuple[tuple[Any, ...], dict[str, Any]]) -> str:
    """A digest of all that the machine code of a launch depends on, besides the target and the version of Triton.

    That is the source of the kernel and of all functions and constants it uses, and the kind of each argument.
    """
    sources: dict[str, str] = {}
    _collect(kernel, sources)
    args, options = arguments
    flags = {name: _changed_fields(value) for name, value in options.items()}
    text = "\n".join([*(sources[name] for name in sorted(sources)), signature(args), signature(flags)])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _collect(kernel: Any, sources: dict[str, str]) -> None:
    """Into ``sources`` the source of ``kernel``, and what its global names stand for."""
    sources[kernel.fn.__qualname__] = kernel.src
    for name in kernel.fn.__code__.co_names:
        value = kernel.fn.__globals__.get(name)
        if hasattr(value, "src") and value.fn.__qualname__ not in sources:
            _collect(value, sources)
        elif type(value).__name__ == "constexpr" or isinstance(value, (int, float)):
            sources[f"{kernel.fn.__module__}.{name}"] = f"{name} = {value}"


def _changed_fields(value: Any) -> Any:
    """Of a dataclass, what differs from its defaults, so that a field more changes nothing where it is not used."""
    if not dataclasses.is_dataclass(value):
        return value
    return {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if getattr(value, f.name) != f.default}


def on_meta(x: Any) -> Any:
    """A tensor without memory in the layout of ``x``; anything else as it is."""
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta") if isinstance(x, torch.Tensor) else x
