"""Self-attention layers of decoders and encoders, batch first, with caches; the base of the other layers in this
folder.

Parameters have the names of Llama, Qwen and DeepSeek checkpoints: ``q_proj``, ``k_proj``, ``v_proj``, ``o_proj``,
``q_norm``, ``k_norm``.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from fastattn.errors import input_error
from fastattn.functional import attention
from fastattn.nn.cache import FP8, KVCache
from fastattn.nn.checks import Window, check_heads, check_options
from fastattn.nn.layer_cache import LayerCache
from fastattn.nn.masks import check_masks, mask_terms
from fastattn.nn.rotary import apply_rotary, check_rotary, rotary_tables

GATES = ("element", "head")


class Call(NamedTuple):
    """The arguments of ``forward`` besides the tokens."""

    key_padding_mask: Tensor | None
    attn_mask: Tensor | None
    positions: Tensor | None
    cache: LayerCache | None

    @property
    def has_mask(self) -> bool:
        return self.key_padding_mask is not None or self.attn_mask is not None


class AttentionLayer(nn.Module):
    """The options of attention that the layers share, rotary embedding, and the call of the op with or without a cache.

    A subclass sets ``cache_sizes`` and makes q, k and v.
    """

    cache_sizes: dict[str, Any]

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        dropout: float,
        window: Window | None,
        softcap: float | None,
        scale: float,
        rope: bool | float,
        rotary_dim: int,
        rope_interleaved: bool,
        backend: str | None,
    ) -> None:
        super().__init__()
        check_options(window, softcap, backend)
        self.embed_dim, self.num_heads = embed_dim, num_heads
        self.dropout, self.window, self.softcap, self.scale = dropout, window, softcap, scale
        self.rope_base = None if not rope else 10000.0 if rope is True else float(rope)
        self.rotary_dim, self.rope_interleaved = rotary_dim, rope_interleaved
        self.backend = backend
        self.sinks: nn.Parameter | None = None
        if self.rope_base is not None:
            check_rotary(rotary_dim, self.rope_base)

    def make_cache(self, batch: int, max_length: int) -> KVCache:
        """An empty cache for this layer, on the device and in the dtype of its parameters.

        For a ``PagedKVCache`` pass ``**layer.cache_sizes``.

        Args:
            batch: B.
            max_length: most tokens of a row.
        """
        like = next(self.parameters())
        return KVCache(batch, max_length, **self.cache_sizes, device=like.device, dtype=like.dtype)

    def _rotary(self, x: Tensor, call: Call) -> tuple[Tensor, Tensor] | None:
        """Cosines and sines of the tokens' positions, of x ``(B, S, E)``; None without rotary embedding."""
        self._check_tokens(x, call.positions)
        if self.rope_base is None:
            return None
        positions = call.positions
        if positions is None:
            tokens = x.shape[1]
            positions = (
                torch.arange(tokens, device=x.device) if call.cache is None else call.cache.new_positions(tokens)
            )
        dtype = torch.promote_types(x.dtype, torch.float32)
        return rotary_tables(positions, self.rotary_dim, self.rope_base, dtype)

    def _turned(self, x: Tensor, tables: tuple[Tensor, Tensor] | None) -> Tensor:
        return x if tables is None else apply_rotary(x, *tables, interleaved=self.rope_interleaved)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
        """Attention of ``(B, S, H, D)`` tensors; with a cache to all tokens so far."""
        options: dict[str, Any] = {
            "window": self.window, "scale": self.scale, "softcap": self.softcap, "sinks": self.sinks,
            "backend": self.backend,
        }  # fmt: skip
        if call.cache is not None and not call.has_mask:
            return call.cache.attend(q, k, v, causal=False, **options)
        if call.cache is not None:
            k, v = self._read_back(k, v, call.cache)
        if call.has_mask:
            check_masks(
                call.key_padding_mask, call.attn_mask, True, (q.shape[0], self.num_heads, q.shape[1], k.shape[1])
            )
            options |= mask_terms(call.key_padding_mask, self._mask_of_heads(call.attn_mask, q.shape[0]), q)
        out = attention(q, k, v, dropout_p=self.dropout if self.training else 0.0, **options)
        assert isinstance(out, Tensor)  # no lse was asked for
        return out

    def _read_back(self, k: Tensor, v: Tensor, cache: LayerCache) -> tuple[Tensor, Tensor]:
        """Append to the cache, and return the keys and values that it then holds."""
        if not isinstance(cache, KVCache) or cache.keys.dtype == FP8:
            given = f"a {type(cache).__name__} of {cache.keys.dtype} with a mask, or read back with absorb=False"
            todo = "The sequences of a PagedKVCache need no padding: give each the tokens that it has."
            raise input_error("cache", given, "a KVCache in the dtype of the tokens", todo)
        return cache.append(k, v)

    def _mask_of_heads(self, attn_mask: Tensor | None, batch: int) -> Tensor | None:
        """``attn_mask`` for the heads of q, of which a head of the layer may have several."""
        return attn_mask

    def _check_tokens(self, x: Tensor, positions: Tensor | None) -> None:
        if not isinstance(x, Tensor) or x.dim() != 3 or x.shape[-1] != self.embed_dim:
            given = f"shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            raise input_error("x", given, f"(B, S, {self.embed_dim})", "The layer is batch first.")
        if positions is not None and positions.shape not in (x.shape[1:2], x.shape[:2]):
            allowed = f"{tuple(x.shape[1:2])} or {tuple(x.shape[:2])}"
            raise input_error("positions", f"shape {tuple(positions.shape)}", allowed, "One number for each token.")

    def extra_repr(self) -> str:
        given = {"window": self.window, "softcap": self.softcap, "rope": self.rope_base, "backend": self.backend}
        options = "".join(f", {name}={value!r}" for name, value in given.items() if value is not None)
        return f"{self.embed_dim}, {self.num_heads}{options}"


