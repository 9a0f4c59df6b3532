"""Conversion of nested and padded tensors to packed ones and back: the rows of all sequences end to end."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from fastattn.torch_internals import jagged_lengths


@dataclass(frozen=True)
class Packed:
    """A nested tensor ``(N, S_n, ...)`` whose sequences have lengths of their own.

    Attributes:
        values: ``(T, ...)``, the sequences end to end.
        offsets: int32 ``(N + 1,)``, as ``cu_seqlens`` of ``fastattn.attention_varlen``.
        longest: the longest length.
        like: the nested tensor.
    """

    values: Tensor
    offsets: Tensor
    longest: int
    like: Tensor

    @classmethod
    def of(cls, x: Tensor) -> Packed:
        if x.layout == torch.jagged:
            offsets: Tensor = x.offsets()  # type: ignore[attr-defined]
            longest = jagged_lengths(x)[1]
            longest = int(offsets.diff().max()) if longest is None else longest
            return cls(x.values(), offsets.to(torch.int32), longest, x)
        sizes = x._nested_tensor_size()
        lengths = sizes[:, 0].tolist()
        ends = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=x.device)
        if x.is_contiguous() and not x.requires_grad and bool((sizes[:, 1:] == sizes[:1, 1:]).all()):
            values = x.values().view(-1, *sizes[0, 1:].tolist())  # its sequences lie end to end
        else:
            values = torch.cat(x.unbind())
        return cls(values, ends, max(lengths), x)

    def nested(self, values: Tensor) -> Tensor:
        """``(T, ...)`` as a nested tensor of the same sequences and layout."""
        if self.like.layout == torch.jagged:
            shortest = jagged_lengths(self.like)[0]
            offsets: Tensor = self.like.offsets()  # type: ignore[attr-defined]
            return torch.nested.nested_tensor_from_jagged(values, offsets, min_seqlen=shortest, max_seqlen=self.longest)
        if torch.is_grad_enabled() and values.requires_grad:
            return torch.nested.as_nested_tensor(list(values.split(self.offsets.diff().tolist())))
        sizes = self.like._nested_tensor_size()
        if values.shape[1:] == tuple(sizes[0, 1:].tolist()):
            of_like = (sizes, self.like._nested_tensor_strides(), self.like._nested_tensor_storage_offsets())
            return torch._nested_view_from_buffer(values.reshape(-1), *of_like)
        return torch.nested.as_nested_tensor(list(values.split(self.offsets.diff().tolist())))

    def positions(self) -> Tensor:
        """``(T,)``, the position of each row in its sequence."""
        at = torch.arange(self.values.shape[0], device=self.offsets.device)
        return at - self.offsets[torch.searchsorted(self.offsets[1:].contiguous(), at.int(), right=True)]


@dataclass(frozen=True)
class Unpadded:
    """The tokens of a padded batch ``(B, S, E)`` whose padding follows the last token of each sequence.

    Attributes:
        values: ``(T, E)``, the sequences end to end.
        rows: ``(T,)``, the row of each token in ``(B * S, E)``.
        offsets: int32 ``(B + 1,)``, as ``cu_seqlens``.
        longest: the longest length.
        shape: B and S.
    """

    values: Tensor
    rows: Tensor
    offsets: Tensor
    longest: int
    shape: tuple[int, int]

    @classmethod
    def of(cls, x: Tensor, padding: Tensor) -> Unpadded | None:
        """``padding`` is boolean ``(B, S)``, True = padding; None if tokens follow it. Waits for the device."""
        keep = ~padding
        counts = keep.sum(1)
        if not torch.equal(keep, torch.arange(x.shape[1], device=x.device) < counts[:, None]):
            return None
        lengths = counts.tolist()
        ends = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=x.device)
        rows = keep.flatten().nonzero().squeeze(1)
        return cls(x.flatten(0, 1).index_select(0, rows), rows, ends, max(lengths), (x.shape[0], x.shape[1]))

    def padded(self, values: Tensor) -> Tensor:
        """``(T, E)`` as ``(B, S, E)``, 0 in the padding."""
        batch, length = self.shape
        zeros = values.new_zeros(batch * length, values.shape[1])
        return zeros.index_copy_(0, self.rows, values).unflatten(0, self.shape)

    def positions(self) -> Tensor:
        """``(T,)``, the position of each row in its sequence."""
        return self.rows % self.shape[1]
