"""Numerical care in torch ops: the softmax normaliser in two parts, and products that do not spread NaN.

With ``m`` the largest score of a row and ``l`` the sum of ``exp(score - m)``, the normaliser is ``m + log(l)``. Rounded
to one number it loses ``log(l)`` if all scores of a row share an offset of 1e8 (much code pads with -1e9 or finfo.min),
and weights computed from it are ``l`` times too large. So two numbers are kept:

    lse     = round(m + log(l))          returned to users
    lse_low = (m - lse) + log(l)         the rounding error of lse

In ``exp((score - lse) - lse_low)`` the large numbers cancel first, so nothing is lost.

A NaN or an infinity in a key, value or query must reach the rows that keep the pair, and no others. ``0 * NaN`` is NaN,
so weights of 0 do not keep it out; ``kept_product`` does.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn.torch_internals import is_transformed

NEVER = float("-inf")  # lse of an empty row, whose lse_low is 0


def split_lse(largest: Tensor, total: Tensor, low: Tensor | float = 0) -> tuple[Tensor, Tensor]:
    """``(lse, lse_low)`` of rows with the largest score ``m = largest + low``, and ``total = sum(exp(score - m))``."""
    rest = total.log() + low
    lse = largest + rest
    return lse, torch.where(lse == NEVER, 0, (largest - lse) + rest)


def merge_lse(lses: Tensor, lows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Join parts of the keys, which lie along the first dimension.

    Args:
        lses: ``(parts, ...)``, the ``lse`` of each part; -inf where a part is empty.
        lows: likewise, their ``lse_low``.

    Returns:
        ``(lse, lse_low, shares)``: the normaliser of all keys, and for each part the factor on its output; the shares
        of a row add up to 1, or are 0 where it is empty.
    """
    largest = lses.amax(0)
    base = torch.where(largest == NEVER, 0, largest)
    base_low = torch.where(lses == base, lows, NEVER).amax(0)  # up to 128 beside scores of 4e9: exp would overflow
    base_low = torch.where(base_low == NEVER, 0, base_low)
    weights = torch.exp((lses - base) + (lows - base_low))
    total = weights.sum(0)
    return *split_lse(base, total, base_low), weights / torch.where(total == 0, 1, total)


def shifted_lse(lse: Tensor, low: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """The ``lse`` and ``lse_low`` of rows whose scores are all greater by ``shift``; what rounding takes is kept."""
    moved = lse + shift
    taken = moved - lse
    rest = (lse - (moved - taken)) + (shift - taken)  # Knuth's sum of two
    return moved, torch.where(lse == NEVER, 0, low + rest)


def kept_product(weights: Tensor, x: Tensor, kept: Tensor) -> Tensor:
    """``weights @ x``, in which a row of ``x`` that is not finite makes the rows that keep it NaN, and no others.

    In host memory a plain product serves if all of ``x`` is finite, which is checked. On a device that check would
    wait, so the careful product always runs. Under torch's transforms and while compiling, values cannot be read, and
    the product is always plain.

    Args:
        weights: ``(..., M, N)``, 0 outside ``kept``.
        x: ``(..., N, D)``.
        kept: boolean, broadcasts to the shape of ``weights``.
    """
    if torch.compiler.is_compiling() or is_transformed():
        return weights @ x
    finite = x.isfinite()
    if x.device.type == "cpu" and bool(finite.all()):
        return weights @ x
    reached = kept.to(x.dtype).expand(weights.shape) @ torch.where(finite, 0, 1).to(x.dtype)
    return torch.where(reached > 0, float("nan"), weights @ torch.where(finite, x, 0))
