"""Masks as data: builders of ``intervals=`` of ``fastattn.attention``.

Each returns int32 ranges ``[start, stop)`` of key positions for each query row, ``(S_q, n, 2)``, ``(B, 1, S_q, n, 2)``
where batch entries differ. They take ``8 * n`` bytes for each query row, with the n that each builder states, and no
kernel is compiled for a new mask. Ranges of a row are in order and do not touch, which is fastest; ``merged`` makes
them so.
"""

from fastattn.intervals.grids import neighbourhood, sliding_tiles, tile_order
from fastattn.intervals.ranges import from_mask, intersection, merged, to_mask, union
from fastattn.intervals.sequences import (
    block_diffusion,
    causal,
    chunked,
    dilated,
    documents,
    prefix_lm,
    segments,
    selected_blocks,
    shared_prefix,
    sliding_window,
)

__all__ = [
    "block_diffusion",
    "causal",
    "chunked",
    "dilated",
    "documents",
    "from_mask",
    "intersection",
    "merged",
    "neighbourhood",
    "prefix_lm",
    "segments",
    "selected_blocks",
    "shared_prefix",
    "sliding_tiles",
    "sliding_window",
    "tile_order",
    "to_mask",
    "union",
]
