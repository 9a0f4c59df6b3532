"""A fake CUDA driver that records the calls of the host code and checks them by the documented rules; runs nothing."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import itertools
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

from fastattn import compiled
from fastattn.backends import cuda, driver, native
from fastattn.backends.cuda import abi, build, library, nvrtc
from fastattn.backends.cuda.instances import Instance, library_instances

SOURCES = tuple(Path(__file__).with_name(name) for name in ("runtime.c", "driver.c"))  # the first includes the others
DEVICES = 2
NAME_BYTES, MAP_BYTES, MAP_MAGIC = 512, 128, 0x4D415021


class RecordedMap(ctypes.Structure):
    """A tensor map: the arguments of its encoding, and the address that it holds now."""

    _fields_ = (
        ("address", ctypes.c_uint64), ("sizes", ctypes.c_uint64 * 5), ("strides", ctypes.c_uint64 * 4),
        ("magic", ctypes.c_uint), ("type", ctypes.c_uint), ("box", ctypes.c_uint * 5),
        ("rank", ctypes.c_uint8), ("steps", ctypes.c_uint8 * 5), ("interleave", ctypes.c_uint8),
        ("swizzle", ctypes.c_uint8), ("promotion", ctypes.c_uint8), ("fill", ctypes.c_uint8),
    )  # fmt: skip


class RecordedLaunch(ctypes.Structure):
    """One launch; ``params`` holds the bytes of its arguments, one after the other."""

    _fields_ = (
        ("kernel", ctypes.c_char * NAME_BYTES), ("grid", ctypes.c_uint * 3), ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint), ("param_bytes", ctypes.c_uint), ("param_count", ctypes.c_uint),
        ("sizes", ctypes.c_uint * 256), ("stream", ctypes.c_uint64),
        ("device", ctypes.c_int), ("follows", ctypes.c_int), ("params", ctypes.c_ubyte * 4096),
    )  # fmt: skip

    @property
    def arguments(self) -> list[bytes]:
        ends = list(itertools.accumulate(list(self.sizes)[: self.param_count]))
        return [bytes(self.params)[end - size : end] for size, end in zip(self.sizes, ends, strict=False)]

    @property
    def argument(self) -> bytes:
        """The first argument."""
        return self.arguments[0]

    @property
    def maps(self) -> list[RecordedMap]:
        """The tensor maps at the beginning of the first argument."""
        pieces = (self.argument[n : n + MAP_BYTES] for n in range(0, len(self.argument) - MAP_BYTES + 1, MAP_BYTES))
        maps = (RecordedMap.from_buffer_copy(piece) for piece in pieces)
        return list(itertools.takewhile(lambda found: found.magic == MAP_MAGIC, maps))


class RecordingDriver:
    """The fake ``libcuda``.

    Attributes:
        library: the loaded library, which replaces ``libcuda.so.1``.
        path: the path of the library.
    """

    def __init__(self) -> None:
        self.path = _built()
        self.library = ctypes.CDLL(str(self.path), mode=ctypes.RTLD_GLOBAL)
        self.library.rec_launch.restype = ctypes.POINTER(RecordedLaunch)
        self.library.rec_broken.restype = ctypes.c_char_p
        self.library.rec_reset()

    @property
    def launches(self) -> list[RecordedLaunch]:
        return [self.library.rec_launch(i).contents for i in range(self.library.rec_launches())]

    def clear(self) -> None:
        """Forget launches and broken rules; loaded modules stay."""
        self.library.rec_clear()

    def copies(self) -> list[RecordedLaunch]:
        """Copies of ``launches`` that later launches do not overwrite."""
        return [RecordedLaunch.from_buffer_copy(launch) for launch in self.launches]

    @property
    def broken_rule(self) -> str:
        """The rule that was broken last, or "" if none was."""
        return self.library.rec_broken().decode()

    def bind(self, device: int | None) -> None:
        """Make a context current on this thread, or none."""
        self.library.rec_bind(-1 if device is None else device)

    @property
    def bound(self) -> int | None:
        """The device whose context is current on this thread."""
        context, found = ctypes.c_void_p(), ctypes.c_int()
        self.library.cuCtxGetCurrent(ctypes.byref(context))
        if context.value is None:
            return None
        self.library.cuCtxGetDevice(ctypes.byref(found))
        return found.value


@contextlib.contextmanager
def recorded_cuda() -> Iterator[RecordingDriver]:
    """Run the CUDA backend's ctypes host over a recording driver; a text of name and argument size is its cubin."""
    recording = RecordingDriver()
    driver._primary_context.cache_clear()

    def fake_driver() -> ctypes.CDLL:  # no mock, which would take longer than the calls that are timed through it
        return recording.library

    def text_of(instance: Instance) -> bytes:
        return f"{instance.name} {argument_bytes(instance)}\0".encode()

    with contextlib.ExitStack() as undo:
        undo.callback(driver._primary_context.cache_clear)
        undo.enter_context(mock.patch.object(driver, "_driver", fake_driver))
        undo.enter_context(mock.patch.object(nvrtc, "cached_kernel", text_of))
        with mock.patch.object(nvrtc, "load"):
            kernels = nvrtc.NvrtcKernels()
        undo.enter_context(mock.patch.object(cuda, "_delivered", return_value=(kernels, "recorded")))
        yield recording


