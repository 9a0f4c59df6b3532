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


@functools.cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def _call(name: str, *arguments: object) -> None:
    code = getattr(_driver(), name)(*arguments)
    if code:
        text = ctypes.c_char_p()
        _driver().cuGetErrorString(code, ctypes.byref(text))
        reason = text.value.decode() if text.value else f"code {code}"
        raise RuntimeError(f"fastattn's CUDA kernel was not launched: {name}: {reason}")


def aligned_buffer(size: int) -> tuple[ctypes.Array[ctypes.c_char], int]:
    """A buffer that holds ``size`` bytes at the returned, aligned address."""
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


def load_function(cubin: bytes, name: str, shared_bytes: int) -> ctypes.c_void_p:
    """The kernel ``name`` of ``cubin`` in the current context, allowed ``shared_bytes`` of shared memory."""
    module, function = ctypes.c_void_p(), ctypes.c_void_p()
    _call("cuModuleLoadData", ctypes.byref(module), cubin)
    _call("cuModuleGetFunction", ctypes.byref(function), module, name.encode())
    _call("cuFuncSetAttribute", function, MAX_DYNAMIC_SHARED, shared_bytes)
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
