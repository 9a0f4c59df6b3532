"""The properties of the simulated GPUs, and their record of launches and of the host's waits."""

from __future__ import annotations

import ctypes
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

DEVICES = 2
_SILENT = (str(Path(torch.__file__).parent), str(Path(__file__).parent))  # folders whose lines cause no wait


@dataclass(frozen=True)
class Wait:
    """The host waited for the device.

    Attributes:
        operator: the operator that waited, for example "aten::_local_scalar_dense".
        line: "path:number code" of the innermost line outside of torch.
    """

    operator: str
    line: str


@dataclass(frozen=True)
class Launch:
    """A kernel was launched.

    Attributes:
        kernel: the name of the kernel.
        device: the index of the current device.
        stream: the id of the current stream of that device.
        grid: the number of blocks in each dimension.
    """

    kernel: str
    device: int
    stream: int
    grid: tuple[int, ...]


@dataclass
class Machine:
    """The simulated GPUs, which are all alike.

    Attributes:
        name: the result of ``torch.cuda.get_device_name``.
        capability: (major, minor).
        multiprocessors, l2_bytes, memory_bytes: the size of each GPU.
        refuses_waits: whether a wait raises, as after ``torch.cuda.set_sync_debug_mode("error")``.
        waits: the waits of the host so far.
        launches: the launches of kernels so far.
        turned: the functions that are told each device that becomes current.
    """

    library: ctypes.CDLL
    name: str = "Simulated H200"
    capability: tuple[int, int] = (9, 0)
    multiprocessors: int = 132
    l2_bytes: int = 50 << 20
    memory_bytes: int = 140 << 30
    refuses_waits: bool = False
    waits: list[Wait] = field(default_factory=list)
    launches: list[Launch] = field(default_factory=list)
    turned: list[Callable[[int], object]] = field(default_factory=list)
    _captured: dict[int, Callable[[], object]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._told = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int, ctypes.c_char_p)(self._note)
        self._call = ctypes.CFUNCTYPE(None, ctypes.c_longlong)(lambda number: self._captured[number]())

    def turn(self, on: bool) -> None:
        self.library.sim_turn(int(on), self._told)

    def _note(self, what: int, name: bytes) -> int:
        self.waits.append(Wait(name.decode(), _line()))
        return int(self.refuses_waits)

    def wait(self) -> None:
        """Record that the host waits for the device.

        Raises:
            RuntimeError: a capture is under way, or waits are refused.
        """
        if self.library.sim_is_capturing():
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing")
        if self._note(0, b"synchronize"):
            raise RuntimeError("called a synchronizing CUDA operation")

    def launch(
        self, kernel: str, grid: tuple[int, ...], run: Callable[[], object], on: tuple[int, int] | None = None
    ) -> None:
        """Run a kernel on ``on``, a (device, stream), by default the current ones; replays repeat it."""
        device = self.library.sim_device()
        device, stream = on or (device, self.library.sim_stream(device))
        self.launches.append(Launch(kernel, device, stream, grid))
        if self.library.sim_is_capturing():
            number = len(self._captured)
            self._captured[number] = run
            self.library.sim_capture_call(self._call, number)
        run()

    def check_address(self, kernel: str, name: str, address: int, device: int) -> None:
        """Check that an argument of a kernel points to live memory of the kernel's device.

        Raises:
            RuntimeError: it points elsewhere.
        """
        found = self.library.sim_device_of(address)
        if address and found != device:
            where = f"on cuda:{found}" if found >= 0 else "in no memory of a device"
            what = f"{name} of {kernel} on cuda:{device} lies {where}"
            raise RuntimeError(f"CUDA error: an illegal memory access was encountered: {what}")


def _line() -> str:
    for frame in reversed(traceback.extract_stack()):
        if not frame.filename.startswith((*_SILENT, "<")):
            return f"{frame.filename}:{frame.lineno} {frame.line}"
    return "unknown"
