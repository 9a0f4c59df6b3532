"""Operands in e4m3 with a scale for each block of rows: what ``attention_fp8`` multiplies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fastattn.errors import input_error
from fastattn.kv_cache import FP8
from fastattn.layout import Layout, check_layout, to_internal

BLOCK = 128  # rows that share a scale
ALIGNMENT = 16  # columns of transposed values begin at a multiple of so many bytes
E4M3_MAX = torch.finfo(FP8).max


@dataclass(frozen=True)
class Quantized:
    """A tensor ``x`` rounded to e4m3: ``x[b, s, h]`` is near ``values[b, s, h] * scales[b, h, s // 128]``.

    Attributes:
        values: ``(B, S, H, D)``, float8_e4m3fn. Values of attention lie in memory as ``(B, H, D, S)``, the order in
            which tensor cores take them.
        scales: ``(B, H, ceil(S / 128))``, fp32, powers of two.
        dtype: that of the tensor it was rounded from.
    """

    values: Tensor
    scales: Tensor
    dtype: torch.dtype

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """``values * scales``, ``(B, S, H, D)``: exact in bfloat16 and wider, since scales are powers of two.

        Args:
            dtype: of the result; None is that of the tensor it was rounded from.

        Example:
            >>> import torch
            >>> from fastattn import quantize
            >>> x = torch.randn(1, 200, 2, 64)
            >>> error = (quantize(x).dequantize() - x).abs()
            >>> bool((error <= x.abs() / 16 + 2**-10 * x.abs().max()).all())
            True
        """
        rows = self.scales.repeat_interleave(BLOCK, 2)[:, :, : self.values.shape[1]]
        return (self.values.float() * rows.transpose(1, 2)[..., None]).to(dtype or self.dtype)


def quantize(x: Tensor, *, role: Literal["key", "value"] = "key", layout: Layout = "BSHD") -> Quantized:
    """``x`` in e4m3, with a scale for each block of 128 rows of a head.

    The scale is the least power of two that brings the largest finite element of the block to at most 448, so that
    an element is off by at most a sixteenth of itself, or by 2^-10 scales if it is below 2^-6 of them. NaN and
    infinity become NaN, and leave the scale of their block as it is.

    Args:
        x: ``(B, S, H, D)``, or ``(B, H, S, D)`` with ``layout="BHSD"``; any floating dtype.
        role: "key" for queries and keys, "value" for values, which lie in memory in another order.
        layout: order of the dimensions of x.

    Returns:
        ``Quantized``, in the order ``(B, S, H, D)`` whatever the layout.

    Raises:
        InputError: x is not a floating tensor of four dimensions, or role is neither of the two.

    Source:
        Micikevicius et al., "FP8 formats for deep learning", 2022; scales for blocks of rows as in Shah et al.,
        "FlashAttention-3", 2024.

    Example:
        >>> import torch, fastattn
        >>> k = fastattn.quantize(torch.randn(1, 300, 2, 64))
        >>> k.values.dtype, k.scales.shape
        (torch.float8_e4m3fn, torch.Size([1, 2, 3]))
    """
    check_layout(layout)
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.dim() != 4:
        given = f"shape {tuple(x.shape)}, {x.dtype}" if isinstance(x, Tensor) else type(x).__name__
        raise input_error("x", given, "a floating tensor (B, S, H, D)", "Reshape or convert it.")
    if role not in ("key", "value"):
        raise input_error("role", repr(role), '"key" or "value"', 'Queries take "key", too.')
    rows = to_internal(x.detach(), layout)
    scales = _scales_of(rows)
    of_rows = scales.repeat_interleave(BLOCK, 2)[:, :, : rows.shape[1]].transpose(1, 2)[..., None]
    scaled = rows.float() / of_rows
    largest = _largest(of_rows, min(torch.finfo(x.dtype).max, torch.finfo(torch.float32).max))
    values = torch.where(scaled.isfinite(), torch.clamp(scaled, -largest, largest), float("nan")).to(FP8)
    return Quantized(transposed(values) if role == "value" else values.contiguous(), scales, x.dtype)


def _scales_of(x: Tensor) -> Tensor:
    """A power of two for each block of rows of ``(B, S, H, D)``: ``(B, H, blocks)``."""
    size = x.detach().float().abs()
    size = torch.where(size.isfinite(), size, 0).amax(-1)  # (B, S, H)
    size = torch.nn.functional.pad(size, (0, 0, 0, -x.shape[1] % BLOCK))
    most = size.unflatten(1, (-1, BLOCK)).amax(2).transpose(1, 2)
    mantissa, exponent = torch.frexp(most / E4M3_MAX)
    exponent = torch.where(mantissa == 0.5, exponent - 1, exponent).clamp(-126, 127)
    return torch.where(most > 0, torch.ldexp(torch.ones_like(most), exponent), 1.0).contiguous()


def _largest(scales: Tensor, most: float) -> Tensor:
    """The largest magnitude in e4m3 whose product with a scale is at most ``most``, just below a power of two.

    Elements near ``most`` are 255 scales and would be rounded to 256.
    """
    return torch.where(scales.double() * 256 > most, 240.0, E4M3_MAX)


def transposed(values: Tensor) -> Tensor:
    """``(B, S, H, D)`` that lies in memory as ``(B, H, D, S)``, with columns at multiples of 16 bytes."""
    batch, rows, heads, dim = values.shape
    memory = values.new_empty(batch, heads, dim, -(-rows // ALIGNMENT) * ALIGNMENT)
    found = memory[..., :rows].permute(0, 3, 1, 2)
    found.copy_(values)
    return found


def is_transposed(values: Tensor) -> bool:
    """Whether the memory is in the order of ``transposed``."""
    aligned = all(stride % ALIGNMENT == 0 for stride in (values.stride(0), *values.stride()[2:]))
    return values.stride(1) == 1 and aligned and values.data_ptr() % ALIGNMENT == 0
