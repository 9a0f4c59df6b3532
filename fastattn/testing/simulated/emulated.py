"""Runs the CUDA backend's kernels on the simulated GPUs, with the emulator of ``csrc/``.

The host code is the backend's own and tensors lie in the memory of the simulated devices, so the results of its
launches are real and can be judged. Addresses are checked as on a GPU: memory of another device, memory of the host and
freed memory are illegal accesses.
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
    """Replaces the library that is built for GPUs.

    Args:
        machine: the simulated GPUs.
        path: the library that ``csrc/emulator/emulate.py`` builds.
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
    """Let the CUDA backend launch these kernels while inside; the rest of the backend is unchanged."""
    kernels = EmulatedKernels(machine, path)
    with mock.patch.object(cuda, "_delivered", return_value=(kernels, "emulated")):
        yield
