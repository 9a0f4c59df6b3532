"""Plans: the launches of a call, recorded once and repeated with the addresses of later calls of the same kind.

Describing a call to a kernel, and Triton's search for the compiled kernel, take far more host time than launching it.
Both depend on the kind of the call alone (``fastattn/plan.py``): shapes, strides, dtypes, device, alignment. So the
launch code runs once under ``recorded``, in which kernels are compiled but not launched. The recording holds the
allocations, the compiled kernels and their arguments; a pointer is recorded as an allocation or an argument of the
call, and an offset. A later call allocates, fills the addresses in and launches on the current stream.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fastattn.backends.base import Run

_recording = threading.local()


@dataclass(frozen=True)
class Address:
    """A pointer among the arguments of a kernel: a tensor of the call, and an offset in bytes from its beginning."""

    tensor: int
    offset: int


@dataclass(frozen=True)
class Allocation:
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


@dataclass
class Launches(TorchFunctionMode):
    """A recording of the launches and allocations of a call, in order."""

    given: Sequence[Tensor]
    allocated: list[Tensor] = field(default_factory=list)
    launched: list[tuple[Any, tuple[int, int, int], tuple[Any, ...]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.empty:
            self.allocated.append(result)
        return result

    def launch(self, kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], options: dict[str, Any]) -> None:
        """Compile the kernel, and record its arguments in the order of its signature."""
        compiled = kernel.run(*args, grid=grid, warmup=True, **options)
        named = (options[name] for name in kernel.arg_names[len(args) :])
        whole = (*grid, 1, 1)[:3]
        self.launched.append((compiled, whole, tuple(self._described(x) for x in (*args, *named))))  # type: ignore[arg-type]

    def _described(self, x: Any) -> Any:
        if isinstance(x, tuple):
            return tuple(map(self._described, x))
        return self._address(x) if isinstance(x, Tensor) else x

    def _address(self, x: Tensor) -> Address:
        at = x.data_ptr()
        for n, base in enumerate(self.given):
            if base.data_ptr() == at:
                return Address(n, 0)
        for n, base in enumerate(self.allocated, len(self.given)):
            begin = base.data_ptr()
            if begin <= at < begin + max(1, base.nbytes):
                return Address(n, at - begin)
        raise LookupError("a tensor that is neither given nor allocated: the launch code copied or computed something")


@contextlib.contextmanager
def recorded(given: Sequence[Tensor]) -> Iterator[Launches]:
    """Record the launches of this thread inside, on the tensors ``given``; nothing runs."""
    with Launches(given) as launches:
        _recording.launches = launches
        try:
            yield launches
        finally:
            del _recording.launches


def launched(kernel: Any, grid: tuple[int, ...]) -> Callable[..., None]:
    """``kernel[grid]``, the launch; inside ``recorded`` it is recorded instead."""
    launches: Launches | None = getattr(_recording, "launches", None)
    if launches is None:
        return kernel[grid]
    return lambda *args, **options: launches.launch(kernel, grid, args, options)


def prepare(function: Callable[..., Sequence[Tensor]], given: Sequence[Tensor | None]) -> Run | None:
    """``function(*given)`` for calls of the same kind: a run that reads the addresses of its arguments alone.

    None if the launch code does more than allocate and launch, or if two arguments share an address and so cannot be
    distinguished.
    """
    tensors = [x for x in given if x is not None]
    if len({x.data_ptr() for x in tensors}) < len(tensors):
        return None
    present = [x is not None for x in given]
    try:
        with recorded(tensors) as launches:
            results = function(*given)
    except LookupError:
        return None
    made = {id(x): n for n, x in enumerate(launches.allocated, len(tensors))}
    if any(id(x) not in made for x in results):
        return None
    allocations = [Allocation(tuple(x.shape), x.dtype, x.device) for x in launches.allocated]
    return _run(launches.launched, allocations, [made[id(x)] for x in results], present)


def _run(
    launched: Sequence[tuple[Any, tuple[int, int, int], tuple[Any, ...]]],
    allocations: Sequence[Allocation],
    results: Sequence[int],
    present: Sequence[bool],
) -> Run:
    device = allocations[0].device
    makers = [(a.shape, a.dtype) for a in allocations]
    launches = [(kernel[grid], _filler(arguments)) for kernel, grid, arguments in launched]

    def run(*given: Tensor | None) -> tuple[Tensor, ...]:
        if device.type == "cuda" and torch.cuda.current_device() != device.index:
            with torch.cuda.device(device):
                return run(*given)
        tensors = [x for x, there in zip(given, present, strict=True) if there]
        tensors += [torch.empty(shape, dtype=dtype, device=device) for shape, dtype in makers]
        addresses = [x.data_ptr() for x in tensors]  # type: ignore[union-attr]
        for launch, fill in launches:
            launch(*fill(addresses))
        return tuple(tensors[n] for n in results)  # type: ignore[misc]

    return run


def _filler(arguments: tuple[Any, ...]) -> Callable[[list[int]], tuple[Any, ...]]:
    """A function from addresses to the arguments with them in place."""
    steps = [(n, _of_one(x)) for n, x in enumerate(arguments) if _has_address(x)]

    def fill(addresses: list[int]) -> tuple[Any, ...]:
        filled = list(arguments)
        for n, step in steps:
            filled[n] = step(addresses)
        return tuple(filled)

    return fill


def _of_one(x: Any) -> Callable[[list[int]], Any]:
    if isinstance(x, Address):
        tensor, offset = x.tensor, x.offset
        return lambda addresses: addresses[tensor] + offset
    first, *rest = x
    if isinstance(first, Address) and not any(map(_has_address, rest)):  # a tensor with its strides
        tensor, offset, tail = first.tensor, first.offset, tuple(rest)
        return lambda addresses: (addresses[tensor] + offset, *tail)
    return _filler(x)


def _has_address(x: Any) -> bool:
    return isinstance(x, Address) or (isinstance(x, tuple) and any(map(_has_address, x)))
