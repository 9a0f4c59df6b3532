"""What is found out about segments ahead of the kernels, against the pairs that they keep."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from fastattn.backends.triton import launch, scans
from fastattn.problem import Inputs

BLOCK = 64


@pytest.mark.parametrize("order", ["documents", "any"])
def test_columns_of_segments(order: str) -> None:
    """No pair is left out and none in the full range is hidden, over more columns than one step of the scan reads.

    Where the ids are sorted both ranges are exact to a block.
    """
    draw = torch.Generator().manual_seed(0)
    sides = {"q": torch.randint(0, 9, (2, 200), generator=draw), "kv": torch.randint(0, 9, (2, 2500), generator=draw)}
    if order == "documents":
        sides = {name: ids.sort(-1).values for name, ids in sides.items()}
    q, k = (torch.zeros(2, ids.shape[1], 1, 16) for ids in sides.values())
    inputs = Inputs(q, k, k, segment_ids_q=sides["q"], segment_ids_kv=sides["kv"], max_seqlen_q=200, max_seqlen_kv=2500)
    found = scans.segments_of(inputs, launch._terms(inputs))
    pairs = sides["q"][:, :, None] == sides["kv"][:, None, :]
    full_blocks = 0
    for rows, kept in (("q", pairs), ("kv", pairs.transpose(1, 2))):
        for b, block in ((b, block) for b in range(2) for block in range(-(-kept.shape[1] // BLOCK))):
            first, full_first, full_last, last = found[rows].ptr[b, block].tolist()
            of_block = kept[b, BLOCK * block : BLOCK * (block + 1)]
            at = of_block.any(0).nonzero().flatten()
            assert not at.numel() or (first <= at.min() and at.max() < last)
            assert bool(of_block[:, full_first:full_last].all())
            full_blocks += full_last > full_first
            if order == "documents" and at.numel():
                assert (first, last) == (int(at.min()) // BLOCK * BLOCK, (int(at.max()) // BLOCK + 1) * BLOCK)
    assert (full_blocks > 0) == (order == "documents")
