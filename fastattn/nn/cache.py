"""The contiguous key/value cache of one attention layer: room for ``max_length`` tokens in each row, allocated once.

Use ``PagedKVCache`` for sequences that are added and freed, share prefixes or differ much in length.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastattn.errors import input_error
from fastattn.nn.layer_cache import LayerCache, kept_moves, make_stores, scales_of_stores

FP8 = torch.float8_e4m3fn


class KVCache(LayerCache):
    """Keys and values of the tokens so far. ``append`` or ``attend`` write new ones in place.

    ``keys`` ``(B, S_max, H_kv, D_qk)`` and ``values`` ``(B, S_max, H_kv, D_v)`` are allocated at once and never move.
    The number of tokens in each row is stored twice: on the host, so that checks need no device, and on the device in
    ``lengths`` ``(B,)`` int32, which kernels read. Nothing waits for the device.

    Inside ``torch.compile`` and in a replayed CUDA graph no host code runs, so such a step updates the device alone.
    Call ``advance`` before it to update the host.

    Args:
        batch: B.
        max_length: S_max.
        num_kv_heads: H_kv.
        head_dim: D_qk.
        head_dim_v: D_v; None is ``head_dim``.
        values_in_keys: the value of a token is the first D_v numbers of its key, as in multi-head latent attention,
            and is not stored again. What is appended must be so, and ``v_scale`` is None. Not for torch.compile.
        device: where the tensors lie; None is torch's default.
        dtype: of the tensors; None is torch's default. ``torch.float8_e4m3fn`` halves the memory, see ``k_scale``.
        k_scale: fp32 ``(H_kv,)`` of an e4m3 cache: keys are stored divided by it. None is 1.
        v_scale: likewise for the values.

    Raises:
        InputError: a size is not positive, or ``values_in_keys`` meets wider values or a ``v_scale``.

    Example:
        >>> import torch, fastattn
        >>> from fastattn.nn import KVCache
        >>> cache = KVCache(batch=1, max_length=8, num_kv_heads=2, head_dim=16)
        >>> q, k = torch.randn(1, 5, 4, 16), torch.randn(1, 5, 2, 16)
        >>> out = cache.attend(q, k, k)                                  # the prompt
        >>> out = cache.attend(q[:, :1], k[:, :1], k[:, :1])             # one token
        >>> cache.length, tuple(out.shape)
        (6, (1, 1, 4, 16))
    """

    def __init__(
        self,
        batch: int,
        max_length: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        head_dim_v: int | None = None,
        values_in_keys: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        k_scale: Tensor | None = None,
        v_scale: Tensor | None = None,
    ) -> None:
        head_dim_v = head_dim if head_dim_v is None else head_dim_v
        sizes = {"batch": batch, "max_length": max_length, "num_kv_heads": num_kv_heads, "head_dim": head_dim}
        check_sizes(sizes | {"head_dim_v": head_dim_v})
        shape = (batch, max_length, num_kv_heads)
        self.keys, self.values = make_stores(shape, (head_dim, head_dim_v), values_in_keys, device=device, dtype=dtype)
        self.lengths = torch.zeros(batch, dtype=torch.int32, device=device)
        self.k_scale, self.v_scale = scales_of_stores(k_scale, v_scale, values_in_keys)
        self._stores = (self.keys,) if values_in_keys else (self.keys, self.values)
        self._filled = [0] * batch  # the same numbers, on the host

    @property
    def batch(self) -> int:
        return self.keys.shape[0]

    @property
    def max_length(self) -> int:
        return self.keys.shape[1]

    @property
    def length(self) -> int:
        """Tokens in each row.

        Raises:
            InputError: the rows differ.
        """
        if any(filled != self._filled[0] for filled in self._filled):
            raise input_error("length", f"rows of {self._filled}", "rows of one length", "See row_lengths.")
        return self._filled[0]

    @property
    def row_lengths(self) -> list[int]:
        """Tokens in each row, on the host."""
        return list(self._filled)

    def new_positions(self, tokens: int) -> Tensor:
        return self.lengths[:, None] + torch.arange(tokens, device=self.lengths.device)

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add the keys and values of the next ``S`` tokens of every row.

        Args:
            k: ``(B, S, H_kv, D_qk)``.
            v: ``(B, S, H_kv, D_v)``.

        Returns:
            views ``(B, length, H_kv, D)`` of all keys and values so far; tokens written after a ``reset`` change them.

        Raises:
            InputError: a shape, dtype or device does not fit, there is no room left, rows differ in length, the cache
                is e4m3, or the tensors need gradients. The cache stays as it was.
        """
        if self.keys.dtype == FP8:
            raise input_error("cache", "e4m3", "a cache in the dtype of k", "Call attend, which applies the scales.")
        begin = self.length
        self._check_new(k, v)
        end = begin + k.shape[1]
        self.keys[:, begin:end] = k
        self.values[:, begin:end] = v
        self._count(k.shape[1])
        return self.keys[:, :end], self.values[:, :end]

    def _append_and_attend(self, q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> Tensor:
        self._check_new(k, v)
        out = self._attend(q, self.lengths, k, v, options)
        self._count(k.shape[1])
        return out

    def select(self, rows: Sequence[int]) -> None:
        """Make row ``n`` a copy of the old row ``rows[n]``: beam search replaces dropped beams by surviving ones so.

        Raises:
            InputError: ``rows`` does not name one existing row for each row of the cache.
        """
        if len(rows) != self.batch or not all(0 <= row < self.batch for row in rows):
            raise input_error("rows", list(rows), f"{self.batch} ints in [0, {self.batch})", "One source for each row.")
        if list(rows) == list(range(self.batch)):
            return
        longest = max(self._filled)
        index = torch.tensor(rows).to(self.keys.device, non_blocking=True)
        for store in self._stores:
            store[:, :longest] = store[index, :longest]
        self._set([self._filled[row] for row in rows])

    def truncate(self, lengths: int | Sequence[int]) -> None:
        """Forget the tokens from ``lengths`` on, such as rejected guesses of speculative decoding.

        Raises:
            InputError: a row holds fewer.
        """
        wanted = [lengths] * self.batch if isinstance(lengths, int) else list(lengths)
        if len(wanted) != self.batch or not all(
            0 <= n <= filled for n, filled in zip(wanted, self._filled, strict=False)
        ):
            raise input_error(
                "lengths", lengths, f"at most what the rows hold: {self._filled}", "Nothing can be added."
            )
        self._set(wanted)

    def keep(self, tokens: int, kept: Sequence[Sequence[int]]) -> None:
        """Of the last ``tokens`` of each row keep some, which move together, and forget the others.

        After a call with a ``tree_mask`` this leaves the accepted path.

        Args:
            tokens: how many the choice is from: those of the last call.
            kept: for each row indices among them, ascending.

        Raises:
            InputError: a row holds fewer tokens, or its indices are not among them in ascending order.

        Example:
            >>> import torch
            >>> from fastattn.nn import KVCache, tree_mask
            >>> cache, x = KVCache(1, 8, 2, 16), torch.randn(1, 3, 2, 16)
            >>> out = cache.attend(x, x, x, tree_mask=tree_mask([-1, 0, 0]))     # one guess, then two for the next
            >>> cache.keep(3, [[0, 2]])
            >>> cache.length, bool((cache.keys[0, 1] == x[0, 2]).all())
            (2, True)
        """
        if len(kept) != self.batch:
            raise input_error("kept", f"{len(kept)} rows", f"{self.batch}, one for each of the cache", "[] keeps none.")
        rows = zip(kept, self._filled, strict=True)
        moves = [(n, *move) for n, (row, filled) in enumerate(rows) for move in kept_moves(tokens, row, filled)]
        if moves:
            row, source, target = torch.tensor(moves).T.to(self.keys.device, non_blocking=True)
            for store in self._stores:
                store[row, target] = store[row, source]
        self._set([filled - tokens + len(row) for row, filled in zip(kept, self._filled, strict=True)])

    def reset(self) -> None:
        """Forget every token; the memory is kept for the next sequence."""
        self._set([0] * self.batch)

    def advance(self, tokens: int) -> None:
        """Count ``tokens`` more in every row on the host alone, before a compiled or captured step that adds them.

        Raises:
            InputError: there is no room for them.
        """
        self._check_room(tokens)
        self._filled = [filled + tokens for filled in self._filled]

    def _count(self, tokens: int) -> None:
        self.lengths += tokens
        if not torch.compiler.is_compiling():  # Dynamo would compile a graph for each length
            self._filled = [filled + tokens for filled in self._filled]

    def _set(self, lengths: list[int]) -> None:
        self._filled = lengths
        self.lengths.copy_(torch.tensor(lengths, dtype=torch.int32), non_blocking=True)

    def _check_new(self, k: Tensor, v: Tensor) -> None:
        stored = self.keys.dtype
        for name, x, store in (("k", k, self.keys), ("v", v, self.values)):
            fits = x.dim() == 4 and k.dim() == 4 and x.shape == (store.shape[0], k.shape[1], *store.shape[2:])
            if not fits or (stored not in (x.dtype, FP8)) or x.device != store.device:
                batch, _, heads, head_dim = store.shape
                given = f"shape {tuple(x.shape)}, {x.dtype}, {x.device}"
                allowed = f"({batch}, S, {heads}, {head_dim}) with one S for k and v, {stored}, {store.device}"
                raise input_error(name, given, allowed, "Make the cache for the batch and dtype it serves.")
            if x.requires_grad and torch.is_grad_enabled():
                todo = "Generate under torch.no_grad(); train without a cache."
                raise input_error(name, "a tensor that requires grad", "one that does not", todo)
        if not torch.compiler.is_compiling():
            self._check_room(k.shape[1])

    def _check_room(self, tokens: int) -> None:
        longest = max(self._filled)
        if longest + tokens > self.max_length:
            given = f"{tokens} tokens after {longest}"
            todo = "Make the cache with a larger max_length, or reset() it."
            raise input_error("k", given, f"at most {self.max_length} in all, the max_length", todo)


def check_sizes(sizes: dict[str, int]) -> None:
    """Raise InputError unless all of them are positive."""
    for name, size in sizes.items():
        if size < 1:
            raise input_error(name, size, "a positive int", "A cache needs room.")
