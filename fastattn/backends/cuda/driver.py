"""The CUDA driver, through ctypes: tensor maps, modules and launches, for kernels that NVRTC compiled.

It does what ``csrc/sm90/host.cu`` does in the built library, for machines without a compiler of host code.
"""

from __future__ import annotations

import ctypes
import functools

TILED_4D = 4
DTYPES = (9, 6)  # CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 and _FLOAT16, in the order of Dtype in csrc/common/params.h
INTERLEAVE_NONE, SWIZZLE_128B, L2_PROMOTION_256B, FILL_NONE = 0, 3, 3, 0
MAP_BYTES, MAP_ALIGNMENT = 128, 64
MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
MULTIPROCESSORS = 16  # CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT
RELAXED = 2  # CU_STREAM_CAPTURE_MODE_RELAXED: a module may be loaded while a stream of this thread is capturing
NO_DRIVER = 999


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
    _call("cuTensorMapReplaceAddress", ctypes.c_void_p(at), ctypes.c_void_p(data))


def use_device(device: int) -> None:
    """Make the context that torch uses on a device current on this thread, which may have none yet.

    Threads of autograd and of servers have none until the runtime is called on them, and the driver makes none.
    """
    context, current = ctypes.c_void_p(), ctypes.c_int(-1)
    _call("cuCtxGetCurrent", ctypes.byref(context))
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


def load_function(cubin: bytes, name: str, shared_bytes: int) -> ctypes.c_void_p:
    """The kernel ``name`` of ``cubin`` in the current context, allowed ``shared_bytes`` of shared memory."""
    module, function, mode = ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_int(RELAXED)
    _call("cuThreadExchangeStreamCaptureMode", ctypes.byref(mode))
    try:
        _call("cuModuleLoadData", ctypes.byref(module), cubin)
        _call("cuModuleGetFunction", ctypes.byref(function), module, name.encode())
        _call("cuFuncSetAttribute", function, MAX_DYNAMIC_SHARED, shared_bytes)
    finally:
        _call("cuThreadExchangeStreamCaptureMode", ctypes.byref(mode))  # back to what it was
    return function


def launch(
    function: ctypes.c_void_p, arguments: int, blocks: int, threads: int, shared_bytes: int, stream: int
) -> None:
    """Launch a kernel of one argument, the struct at address ``arguments``."""
    pointers = (ctypes.c_void_p * 1)(arguments)
    _call(
        "cuLaunchKernel", function, blocks, 1, 1, threads, 1, 1, shared_bytes, ctypes.c_void_p(stream), pointers, None
    )


def multiprocessors(device: int) -> int:
    count = ctypes.c_int()
    _call("cuDeviceGetAttribute", ctypes.byref(count), MULTIPROCESSORS, device)
    return count.value
