"""``flash_attn.bert_padding``: padded batches to packed rows and back."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn.errors import input_error


def index_first_axis(input: Tensor, indices: Tensor) -> Tensor:
    """``input[indices]``, rows by their indices.

    Args:
        input: ``(T, ...)``.
        indices: int64 ``(n,)``.

    Returns:
        ``(n, ...)``.
    """
    return input.index_select(0, indices)


def index_first_axis_residual(input: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """``input[indices]`` and ``input`` itself, for a residual connection.

    Args:
        input: ``(T, ...)``.
        indices: int64 ``(n,)``.

    Returns:
        ``(n, ...)`` and ``input``.
    """
    return index_first_axis(input, indices), input


def index_put_first_axis(values: Tensor, indices: Tensor, first_axis_dim: int) -> Tensor:
    """Rows at ``indices`` among rows of zeros, the inverse of ``index_first_axis``.

    Args:
        values: ``(n, ...)``.
        indices: int64 ``(n,)``, all different.
        first_axis_dim: T.

    Returns:
        ``(T, ...)``.
    """
    return values.new_zeros(first_axis_dim, *values.shape[1:]).index_copy(0, indices, values)


def unpad_input(
    hidden_states: Tensor, attention_mask: Tensor, unused_mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, int, Tensor]:
    """The rows of a padded batch that are not padding, end to end.

    Args:
        hidden_states: ``(B, S, ...)``.
        attention_mask: ``(B, S)``, 1 for tokens and 0 for padding.
        unused_mask: ``(B, S)``, 1 for rows that are allocated but hold no token; they are returned, but not counted.

    Returns:
        the rows ``(T, ...)``; ``indices``, their places in ``(B * S)``; ``cu_seqlens`` int32 ``(B + 1,)``; the longest
        length; and the number of tokens in each sequence, int32 ``(B,)``.

    Example:
        >>> import torch
        >>> from fastattn.integrations.flash_attn.bert_padding import pad_input, unpad_input
        >>> x, mask = torch.randn(2, 3, 4), torch.tensor([[1, 1, 0], [1, 1, 1]])
        >>> rows, indices, cu_seqlens, longest, lengths = unpad_input(x, mask)
        >>> rows.shape, cu_seqlens.tolist(), longest
        (torch.Size([5, 4]), [0, 2, 5], 3)
        >>> bool((pad_input(rows, indices, 2, 3)[1] == x[1]).all())
        True
    """
    kept = attention_mask if unused_mask is None else attention_mask + unused_mask
    lengths = kept.sum(-1, dtype=torch.int32)
    used = attention_mask.sum(-1, dtype=torch.int32)
    indices = kept.flatten().nonzero()[:, 0]
    return *_rows(hidden_states, indices, lengths), used


def unpad_input_for_concatenated_sequences(
    hidden_states: Tensor, attention_mask_in_length: Tensor
) -> tuple[Tensor, Tensor, Tensor, int]:
    """``unpad_input`` for rows that hold several sequences one after the other.

    Args:
        hidden_states: ``(B, S, ...)``.
        attention_mask_in_length: ``(B, S)``, the lengths of each row's sequences, and zeros after them.

    Returns:
        the rows, their indices, ``cu_seqlens`` of all sequences, and the longest length.
    """
    filled = attention_mask_in_length.sum(-1, keepdim=True)
    at = torch.arange(attention_mask_in_length.shape[1], device=filled.device)
    lengths = attention_mask_in_length[attention_mask_in_length != 0].to(torch.int32)
    return _rows(hidden_states, (at < filled).flatten().nonzero()[:, 0], lengths)


def pad_input(hidden_states: Tensor, indices: Tensor, batch: int, seqlen: int) -> Tensor:
    """The inverse of ``unpad_input``; padding is 0.

    Args:
        hidden_states: ``(T, ...)``.
        indices: as ``unpad_input`` gave them.
        batch: B.
        seqlen: S.

    Returns:
        ``(B, S, ...)``.
    """
    return index_put_first_axis(hidden_states, indices, batch * seqlen).unflatten(0, (batch, seqlen))


def _rows(hidden_states: Tensor, indices: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor, Tensor, int]:
    if lengths.numel() == 0:
        raise input_error("attention_mask", "no sequence", "one at least", "Leave out empty batches.")
    cu_seqlens = F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    return index_first_axis(hidden_states.flatten(0, 1), indices), indices, cu_seqlens, int(lengths.max())
