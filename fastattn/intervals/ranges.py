"""Ranges of rows: merged, united, intersected, and turned into boolean masks and back."""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn.errors import input_error
from fastattn.problem import pairs_of
from fastattn.spec import in_intervals

_FAR = torch.iinfo(torch.int32).max


def pairs(starts: Tensor, stops: Tensor) -> Tensor:
    """Ranges from their ends: int32 with a last dimension of 2."""
    return torch.stack([starts, stops], dim=-1).to(torch.int32)


def merged(intervals: Tensor) -> Tensor:
    """The same keys in the fewest ranges: in order, those that overlap or touch made one, empty ones last.

    Reads the number of ranges that remain, which on an accelerator waits for it. Takes a few copies of the ranges.

    Args:
        intervals: int32 ``(..., S_q, n, 2)``.

    Returns:
        int32 ``(..., S_q, m, 2)``; m is the largest number of ranges of a row, at least 1. Empty ranges are ``(0, 0)``.

    Raises:
        InputError: it is no int32 tensor of pairs.

    Example:
        >>> import torch, fastattn
        >>> fastattn.intervals.merged(torch.tensor([[[6, 8], [0, 3], [3, 4], [5, 2]]], dtype=torch.int32)).tolist()
        [[[0, 4], [6, 8]]]
    """
    _check(intervals)
    if intervals.shape[-2] == 0:
        return intervals.new_zeros((*intervals.shape[:-2], 1, 2))
    is_empty = intervals[..., 0] >= intervals[..., 1]
    starts = intervals[..., 0].masked_fill(is_empty, _FAR)
    starts, order = starts.sort(-1)
    stops = intervals[..., 1].gather(-1, order)
    is_empty = starts == _FAR
    reach = stops.masked_fill(is_empty, -_FAR).cummax(-1).values
    begins = torch.ones_like(is_empty)
    begins[..., 1:] = starts[..., 1:] > reach[..., :-1]
    number = (begins & ~is_empty).cumsum(-1) - 1
    count = max(1, int(number.max()) + 1) if number.numel() else 1
    number = number.masked_fill(is_empty, count)  # a place beyond those that are kept
    first = starts.new_full((*starts.shape[:-1], count + 1), _FAR).scatter_reduce(-1, number, starts, "amin")
    last = starts.new_full((*starts.shape[:-1], count + 1), -_FAR).scatter_reduce(-1, number, stops, "amax")
    found = pairs(first, last)[..., :count, :]
    return found.masked_fill((found[..., :1] >= found[..., 1:]), 0)


def union(*intervals: Tensor) -> Tensor:
    """The keys that any of several masks keeps, merged.

    Args:
        intervals: int32 ``(..., S_q, n, 2)`` each, whose leading dimensions broadcast.

    Returns:
        int32 ``(..., S_q, m, 2)`` with m at most the sum of their n.

    Example:
        >>> import fastattn
        >>> both = fastattn.intervals.union(fastattn.intervals.prefix_lm(8, 2), fastattn.intervals.chunked(8, 4))
        >>> both[7].tolist()
        [[0, 8]]
    """
    for each in intervals:
        _check(each)
    leading = torch.broadcast_shapes(*(x.shape[:-2] for x in intervals))
    return merged(torch.cat([x.expand(*leading, *x.shape[-2:]) for x in intervals], dim=-2))


def intersection(a: Tensor, b: Tensor) -> Tensor:
    """The keys that both masks keep, merged.

    Args:
        a, b: int32 ``(..., S_q, n, 2)``, whose leading dimensions broadcast.

    Returns:
        int32 ``(..., S_q, m, 2)``; on the way there are the products of their n.

    Example:
        >>> import fastattn
        >>> documents = fastattn.intervals.documents([3, 5])
        >>> fastattn.intervals.intersection(documents, fastattn.intervals.causal(8))[:, 0].tolist()
        [[0, 1], [0, 2], [0, 3], [3, 4], [3, 5], [3, 6], [3, 7], [3, 8]]
    """
    _check(a)
    _check(b)
    starts = torch.maximum(a[..., :, None, 0], b[..., None, :, 0])
    stops = torch.minimum(a[..., :, None, 1], b[..., None, :, 1])
    return merged(pairs(starts.flatten(-2), stops.flatten(-2)))


def to_mask(intervals: Tensor, s_kv: int) -> Tensor:
    """The boolean mask of the same keys, for tests and drawings: it takes ``S_q * s_kv`` bytes.

    Args:
        intervals: int32 ``(..., S_q, n, 2)``.
        s_kv: number of keys.

    Returns:
        boolean ``(..., S_q, s_kv)``, True = attend.

    Example:
        >>> import fastattn
        >>> fastattn.intervals.to_mask(fastattn.intervals.chunked(4, 2), 4).int().tolist()
        [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]
    """
    _check(intervals)
    j = torch.arange(s_kv, device=intervals.device)
    nothing = intervals.new_zeros((*intervals.shape[:-2], s_kv), dtype=torch.bool)
    return nothing | in_intervals(pairs_of(intervals), j)


def from_mask(mask: Tensor) -> Tensor:
    """The ranges of a boolean mask: each run of True in a row is one.

    Args:
        mask: boolean ``(..., S_q, S_kv)``, True = attend.

    Returns:
        int32 ``(..., S_q, n, 2)``; n is the largest number of runs of a row, at least 1. Reading it waits for an
        accelerator.

    Raises:
        InputError: it is not boolean.

    Example:
        >>> import torch, fastattn
        >>> fastattn.intervals.from_mask(torch.tensor([[1, 1, 0, 1], [0, 0, 0, 0]]) > 0).tolist()
        [[[0, 2], [3, 4]], [[0, 0], [0, 0]]]
    """
    if mask.dtype != torch.bool:
        raise input_error("mask", mask.dtype, "torch.bool, True = attend", "Compare it: mask != 0.")
    if mask.shape[-1] == 0:
        return torch.zeros((*mask.shape[:-1], 1, 2), dtype=torch.int32, device=mask.device)
    edges = torch.nn.functional.pad(mask, (1, 1)).diff(dim=-1)  # True where a run begins or ends
    order = edges.cumsum(-1) - 1
    count = max(2, int(order.max()) + 1)
    places = torch.where(edges, order, count)
    at = torch.arange(edges.shape[-1], device=mask.device).expand(edges.shape)
    found = torch.zeros((*mask.shape[:-1], count + 1), dtype=torch.long, device=mask.device)
    return found.scatter(-1, places, at)[..., :count].unflatten(-1, (-1, 2)).to(torch.int32)


def _check(intervals: Tensor) -> None:
    if intervals.dtype != torch.int32 or intervals.dim() < 3 or intervals.shape[-1] != 2:
        given = f"{intervals.dtype}, shape {tuple(intervals.shape)}"
        raise input_error("intervals", given, "torch.int32 (..., S_q, n, 2)", "The last dimension is [start, stop).")
