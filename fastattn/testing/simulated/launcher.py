"""Drives Triton's own launcher over the recording driver, to see what its compiled C code passes to the driver.

It needs a process of its own in which no kernel is interpreted. A kernel is compiled only to Triton's first
intermediate form, which fixes the parameters; in place of machine code stands a text that lists the size of each
parameter in bytes.
"""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from fastattn.backends import load
from fastattn.testing.simulated.recording import RecordingDriver

CAPABILITY = 90
STREAM = 7
_PARAMETER = re.compile(r"%[\w.]+: (!tt\.ptr<[^>]*>|[a-z]+\d+)")
_BYTES = {"i1": 1, "i8": 1, "i16": 2, "i32": 4, "i64": 8, "f32": 4, "f64": 8}


def use(recording: RecordingDriver) -> None:
    """Make Triton launch on tensors in host memory from now on, as on a GPU whose driver is ``recording``.

    This also sets environment variables, so call it before Triton is imported.
    """
    folder = Path(tempfile.mkdtemp(prefix="fastattn-launcher-"))
    (folder / "libcuda.so.1").symlink_to(recording.path)  # the launcher is linked with it
    os.environ.update(TRITON_INTERPRET="0", TRITON_LIBCUDA_PATH=str(folder), TRITON_CACHE_DIR=str(folder / "cache"))
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia import driver as nvidia
    from triton.backends.nvidia.compiler import CUDABackend
    from triton.runtime import driver

    class HostDriver(nvidia.CudaDriver):
        """Triton's own driver, except for devices and streams, which a CPU build of torch lacks."""

        def __init__(self) -> None:
            self.utils, self.launcher_cls = nvidia.CudaUtils(), nvidia.CudaLauncher

        is_active = staticmethod(lambda: True)
        get_current_device = staticmethod(lambda: 0)
        get_current_stream = staticmethod(lambda device=None: STREAM)
        set_current_device = staticmethod(lambda device: None)
        get_device_capability = staticmethod(lambda device=0: divmod(CAPABILITY, 10))
        get_current_target = staticmethod(lambda: GPUTarget("cuda", CAPABILITY, 32))
        get_active_torch_device = staticmethod(lambda: torch.device("cpu"))

    CUDABackend.add_stages = _stages
    recording.bind(0)
    driver.set_active(HostDriver())


@contextlib.contextmanager
def host_tensors(backend: str) -> Iterator[None]:
    """Let ``backend`` accept tensors in host memory while inside, as if they were on a GPU."""
    with mock.patch.multiple(load(backend), unsupported_reasons=lambda _: [], unavailable_reason=lambda: None):
        yield


def _stages(self: Any, stages: dict[str, Callable[..., Any]], options: Any, *_: Any) -> None:
    """Replaces ``CUDABackend.add_stages``."""
    capability = self._parse_arch(options.arch)

    def described(module: Any, metadata: dict[str, Any]) -> bytes:
        text = next(line for line in str(module).splitlines() if "tt.func public" in line)
        name = text.partition("@")[2].partition("(")[0]
        sizes = [_BYTES.get(kind, 8) for kind in _PARAMETER.findall(text)]
        metadata.update(name=name, shared=0, tmem_size=0)
        for scratch in ("global", "profile"):
            metadata.update({f"{scratch}_scratch_size": 0, f"{scratch}_scratch_align": 1})
        return " ".join(map(str, [name, *sizes])).encode() + b"\0"

    stages["ttir"] = lambda source, metadata: self.make_ttir(source, metadata, options, capability)
    stages["cubin"] = described
