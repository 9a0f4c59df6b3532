"""The instructions of tensor cores: fragments of ``mma`` and ``wgmma``, ``ldmatrix``, matrices behind descriptors.

A register of an operand holds ``n = 4 / size`` neighbouring elements along K. With ``g = lane / 4`` and
``t = lane % 4`` the four registers of A hold rows ``g, g + 8, g, g + 8`` at ``K = n t``, 16 bytes further for the last
two; the two of B hold column ``g`` at the same K. Of four registers of the sum the first two are columns ``2 t`` and
``2 t + 1`` of row ``g``, the others of row ``g + 8`` (PTX ISA, "Matrix fragments for mma.m16n8k16" and its like).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastattn.backends.triton.tools.ptx.memory import Addresses, Fault
from fastattn.backends.triton.tools.ptx.operations import Bits, from_e4m3, values

Floats = NDArray[np.float32]
SIZES = {"bf16": 2, "f16": 2, "e4m3": 1, "tf32": 4}
SWIZZLES = {0: 0, 1: 128, 2: 64, 3: 32}  # bytes of a row, by bits 62 and 63 of a descriptor
LANES = np.arange(32)


def elements(raw: NDArray[np.uint8], kind: str) -> Floats:
    """``[..., bytes]`` as ``[..., elements]`` in fp32."""
    if kind == "e4m3":
        return from_e4m3(raw)
    if kind == "tf32":
        return (
            np.ascontiguousarray(raw).view(np.uint32).astype(np.uint32).__and__(np.uint32(0xFFFFE000)).view(np.float32)
        )
    return values(np.ascontiguousarray(raw).view(np.uint16), kind).astype(np.float32)


def _bytes_of(registers: list[Bits]) -> NDArray[np.uint8]:
    """``[threads, registers, 4]``."""
    return np.ascontiguousarray(np.stack(registers, 1)).view(np.uint8).reshape(len(registers[0]), len(registers), 4)


def a_of_registers(registers: list[Bits], kind: str) -> Floats:
    """``[warps, 16, K]`` from the four registers of A."""
    raw = elements(_bytes_of(registers), kind)  # [threads, 4, n]
    warps, n = raw.shape[0] // 32, raw.shape[2]
    by = raw.reshape(warps, 8, 4, 2, 2, n)  # warp, g, t, half of K, half of rows
    return by.transpose(0, 4, 1, 3, 2, 5).reshape(warps, 16, 8 * n)


def b_of_registers(registers: list[Bits], kind: str) -> Floats:
    """``[warps, K, 8]`` from the two registers of B."""
    raw = elements(_bytes_of(registers), kind)
    warps, n = raw.shape[0] // 32, raw.shape[2]
    by = raw.reshape(warps, 8, 4, 2, n)  # warp, column, t, half of K
    return by.transpose(0, 3, 2, 4, 1).reshape(warps, 8 * n, 8)


def sums_of_registers(registers: list[Bits]) -> Floats:
    """``[warps, 16, columns]`` from the registers of the sum, four for each eight columns."""
    raw = np.stack([x.view(np.float32) for x in registers], 1)
    warps, count = raw.shape[0] // 32, raw.shape[1] // 4
    by = raw.reshape(warps, 8, 4, count, 2, 2)  # warp, g, t, columns / 8, half of rows, neighbour
    return by.transpose(0, 4, 1, 3, 2, 5).reshape(warps, 16, 8 * count)


def registers_of_sums(sums: Floats) -> list[Bits]:
    """The inverse of ``sums_of_registers``."""
    warps, _, columns = sums.shape
    by = sums.reshape(warps, 2, 8, columns // 8, 4, 2).transpose(0, 2, 4, 3, 1, 5)
    flat = by.reshape(warps * 32, columns // 2).astype(np.float32)
    return [np.ascontiguousarray(flat[:, i]).view(np.uint32) for i in range(flat.shape[1])]


def matrices_of_rows(rows: NDArray[np.uint8], count: int, transposed: bool) -> list[Bits]:
    """``ldmatrix``: the register of each of ``count`` matrices from the 16 bytes of each row, ``[rows, 16]``."""
    tiles = np.ascontiguousarray(rows).view(np.uint16).reshape(-1, count, 8, 8)
    if transposed:
        tiles = tiles.swapaxes(2, 3)
    found = np.ascontiguousarray(tiles.reshape(-1, count, 32, 2)).view(np.uint32)[..., 0]
    return [np.ascontiguousarray(found[:, m].reshape(-1)) for m in range(count)]


def rows_of_matrices(registers: list[Bits], transposed: bool) -> NDArray[np.uint8]:
    """``stmatrix``: the inverse of ``matrices_of_rows``."""
    warps = registers[0].shape[0] // 32
    found = np.stack([x.reshape(warps, 32) for x in registers], 1)
    tiles = np.ascontiguousarray(found[..., None]).view(np.uint16).reshape(warps, len(registers), 8, 8)
    if transposed:
        tiles = tiles.swapaxes(2, 3)
    return np.ascontiguousarray(tiles).view(np.uint8).reshape(warps * 8 * len(registers), 16)


def addresses(descriptor: int, rows: int, size: int, transposed: bool) -> Addresses:
    """The address of each element of the operand behind a descriptor: ``[rows, K]``, K being 32 bytes.

    K runs along the memory's rows, or across them if ``transposed`` (PTX ISA, "Asynchronous warpgroup level matrix
    shared memory layout"). Rows of 128, 64 or 32 bytes are swizzled: a chunk of 16 bytes changes its place with the
    number of its row.
    """
    begin, leading, stride = ((descriptor >> shift & 0x3FFF) << 4 for shift in (0, 16, 32))
    if descriptor >> 49 & 7:
        raise Fault("wgmma: a descriptor with a base offset")
    width = SWIZZLES[descriptor >> 62]
    row, k = np.arange(rows)[:, None], np.arange(32 // size)[None, :]
    if not transposed:
        if not width:  # chunks of 16 bytes, `leading` apart along K
            return begin + row // 8 * stride + row % 8 * 16 + k * size // 16 * leading + k * size % 16
        linear = begin + row // 8 * stride + row % 8 * width + k * size
    else:
        along = width // size or 16 // size
        linear = begin + row // along * leading + k // 8 * stride + k % 8 * (width or 16) + row % along * size
    return _swizzled(linear, width)


def _swizzled(linear: Addresses, width: int) -> Addresses:
    """Chunks of 16 bytes exchanged by the bits of the address that count rows of 128 bytes."""
    bits = {128: 7, 64: 3, 32: 1, 0: 0}[width]
    return linear ^ ((linear >> 7 & bits) << 4)


def product(a: Floats, b: Floats, sums: Any) -> Floats:
    """``a @ b + sums``, exact products summed in fp32."""
    with np.errstate(all="ignore"):
        return (np.matmul(a.astype(np.float64), b.astype(np.float64)) + sums).astype(np.float32)
