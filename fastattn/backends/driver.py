"""The CUDA driver, through ctypes: tensor maps, modules, and launches of kernels that NVRTC or Triton compiled.

For kernels of NVRTC it does what ``csrc/sm90/host.cu`` does in the built library, for machines without a compiler of
host code.
"""

from __future__ import annotations

import ctypes
import functools
import struct
from collections.abc import Callable, Sequence
from typing import NamedTuple, NoReturn

TILED_4D = 4
DTYPES = (9, 6)  # CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 and _FLOAT16, in the order of Dtype in csrc/common/params.h
INTERLEAVE_NONE, SWIZZLE_128B, L2_PROMOTION_256B, FILL_NONE = 0, 3, 3, 0
MAP_BYTES, MAP_ALIGNMENT = 128, 64
MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
MULTIPROCESSORS = 16  # CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT
RELAXED = 2  # CU_STREAM_CAPTURE_MODE_RELAXED: a module may be loaded while a stream of this thread is capturing
NO_DRIVER = 999
# CUlaunchConfig: grid, block, bytes of shared memory, stream, attributes and their number.
CONFIG = struct.Struct("<7I4xQQI4x")
POINTER = struct.Struct("<Q")
CONFIG_STREAM = 32  # of the stream in CONFIG
# A CUlaunchAttribute of 72 bytes: CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION, allowed.
OVERLAPS = ctypes.create_string_buffer(struct.pack("<I4xi60x", 6, 1), 72)

Launch = Callable[[tuple[int, ...], int], None]  # on tensors at addresses, on a stream


@functools.cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def supported_major() -> int:
    """The newest major version of CUDA that the driver knows; a large number without a driver, where nothing runs."""
    version = ctypes.c_int()
    try:
        code = _driver().cuDriverGetVersion(ctypes.byref(version))
    except (OSError, AttributeError):
        return NO_DRIVER
    return NO_DRIVER if code else version.value // 1000


def _call(name: str, *arguments: object) -> None:
    code = getattr(_driver(), name)(*arguments)
    if code:
        _refuse(name, code)


def _refuse(name: str, code: int) -> NoReturn:
    text = ctypes.c_char_p()
    _driver().cuGetErrorString(code, ctypes.byref(text))
    reason = text.value.decode() if text.value else f"code {code}"
    raise RuntimeError(f"fastattn's CUDA kernel was not launched: {name}: {reason}")


def aligned_buffer(size: int) -> tuple[ctypes.Array[ctypes.c_char], int]:
    """A buffer of ``size`` bytes, rounded up to the alignment, and the aligned address of these bytes.

    The driver copies whole multiples of the alignment of a kernel's argument.
    """
    size += -size % MAP_ALIGNMENT
    buffer = ctypes.create_string_buffer(size + MAP_ALIGNMENT)
    address = ctypes.addressof(buffer)
    return buffer, address + -address % MAP_ALIGNMENT


def encode_map(to: int, data: int, dtype: int, sizes: tuple[int, ...], strides: tuple[int, ...], box_rows: int) -> None:
    """Write the tensor map of a (head dim, row, head, batch) tensor at address ``to``.

    ``strides`` are in bytes, of rows, heads and batch. A dimension of size 1 is never stepped over, so any valid stride
    will do for it.
    """
    steps = [16 if size == 1 else stride for size, stride in zip(sizes[1:], strides, strict=True)]
    _call(
        "cuTensorMapEncodeTiled",
        ctypes.c_void_p(to),
        DTYPES[dtype],
        TILED_4D,
        ctypes.c_void_p(data),
        (ctypes.c_uint64 * 4)(*sizes),
        (ctypes.c_uint64 * 3)(*steps),
        (ctypes.c_uint32 * 4)(64, box_rows, 1, 1),
        (ctypes.c_uint32 * 4)(1, 1, 1, 1),
        INTERLEAVE_NONE,
        SWIZZLE_128B,
        L2_PROMOTION_256B,
        FILL_NONE,
    )


def move_map(at: int, data: int) -> None:
    """Let the tensor map at address ``at`` show a tensor alike at address ``data``."""
    if code := _driver().cuTensorMapReplaceAddress(ctypes.c_void_p(at), ctypes.c_void_p(data)):
        _refuse("cuTensorMapReplaceAddress", code)


def use_device(device: int) -> None:
    """Make the context that torch uses on a device current on this thread, which may have none yet.

    Threads of autograd and of servers have none until the runtime is called on them, and the driver makes none.
    """
    context, current = ctypes.c_void_p(), ctypes.c_int(-1)
    _call("cuCtxGetCurrent", ctypes.byref(context))
    if context.value == _primary_context(device).value:
        return
    if context.value:
        _call("cuCtxGetDevice", ctypes.byref(current))
    if current.value != device:
        _call("cuCtxSetCurrent", _primary_context(device))


@functools.cache
def _primary_context(device: int) -> ctypes.c_void_p:
    """The primary context of a device, retained once and never released."""
    handle, context = ctypes.c_int(), ctypes.c_void_p()
    _call("cuDeviceGet", ctypes.byref(handle), device)
    _call("cuDevicePrimaryCtxRetain", ctypes.byref(context), handle)
    return context


