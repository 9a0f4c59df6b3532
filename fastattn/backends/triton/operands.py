"""Rows as operands of products, for kernels that take several: whole tiles, or parts of the head dim at a time."""

# mypy: disallow-untyped-defs=False
from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from fastattn.backends.triton.tile import dot_in_chunks, load_rows


class Operand(NamedTuple):
    """Rows from ``first`` on, zero outside ``low .. high``; ``tile`` holds them unless ``F.in_chunks``."""

    rows: Any
    first: Any
    low: Any
    high: Any
    tile: Any


@triton.jit
def operand(
    rows, first, low, high, HAS_LOW: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
    F: tl.constexpr,
):  # fmt: skip
    """The rows of one tile; ``low`` is 0 without HAS_LOW."""
    tile = 0
    if not F.in_chunks:
        tile = load_rows(rows, first, low, high, HAS_LOW, D, BLOCK, BLOCK_D, F.upcast)
    return Operand(rows, first, low, high, tile)


@triton.jit
def product(
    a, b, D: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr, F: tl.constexpr
):
    """``a @ b^T``, ``[BLOCK_A, BLOCK_B]``."""
    if F.in_chunks:
        return dot_in_chunks(
            a.rows, a.first, a.low, a.high, b.rows, b.first, b.low, b.high, D, BLOCK_A, BLOCK_B, BLOCK_D, F
        )
    else:
        return tl.dot(a.tile, tl.trans(b.tile), input_precision=F.precision)


@triton.jit
def whole(
    x, HAS_LOW: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, F: tl.constexpr
):  # fmt: skip
    """The rows as one tile, for a product over them."""
    if F.in_chunks:
        return load_rows(x.rows, x.first, x.low, x.high, HAS_LOW, D, BLOCK, BLOCK_D, F.upcast)
    else:
        return x.tile


@triton.jit
def left_operand(x, DTYPE: tl.constexpr, F: tl.constexpr):
    """``x`` rounded to DTYPE, to be the left operand of a product.

    Triton spreads such an operand over threads by the narrowest elements that it was computed from, which are bytes and
    bits where there is a mask or dropout. It then moves the operand through shared memory, and multiplies wrongly over
    16 elements (3.6 and 3.7, for ``mma.sync``). It does not look behind an instruction that it does not know; that
    costs registers, so ``launch.compiled`` asks for it only where it has to.
    """
    x = x.to(DTYPE)
    if F.opaque:
        x = tl.inline_asm_elementwise(
            "mov.b32 $0, $1;", "=r,r", [x], dtype=x.dtype, is_pure=False, pack=32 // x.dtype.primitive_bitwidth
        )
    return x
