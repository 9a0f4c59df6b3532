"""The key/value cache of one attention layer during generation: room for ``max_length`` tokens, set aside once."""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn.errors import input_error


class KVCache:
    """Keys and values of the tokens so far. ``append`` writes new ones in place and returns all of them as views.

    ``keys`` ``(B, S_max, H_kv, D_qk)`` and ``values`` ``(B, S_max, H_kv, D_v)`` are allocated at once and never move;
    ``length`` is the number of tokens filled, an int on the host.

    Args:
        batch: B.
        max_length: S_max.
        num_kv_heads: H_kv.
        head_dim: D_qk.
        head_dim_v: D_v; None is ``head_dim``.
        device: where the tensors lie; None is torch's default.
        dtype: of the tensors; None is torch's default.

    Raises:
        InputError: a size is not positive.

    Example:
        >>> import torch, fastattn
        >>> from fastattn.nn import KVCache
        >>> cache = KVCache(batch=1, max_length=8, num_kv_heads=2, head_dim=16)
        >>> k = v = torch.randn(1, 5, 2, 16)
        >>> keys, values = cache.append(k, v)                            # the prompt
        >>> keys, values = cache.append(k[:, :1], v[:, :1])              # one token
        >>> cache.length, tuple(keys.shape)
        (6, (1, 6, 2, 16))
        >>> fastattn.attention(torch.randn(1, 1, 4, 16), keys, values, causal=True).shape
        torch.Size([1, 1, 4, 16])
    """

    def __init__(
        self,
        batch: int,
        max_length: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        head_dim_v: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        head_dim_v = head_dim if head_dim_v is None else head_dim_v
        sizes = {"batch": batch, "max_length": max_length, "num_kv_heads": num_kv_heads, "head_dim": head_dim}
        for name, size in (sizes | {"head_dim_v": head_dim_v}).items():
            if size < 1:
                raise input_error(name, size, "a positive int", "A cache needs room.")
        self.keys = torch.zeros(batch, max_length, num_kv_heads, head_dim, device=device, dtype=dtype)
        self.values = torch.zeros(batch, max_length, num_kv_heads, head_dim_v, device=device, dtype=dtype)
        self.length = 0

    @property
    def max_length(self) -> int:
        return self.keys.shape[1]

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add the keys and values of the next ``S`` tokens.

        Args:
            k: ``(B, S, H_kv, D_qk)``.
            v: ``(B, S, H_kv, D_v)``.

        Returns:
            views ``(B, length, H_kv, D)`` of all keys and values so far; they change when a ``reset`` is written over.

        Raises:
            InputError: a shape, dtype or device does not fit, there is no room left, or the tensors need gradients.
                The cache stays as it was.
        """
        end = self.length + k.shape[1] if k.dim() == 4 else 0
        for name, x, store in (("k", k, self.keys), ("v", v, self.values)):
            fits = x.dim() == 4 and x.shape == (store.shape[0], k.shape[1], *store.shape[2:])
            if not fits or x.dtype != store.dtype or x.device != store.device:
                batch, _, heads, head_dim = store.shape
                given = f"shape {tuple(x.shape)}, {x.dtype}, {x.device}"
                allowed = f"({batch}, S, {heads}, {head_dim}) with one S for k and v, {store.dtype}, {store.device}"
                raise input_error(name, given, allowed, "Make the cache for the batch and dtype it serves.")
            if x.requires_grad and torch.is_grad_enabled():
                todo = "Generate under torch.no_grad(); train without a cache."
                raise input_error(name, "a tensor that requires grad", "one that does not", todo)
        if end > self.max_length:
            given = f"{k.shape[1]} tokens after {self.length}"
            todo = "Make the cache with a larger max_length, or reset() it."
            raise input_error("k", given, f"at most {self.max_length} in all, the max_length", todo)
        self.keys[:, self.length : end] = k
        self.values[:, self.length : end] = v
        self.length = end
        return self.keys[:, :end], self.values[:, :end]

    def reset(self) -> None:
        """Forget every token; the memory is kept for the next sequence."""
        self.length = 0