def load_function(cubin: bytes, name: str, shared_bytes: int) -> int:
    """The kernel ``name`` of ``cubin`` in the current context, allowed ``shared_bytes`` of shared memory."""
    module, function, mode = ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_int(RELAXED)
    _call("cuThreadExchangeStreamCaptureMode", ctypes.byref(mode))
    try:
        _call("cuModuleLoadData", ctypes.byref(module), cubin)
        _call("cuModuleGetFunction", ctypes.byref(function), module, name.encode())
        _call("cuFuncSetAttribute", function, MAX_DYNAMIC_SHARED, shared_bytes)
    finally:
        _call("cuThreadExchangeStreamCaptureMode", ctypes.byref(mode))  # back to what it was
    assert function.value is not None
    return function.value


class Placed(NamedTuple):
    """A kernel, and where in an image its parameters lie.

    Attributes:
        function: its handle.
        grid: the number of blocks in each direction.
        threads: of a block.
        shared_bytes: of a block.
        params: the offset of each parameter.
        follows: whether it may begin before the kernel before it in the stream has ended, for which it waits itself.
    """

    function: int
    grid: tuple[int, int, int]
    threads: int
    shared_bytes: int
    params: tuple[int, ...]
    follows: bool = False


class Block:
    """The parameters and configurations of the launches of a pass, where the driver reads them.

    A launch copies them before it returns, so a block serves one call at a time.

    Attributes:
        buffer: holds ``image`` from the offset ``begin`` on, which is aligned.
        at: the address of ``image``.
        addresses: the addresses of tensors that it holds now; None at first.
        stream: that it holds now.
        calls: the arguments of each launch.
        context: room for the current context of the thread, and ``at_context``, its address.
    """

    def __init__(self, image: bytes, kernels: Sequence[Placed], streams: Sequence[int]) -> None:
        self.addresses: tuple[int, ...] | None = None
        self.stream: int | None = None
        self.context = ctypes.c_void_p()
        self.at_context = ctypes.byref(self.context)
        size = len(image) + -len(image) % MAP_ALIGNMENT
        self.buffer, self.at = aligned_buffer(size + sum(CONFIG.size + 8 * len(k.params) for k in kernels))
        self.begin = self.at - ctypes.addressof(self.buffer)
        ctypes.memmove(self.at, image, len(image))
        self._streams = [self.begin + at for at in streams]
        self.calls = []
        for kernel in kernels:
            of_params = size + CONFIG.size
            attributes = (ctypes.addressof(OVERLAPS), 1) if kernel.follows else (0, 0)
            shape = *kernel.grid, kernel.threads, 1, 1, kernel.shared_bytes
            CONFIG.pack_into(self.buffer, self.begin + size, *shape, 0, *attributes)
            for n, offset in enumerate(kernel.params):
                POINTER.pack_into(self.buffer, self.begin + of_params + 8 * n, self.at + offset)
            pointers = (ctypes.c_void_p(self.at + n) for n in (size, of_params))
            config, params = pointers
            self.calls.append((config, ctypes.c_void_p(kernel.function), params))
            self._streams.append(self.begin + size + CONFIG_STREAM)
            size = of_params + 8 * len(kernel.params)

    def use(self, stream: int) -> None:
        for at in self._streams:
            POINTER.pack_into(self.buffer, at, stream)
        self.stream = stream


def launcher(
    device: int,
    image: bytes,
    kernels: Sequence[Placed],
    write: Callable[[Block, tuple[int, ...], Sequence[int] | None], None],
    streams: Sequence[int] = (),
) -> Launch:
    """The launches of a pass, one after the other, on tensors at other addresses each time.

    Args:
        device: of the kernels.
        image: what all calls share of the parameters.
        kernels: in order.
        write: puts addresses of tensors into a block, in the places of those that it holds, if any. What it writes
            depends on them alone, so it is not called if they are the same: in a loop torch gives memory again.
        streams: where in the image the stream is written, besides the configurations.
    """
    free: list[Block] = []  # of this pass; a thread takes one as long as it launches

    def launch(addresses: tuple[int, ...], stream: int) -> None:
        try:
            block = free.pop()
        except IndexError:
            block = Block(image, kernels, streams)
        if addresses != (held := block.addresses):
            block.addresses = None
            write(block, addresses, held)
            block.addresses = addresses
        if stream != block.stream:
            block.use(stream)
        cuda = _driver()
        cuda.cuCtxGetCurrent(block.at_context)
        if block.context.value != _primary_context(device).value:
            use_device(device)
        for call in block.calls:
            if code := cuda.cuLaunchKernelEx(*call, None):
                _refuse("cuLaunchKernelEx", code)
        free.append(block)

    return launch


def multiprocessors(device: int) -> int:
    count = ctypes.c_int()
    _call("cuDeviceGetAttribute", ctypes.byref(count), MULTIPROCESSORS, device)
    return count.value
