"""``flash_attn.flash_attn_interface``: the functions that take k and v, or all three, in one tensor."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fastattn.errors import input_error
from fastattn.integrations.flash_attn.interface import WithProbs, flash_attn_func, flash_attn_varlen_func


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] | Tensor = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> WithProbs:
    """``flash_attn.flash_attn_qkvpacked_func``: q, k and v in one tensor, as a fused projection gives them.

    Args:
        qkv: ``(B, S, 3, H, D)``.
        dropout_p: this and the others as in ``flash_attn_func``.
        softmax_scale: as there.
        causal: as there.
        window_size: as there.
        softcap: as there.
        alibi_slopes: as there.
        deterministic: as there.
        return_attn_probs: as there.

    Returns:
        as ``flash_attn_func``.

    Raises:
        InputError: an argument is wrong.

    Example:
        >>> import torch
        >>> from fastattn.integrations.flash_attn import flash_attn_qkvpacked_func
        >>> flash_attn_qkvpacked_func(torch.randn(2, 16, 3, 8, 64), causal=True).shape
        torch.Size([2, 16, 8, 64])
    """
    q, k, v = _apart("qkv", qkv, 5, 3, "(B, S, 3, H, D)")
    return flash_attn_func(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
    )


def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] | Tensor = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> WithProbs:
    """``flash_attn.flash_attn_kvpacked_func``: k and v in one tensor.

    Args:
        q: ``(B, S_q, H_q, D)``.
        kv: ``(B, S_kv, 2, H_kv, D)``; ``H_kv`` divides ``H_q``.
        dropout_p: this and the others as in ``flash_attn_func``.
        softmax_scale: as there.
        causal: as there.
        window_size: as there.
        softcap: as there.
        alibi_slopes: as there.
        deterministic: as there.
        return_attn_probs: as there.

    Returns:
        as ``flash_attn_func``.

    Raises:
        InputError: an argument is wrong.

    Example:
        >>> import torch
        >>> from fastattn.integrations.flash_attn import flash_attn_kvpacked_func
        >>> q, kv = torch.randn(2, 16, 8, 64), torch.randn(2, 20, 2, 2, 64)
        >>> flash_attn_kvpacked_func(q, kv, causal=True).shape
        torch.Size([2, 16, 8, 64])
    """
    k, v = _apart("kv", kv, 5, 2, "(B, S_kv, 2, H_kv, D)")
    return flash_attn_func(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
    )


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] | Tensor = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> WithProbs:
    """``flash_attn.flash_attn_varlen_qkvpacked_func``: packed sequences, q, k and v in one tensor.

    Args:
        qkv: ``(T, 3, H, D)``.
        cu_seqlens: int32 ``(N + 1,)``, where each sequence begins, and the end.
        max_seqlen: longest sequence.
        dropout_p: this and the others as in ``flash_attn_func``.
        softmax_scale: as there.
        causal: as there.
        window_size: as there.
        softcap: as there.
        alibi_slopes: as there.
        deterministic: as there.
        return_attn_probs: as there.

    Returns:
        as ``flash_attn_varlen_func``.

    Raises:
        InputError: an argument is wrong.

    Example:
        >>> import torch
        >>> from fastattn.integrations.flash_attn import flash_attn_varlen_qkvpacked_func
        >>> cu_seqlens = torch.tensor([0, 3, 7], dtype=torch.int32)
        >>> flash_attn_varlen_qkvpacked_func(torch.randn(7, 3, 4, 32), cu_seqlens, 4, causal=True).shape
        torch.Size([7, 4, 32])
    """
    q, k, v = _apart("qkv", qkv, 4, 3, "(T, 3, H, D)")
    return flash_attn_varlen_func(
        q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen,
        dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs,
    )  # fmt: skip


def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] | Tensor = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> WithProbs:
    """``flash_attn.flash_attn_varlen_kvpacked_func``: packed sequences, k and v in one tensor.

    Args:
        q: ``(T_q, H_q, D)``.
        kv: ``(T_kv, 2, H_kv, D)``.
        cu_seqlens_q: int32 ``(N + 1,)``, where each query sequence begins, and the end.
        cu_seqlens_k: likewise for the keys.
        max_seqlen_q: longest query sequence.
        max_seqlen_k: longest key sequence.
        dropout_p: this and the others as in ``flash_attn_func``.
        softmax_scale: as there.
        causal: as there.
        window_size: as there.
        softcap: as there.
        alibi_slopes: as there.
        deterministic: as there.
        return_attn_probs: as there.

    Returns:
        as ``flash_attn_varlen_func``.

    Raises:
        InputError: an argument is wrong.

    Example:
        >>> import torch
        >>> from fastattn.integrations.flash_attn import flash_attn_varlen_kvpacked_func
        >>> q, kv = torch.randn(7, 4, 32), torch.randn(7, 2, 2, 32)
        >>> cu_seqlens = torch.tensor([0, 3, 7], dtype=torch.int32)
        >>> flash_attn_varlen_kvpacked_func(q, kv, cu_seqlens, cu_seqlens, 4, 4, causal=True).shape
        torch.Size([7, 4, 32])
    """
    k, v = _apart("kv", kv, 4, 2, "(T_kv, 2, H_kv, D)")
    return flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
        dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs,
    )  # fmt: skip


def _apart(name: str, x: Tensor, dim: int, count: int, shape: str) -> tuple[Tensor, ...]:
    """The ``count`` tensors that lie side by side in dimension ``dim - 3``."""
    if x.dim() != dim or x.shape[-3] != count:
        todo = "Key heads may be fewer where q is a tensor of its own."
        raise input_error(name, f"shape {tuple(x.shape)}", shape, todo)
    return x.unbind(-3)
