"""The passes ahead of the kernels: which keys some query keeps, which tiles share a segment or meet an interval."""

from __future__ import annotations

import dataclasses

import torch
import triton
from torch import Tensor

from fastattn.backends.triton import ranges
from fastattn.backends.triton.arguments import Flags, PerToken, Sizes, Terms, Visits, coded
from fastattn.backends.triton.configs import ALWAYS
from fastattn.backends.triton.plans import launched
from fastattn.backends.triton.prescan import interval_tiles_kernel, segment_columns_kernel, used_keys_kernel
from fastattn.problem import Inputs

BLOCK = 64  # rows and columns of the tiles that ``used_keys`` looks at


def segments_of(inputs: Inputs, terms: Terms) -> dict[str, PerToken]:
    """For query rows "q" and key rows "kv" what ``columns_of_segments`` reads: both ids are scanned once a pass."""
    lengths = {"q": inputs.q.shape[1], "kv": inputs.k.shape[1]}
    sides = terms.segment_ids_q, terms.segment_ids_kv
    batch = max(side.ptr.shape[0] for side in sides)
    padded, block = int(ranges.SEGMENT_ROWS), int(ranges.SEGMENT_BLOCK)
    blocks = {rows: triton.cdiv(length, padded) * padded // block for rows, length in lengths.items()}
    found = {}
    for rows, count in blocks.items():
        columns = torch.empty(batch, count, 4, dtype=torch.int32, device=inputs.q.device)
        found[rows] = PerToken(columns, coded(columns.stride(0) if batch > 1 else 0), coded(4))
    if batch and max(blocks.values()):
        launched(segment_columns_kernel, (batch * max(blocks.values()), 2))(
            *sides, found["q"], found["kv"], coded(lengths["q"]), coded(lengths["kv"]), **ALWAYS
        )
    return found


def with_segments(terms: Terms, segments: dict[str, PerToken], rows: str) -> Terms:
    """The terms for a kernel whose programs own rows of ``rows`` ("q" or "kv")."""
    return terms._replace(segment_columns=segments[rows]) if segments else terms


def used_keys(inputs: Inputs, terms: Terms, sizes: Sizes, flags: Flags) -> Tensor:
    """Not 0 where some query keeps the key: ``(B, S_kv, 1|H_kv)``, packed ``(T_kv, 1|H_kv)``."""
    x = inputs
    has_heads = any(t is not None and t.shape[1] > 1 for t in (x.mask, x.intervals))
    heads = x.heads_kv if has_heads else 1
    used = torch.empty(*x.k.shape[:-2], heads, dtype=torch.uint8, device=x.q.device)
    if used.numel():
        flags = Flags(
            1, 1, 16, 16, left=flags.left, right=flags.right, segments=flags.segments, mask=flags.mask,
            intervals=flags.intervals, packed=flags.packed,
        )  # fmt: skip
        at = PerToken(used, coded(0 if x.is_packed else used.stride(0)), coded(used.stride(-2)))
        looked_at = coded(x.heads_q // x.heads_kv if has_heads else 1)
        launched(used_keys_kernel, (x.batch * triton.cdiv(x.max_seqlen_kv, BLOCK), heads))(
            at, terms, sizes, looked_at, F=flags, BLOCK_M=BLOCK, BLOCK_N=BLOCK, **ALWAYS
        )
    return used


def with_visits(
    inputs: Inputs, terms: Terms, sizes: Sizes, flags: Flags, rows: str, blocks: tuple[int, int], sharing: int
) -> Terms:
    """The terms with the lists of tiles that intervals leave to a kernel, if there are any.

    Args:
        inputs, terms, sizes, flags: of the call.
        rows: "q" or "kv", the rows that its programs own.
        blocks: how many of them, and of the other rows in a tile.
        sharing: query heads that share a list, if the intervals differ between heads.
    """
    if inputs.intervals is None:
        return terms
    block, block_other = blocks
    lengths = {"q": inputs.max_seqlen_q, "kv": inputs.max_seqlen_kv}
    count = triton.cdiv(lengths[rows], block)
    others = triton.cdiv(lengths["kv" if rows == "q" else "q"], block_other)
    per_head = inputs.intervals.shape[1] > 1
    heads = inputs.heads_q // sharing if per_head else 1
    ids = (inputs.segment_ids_q, inputs.segment_ids_kv)
    differ = inputs.is_packed or inputs.intervals.shape[0] > 1 or any(t is not None and t.shape[0] > 1 for t in ids)
    batch = inputs.batch if differ else 1
    found = torch.empty(batch, heads, count, 1 + others, dtype=torch.int32, device=inputs.q.device)
    stride_b, stride_h = (found.stride(n) if found.shape[n] > 1 else 0 for n in (0, 1))
    terms = terms._replace(visits=Visits(found, coded(stride_b), coded(stride_h), coded(1 + others)))
    flags = dataclasses.replace(flags, d_qk=1, d_v=1, block_qk=16, block_v=16, vector=1, bias=0, dropout=False)
    launched(interval_tiles_kernel, (batch * count, heads))(
        terms, sizes, coded(sharing if per_head else 1), F=flags, BLOCK=block, BLOCK_OTHER=block_other,
        BY_KEYS=rows == "kv", **ALWAYS,
    )  # fmt: skip
    return terms