class SelfAttention(AttentionLayer):
    """Self-attention of a decoder or an encoder, batch first, with normalised queries and keys and a cache.

        q, k, v = heads(x W_q^T), heads(x W_k^T), heads(x W_v^T)
        q, k    = rotary(RMSNorm(q)), rotary(RMSNorm(k))          each where asked for
        out     = concat(fastattn.attention(q, k, v, ...)) W_o^T

    ``MultiHeadAttention`` is the layer with the interface of torch's, cross-attention and weights. This one has the
    parameter names of Llama and Qwen checkpoints, head dims that do not divide ``embed_dim``, and caches.

    Args:
        embed_dim: E, the width of the tokens.
        num_heads: H_q.
        num_kv_heads: H_kv, divides ``num_heads``; None is ``num_heads``.
        head_dim: D; None is ``E // H_q``.
        bias: whether the projections have biases.
        dropout: probability of dropping an attention weight in training.
        window: ``(left, right)`` neighbours that each token sees, as in ``fastattn.attention``; ``(None, 0)`` is
            causal, None is all.
        softcap: ``softcap * tanh(scores / softcap)`` before the masks (Gemma 2); None is off.
        rope: rotary position embedding; True, or its base if not 10000 (Su et al., "RoFormer", 2021).
        rotary_dim: head dims that are turned, from the first on; None is all.
        qk_norm: RMSNorm over each head of the queries and keys, before ``rope`` (Dehghani et al., 2023; Qwen 3).
        sinks: a learned logit for each head that takes part in the softmax but has no value, 0 at first.
        backend: a name from ``fastattn.backends()``, which runs or raises; None chooses.
        device: of the parameters.
        dtype: of the parameters.

    Attributes:
        cache_sizes: of a ``PagedKVCache`` that serves the layer, by the names of its arguments.

    Raises:
        InputError: an argument is out of range, or there is no such backend.

    Source:
        Vaswani et al., "Attention is all you need", 2017; Dehghani et al., "Scaling vision transformers to 22 billion
        parameters", 2023; Yang et al., "Qwen3 technical report", 2025.

    Example:
        >>> import torch
        >>> from fastattn.nn import SelfAttention
        >>> layer = SelfAttention(64, 4, num_kv_heads=2, window=(None, 0), rope=True, qk_norm=True).eval()
        >>> x = torch.randn(2, 10, 64)
        >>> with torch.no_grad():
        ...     whole, cache = layer(x), layer.make_cache(batch=2, max_length=16)
        ...     steps = torch.cat([layer(x[:, :9], cache=cache), layer(x[:, 9:], cache=cache)], dim=1)
        >>> torch.allclose(steps, whole, atol=1e-5)
        True
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        bias: bool = False,
        dropout: float = 0.0,
        window: Window | None = None,
        softcap: float | None = None,
        rope: bool | float = False,
        rotary_dim: int | None = None,
        qk_norm: bool = False,
        sinks: bool = False,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        head_dim = embed_dim // max(1, num_heads) if head_dim is None else head_dim
        check_heads({"embed_dim": embed_dim, "head_dim": head_dim}, num_heads, num_kv_heads, dropout)
        scored = self._scored_dim(head_dim)
        super().__init__(
            embed_dim, num_heads, dropout=dropout, window=window, softcap=softcap, scale=scored**-0.5, rope=rope,
            rotary_dim=scored if rotary_dim is None else rotary_dim, rope_interleaved=False, backend=backend,
        )  # fmt: skip
        if self.rotary_dim > scored:
            raise input_error("rotary_dim", rotary_dim, f"at most {scored}", "It counts dims of a query.")
        self.head_dim, self.num_kv_heads, self.scored_dim = head_dim, num_kv_heads, scored
        self.cache_sizes = {"num_kv_heads": num_kv_heads, "head_dim": head_dim}
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        self.q_proj = nn.Linear(embed_dim, num_heads * head_dim, bias=bias, **made)
        self.k_proj = nn.Linear(embed_dim, num_kv_heads * head_dim, bias=bias, **made)
        self.v_proj = nn.Linear(embed_dim, num_kv_heads * head_dim, bias=bias, **made)
        self.o_proj = nn.Linear(num_heads * head_dim, embed_dim, bias=bias, **made)
        self.q_norm = nn.RMSNorm(scored, eps=1e-6, **made) if qk_norm else None
        self.k_norm = nn.RMSNorm(scored, eps=1e-6, **made) if qk_norm else None
        self.sinks = nn.Parameter(torch.zeros(num_heads, **made)) if sinks else None

    def forward(
        self,
        x: Tensor,
        key_padding_mask: Tensor | None = None,
        attn_mask: Tensor | None = None,
        *,
        positions: Tensor | None = None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """Attend from each token to the others.

        Args:
            x: tokens ``(B, S, E)``; in a packed step of a ``PagedKVCache`` ``(1, T, E)``.
            key_padding_mask: ``(B, S_kv)``, boolean, True = masked, or floating, added to the scores; as in
                ``MultiHeadAttention``. S_kv is S, with a cache all tokens that it then holds.
            attn_mask: ``(S, S_kv)``, or ``(B * H_q, S, S_kv)``, likewise.
            positions: ``(S,)`` or ``(B, S)`` for ``rope``; None counts from 0, with a cache from what it holds.
            cache: a ``KVCache`` or ``PagedLayer``, to which the tokens are appended: generation, without gradients
                and dropout. Masks need a ``KVCache``.

        Returns:
            ``(B, S, E)``.

        Raises:
            InputError: a shape or dtype does not fit, the cache is full, or it meets gradients.
        """
        call = Call(key_padding_mask, attn_mask, positions, cache)
        tables = self._rotary(x, call)
        q, k = (proj(x).unflatten(-1, (-1, self.scored_dim)) for proj in (self.q_proj, self.k_proj))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        v = self.v_proj(x).unflatten(-1, (-1, self.head_dim))
        out = self._combined(self._turned(q, tables), self._turned(k, tables), v, call)
        return self.o_proj(self._gated(out, x).flatten(2))

    @staticmethod
    def _scored_dim(head_dim: int) -> int:
        """Dims of a query; a head of the layer may have several queries."""
        return head_dim

    def _combined(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
        """``(B, S, H_q, D)`` from the queries and keys ``(B, S, ..., scored_dim)`` and the values."""
        return self._attend(q, k, v, call)

    def _gated(self, out: Tensor, x: Tensor) -> Tensor:
        """The input of the last projection."""
        return out


class GatedAttention(SelfAttention):
    """Self-attention whose output is gated by a sigmoid of the tokens, before the last projection.

        out = (concat(fastattn.attention(q, k, v, ...)) * sigmoid(x W_g^T)) W_o^T

    The gate makes the product of the value and output projections non-linear, and lets a token ignore what it attends
    to, which otherwise takes an attention sink. Qwen3-Next has it for each number, with ``qk_norm``, ``rope`` and
    ``rotary_dim = D / 4``; its checkpoints hold ``gate_proj`` inside ``q_proj``, for each head after its query.

    Args:
        gate: "element" has a gate for each number of a head, "head" one for each head; ``gate_proj`` is
            ``(H_q * D, E)`` or ``(H_q, E)``.
        embed_dim, num_heads and the others: as in ``SelfAttention``.

    Raises:
        InputError: an argument is out of range.

    Source:
        Qiu et al., "Gated attention for large language models: non-linearity, sparsity, and attention-sink-free",
        2025 (position G1).

    Example:
        >>> import torch
        >>> from fastattn.nn import GatedAttention
        >>> layer = GatedAttention(64, 4, num_kv_heads=2, head_dim=32, window=(None, 0), rope=True, qk_norm=True)
        >>> layer(torch.randn(2, 10, 64)).shape
        torch.Size([2, 10, 64])
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        gate: Literal["element", "head"] = "element",
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        bias: bool = False,
        dropout: float = 0.0,
        window: Window | None = None,
        softcap: float | None = None,
        rope: bool | float = False,
        rotary_dim: int | None = None,
        qk_norm: bool = False,
        sinks: bool = False,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            embed_dim, num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, bias=bias, dropout=dropout,
            window=window, softcap=softcap, rope=rope, rotary_dim=rotary_dim, qk_norm=qk_norm, sinks=sinks,
            backend=backend, device=device, dtype=dtype,
        )  # fmt: skip
        if gate not in GATES:
            raise input_error("gate", repr(gate), '"element" or "head"', "Qwen3-Next has a gate for each element.")
        gates = num_heads * (self.head_dim if gate == "element" else 1)
        self.gate_proj = nn.Linear(embed_dim, gates, bias=bias, device=device, dtype=dtype)

    def _gated(self, out: Tensor, x: Tensor) -> Tensor:
        return out * self.gate_proj(x).sigmoid().unflatten(-1, (self.num_heads, -1))
