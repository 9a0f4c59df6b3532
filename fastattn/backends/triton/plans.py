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
import triton
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fastattn.backends.base import Run
from fastattn.backends.triton import direct
from fastattn.backends.triton.direct import Address
from fastattn.storage import model
from fastattn.torch_internals import current_device

WORKSPACE_ALIGNMENT = 512  # bytes, as torch allocates on a GPU
_recording = threading.local()


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
        for n, base in [*enumerate(self.allocated, len(self.given)), *enumerate(self.given)]:
            begin = base.data_ptr()
            if base.is_contiguous() and begin <= at < begin + max(1, base.nbytes):
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


def prepare(function: Callable[..., Sequence[Tensor]], given: Sequence[Tensor | None], turned: int = 0) -> Run | None:
    """``function(*given)`` for calls of the same kind: a run that reads the addresses of its arguments alone.

    The dimensions 1 and 2 of the first ``turned`` results are exchanged. None if the launch code does more than
    allocate and launch, or if two arguments share an address and so cannot be distinguished.
    """
    tensors = [x for x in given if x is not None]
    if len({x.data_ptr() for x in tensors}) < len(tensors):
        return None
    try:
        with recorded(tensors) as launches:
            results = function(*given)
    except LookupError:
        return None
    made = {id(x): n for n, x in enumerate(launches.allocated, len(tensors))}
    if any(id(x) not in made for x in results):
        return None
    memory = Memory.of(launches.allocated, len(tensors), [made[id(x)] for x in results], turned)
    with device_of(results[0]):  # which kernels are loaded on
        launched = Launched(launches.launched, memory)
    return _run([x is not None for x in given], memory, launched)


@dataclass(frozen=True)
class Memory:
    """The allocations of a pass: each result for itself, and all that is not returned in one piece.

    Attributes:
        device: of all tensors.
        models: of the results, and of the piece if there is one.
        places: of each recorded tensor: its number among the tensors of a run, and its offset there in bytes.
        results: how many models are results.
    """

    device: torch.device
    models: tuple[Tensor, ...]
    places: tuple[tuple[int, int], ...]
    results: int

    @classmethod
    def of(cls, allocated: Sequence[Tensor], given: int, results: Sequence[int], turned: int) -> Memory:
        device, size = allocated[0].device, 0
        places = {n: (n, 0) for n in range(given)} | {n: (given + i, 0) for i, n in enumerate(results)}
        for n, x in enumerate(allocated, given):
            if n not in places:
                places[n] = (given + len(results), size)
                size += -(-x.nbytes // WORKSPACE_ALIGNMENT) * WORKSPACE_ALIGNMENT
        made = [allocated[n - given] for n in results]
        models = [model(tuple(x.shape), x.dtype, device, i < turned) for i, x in enumerate(made)]
        if size:
            models.append(model((size,), torch.uint8, device))
        return cls(device, tuple(models), tuple(places[n] for n in range(len(places))), len(results))

    def place(self, x: Address) -> tuple[int, int]:
        """The number of the tensor among those of a run, and the offset in bytes."""
        tensor, offset = self.places[x.tensor]
        return tensor, offset + x.offset


def device_of(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """Launch on the device of ``x``, which need not be the current one."""
    return torch.cuda.device(x.device) if x.device.type == "cuda" else contextlib.nullcontext()


def _run(present: Sequence[bool], memory: Memory, launched: Launched) -> Run:
    is_cuda, index = memory.device.type == "cuda", memory.device.index or 0
    new, models, count = torch.empty_like, memory.models, memory.results
    there = None if all(present) else [n for n, is_there in enumerate(present) if is_there]

    def run(*given: Tensor | None) -> tuple[Tensor, ...]:
        if is_cuda and current_device() != index:
            with torch.cuda.device(index):
                return run(*given)
        made = [new(x) for x in models]
        tensors: Sequence[Any] = given if there is None else [given[n] for n in there]
        launched(tuple([x.data_ptr() for x in (*tensors, *made)]), index)
        return tuple(made[:count])

    return run


class Launched:
    """The launches of a pass, repeated with other addresses, by the driver itself or by Triton's launcher.

    Triton's launcher takes several times as long: it looks at every argument anew. It serves where a profiler has hooks
    in it, and for kernels of another kind than plain CUDA ones.
    """

    def __init__(self, launched: Sequence[tuple[Any, tuple[int, int, int], tuple[Any, ...]]], memory: Memory) -> None:
        self._usual = [(kernel[grid], _filler(arguments, memory)) for kernel, grid, arguments in launched]
        self._direct = direct.launcher(launched, memory.place, memory.device.index or 0)
        self._stream: Any = None if self._direct is None else triton.runtime.driver.active.get_current_stream
        self._hooks = triton.knobs.runtime

    def __call__(self, addresses: tuple[int, ...], device: int) -> None:
        if self._direct is not None and not direct.has_hooks(self._hooks):
            self._direct(addresses, self._stream(device))
            return
        for launch, fill in self._usual:
            launch(*fill(addresses))


def _filler(arguments: tuple[Any, ...], memory: Memory) -> Callable[[Sequence[int]], tuple[Any, ...]]:
    """A function from addresses to the arguments with them in place."""

    def filled(x: Any, addresses: Sequence[int]) -> Any:
        if isinstance(x, Address):
            tensor, offset = memory.place(x)
            return addresses[tensor] + offset
        return tuple(filled(y, addresses) for y in x) if isinstance(x, tuple) else x

    return lambda addresses: filled(arguments, addresses)
