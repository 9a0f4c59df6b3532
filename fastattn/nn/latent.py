"""Multi-head latent attention: keys and values are expanded from a small vector for each token, which is cached."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastattn.nn.checks import Window, check_heads
from fastattn.nn.layer_cache import LayerCache
from fastattn.nn.self_attention import AttentionLayer, Call

EPS = 1e-6  # of DeepSeek's models


class LatentAttention(AttentionLayer):
    """Self-attention over keys and values that are expanded from a latent of each token (MLA of DeepSeek-V2 and V3).

        c           = RMSNorm(x W_DKV^T)                                     kv_lora_rank wide, the latent
        k_rope      = rotary(x W_KR^T)                                       one for all heads
        [k_nope; v] = heads(c W_UKV^T)
        q           = heads(RMSNorm(x W_DQ^T) W_UQ^T), or heads(x W_Q^T) if q_lora_rank is None
        q, k        = [q_nope; rotary(q_rope)], [k_nope; k_rope]
        out         = concat(fastattn.attention(q, k, v, ...)) W_o^T

    Absorbed, ``W_UK`` moves to the query and ``W_UV`` to the output, and all heads read one key and one value:

        q' = [q_nope W_UK; rotary(q_rope)],   k' = [c; k_rope],   v' = c,   out = concat((p c) W_UV^T) W_o^T

    That is the same function. It reads ``kv_lora_rank + qk_rope_head_dim`` numbers a token instead of
    ``num_heads * (qk_nope_head_dim + qk_rope_head_dim + v_head_dim)``, for more arithmetic: right for decoding, where
    reading the cache decides, and wrong for training and prompts.

    Parameters have DeepSeek's names: ``q_a_proj``, ``q_a_layernorm``, ``q_b_proj`` (or ``q_proj``),
    ``kv_a_proj_with_mqa``, ``kv_a_layernorm``, ``kv_b_proj``, ``o_proj``.

    Args:
        embed_dim: E, the width of the tokens.
        num_heads: H.
        kv_lora_rank: width of the latent.
        q_lora_rank: width of the latent of the queries; None projects them in one step (DeepSeek-V2-Lite).
        qk_nope_head_dim: head dims of queries and keys without positions.
        qk_rope_head_dim: head dims of queries and keys with positions, even.
        v_head_dim: D_v.
        bias: whether ``q_a_proj``, ``kv_a_proj_with_mqa`` and ``o_proj`` have biases.
        dropout: probability of dropping an attention weight in training.
        window: as in ``SelfAttention``; ``(None, 0)`` is causal.
        softcap: as in ``SelfAttention``.
        scale: factor on the scores; None is ``(qk_nope_head_dim + qk_rope_head_dim) ** -0.5``. YaRN changes it.
        rope: base of the rotary embedding.
        rope_interleaved: pairs are neighbours, as in DeepSeek's checkpoints; False: half of ``qk_rope_head_dim`` apart.
        backend: a name from ``fastattn.backends()``, which runs or raises; None chooses.
        device: of the parameters.
        dtype: of the parameters.

    Attributes:
        cache_sizes: of a ``PagedKVCache`` that serves the layer, by the names of its arguments. The values lie in the
            keys, so a token takes ``kv_lora_rank + qk_rope_head_dim`` numbers.

    Raises:
        InputError: an argument is out of range, or there is no such backend.

    Source:
        DeepSeek-AI, "DeepSeek-V2", 2024, section 2.1; "DeepSeek-V3 technical report", 2024.

    Example:
        >>> import torch
        >>> from fastattn.nn import LatentAttention
        >>> layer = LatentAttention(64, 4, kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16,
        ...                         window=(None, 0))
        >>> x = torch.randn(2, 10, 64)
        >>> with torch.no_grad():
        ...     whole, cache = layer(x), layer.make_cache(batch=2, max_length=16)
        ...     prompt = layer(x[:, :9], cache=cache, absorb=False)
        ...     token = layer(x[:, 9:], cache=cache)
        >>> torch.allclose(torch.cat([prompt, token], dim=1), whole, atol=1e-5), cache.keys.shape[2:]
        (True, torch.Size([1, 40]))
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        kv_lora_rank: int,
        q_lora_rank: int | None = None,
        qk_nope_head_dim: int = 128,
        qk_rope_head_dim: int = 64,
        v_head_dim: int = 128,
        bias: bool = False,
        dropout: float = 0.0,
        window: Window | None = None,
        softcap: float | None = None,
        scale: float | None = None,
        rope: float = 10000.0,
        rope_interleaved: bool = True,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        sizes = {"embed_dim": embed_dim, "kv_lora_rank": kv_lora_rank, "qk_nope_head_dim": qk_nope_head_dim,
                 "q_lora_rank": 1 if q_lora_rank is None else q_lora_rank, "v_head_dim": v_head_dim}  # fmt: skip
        check_heads(sizes, num_heads, num_heads, dropout)
        head_dim = qk_nope_head_dim + qk_rope_head_dim
        super().__init__(
            embed_dim, num_heads, dropout=dropout, window=window, softcap=softcap,
            scale=head_dim**-0.5 if scale is None else scale, rope=float(rope), rotary_dim=qk_rope_head_dim,
            rope_interleaved=rope_interleaved, backend=backend,
        )  # fmt: skip
        self.kv_lora_rank, self.nope_dim, self.v_head_dim = kv_lora_rank, qk_nope_head_dim, v_head_dim
        stored = kv_lora_rank + qk_rope_head_dim
        self.cache_sizes = {
            "num_kv_heads": 1, "head_dim": stored, "head_dim_v": kv_lora_rank, "values_in_keys": True
        }  # fmt: skip
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        self.q_proj = self.q_a_proj = self.q_a_layernorm = self.q_b_proj = None
        if q_lora_rank is None:
            self.q_proj = nn.Linear(embed_dim, num_heads * head_dim, bias=False, **made)
        else:
            self.q_a_proj = nn.Linear(embed_dim, q_lora_rank, bias=bias, **made)
            self.q_a_layernorm = nn.RMSNorm(q_lora_rank, eps=EPS, **made)
            self.q_b_proj = nn.Linear(q_lora_rank, num_heads * head_dim, bias=False, **made)
        self.kv_a_proj_with_mqa = nn.Linear(embed_dim, stored, bias=bias, **made)
        self.kv_a_layernorm = nn.RMSNorm(kv_lora_rank, eps=EPS, **made)
        self.kv_b_proj = nn.Linear(kv_lora_rank, num_heads * (qk_nope_head_dim + v_head_dim), bias=False, **made)
        self.o_proj = nn.Linear(num_heads * v_head_dim, embed_dim, bias=bias, **made)

    def forward(
        self,
        x: Tensor,
        key_padding_mask: Tensor | None = None,
        attn_mask: Tensor | None = None,
        *,
        positions: Tensor | None = None,
        cache: LayerCache | None = None,
        absorb: bool | None = None,
    ) -> Tensor:
        """Attend from each token to the others.

        Args:
            x: tokens ``(B, S, E)``; in a packed step of a ``PagedKVCache`` ``(1, T, E)``.
            key_padding_mask: as in ``SelfAttention``.
            attn_mask: likewise.
            positions: likewise.
            cache: a ``KVCache`` or ``PagedLayer`` with the layer's ``cache_sizes``.
            absorb: whether all heads read the latents themselves; None: if there is a cache. False with a ``KVCache``
                expands all latents that it then holds, which is faster for prompts.

        Returns:
            ``(B, S, E)``.

        Raises:
            InputError: a shape or dtype does not fit, the cache is full, it meets gradients, or ``absorb=False`` meets
                a ``PagedLayer``.
        """
        call = Call(key_padding_mask, attn_mask, positions, cache)
        tables = self._rotary(x, call)
        q_nope, q_rope = self._queries(x).split((self.nope_dim, self.rotary_dim), dim=-1)
        q_rope = self._turned(q_rope, tables)
        latents, k_rope = self.kv_a_proj_with_mqa(x).split((self.kv_lora_rank, self.rotary_dim), dim=-1)
        k_rope = self._turned(k_rope[:, :, None], tables)
        latents = self.kv_a_layernorm(latents)[:, :, None]  # [B, S, 1, kv_lora_rank]
        if (cache is not None) if absorb is None else absorb:
            out = self._absorbed(q_nope, q_rope, torch.cat((latents, k_rope), dim=-1), call)
        else:
            if cache is not None:
                stored, latents = self._read_back(torch.cat((latents, k_rope), dim=-1), latents, cache)
                k_rope, call = stored[..., self.kv_lora_rank :], call._replace(cache=None)
            out = self._expanded(torch.cat((q_nope, q_rope), dim=-1), latents, k_rope, call)
        return self.o_proj(out.flatten(2))

    def _queries(self, x: Tensor) -> Tensor:
        """``(B, S, H, qk_nope_head_dim + qk_rope_head_dim)``."""
        if self.q_a_proj is None or self.q_a_layernorm is None or self.q_b_proj is None:
            assert self.q_proj is not None
            q = self.q_proj(x)
        else:
            q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))
        return q.unflatten(-1, (self.num_heads, -1))

    def _expanded(self, q: Tensor, latents: Tensor, k_rope: Tensor, call: Call) -> Tensor:
        """Attention of keys and values for each head."""
        each = self.kv_b_proj(latents[:, :, 0]).unflatten(-1, (self.num_heads, -1))
        k_nope, v = each.split((self.nope_dim, self.v_head_dim), dim=-1)
        k = torch.cat((k_nope, k_rope.expand(-1, -1, self.num_heads, -1)), dim=-1)
        return self._attend(q, k, v, call)

    def _absorbed(self, q_nope: Tensor, q_rope: Tensor, k: Tensor, call: Call) -> Tensor:
        """Attention of all heads to the latents."""
        up = self.kv_b_proj.weight.to(k.dtype).unflatten(0, (self.num_heads, -1))
        up_k, up_v = up.split((self.nope_dim, self.v_head_dim), dim=1)  # [H, D, kv_lora_rank]
        q = torch.cat((torch.einsum("bshd,hdr->bshr", q_nope, up_k), q_rope), dim=-1)
        out = self._attend(q, k, k[..., : self.kv_lora_rank], call)
        return torch.einsum("bshr,hdr->bshd", out, up_v)
