"""Masks of token sequences: documents, prefixes, chunks, windows, blocks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastattn.errors import input_error
from fastattn.intervals.ranges import merged, pairs

Device = torch.device | str | None


def causal(s_q: int, s_kv: int | None = None, *, device: Device = None) -> Tensor:
    """Row ``i`` keeps ``[0, i + s_kv - s_q + 1)``: the last query sees the last key.

    ``causal=True`` of ``attention`` does the same and combines with any intervals; this is for ``union``.

    Args:
        s_q: query rows.
        s_kv: keys; None is ``s_q``.
        device: of the result.

    Returns:
        int32 ``(s_q, 1, 2)``.

    Source:
        Vaswani et al., "Attention is all you need", 2017.

    Example:
        >>> import fastattn
        >>> fastattn.intervals.causal(2, 5)[:, 0].tolist()
        [[0, 4], [0, 5]]
    """
    i = torch.arange(s_q, device=device)
    return pairs(torch.zeros_like(i), i + ((s_q if s_kv is None else s_kv) - s_q + 1))[:, None]


def documents(lengths: Sequence[int] | Tensor, *, causal: bool = False, device: Device = None) -> Tensor:
    """Documents packed into one row: each token keeps those of its own document.

    Args:
        lengths: ``(N,)`` lengths of the documents, in order.
        causal: keep none that follow.
        device: of the result; None is that of ``lengths``, if it is a tensor.

    Returns:
        int32 ``(sum(lengths), 1, 2)``.

    Source:
        Krell et al., "Efficient sequence packing without cross-contamination", 2021.

    Example:
        >>> import torch, fastattn
        >>> q = torch.randn(1, 12, 2, 16)
        >>> fastattn.attention(q, q, q, intervals=fastattn.intervals.documents([5, 7]), causal=True).shape
        torch.Size([1, 12, 2, 16])
    """
    sizes = torch.as_tensor(lengths, device=device).long()
    if sizes.dim() != 1 or bool((sizes < 0).any()):
        raise input_error("lengths", sizes.tolist(), "lengths >= 0 in one dimension", "Give one for each document.")
    ends = sizes.cumsum(0)
    starts, stops = ((x.repeat_interleave(sizes)) for x in (ends - sizes, ends))
    if causal:
        stops = torch.arange(1, starts.shape[0] + 1, device=starts.device)
    return pairs(starts, stops)[:, None]


def segments(segment_ids: Tensor) -> Tensor:
    """Documents of a batch by their ids, as ``segment_ids=`` has them; tokens of a document stand together.

    Args:
        segment_ids: ``(B, S)`` integers.

    Returns:
        int32 ``(B, 1, S, 1, 2)``.

    Raises:
        InputError: the ids do not have two dimensions, or tokens of one id stand apart.

    Example:
        >>> import torch, fastattn
        >>> fastattn.intervals.segments(torch.tensor([[4, 4, 9, 9, 9]]))[0, 0, :, 0].tolist()
        [[0, 2], [0, 2], [2, 5], [2, 5], [2, 5]]
    """
    if segment_ids.dim() != 2:
        raise input_error("segment_ids", f"shape {tuple(segment_ids.shape)}", "(B, S)", "One id for each token.")
    i = torch.arange(segment_ids.shape[1], device=segment_ids.device).expand(segment_ids.shape)
    begins = torch.ones_like(segment_ids, dtype=torch.bool)
    begins[:, 1:] = segment_ids.diff(dim=1) != 0
    if bool((segment_ids.sort(1).values.diff(dim=1) != 0).sum(1).ne(begins[:, 1:].sum(1)).any()):
        todo = "Pass them to attention as segment_ids=, or sort the tokens."
        raise input_error("segment_ids", "tokens of one id apart", "documents that each stand together", todo)
    ends = torch.cat([begins[:, 1:], begins[:, :1]], dim=1)
    starts = torch.where(begins, i, 0).cummax(1).values
    stops = torch.where(ends, i + 1, segment_ids.shape[1]).flip(1).cummin(1).values.flip(1)
    return pairs(starts, stops)[:, None, :, None]


def prefix_lm(s: int, prefix: int | Tensor, *, device: Device = None) -> Tensor:
    """All tokens see the prefix, which sees itself in both directions: row ``i`` keeps ``[0, max(prefix, i + 1))``.

    Args:
        s: tokens.
        prefix: length of the prefix, or ``(B,)`` lengths.
        device: of the result; None is that of ``prefix``, if it is a tensor.

    Returns:
        int32 ``(s, 1, 2)``, or ``(B, 1, s, 1, 2)``.

    Source:
        Raffel et al., "Exploring the limits of transfer learning with a unified text-to-text transformer", 2020.

    Example:
        >>> import fastattn
        >>> fastattn.intervals.prefix_lm(4, 2)[:, 0].tolist()
        [[0, 2], [0, 2], [0, 3], [0, 4]]
    """
    device = prefix.device if device is None and isinstance(prefix, Tensor) else device
    length = torch.as_tensor(prefix, device=device)
    i = torch.arange(1, s + 1, device=device)
    stops = torch.maximum(i, length[..., None]).clamp(max=s)
    found = pairs(torch.zeros_like(stops), stops)[..., None, :]
    return found[:, None] if length.dim() else found


def chunked(s: int, chunk: int, *, device: Device = None) -> Tensor:
    """Each token sees its chunk up to itself: row ``i`` keeps ``[i // chunk * chunk, i + 1)``.

    Args:
        s: tokens.
        chunk: tokens of a chunk.
        device: of the result.

    Returns:
        int32 ``(s, 1, 2)``.

    Source:
        Meta, "The Llama 4 herd", 2025: the layers with rotary embedding.

    Example:
        >>> import fastattn
        >>> fastattn.intervals.chunked(5, 2)[:, 0].tolist()
        [[0, 1], [0, 2], [2, 3], [2, 4], [4, 5]]
    """
    _check_positive(chunk=chunk)
    i = torch.arange(s, device=device)
    return pairs(i // chunk * chunk, i + 1)[:, None]


def sliding_window(s: int, left: int, right: int = 0, *, global_tokens: int = 0, device: Device = None) -> Tensor:
    """A window, and first tokens that see and are seen by all.

    Row ``i`` keeps ``[i - left, i + right + 1)`` and ``[0, global_tokens)``; rows before ``global_tokens`` keep all
    keys. With ``causal=True`` these are the attention sinks of StreamingLLM.

    Args:
        s: tokens.
        left: keys before the token.
        right: keys after it.
        global_tokens: how many of the first tokens are global.
        device: of the result.

    Returns:
        int32 ``(s, n, 2)``, n at most 2.

    Source:
        Beltagy et al., "Longformer", 2020; Xiao et al., "Efficient streaming language models with attention sinks",
        2023.

    Example:
        >>> import torch, fastattn
        >>> fastattn.intervals.sliding_window(6, left=1, global_tokens=1)[4].tolist()
        [[0, 1], [3, 5]]
    """
    i = torch.arange(s, device=device)
    is_global = i < global_tokens
    starts = (i - left).clamp(min=0).masked_fill(is_global, 0)
    stops = (i + right + 1).clamp(max=s).masked_fill(is_global, s)
    first = torch.tensor([0, min(global_tokens, s)], device=device).expand(s, 2)
    return merged(torch.stack([first.to(torch.int32), pairs(starts, stops)], dim=1))


def dilated(s: int, left: int, right: int = 0, *, dilation: int, device: Device = None) -> Tensor:
    """A window with gaps: row ``i`` keeps ``i + d * dilation`` for ``-left <= d <= right``.

    Args:
        s: tokens.
        left: keys before the token.
        right: keys after it.
        dilation: distance from one to the next.
        device: of the result.

    Returns:
        int32 ``(s, n, 2)``, with a range for each key: n is ``left + right + 1``, or 1 if dilation is 1.

    Source:
        Beltagy et al., "Longformer", 2020.

    Example:
        >>> import fastattn
        >>> fastattn.intervals.dilated(7, left=2, dilation=3)[6].tolist()
        [[0, 1], [3, 4], [6, 7]]
    """
    _check_positive(dilation=dilation)
    j = torch.arange(s, device=device)[:, None] + torch.arange(-left, right + 1, device=device) * dilation
    is_there = (j >= 0) & (j < s)
    return merged(pairs(j.where(is_there, 0), (j + 1).where(is_there, 0)))


def shared_prefix(
    prefix: int, lengths: Sequence[int] | Tensor, *, causal: bool = True, device: Device = None
) -> Tensor:
    """Several continuations of one prefix in one row: each sees the prefix and itself, not the others.

    Give the tokens of each continuation the positions that follow the prefix.

    Args:
        prefix: tokens of the prefix, which come first.
        lengths: ``(N,)`` tokens of each continuation, in order.
        causal: keep no key that follows.
        device: of the result.

    Returns:
        int32 ``(prefix + sum(lengths), n, 2)``, n at most 2.

    Source:
        Juravsky et al., "Hydragen: High-throughput LLM inference with shared prefixes", 2024.

    Example:
        >>> import fastattn
        >>> fastattn.intervals.shared_prefix(2, [2, 2])[5].tolist()
        [[0, 2], [4, 6]]
    """
    sizes = torch.as_tensor(lengths, device=device).long()
    own = documents(torch.cat([sizes.new_tensor([prefix]), sizes]), causal=causal)
    first = own.new_tensor([0, prefix]).expand(own.shape[0], 1, 2).clone()
    first[:prefix] = 0
    return merged(torch.cat([first, own], dim=1))


def block_diffusion(s: int, block: int, *, device: Device = None) -> Tensor:
    """The training mask of block diffusion over ``2 * s`` tokens: the noisy sequence, then the clean one.

    With ``b = i // block`` of a token's place i in its sequence, a noisy token keeps its own noisy block and the clean
    blocks before b, a clean one the clean blocks up to b.

    Args:
        s: tokens of the sequence.
        block: tokens of a block.
        device: of the result.

    Returns:
        int32 ``(2 * s, 2, 2)``.

    Source:
        Arriola et al., "Block diffusion: Interpolating between autoregressive and diffusion language models", 2025.

    Example:
        >>> import fastattn
        >>> fastattn.intervals.block_diffusion(6, 2)[[3, 7]].tolist()
        [[[2, 4], [6, 8]], [[6, 8], [0, 0]]]
    """
    _check_positive(block=block)
    begins = torch.arange(s, device=device) // block * block
    ends = (begins + block).clamp(max=s)
    nothing, clean = torch.zeros_like(begins), torch.full_like(begins, s)
    noisy = torch.stack([pairs(begins, ends), pairs(clean, s + begins)], dim=1)
    return merged(torch.cat([noisy, torch.stack([pairs(clean, s + ends), pairs(nothing, nothing)], dim=1)]))


def selected_blocks(chosen: Tensor, block: int, s_q: int, *, rows: int = 1) -> Tensor:
    """The blocks of keys that a router has selected; ``causal=True`` of ``attention`` cuts the last one.

    A row keeps ``[c * block, (c + 1) * block)`` for each of its chosen c.

    Args:
        chosen: integers ``(..., s_q / rows, m)``, numbers of blocks; negative ones select nothing.
        block: keys of a block.
        s_q: query rows.
        rows: query rows that share a choice: 1 for MoBA, and for NSA with a choice of each token.

    Returns:
        int32 ``(..., s_q, n, 2)``, n at most m; blocks side by side become one range.

    Raises:
        InputError: the choices are not those of ``s_q`` rows.

    Source:
        Yuan et al., "Native sparse attention", 2025; Lu et al., "MoBA: Mixture of block attention", 2025.

    Example:
        >>> import torch, fastattn
        >>> q = torch.randn(1, 128, 2, 16)
        >>> k = q.unflatten(1, (-1, 16)).mean(2)  # the mean key of each block
        >>> of_past = torch.arange(8) < torch.arange(128)[:, None] // 16
        >>> scores = torch.einsum("bihd,bjhd->bhij", q, k).masked_fill(~of_past, float("-inf"))
        >>> best = scores.topk(2)
        >>> own = (torch.arange(128) // 16)[:, None].expand(1, 2, 128, 1)
        >>> chosen = torch.cat([best.indices.where(best.values.isfinite(), -1), own], -1)
        >>> intervals = fastattn.intervals.selected_blocks(chosen, 16, 128)
        >>> fastattn.attention(q, q, q, intervals=intervals, causal=True).shape
        torch.Size([1, 128, 2, 16])
    """
    _check_positive(block=block, rows=rows)
    if chosen.is_floating_point() or chosen.dim() < 2 or chosen.shape[-2] != -(-s_q // rows):
        given, allowed = f"{chosen.dtype}, shape {tuple(chosen.shape)}", f"integers (..., {-(-s_q // rows)}, m)"
        raise input_error("chosen", given, allowed, f"{s_q} rows share choices by {rows}.")
    starts = chosen.long() * block
    ranges = merged(pairs(starts, torch.where(chosen < 0, starts, starts + block)))
    return ranges if rows == 1 else ranges.repeat_interleave(rows, dim=-3)[..., :s_q, :, :]


def _check_positive(**numbers: int) -> None:
    for name, n in numbers.items():
        if n < 1:
            raise input_error(name, n, "an int of at least 1", "It counts tokens.")
