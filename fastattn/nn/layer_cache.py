"""One attention layer's view of a key/value cache: new tokens are appended, and queries attend to all of them."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastattn.decoding import attention_with_kv_cache
from fastattn.errors import input_error

Window = tuple[int | None, int | None]


class LayerCache(ABC):
    """Keys and values of one layer; ``KVCache`` and ``PagedLayer`` store them.

    Attributes:
        keys: the store of keys.
        values: the store of values.
        k_scale: fp32 factor on the keys of an e4m3 cache; None is 1.
        v_scale: likewise for the values.
    """

    keys: Tensor
    values: Tensor
    k_scale: Tensor | None
    v_scale: Tensor | None

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        causal: bool = True,
        window: Window | None = None,
        scale: float | None = None,
        softcap: float | None = None,
        bias: Tensor | None = None,
        alibi_slopes: Tensor | None = None,
        sinks: Tensor | None = None,
        tree_mask: Tensor | None = None,
        backend: str | None = None,
    ) -> Tensor:
        """Append the keys and values of new tokens, and attend from ``q`` to all tokens that the cache then holds.

        Args:
            q: ``(B, S_q, H_q, D_qk)``; the last query of a row is at its last token. In a packed step of a
                ``PagedKVCache`` q, k and v are ``(1, T, H, D)``.
            k: ``(B, S, H_kv, D_qk)``.
            v: ``(B, S, H_kv, D_v)``.
            causal: this and the others as in ``fastattn.attention_with_kv_cache``.
            window: as there.
            scale: as there.
            softcap: as there.
            bias: as there, ``(B, H_q, S_q, S)`` by position of the key.
            alibi_slopes: as there.
            sinks: as there.
            tree_mask: as there; ``keep`` of the cache then keeps the accepted path. Keys that are rotated before they
                come here take the position of their depth.
            backend: as there.

        Returns:
            ``(B, S_q, H_q, D_v)``.

        Raises:
            InputError: a shape, dtype or device does not fit, there is no room left, or the tensors need gradients. The
                cache stays as it was.
        """
        options: dict[str, Any] = {
            "causal": causal, "window": window, "scale": scale, "softcap": softcap, "bias": bias,
            "alibi_slopes": alibi_slopes, "sinks": sinks, "tree_mask": tree_mask, "backend": backend,
            "k_scale": self.k_scale, "v_scale": self.v_scale,
        }  # fmt: skip
        return self._append_and_attend(q, k, v, options)

    @abstractmethod
    def new_positions(self, tokens: int) -> Tensor:
        """Positions ``(B, tokens)`` of the next tokens of each row, for rotary embedding. Before ``attend``."""

    @abstractmethod
    def _append_and_attend(self, q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> Tensor:
        """``attend``, with the keyword arguments of ``attention_with_kv_cache``."""

    def _attend(self, q: Tensor, lengths: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> Tensor:
        """Append to the stores after ``lengths`` tokens, and attend."""
        out = attention_with_kv_cache(q, self.keys, self.values, lengths, k, v, **options)
        assert isinstance(out, Tensor)  # no lse was asked for
        return out


def kept_moves(tokens: int, kept: Sequence[int], length: int) -> list[tuple[int, int]]:
    """From where to where the kept ones of the last ``tokens`` of a row of ``length`` move, but for those that stay.

    Raises:
        InputError: there are fewer tokens, or ``kept`` are not indices among them in ascending order.
    """
    in_order = all(a < b for a, b in itertools.pairwise((-1, *kept, tokens)))
    if not 0 <= tokens <= length or not in_order:
        allowed = f"at most the {length} of the row, and indices below their number in ascending order"
        raise input_error("kept", f"{list(kept)} of {tokens} tokens", allowed, "A path of a tree, its root first.")
    begin = length - tokens
    return [(begin + token, begin + n) for n, token in enumerate(kept) if token != n]


def make_stores(
    shape: tuple[int, ...], head_dims: tuple[int, int], values_in_keys: bool, **options: Any
) -> tuple[Tensor, Tensor]:
    """Zeros for keys and values, ``(*shape, D_qk)`` and ``(*shape, D_v)``; with ``values_in_keys`` one view the other.

    Raises:
        InputError: a value would be wider than the key that it is a part of.
    """
    head_dim, head_dim_v = head_dims
    keys = torch.zeros(*shape, head_dim, **options)
    if not values_in_keys:
        return keys, torch.zeros(*shape, head_dim_v, **options)
    if head_dim_v > head_dim:
        todo = "A value is the beginning of its key."
        raise input_error("head_dim_v", f"{head_dim_v} with values_in_keys", f"at most head_dim {head_dim}", todo)
    return keys, keys[..., :head_dim_v]


def scales_of_stores(
    k_scale: Tensor | None, v_scale: Tensor | None, values_in_keys: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Scales of keys and values, which are the same numbers with ``values_in_keys``.

    Raises:
        InputError: values that are parts of the keys are given a scale.
    """
    if values_in_keys and v_scale is not None:
        raise input_error("v_scale", "a tensor with values_in_keys", "None", "Values are stored with k_scale.")
    return k_scale, k_scale if values_in_keys else v_scale
