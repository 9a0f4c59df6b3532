"""The CUDA backend's kernels on the simulated GPUs: a library of the emulated machine launches them there.

The host code is the backend's own, tensors lie in the memory of the simulated devices, and the emulator of ``csrc/``
computes on it: what the backend launches is real, and judged. Addresses are checked as a GPU would: memory of another
device, of the host, or freed is an illegal access.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

from fastattn.backends import cuda
from fastattn.backends.cuda import abi, library
from fastattn.testing.simulated.machine import Machine


class EmulatedKernels(library.Library):
    """In the place of the library that is built for GPUs.

    Args:
        machine: the simulated GPUs.
        path: of the library that ``csrc/emulator/emulate.py`` builds.
    """

    def __init__(self, machine: Machine, path: Path) -> None:
        super().__init__(path)
        self._machine = machine

    def _launch(self, struct: abi.Abi, packed: bytes) -> None:
        given, run = struct.unpack(packed), functools.partial(super()._launch, struct, packed)
        device, stream = int(given["device"]), int(given["stream"])
        for name in struct.addresses:
            self._machine.check_address(struct.name, name, int(given[name]), device)
        self._machine.launch(struct.name, (), run, (device, stream))


@contextlib.contextmanager
def emulated_cuda(machine: Machine, path: Path) -> Iterator[None]:
    """The CUDA backend with these kernels while inside; nothing else of it is replaced."""
    kernels = EmulatedKernels(machine, path)
    with mock.patch.object(cuda, "_delivered", return_value=(kernels, "emulated")):
        yield
