"""The masks of ``torch.nn.MultiheadAttention``, True = masked, as the terms of ``fastattn.attention``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastattn.errors import input_error


def mask_terms(key_padding_mask: Tensor | None, attn_mask: Tensor | None, q: Tensor) -> dict[str, Any]:
    """``bias``, ``mask`` (True = attend) and ``segment_ids`` of ``fastattn.attention`` for q ``(B, S_q, H_q, D)``.

    Args:
        key_padding_mask: ``(B, S_kv)``, or ``(S_kv,)`` for a batch of one: True = masked, or added to the scores.
        attn_mask: ``(S_q, S_kv)`` or ``(B * H_q, S_q, S_kv)``, likewise.
        q: the queries.
    """
    bias, keep, segment_ids = None, None, None
    if key_padding_mask is not None:
        padding = key_padding_mask
        if padding.dtype != torch.bool:
            bias = key_padding_mask[..., None, None, :]
            padding = key_padding_mask == float("-inf")  # torch's layers make it of True; as segments it is skipped
        segments = torch.atleast_2d(padding).int()  # 1 is a document without queries
        segment_ids = (segments.new_zeros(1, q.shape[1]), segments)
    if attn_mask is not None and attn_mask.dim() == 3:
        attn_mask = attn_mask.unflatten(0, (q.shape[0], q.shape[2]))
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        keep = ~attn_mask
    elif attn_mask is not None:
        bias = attn_mask if bias is None else bias + attn_mask
    return {"bias": bias, "mask": keep, "segment_ids": segment_ids}


def check_masks(
    key_padding_mask: Tensor | None, attn_mask: Tensor | None, is_batched: bool, sizes: tuple[int, int, int, int]
) -> None:
    """Raise InputError unless the masks are boolean or floating and fit ``sizes``: B, H_q, S_q and S_kv."""
    batch, heads, s_q, s_kv = sizes
    padding_shape = (batch, s_kv) if is_batched else (s_kv,)
    attn_shapes = [(s_q, s_kv), (batch * heads, s_q, s_kv)]
    for name, mask, shapes, advice in (
        ("key_padding_mask", key_padding_mask, [padding_shape], "It has one entry for each key."),
        ("attn_mask", attn_mask, attn_shapes, "A mask of each batch entry is repeated for each head."),
    ):
        if mask is None:
            continue
        if mask.dtype != torch.bool and not mask.is_floating_point():
            todo = "Convert it with .bool(); True = masked."
            raise input_error(name, mask.dtype, "torch.bool, or a floating dtype that is added to the scores", todo)
        if mask.shape not in shapes:
            raise input_error(name, f"shape {tuple(mask.shape)}", " or ".join(map(str, shapes)), advice)
