"""The rotation of rotary position embedding, given the cosines and sines of the positions."""

from __future__ import annotations

import torch
from torch import Tensor


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """Rotate each pair ``(a, b)`` of head dims to ``(a cos - b sin, a sin + b cos)``.

    Pairs are half of ``D_rotary`` apart, ``(x[i], x[i + D_rotary/2])``, or neighbours, ``(x[2i], x[2i + 1])``. Head
    dims from ``D_rotary`` on stay as they are. Computed in the precision of the tables and rounded once, to the dtype
    of ``x``.

    Args:
        x: queries or keys ``(B, S, H, D)``, or packed ``(T, H, D)``.
        cos: ``(S, D_rotary / 2)`` or ``(B, S, D_rotary / 2)`` from ``fastattn.nn.rotary.rotary_tables``, as is ``sin``.
        sin: likewise.
        interleaved: pair neighbours.

    Returns:
        a tensor like ``x``.

    Example:
        >>> import torch
        >>> from fastattn.nn.rotary import apply_rotary, rotary_tables
        >>> q = torch.randn(2, 5, 4, 64, dtype=torch.bfloat16)
        >>> apply_rotary(q, *rotary_tables(torch.arange(5), 64)).dtype
        torch.bfloat16
    """
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)  # one angle for all heads
    width, dtype = 2 * cos.shape[-1], x.dtype
    kept = None if width == x.shape[-1] else x[..., width:]
    turned = (x if kept is None else x[..., :width]).to(cos.dtype)
    a, b = (turned[..., 0::2], turned[..., 1::2]) if interleaved else turned.chunk(2, dim=-1)
    pair = torch.addcmul(a * cos, b, sin, value=-1), torch.addcmul(a * sin, b, cos)
    turned = torch.stack(pair, dim=-1).flatten(-2) if interleaved else torch.cat(pair, dim=-1)
    return turned.to(dtype) if kept is None else torch.cat([turned.to(dtype), kept], dim=-1)
