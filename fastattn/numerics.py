"""Exactness in torch ops: the softmax normaliser in two parts, and products through which no NaN leaks.

With ``m`` the largest score of a row and ``l`` the sum of ``exp(score - m)``, the normaliser is ``m + log(l)``. Rounded
to one number it loses ``log(l)`` where all scores of a row share an offset of 1e8 (a row of -1e9 or finfo.min, which is
how half the field pads), and weights computed from it are ``l`` times too large. So two numbers are kept:

    lse     = round(m + log(l))          what users see
    lse_low = (m - lse) + log(l)         what rounding took from it

and ``exp((score - lse) - lse_low)`` is exact: large numbers cancel first.

A NaN or an infinity in a key, value or query reaches those rows alone that keep the pair. ``0 * NaN`` is NaN, so a
product with weights that are 0 is not enough: ``kept_product`` tells the rows apart.
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


def kept_product(weights: Tensor, x: Tensor, kept: Tensor) -> Tensor:
    """``weights @ x``, where a row of ``x`` that is not finite reaches those rows alone that keep it, as NaN.

    It is looked for in host memory, where looking costs little; on a device, where it would wait, the rows are always
    told apart. Under torch's transforms and while compiling, where values cannot be looked at, the product is plain.

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
