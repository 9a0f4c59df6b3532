"""The decoder language model: attention, MLP, block, decoder. Everything it is made of stands in ``config.py``.

Shapes: B batch, S tokens in a row, C width, H heads, D head dim, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastattn
from fastattn.errors import input_error
from fastattn.models.config import TransformerConfig
from fastattn.nn import KVCache, Rotary


class Attention(nn.Module):
    """Causal self-attention with grouped key/value heads."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = config.head_shape
        self.qkv = nn.Linear(config.width, (self.heads + 2 * self.kv_heads) * self.head_dim, bias=config.bias)
        self.out = nn.Linear(self.heads * self.head_dim, config.width, bias=config.bias)
        self.q_norm = make_norm(config, self.head_dim) if config.qk_norm else nn.Identity()
        self.k_norm = make_norm(config, self.head_dim) if config.qk_norm else nn.Identity()
        self.rotary = Rotary(self.head_dim, config.rope_base) if config.positions == "rope" else None
        self.sinks = nn.Parameter(torch.zeros(self.heads)) if config.sinks else None
        self.window = None if config.window is None else (config.window, 0)
        self.softcap = config.softcap
        self.dropout = config.dropout
        self.backend = "eager" if config.attention == "eager" else None

    def forward(
        self, x: Tensor, positions: Tensor, segment_ids: Tensor | None = None, cache: KVCache | None = None
    ) -> Tensor:
        B, S, _ = x.shape
        sizes = (self.heads, self.kv_heads, self.kv_heads)
        q, k, v = self.qkv(x).view(B, S, sum(sizes), self.head_dim).split(sizes, dim=2)  # [B, S, H, D] each
        q, k = self.q_norm(q), self.k_norm(k)
        if self.rotary is not None:
            q, k = self.rotary(q, positions), self.rotary(k, positions)
        if cache is not None:
            k, v = cache.append(k, v)
        out = fastattn.attention(
            q,
            k,
            v,
            causal=True,
            window=self.window,
            softcap=self.softcap,
            sinks=self.sinks,
            segment_ids=segment_ids,
            dropout_p=self.dropout if self.training else 0.0,
            backend=self.backend,
        )
        assert isinstance(out, Tensor)  # no lse was asked for
        return self.out(out.reshape(B, S, self.heads * self.head_dim))


class MLP(nn.Module):
    """``down(gelu(up(x)))``, or ``down(silu(gate) * up)`` with both from one product (SwiGLU; Shazeer, 2020)."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.gated = config.activation == "swiglu"
        self.up = nn.Linear(config.width, config.hidden * (2 if self.gated else 1), bias=config.bias)
        self.down = nn.Linear(config.hidden, config.width, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(x)
        if self.gated:
            gate, x = x.chunk(2, dim=-1)
            return self.down(F.silu(gate) * x)
        return self.down(F.gelu(x, approximate="tanh"))


class Block(nn.Module):
    """Attention, then MLP, each on the normalised stream and added back to it."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.attention_norm = make_norm(config, config.width)
        self.attention = Attention(config)
        self.mlp_norm = make_norm(config, config.width)
        self.mlp = MLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, x: Tensor, positions: Tensor, segment_ids: Tensor | None = None, cache: KVCache | None = None
    ) -> Tensor:
        x = x + self.dropout(self.attention(self.attention_norm(x), positions, segment_ids, cache))
        return x + self.dropout(self.mlp(self.mlp_norm(x)))