def argument_bytes(instance: Instance) -> int:
    """The size in bytes of a kernel's argument as csrc/ declares it: tensor maps, then the flat struct."""
    maps = {"ForwardArgs": 4, "BackwardArgs": 7, "DecodeArgs": 2}.get(instance.config.arguments, 0)
    struct = {"F": abi.FORWARD, "B": abi.BACKWARD, "D": abi.DECODE}[instance.config.arguments[0]]
    return maps * MAP_BYTES + struct.size


def built_host(recording: RecordingDriver) -> library.Library:
    """The C++ host, ``csrc/sm90/host.cu`` with all launches, compiled by nvcc against the recording driver and runtime.

    Kernels are compiled with empty bodies, which takes seconds.

    Raises:
        BuildError: there is no nvcc, or the sources do not compile.
    """
    csrc = native.source_folder()
    key = hashlib.sha256((build.fingerprint(csrc) + Path(__file__).read_text(encoding="utf-8")).encode())
    path = compiled.kept(f"recorded-host-{key.hexdigest()[:24]}.so", functools.partial(_compile_host, csrc))
    host = library.Library(path)
    sizes = host._library.recorded_argument_bytes
    sizes.restype = ctypes.c_uint
    recording.library.rec_set_argument_bytes(sizes)
    return host


_BODY = re.compile(r"(FA_GLOBAL\([^\n]*\)\n\w+\(FA_KERNEL_ARGUMENT (?:typename )?[\w:]+ \w+\)) \{\n[^}]*\}")
_SIZES = """
extern "C" __attribute__((visibility("default"))) unsigned recorded_argument_bytes(char const* kernel) {
  auto const takes = [&](char const* type) { return __builtin_strstr(kernel, type) != nullptr; };
  if (takes("11ForwardArgs")) return sizeof(fa::sm90::ForwardArgs);
  if (takes("12BackwardArgs")) return sizeof(fa::sm90::BackwardArgs);
  if (takes("10DecodeArgs")) return sizeof(fa::sm90::DecodeArgs);
  if (takes("13ForwardParams")) return sizeof(fa::ForwardParams);
  return takes("14BackwardParams") ? sizeof(fa::BackwardParams) : sizeof(fa::DecodeParams);
}
"""


def _compile_host(csrc: Path, path: Path) -> None:
    instances = library_instances(csrc)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for name in ("common", "sm90"):
            shutil.copytree(csrc / name, folder / name)
        for source in (folder / "sm90").glob("*.cuh"):
            source.write_text(_BODY.sub(r"\1 {}", source.read_text()))
        lines = [line for instance in instances for line in build.instance_source(instance).splitlines()[1:]]
        whole = folder / "whole.cu"
        whole.write_text("\n".join(['#include "sm90/host.cu"', '#include "sm90/launch.cuh"', *lines, _SIZES]))
        command = [build.find_nvcc(), "-std=c++17", "-O0", "-w", *build.ARCHITECTURE]
        command += ["-Xcompiler=-fPIC", "-cudart", "none", "-shared", f"-I{folder}", str(whole), "-o", str(path)]
        code, said = compiled.run(command)
    if code:
        raise compiled.BuildError(f"the host code does not compile:\n{said}")


@functools.cache
def _built() -> Path:
    key = hashlib.sha256(b"".join(source.read_bytes() for source in SOURCES)).hexdigest()[:24]
    return compiled.kept(f"recording-{key}-libcuda.so.1", _compile)


def _compile(path: Path) -> None:
    command = ["gcc", "-O1", "-w", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", str(SOURCES[0]), "-o", str(path)]
    code, said = compiled.run(command)
    if code:
        raise RuntimeError(f"the recording driver does not compile:\n{said}")
