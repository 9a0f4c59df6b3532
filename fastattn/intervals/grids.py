"""Masks of tokens on a grid of one, two or three dimensions: neighbourhoods and sliding tiles.

The tokens of a grid ``(..., height, width)`` come in the order of ``flatten``, the width last.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastattn.errors import input_error
from fastattn.intervals.ranges import merged

Device = torch.device | str | None
Sizes = int | Sequence[int]


def neighbourhood(
    grid: Sequence[int],
    window: Sizes,
    *,
    dilation: Sizes = 1,
    causal: bool | Sequence[bool] = False,
    device: Device = None,
) -> Tensor:
    """Each token sees its nearest neighbours on the grid, as NATTEN defines them.

    In each dimension, of length L and dilation d, tokens whose places agree modulo d form a line of their own. On it a
    token keeps ``window`` places around its own, ``window // 2`` before and ``(window - 1) // 2`` after it, shifted at
    the borders so that there are always as many; a causal dimension keeps its own place and the ``window - 1`` before
    it, fewer at the border. A key is kept if it is in every dimension.

    Args:
        grid: 1 to 3 lengths, the width last.
        window: places kept in each dimension, or one number for all.
        dilation: distance of one place to the next, likewise; ``window * dilation`` fits into the grid.
        causal: whether a dimension is causal, likewise.
        device: of the result.

    Returns:
        int32 ``(prod(grid), n, 2)``; n is the product of the windows of all dimensions but the last, times the last if
        that one is dilated. Rows of the grid that are kept from end to end become one range.

    Raises:
        InputError: the sizes do not fit together.

    Source:
        Hassani et al., "Neighborhood attention transformer", 2023; Hassani and Shi, "Dilated neighborhood attention
        transformer", 2022.

    Example:
        >>> import torch, fastattn
        >>> intervals = fastattn.intervals.neighbourhood((8, 8), 3)
        >>> intervals[0].tolist(), intervals[9].tolist()
        ([[0, 3], [8, 11], [16, 19]], [[0, 3], [8, 11], [16, 19]])
        >>> q = torch.randn(1, 64, 2, 16)
        >>> fastattn.attention(q, q, q, intervals=intervals).shape
        torch.Size([1, 64, 2, 16])
    """
    dims = len(grid)
    windows, steps, are_causal = (_of_each(name, x, dims) for name, x in _named(window, dilation, causal))
    for length, width, step in zip(grid, windows, steps, strict=True):
        if width < 1 or step < 1 or width * step > length:
            given, allowed = f"{width} with dilation {step} of {length}", "at least 1, window * dilation <= length"
            raise input_error("window", given, allowed, "Take a smaller window or a larger grid.")
    axes = [_axis(*sizes, device) for sizes in zip(grid, windows, steps, are_causal, strict=True)]
    *outer, last = axes
    if steps[-1] == 1:  # the places of the last dimension stand side by side
        last = torch.stack([last[..., 0].amin(1), last[..., 1].amax(1)], dim=-1)[:, None]
    ranges = last
    for n, axis in reversed(list(enumerate(outer))):
        ranges = _outer(axis, ranges, math.prod(grid[n + 1 :]))
    return merged(ranges.to(torch.int32))


def sliding_tiles(grid: Sequence[int], tile: Sequence[int], window: Sizes, *, device: Device = None) -> Tensor:
    """Each tile of tokens sees a window of tiles around it, shifted at the borders; tokens come tile by tile.

    ``tile_order`` brings tokens into that order, in which a tile is one run of keys: every tile of scores is kept as a
    whole or not at all.

    Args:
        grid: 1 to 3 lengths, the width last.
        tile: lengths of a tile, which divide those of the grid.
        window: tiles kept in each dimension, or one number for all; at most as many as there are.
        device: of the result.

    Returns:
        int32 ``(prod(grid), n, 2)``; n is at most the product of the windows of all dimensions but the last.

    Raises:
        InputError: the sizes do not fit together.

    Source:
        Zhang et al., "Fast video generation with sliding tile attention", 2025.

    Example:
        >>> import torch, fastattn
        >>> grid, tile = (4, 8, 8), (2, 4, 4)
        >>> order = fastattn.intervals.tile_order(grid, tile)
        >>> x = torch.randn(1, 256, 2, 16)[:, order]
        >>> out = fastattn.attention(x, x, x, intervals=fastattn.intervals.sliding_tiles(grid, tile, (1, 1, 2)))
        >>> out[:, order.argsort()].shape  # back in the order of the grid
        torch.Size([1, 256, 2, 16])
    """
    _check_tiles(grid, tile)
    of_tiles = neighbourhood([length // size for length, size in zip(grid, tile, strict=True)], window, device=device)
    size = math.prod(tile)
    return (of_tiles * size).repeat_interleave(size, dim=0)


def tile_order(grid: Sequence[int], tile: Sequence[int], *, device: Device = None) -> Tensor:
    """The tokens of a grid tile by tile: ``x[:, tile_order(grid, tile)]``; its ``argsort()`` leads back.

    Args:
        grid: lengths, the width last.
        tile: lengths of a tile, which divide those of the grid.
        device: of the result.

    Returns:
        int64 ``(prod(grid),)``.

    Example:
        >>> import fastattn
        >>> fastattn.intervals.tile_order((2, 4), (2, 2)).tolist()
        [0, 1, 4, 5, 2, 3, 6, 7]
    """
    _check_tiles(grid, tile)
    split = [n for length, size in zip(grid, tile, strict=True) for n in (length // size, size)]
    places = torch.arange(math.prod(grid), device=device).view(split)
    return places.permute(*range(0, 2 * len(grid), 2), *range(1, 2 * len(grid), 2)).flatten()


def _axis(length: int, window: int, dilation: int, causal: int, device: Device) -> Tensor:
    """``(length, window, 2)``: the places that each place of one dimension keeps, as ranges; empty ones are (0, 0)."""
    i = torch.arange(length, device=device)
    line, place = i % dilation, i // dilation
    most = (length - line + dilation - 1) // dilation  # places on the line
    first = place - (window - 1) if causal else torch.minimum((place - window // 2).clamp(min=0), most - window)
    kept = first[:, None] + torch.arange(window, device=device)
    is_there = kept >= 0
    j = kept * dilation + line[:, None]
    return torch.stack([j.where(is_there, 0), (j + 1).where(is_there, 0)], dim=-1)


def _outer(axis: Tensor, ranges: Tensor, size: int) -> Tensor:
    """Ranges on a grid with one more dimension, ``(length * rows, places * n, 2)``; a place has ``size`` tokens."""
    begins = axis[:, None, :, None, :1] * size  # [length, 1, places, 1, 1]
    found = ranges[None, :, None] + begins  # [length, rows, places, n, 2]
    has_place = axis[..., 0] < axis[..., 1]
    is_there = has_place[:, None, :, None, None] & (ranges[..., :1] < ranges[..., 1:])[None, :, None]
    return found.where(is_there, 0).flatten(2, 3).flatten(0, 1)


def _named(window: Sizes, dilation: Sizes, causal: bool | Sequence[bool]) -> list[tuple[str, Sizes]]:
    return [("window", window), ("dilation", dilation), ("causal", causal)]


def _of_each(name: str, x: Sizes, dims: int) -> list[int]:
    """A number for each dimension."""
    found = [x] * dims if isinstance(x, int) else list(x)
    if not 1 <= dims <= 3 or len(found) != dims:
        allowed = "one for each of 1 to 3 dimensions of the grid, or one number"
        raise input_error(name, f"{x} for {dims} dimensions", allowed, "The width comes last.")
    return found


def _check_tiles(grid: Sequence[int], tile: Sequence[int]) -> None:
    fits = len(grid) == len(tile) and all(
        size > 0 and length % size == 0 for length, size in zip(grid, tile, strict=True)
    )
    if not fits:
        allowed = f"{len(grid)} sizes that divide {tuple(grid)}"
        raise input_error("tile", tuple(tile), allowed, "Pad the grid, or choose another tile.")