class Decoder(nn.Module):
    """A decoder language model: tokens in, logits of each next token out.

    Args:
        config: what it is made of.

    Example:
        >>> import torch
        >>> from fastattn.models import Decoder, preset
        >>> model = Decoder(preset("tiny", vocab_size=300))
        >>> model(torch.randint(300, (2, 16))).shape
        torch.Size([2, 16, 300])
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        learned = config.positions == "learned"
        self.position_embedding = nn.Embedding(config.max_length, config.width) if learned else None
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = make_norm(config, config.width)
        # A tied output layer has no weight of its own, so that nothing is stored or decayed twice.
        self.head = None if config.tie_embeddings else nn.Linear(config.width, config.vocab_size, bias=False)
        self._initialise()

    def forward(
        self,
        tokens: Tensor,
        *,
        positions: Tensor | None = None,
        segment_ids: Tensor | None = None,
        caches: Sequence[KVCache] | None = None,
    ) -> Tensor:
        """Logits of the token that follows each token.

        Args:
            tokens: ``(B, S)``, int64.
            positions: ``(S,)`` or ``(B, S)``; None counts on from the tokens in ``caches``. Packed documents restart
                at 0.
            segment_ids: ``(B, S)``: tokens attend inside their own document. None is one document to a row.
            caches: from ``make_caches``, one for each layer; the tokens are appended to them.

        Returns:
            ``(B, S, V)``.

        Raises:
            InputError: more tokens than ``max_length``, or segments together with caches.
        """
        past = caches[0].length if caches else 0
        self._check(tokens, past, segment_ids, caches)
        if positions is None:
            positions = torch.arange(past, past + tokens.shape[1], device=tokens.device)
        x = self.embedding(tokens)  # [B, S, C]
        if self.position_embedding is not None:
            x = x + self.position_embedding(positions)
        x = self.dropout(x)
        for layer, block in enumerate(self.blocks):
            x = block(x, positions, segment_ids, caches[layer] if caches else None)
        x = self.norm(x)
        return F.linear(x, self.embedding.weight) if self.head is None else self.head(x)

    def make_caches(self, batch: int, max_length: int | None = None) -> list[KVCache]:
        """An empty key/value cache for each layer, with room for ``max_length`` tokens (None: the config's)."""
        _, kv_heads, head_dim = self.config.head_shape
        weight = self.embedding.weight
        length = max_length or self.config.max_length
        sizes = (batch, length, kv_heads, head_dim)
        return [KVCache(*sizes, device=weight.device, dtype=weight.dtype) for _ in self.blocks]

    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self, length: int) -> float:
        """FLOPs of training on one token, forward and backward, in rows of ``length`` tokens, one document to a row.

        Each weight that multiplies costs 6 (a multiply and an add, once forward and twice backward). Attention costs
        14 for each kept pair, head and head dim: two products forward, five backward, as the fused kernels do.
        """
        heads, _, head_dim = self.config.head_shape
        weights = sum(p.numel() for name, p in self.named_parameters() if p.dim() == 2 and "embedding" not in name)
        if self.head is None:
            weights += self.embedding.weight.numel()
        seen = min(length, length if self.config.window is None else self.config.window + 1)
        pairs = seen * (seen + 1) / 2 + (length - seen) * seen
        return 6 * weights + 14 * self.config.layers * heads * head_dim * pairs / length

    def _check(self, tokens: Tensor, past: int, segment_ids: Tensor | None, caches: Sequence[KVCache] | None) -> None:
        if tokens.dim() != 2:
            raise input_error("tokens", f"shape {tuple(tokens.shape)}", "(B, S)", "Add the batch: tokens[None].")
        length = past + tokens.shape[1]
        if length > self.config.max_length:
            allowed = f"at most max_length = {self.config.max_length}"
            raise input_error("tokens", f"{length} in a row", allowed, "Shorten the text, or train a longer model.")
        if caches and segment_ids is not None:
            todo = "A cache holds one document for each row; generate without segments."
            raise input_error("segment_ids", "a tensor together with caches", "one of the two", todo)

    @torch.no_grad()
    def _initialise(self) -> None:
        """GPT-2's scheme: normal of 0.02, and less where blocks add to the stream, so that its size stays even."""
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                adds = name.endswith(("attention.out.weight", "mlp.down.weight"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * self.config.layers) if adds else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)


class RMSNorm(nn.RMSNorm):
    """RMSNorm in the precision of its weight, under autocast too."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype))


def make_norm(config: TransformerConfig, width: int) -> nn.Module:
    """The normalisation that the config names, over the last ``width`` numbers."""
    if config.norm == "rms":
        return RMSNorm(width, eps=1e-6)
    return nn.LayerNorm(width, eps=1e-5, bias=config.bias)
