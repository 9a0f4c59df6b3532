"""The intervals of one block: what they keep, and in host memory whether they keep nothing or all of it."""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn.backends.portable.plan import Block, Span
from fastattn.problem import pairs_of
from fastattn.spec import in_intervals


def kept(intervals: Tensor, block: Block) -> Tensor | None:
    """``[1|b, 1|H_q, M, N]``, True where a range holds the key; None if one of each row is known to hold all keys."""
    ranges = _of_rows(intervals, block)
    begin, end = block.keys
    if ranges.device.type == "cpu":
        holds_all = (ranges[..., 0] <= begin) & (ranges[..., 1] >= end)
        if bool(holds_all.any(-1).all()):
            return None
    j = torch.arange(begin, end, device=ranges.device)
    return ranges.new_zeros((), dtype=torch.bool) | in_intervals(pairs_of(ranges), j)


def narrow(block: Block, intervals: Tensor) -> Block | None:
    """``block`` without the outer keys that no row keeps; None if nothing remains. Reads values, of host memory."""
    keys = _hull(intervals, block)
    return None if keys[0] == keys[1] else block.replace(keys=keys)


def _hull(intervals: Tensor, block: Block) -> Span:
    """The smallest span of the block's keys outside which its rows keep nothing."""
    ranges = _of_rows(intervals, block).clamp(*block.keys)
    start, stop = ranges[..., 0], ranges[..., 1]
    has_any = start < stop
    if not bool(has_any.any()):
        return 0, 0
    return int(start[has_any].min()), int(stop[has_any].max())


def meets(intervals: Tensor, tile: Block) -> bool:
    """Whether some row keeps a key of the tile. Reads values, of host memory."""
    ranges = _of_rows(intervals, tile).clamp(*tile.keys)
    return bool((ranges[..., 0] < ranges[..., 1]).any())


def _of_rows(intervals: Tensor, block: Block) -> Tensor:
    """``(1|b, 1|H_q, M, n, 2)``."""
    entries = slice(*block.batch) if intervals.shape[0] > 1 else slice(None)
    return intervals[entries, :, block.q_begin : block.q_begin + block.size[1]]
