"""Arithmetic of PTX on the registers of all threads of a block: arrays of bits, one element for each thread."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Bits = NDArray[Any]
WIDTHS = {"b8": 1, "u8": 1, "s8": 1, "b16": 2, "u16": 2, "s16": 2, "f16": 2, "bf16": 2, "b32": 4, "u32": 4, "s32": 4,
          "f32": 4, "bf16x2": 4, "f16x2": 4, "e4m3x2": 2, "b64": 8, "u64": 8, "s64": 8, "f64": 8}  # fmt: skip
UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
SIGNED = {1: np.int8, 2: np.int16, 4: np.int32, 8: np.int64}
FLOATS = {"f16": np.float16, "f32": np.float32, "f64": np.float64}


def values(bits: Bits, kind: str) -> Bits:
    """Bits as numbers of a type."""
    if kind == "pred":
        return bits
    if kind == "bf16":
        return (bits.astype(np.uint32) << 16).view(np.float32)
    width = WIDTHS[kind]
    raw = bits if bits.dtype.itemsize == width else bits.astype(UNSIGNED[width])
    if kind in FLOATS:
        return raw.view(FLOATS[kind])
    return raw.view(SIGNED[width]) if kind[0] == "s" else raw


def bits_of(numbers: Bits, kind: str) -> Bits:
    """Numbers of a type as bits."""
    if kind == "pred":
        return numbers.astype(bool)
    if kind == "bf16":
        return to_bf16(numbers)
    width = WIDTHS[kind]
    if kind in FLOATS:
        return numbers.astype(FLOATS[kind]).view(UNSIGNED[width])
    return numbers.astype(UNSIGNED[width])


def to_bf16(numbers: Bits) -> Bits:
    """fp32 rounded to the nearest bf16, ties to even."""
    raw = numbers.astype(np.float32).view(np.uint32)
    rounded = ((raw + 0x7FFF + ((raw >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(numbers), np.uint16(0x7FFF), rounded)


def to_e4m3(numbers: Bits) -> Bits:
    """fp32 rounded to the nearest e4m3, ties to even; what is too large becomes 448."""
    size = np.minimum(np.abs(numbers.astype(np.float64)), 448.0)
    with np.errstate(divide="ignore"):
        exponent = np.clip(np.floor(np.log2(size, where=size > 0, out=np.full(size.shape, -6.0))), -6, 8)
    steps = np.rint(size * 2.0 ** (3 - exponent)).astype(np.int64)  # np.rint rounds ties to even
    magnitude = np.where(steps >= 8, ((exponent.astype(np.int64) + 6) << 3) + steps, steps)
    sign = np.signbit(numbers).astype(np.int64) << 7
    return np.where(np.isnan(numbers), 0x7F, magnitude | sign).astype(np.uint8)


def from_e4m3(raw: Bits) -> Bits:
    """The fp32 values of e4m3 bytes."""
    exponent, mantissa = ((raw >> 3) & 15).astype(np.int32), (raw & 7).astype(np.float32)
    size = np.where(exponent > 0, (8 + mantissa) * 2.0 ** (exponent - 10.0), mantissa * 2.0**-9)
    size = np.where((raw & 0x7F) == 0x7F, np.nan, size)
    return np.where(raw & 0x80, -size, size).astype(np.float32)


def _quotient(a: Bits, b: Bits) -> Bits:
    if a.dtype.kind == "f":
        return a / b
    if a.dtype.kind == "u":
        return a // b
    wide = a.astype(np.int64)
    return (np.abs(wide) // np.abs(b.astype(np.int64))) * np.sign(wide) * np.sign(b.astype(np.int64))


def _remainder(a: Bits, b: Bits) -> Bits:
    return a - (_quotient(a, b) * b).astype(a.dtype)


def _largest(a: Bits, b: Bits) -> Bits:
    return np.fmax(a, b) if a.dtype.kind == "f" else np.maximum(a, b)


def _smallest(a: Bits, b: Bits) -> Bits:
    return np.fmin(a, b) if a.dtype.kind == "f" else np.minimum(a, b)


def _shifted(a: Bits, b: Bits, left: bool) -> Bits:
    """A shift by the width or more gives 0, or the sign."""
    bits = 8 * a.dtype.itemsize
    amount = np.minimum(b.astype(np.int64), bits - 1).astype(a.dtype)
    found = (a << amount) if left else (a >> amount)
    over = b.astype(np.int64) >= bits
    return np.where(over, a.dtype.type(0), found) if left or a.dtype.kind == "u" else found


BINARY: dict[str, Callable[[Bits, Bits], Bits]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "div": _quotient,
    "rem": _remainder,
    "max": _largest,
    "min": _smallest,
    "and": lambda a, b: a & b,
    "or": lambda a, b: a | b,
    "xor": lambda a, b: a ^ b,
    "shl": lambda a, b: _shifted(a, b, True),
    "shr": lambda a, b: _shifted(a, b, False),
}
UNARY: dict[str, Callable[[Bits], Bits]] = {
    "mov": lambda a: a,
    "neg": lambda a: -a,
    "not": lambda a: ~a,
    "abs": np.abs,
    "ex2": np.exp2,
    "lg2": np.log2,
    "rcp": lambda a: 1 / a,
    "sqrt": np.sqrt,
    "rsqrt": lambda a: 1 / np.sqrt(a),
}
COMPARISONS: dict[str, Callable[[Bits, Bits], Bits]] = {
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b,
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
    "lo": lambda a, b: a < b,
    "ls": lambda a, b: a <= b,
    "hi": lambda a, b: a > b,
    "hs": lambda a, b: a >= b,
}


def compute(opcode: tuple[str, ...], given: list[Bits]) -> Bits:
    """The bits of the result of an arithmetic instruction; KeyError of one that is not known."""
    name, kind, modifiers = opcode[0], opcode[-1], opcode[1:-1]
    with np.errstate(all="ignore"):
        if name == "cvt":
            return _converted(opcode, given)
        if name in ("mul", "mad") and modifiers and modifiers[0] in ("wide", "hi", "lo"):
            return _integer_product(modifiers[0], kind, given)
        if name in ("fma", "mad"):
            a, b, c = (values(x, kind).astype(np.float64) for x in given)
            return bits_of(a * b + c, kind)
        if name == "setp":
            return _compared(modifiers[0], values(given[0], kind), values(given[1], kind))
        if name == "selp":
            return np.where(given[2], given[0], given[1])
        if name == "bfe":
            return _field(kind, *given)
        if name == "bfi":
            return _inserted(*given)
        if name == "lop3":
            return _by_table(*given)
        if name == "prmt":
            return _permuted(*given)
        if name in UNARY:
            return bits_of(UNARY[name](values(given[0], kind)), kind)
        if name not in BINARY:
            raise KeyError(name)
        second = given[1] if name in ("shl", "shr") else values(given[1], kind)
        found = BINARY[name](values(given[0], kind), second)
        if "relu" in modifiers:
            found = np.maximum(found, 0)
        if name in ("max", "min") and "NaN" in modifiers:
            a, b = (values(x, kind) for x in given)
            found = np.where(np.isnan(a) | np.isnan(b), np.nan, found)
        return bits_of(found, kind)


def _compared(how: str, a: Bits, b: Bits) -> Bits:
    if how in ("num", "nan"):
        return (np.isnan(a) | np.isnan(b)) == (how == "nan")
    if how.endswith("u") and how[:-1] in COMPARISONS and a.dtype.kind == "f":  # true where not ordered
        return COMPARISONS[how[:-1]](a, b) | np.isnan(a) | np.isnan(b)
    found = COMPARISONS[how](a, b)
    return found & ~(np.isnan(a) | np.isnan(b)) if a.dtype.kind == "f" else found  # "ne" too


def _integer_product(part: str, kind: str, given: list[Bits]) -> Bits:
    a, b = (values(x, kind) for x in given[:2])
    width = WIDTHS[kind]
    if part == "lo":
        product = a * b
        return bits_of(product + values(given[2], kind) if len(given) > 2 else product, kind)
    wide = np.int64 if kind[0] == "s" else np.uint64
    if width == 8:
        product = np.array([(int(x) * int(y)) >> 64 for x, y in zip(a, b, strict=True)], dtype=object)
        found = np.array([int(x) & (2**64 - 1) for x in product], dtype=np.uint64)
        return found + given[2] if len(given) > 2 else found
    product = a.astype(wide) * b.astype(wide)
    if part == "hi":
        product = product >> wide(8 * width)
        return bits_of(product + (values(given[2], kind) if len(given) > 2 else wide(0)), kind)
    if len(given) > 2:
        product = product + values(given[2], ("s" if kind[0] == "s" else "u") + str(16 * width))
    return product.view(np.uint64) if width == 4 else product.astype(UNSIGNED[2 * width])


def _converted(opcode: tuple[str, ...], given: list[Bits]) -> Bits:
    *modifiers, to, of = opcode[1:]
    if to in ("bf16x2", "f16x2") and of != "e4m3x2":
        high, low = (bits_of(values(x, of), to[:-2]).astype(np.uint32) for x in given)
        return (high << 16) | low
    if to == "e4m3x2":
        if of == "f16x2":
            high, low = (values((given[0] >> shift).astype(np.uint16), "f16") for shift in (16, 0))
        else:
            high, low = (values(x, of) for x in given)
        return (to_e4m3(high).astype(np.uint16) << 8) | to_e4m3(low)
    if of == "e4m3x2":
        high, low = (from_e4m3((given[0] >> shift).astype(np.uint8)) for shift in (8, 0))
        return (bits_of(high, "f16").astype(np.uint32) << 16) | bits_of(low, "f16")
    numbers = values(given[0], of)
    if to[0] in "su" and numbers.dtype.kind == "f":
        rounding = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
        how = next(rounding[m] for m in modifiers if m in rounding)
        bits = 8 * WIDTHS[to]
        least, most = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if to[0] == "s" else (0, 2**bits - 1)
        return bits_of(np.clip(np.nan_to_num(how(numbers)), least, most), to)
    return bits_of(numbers, to)


def _field(kind: str, a: Bits, begin: Bits, length: Bits) -> Bits:
    """A field of bits, with its sign for a signed type."""
    start, size = begin.astype(np.int64) & 255, length.astype(np.int64) & 255
    wide = values(a, "u32" if WIDTHS[kind] == 4 else "u64").astype(np.uint64)
    field = (wide >> start.astype(np.uint64)) & ((np.uint64(1) << size.astype(np.uint64)) - np.uint64(1))
    if kind[0] == "s":
        sign = np.uint64(1) << np.maximum(size - 1, 0).astype(np.uint64)
        field = (field ^ sign) - sign
    return bits_of(field, kind)


def _inserted(field: Bits, into: Bits, begin: Bits, length: Bits) -> Bits:
    """``into`` with a field of bits replaced by the low bits of ``field``."""
    start, size = (np.minimum(x.astype(np.uint64) & np.uint64(255), np.uint64(63)) for x in (begin, length))
    mask = ((np.uint64(1) << size) - np.uint64(1)) << start
    found = (into.astype(np.uint64) & ~mask) | ((field.astype(np.uint64) << start) & mask)
    return found.astype(into.dtype)


def _by_table(a: Bits, b: Bits, c: Bits, table: Bits) -> Bits:
    found, code = np.zeros_like(a), int(table[0])
    for row in range(8):
        if code >> row & 1:
            parts = (x if row & bit else ~x for x, bit in ((a, 4), (b, 2), (c, 1)))
            first, second, third = parts
            found |= first & second & third
    return found


def _permuted(a: Bits, b: Bits, selector: Bits) -> Bits:
    """``prmt.b32`` in its default mode: four bytes chosen from eight."""
    pool = np.stack([(x >> shift) & 0xFF for x in (a, b) for shift in (0, 8, 16, 24)], axis=1)
    found = np.zeros_like(a)
    for place in range(4):
        choice = (selector >> (4 * place)) & 0xF
        byte = np.take_along_axis(pool, (choice & 7).astype(np.int64)[:, None], 1)[:, 0]
        byte = np.where(choice & 8, np.where(byte & 0x80, 0xFF, 0), byte).astype(np.uint32)
        found |= byte << np.uint32(8 * place)
    return found


def is_wide(opcode: tuple[str, ...]) -> bool:
    """Whether the result is twice as wide as the type says."""
    return "wide" in opcode
