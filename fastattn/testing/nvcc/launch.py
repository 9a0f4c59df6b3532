"""The CUDA backend on CPU tensors, its kernels compiled by nvcc to PTX and interpreted."""

from __future__ import annotations

import contextlib
import functools
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from unittest import mock

from fastattn import compiled
from fastattn.backends import cuda, driver, native
from fastattn.backends.cuda import abi, build, counters, decode, nvrtc
from fastattn.backends.cuda.instances import DTYPES, Instance
from fastattn.backends.triton.tools.ptx.memory import Global
from fastattn.backends.triton.tools.ptx.text import Program, parse
from fastattn.errors import InputError
from fastattn.testing.nvcc.group import Launch
from fastattn.testing.nvcc.machine import run_block
from fastattn.testing.nvcc.maps import TensorMap
from fastattn.testing.nvcc.spans import spans_of

BLOCKS = 2  # of a persistent kernel, so that each has several tiles


class InterpretedKernels(nvrtc.NvrtcKernels):
    """Stands in for the kernels' library: kernels, their order and their tensor maps are those of NVRTC's.

    Args:
        executed: how many instructions each kernel executed is added to it, by the kernel's name.
        seed: of the order in which warpgroups take turns.
        changed: a function of the name of a kernel and its PTX, for planting faults.
    """

    def __init__(
        self, executed: dict[str, int] | None = None, seed: int = 0, changed: Callable[[str, str], str] | None = None
    ) -> None:
        super().__init__()
        self._executed, self._seed, self._changed = {} if executed is None else executed, seed, changed

    @staticmethod
    def _find_compiler() -> None:
        nvcc()

    def prepared(self, struct: abi.Abi, fields: abi.Fields) -> driver.Launch:
        def launch(addresses: Sequence[int], stream: int) -> None:
            self._run(struct, {**fields, **dict(zip(struct.addresses, addresses, strict=True))})

        return launch

    def _run(self, struct: abi.Abi, fields: abi.Fields) -> None:
        fields = {**fields, "blocks": BLOCKS} if "blocks" in fields else fields
        given = {name: int(value) for name, value in fields.items()}
        steps, packed = self.steps(struct, given), struct.pack(fields)
        memory = Global(spans=spans_of(struct, given, [step.config for step in steps]))
        for step in steps:
            instance = Instance(step.config, DTYPES[given["dtype"]])
            maps = {
                n * driver.MAP_BYTES: TensorMap(given[view.name] + view.skipped, view)
                for n, view in enumerate(step.views)
            }
            argument = bytes(len(maps) * driver.MAP_BYTES) + packed
            program = self._program(instance)
            launch = Launch(program, argument, maps, memory, nvrtc.shared_bytes(step.config), step.blocks)
            count = sum(run_block(launch, number, self._seed) for number in range(step.blocks))
            self._executed[instance.name] = self._executed.get(instance.name, 0) + count

    def _program(self, instance: Instance) -> Program:
        return parse(self._changed(instance.name, ptx_of(instance))) if self._changed else _parsed(instance)


@contextlib.contextmanager
def interpreted_cuda(kernels: InterpretedKernels) -> Iterator[None]:
    """Let the CUDA backend launch these kernels while inside; the rest of the backend is unchanged.

    Counters are its own, since a kernel that ends in a fault leaves them as they are.
    """
    own_counters = mock.patch.dict(counters._counters, clear=True)
    with mock.patch.object(cuda, "_delivered", return_value=(kernels, "interpreted")), own_counters:
        yield


@contextlib.contextmanager
def split(parts: int) -> Iterator[None]:
    """Let decoding split keys into as many parts while inside, whatever the GPU."""
    with mock.patch.object(decode, "split_count", return_value=parts):
        yield


@functools.cache
def nvcc() -> str:
    """The compiler, which works, or InputError."""
    try:
        return build.find_nvcc()
    except build.BuildError as error:
        raise InputError(f"The CUDA kernels cannot be compiled to PTX: {error}.") from None


@functools.cache
def ptx_of(instance: Instance) -> str:
    """What nvcc emits for a kernel."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.cu")
        source.write_text(nvrtc.source_of(instance))
        target = source.with_suffix(".ptx")
        options = ("-std=c++17", "-O3", f"-arch={nvrtc.ARCHITECTURE}", "-ptx", f"-I{native.source_folder()}")
        code, said = compiled.run([nvcc(), *options, str(source), "-o", str(target)])
        if code:
            raise build.BuildError(f"compiling {instance.name} failed:\n{said}")
        return target.read_text()


@functools.cache
def _parsed(instance: Instance) -> Program:
    return parse(ptx_of(instance))
