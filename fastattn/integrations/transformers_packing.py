"""Documents packed into one row, given as in transformers: by ``position_ids`` that restart at 0, or by boundaries.

transformers makes masks of packed ``position_ids`` only without a cache, without a padding mask and if the model's code
passes them on. Its FlashAttention function therefore reads them itself, and so does this module.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from fastattn.errors import input_error


@dataclass(frozen=True)
class Documents:
    """The documents to which the tokens of ``(B, S)`` rows belong.

    Attributes:
        segment_ids: ``(B, S)``, ascending in each row.
        cu_seqlens: int32, where documents begin once the rows are laid end to end, and the end.
        longest: tokens of the longest document.
        rows: B; position_ids of one row may hold for a whole batch.
    """

    segment_ids: Tensor
    cu_seqlens: Tensor
    longest: int
    rows: int

    def for_batch(self, rows: int) -> Documents:
        """The same documents in every one of ``rows`` rows."""
        if rows == self.rows:
            return self
        return _documents(self.segment_ids.expand(rows, -1))


FEW = 512  # positions
_nothing: Callable[[], Tensor | None] = lambda: None  # noqa: E731  a dead reference
# The position_ids asked about last, their version and documents: every layer of a model asks about the same tensor.
_last: tuple[Callable[[], Tensor | None], int, Documents | None] = (_nothing, 0, None)
_implied = WeakTensorKeyDictionary()  # masks -> (their version, boundaries, whether these say all that the mask says)


def documents_of(position_ids: Tensor | None, rows: int, s_q: int) -> Documents | None:
    """The documents of a row whose ``position_ids`` restart at 0; None for one document in each row.

    It reads values, once for each forward pass, so it returns None while compiling or capturing a CUDA graph.
    Positions that are all 0 are ignored.
    """
    if position_ids is None or s_q < 2 or not _may_read(position_ids):
        return None
    if position_ids.dim() != 2 or position_ids.shape[1] != s_q:
        return None
    version = 0 if position_ids.is_inference() else position_ids._version
    global _last
    last, seen, found = _last
    if last() is not position_ids or seen != version:
        found = _read(position_ids)
        _last = weakref.ref(position_ids), version, found
    return None if found is None or found.rows not in (1, rows) else found.for_batch(rows)


def _read(position_ids: Tensor) -> Documents | None:
    if position_ids.is_cpu and position_ids.numel() <= FEW:  # so few are read in less time than torch takes to begin
        if not any(0 in row[1:] for row in position_ids.tolist()):
            return None
    elif bool(position_ids[:, 1:].all()):  # the commonest, and cheap to see
        return None
    begins = position_ids == 0
    begins[:, 0] = True
    starts = begins.sum(1)
    if bool(((starts == 1) | (starts == begins.shape[1])).all()):
        return None
    return _documents(begins.cumsum(1, dtype=torch.int32))


def _documents(segment_ids: Tensor) -> Documents:
    begins = torch.ones_like(segment_ids, dtype=torch.bool)
    begins[:, 1:] = segment_ids.diff(dim=1) != 0
    cu_seqlens = torch.cat([begins.flatten().nonzero()[:, 0], begins.new_tensor([begins.numel()], dtype=torch.int64)])
    cu_seqlens = cu_seqlens.to(torch.int32)
    return Documents(segment_ids, cu_seqlens, int(cu_seqlens.diff().max()), segment_ids.shape[0])


def segments_of_boundaries(cu_seqlens: Tensor, length: int) -> Tensor:
    """``(1, length)`` segment ids of packed sequences."""
    at = torch.arange(length, device=cu_seqlens.device)
    return torch.searchsorted(cu_seqlens[1:].contiguous(), at.to(cu_seqlens.dtype), right=True).to(torch.int32)[None]


def says_no_more(mask: Tensor, cu_seq_lens: Tensor, causal: bool, window: tuple[int, int] | None) -> bool:
    """Whether a boolean mask over packed sequences keeps exactly what their boundaries, causality and window keep.

    False if values cannot be read now; the mask is then applied at its full cost.
    """
    if mask.dtype != torch.bool or mask.shape[:2] != (1, 1) or mask.shape[2] != mask.shape[3] or not _may_read(mask):
        return False
    version = 0 if mask.is_inference() else mask._version
    question = (version, cu_seq_lens.data_ptr(), causal, window)
    known = _implied.get(mask)
    if known is None or known[0] != question:
        known = _implied[mask] = (
            question,
            bool((mask[0, 0] == _kept(cu_seq_lens, mask.shape[3], causal, window)).all()),
        )
    return known[1]


def _kept(cu_seq_lens: Tensor, length: int, causal: bool, window: tuple[int, int] | None) -> Tensor:
    segments = segments_of_boundaries(cu_seq_lens, length)[0]
    distance = torch.arange(length, device=segments.device)
    distance = distance[:, None] - distance[None, :]
    kept = segments[:, None] == segments[None, :]
    if causal:
        kept &= distance >= 0
    if window is not None:
        kept &= (distance <= window[0]) & (distance >= -window[1])
    return kept


def refuse_packing_beside_others(documents: Documents, attention_mask: Tensor) -> None:
    """Raise InputError if a mask over keys of earlier forward passes lets a document see the one before it.

    Positions that restart behind padding are no documents, and such a mask keeps them apart.
    """
    restart = documents.segment_ids.diff(dim=1) != 0
    before = attention_mask[:, 0].diagonal(-1, -2, -1)[:, : restart.shape[1]]
    if bool((restart & (before.expand(restart.shape[0], -1) if before.dtype == torch.bool else before == 0)).any()):
        todo = "Pass packed documents without past keys, or one document in each row."
        raise input_error("position_ids", "documents that restart at 0, beside the keys of a cache", "none", todo)


def _may_read(x: Tensor) -> bool:
    return not (torch.compiler.is_compiling() or (x.is_cuda and torch.cuda.is_current_stream_capturing()))
