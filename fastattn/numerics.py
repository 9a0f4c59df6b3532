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


def split_lse(largest: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
    """``(lse, lse_low)`` of rows whose largest score is ``largest``, with ``total = sum(exp(score - largest))``."""
    log_total = total.log()
    lse = largest + log_total
    return lse, torch.where(lse == NEVER, 0, (largest - lse) + log_total)


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
    weights = torch.exp((lses - base) + lows)
    total = weights.sum(0)
    return *split_lse(base, total), weights / torch.where(total == 0, 1, total)


def shifted_lse(lse: Tensor, low: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """The ``lse`` and ``lse_low`` of rows whose scores are all greater by ``shift``; what rounding takes is kept."""
    moved = lse + shift
    taken = moved - lse
    rest = (lse - (moved - taken)) + (shift - taken)  # Knuth's sum of two
    return moved, torch.where(lse == NEVER, 0, low + rest)


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
