"""Building blocks of every model: attention, MLP, block, and the stack of blocks, as ``config.py`` selects them.

Shapes: B batch, S tokens in a row, C width, H heads, D head dim.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastattn
from fastattn.errors import input_error
from fastattn.lm.models.config import GATED, Kind, TransformerConfig
from fastattn.lm.models.positions import RelativeBias, alibi_slopes, sinusoidal
from fastattn.nn import KVCache, PagedLayer
from fastattn.nn.rotary import apply_rotary, rotary_tables

Segments = Tensor | tuple[Tensor, Tensor] | None
PADDING = -1  # the segment of tokens that are none


class Rows(NamedTuple):
    """Inputs of self-attention besides the hidden states; the same in every layer."""

    segment_ids: Segments
    rotary: tuple[Tensor, Tensor] | None  # cos and sin
    local_rotary: tuple[Tensor, Tensor] | None  # of the layers with a window
    alibi_slopes: Tensor | None
    bias: Tensor | None
    sees_all: bool = False  # nothing is hidden from the tokens: those of an image
    intervals: Tensor | None = None  # of the keys that each token sees, where an image stands before text


class Memory(NamedTuple):
    """Keys of cross-attention: final states of the encoder, and their padding mask."""

    states: Tensor  # [B, S_source, C]
    mask: Tensor | None  # [B, S_source]


class DecoderCache(KVCache):
    """A layer's keys and values of the tokens so far, and those of the encoder's states, which never change."""

    source: tuple[Tensor, Tensor, Segments] | None = None

    def select(self, rows: Sequence[int]) -> None:
        super().select(rows)
        if self.source is not None:
            k, v, segment_ids = self.source
            index = torch.tensor(rows, device=k.device)
            of_rows = (segment_ids[0], segment_ids[1][index]) if isinstance(segment_ids, tuple) else None
            self.source = k[index], v[index], of_rows

    def reset(self) -> None:
        super().reset()
        self.source = None


Cache = KVCache | PagedLayer


class Attention(nn.Module):
    """Self-attention with grouped key/value heads."""

    weights: list[Tensor] | None = None  # receives those of each call while ``recorded_weights`` asks for them

    def __init__(self, config: TransformerConfig, causal: bool, layer: int) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = config.head_shape
        qkv_bias = config.bias if config.qkv_bias is None else config.qkv_bias
        self.qkv = nn.Linear(config.width, (self.heads + 2 * self.kv_heads) * self.head_dim, bias=qkv_bias)
        self.out = nn.Linear(self.heads * self.head_dim, config.width, bias=config.bias)
        self.q_norm = make_norm(config, self.head_dim) if config.qk_norm else nn.Identity()
        self.k_norm = make_norm(config, self.head_dim) if config.qk_norm else nn.Identity()
        self.sinks = nn.Parameter(torch.zeros(self.heads)) if config.sinks else None
        self.causal = causal
        self.window: tuple[int, int] | None = None
        if config.window is not None and layer not in config.global_layers:
            self.window = config.window, 0 if causal else config.window
        self.softcap = config.softcap
        self.scale = config.attention_scale
        self.dropout = config.dropout
        self.backend = "eager" if config.attention == "eager" else None

    def forward(self, x: Tensor, rows: Rows, cache: Cache | None = None) -> Tensor:
        sizes = (self.heads, self.kv_heads, self.kv_heads)
        q, k, v = self.qkv(x).unflatten(-1, (sum(sizes), self.head_dim)).split(sizes, dim=2)  # [B, S, H, D] each
        q, k = self.q_norm(q), self.k_norm(k)
        rotary = rows.rotary if self.window is None else rows.local_rotary
        if rotary is not None:
            q, k = apply_rotary(q, *rotary), apply_rotary(k, *rotary)
        if cache is not None and rows.segment_ids is None:
            return self.out(self._attend_to_cache(q, k, v, rows, cache).flatten(2))
        if isinstance(cache, KVCache):
            k, v = cache.append(k, v)  # a mask of padding: read back as one tensor
        out = fastattn.attention(
            q,
            k,
            v,
            causal=self.causal and not rows.sees_all and rows.intervals is None,
            window=self.window,
            scale=self.scale,
            softcap=self.softcap,
            bias=rows.bias,
            alibi_slopes=rows.alibi_slopes,
            sinks=self.sinks,
            segment_ids=rows.segment_ids,
            intervals=rows.intervals,
            dropout_p=self.dropout if self.training else 0.0,
            return_weights=self.weights is not None,
            backend=self.backend,
        )
        return self.out(_noted(out, self.weights).flatten(2))

    def _attend_to_cache(self, q: Tensor, k: Tensor, v: Tensor, rows: Rows, cache: Cache) -> Tensor:
        return cache.attend(
            q,
            k,
            v,
            causal=self.causal and not rows.sees_all,
            window=self.window,
            scale=self.scale,
            softcap=self.softcap,
            bias=rows.bias,
            alibi_slopes=rows.alibi_slopes,
            sinks=self.sinks,
            backend=self.backend,
        )


def _noted(found: Tensor | tuple[Tensor, ...], weights: list[Tensor] | None) -> Tensor:
    """The output of attention, whose weights are added to the list if there is one."""
    if weights is None:
        assert isinstance(found, Tensor)
        return found
    out, of_call = found
    weights.append(of_call)
    return out


class CrossAttention(nn.Module):
    """Attention from the tokens of a decoder to the states of an encoder."""

    weights: list[Tensor] | None = None  # as of ``Attention``

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = config.head_shape
        self.q = nn.Linear(config.width, self.heads * self.head_dim, bias=config.bias)
        self.kv = nn.Linear(config.width, 2 * self.kv_heads * self.head_dim, bias=config.bias)
        self.out = nn.Linear(self.heads * self.head_dim, config.width, bias=config.bias)
        self.scale = config.attention_scale
        self.dropout = config.dropout
        self.backend = "eager" if config.attention == "eager" else None

    def forward(self, x: Tensor, memory: Memory | None, cache: DecoderCache | PagedLayer | None = None) -> Tensor:
        q = self.q(x).unflatten(-1, (self.heads, self.head_dim))
        source = cache.source if cache is not None else None
        if source is None:
            assert memory is not None  # EncoderDecoder sees to it
            source = self._keys_and_values(memory)
            if cache is not None:
                cache.source = source
        k, v, segment_ids = source
        if isinstance(segment_ids, tuple):
            segment_ids = (segment_ids[0].expand(1, x.shape[1]), segment_ids[1])
        out = fastattn.attention(
            q,
            k,
            v,
            scale=self.scale,
            segment_ids=segment_ids,
            dropout_p=self.dropout if self.training else 0.0,
            return_weights=self.weights is not None,
            backend=self.backend,
        )
        return self.out(_noted(out, self.weights).flatten(2))

    def _keys_and_values(self, memory: Memory) -> tuple[Tensor, Tensor, Segments]:
        k, v = self.kv(memory.states).unflatten(-1, (2 * self.kv_heads, self.head_dim)).chunk(2, dim=2)
        if memory.mask is None:
            return k, v, None
        segments = segments_of(memory.mask)
        return k, v, (segments.new_zeros(1, 1), segments)


class MLP(nn.Module):
    """``down(act(up(x)))``, or ``down(act(gate) * up)`` with both from one product (Shazeer, 2020)."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.gated = config.activation in GATED
        self.up = nn.Linear(config.width, config.hidden * (2 if self.gated else 1), bias=config.bias)
        self.down = nn.Linear(config.hidden, config.width, bias=config.bias)
        self.act = make_activation(config)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(x)
        if self.gated:
            gate, x = x.chunk(2, dim=-1)
            return self.down(self.act(gate) * x)
        return self.down(self.act(x))


class Block(nn.Module):
    """Attention, then in a decoder with an encoder attention to its states, then MLP, each added to the stream."""

    def __init__(self, config: TransformerConfig, causal: bool, layer: int, cross: bool = False) -> None:
        super().__init__()
        has_norm = layer > 0 or config.first_norm
        self.attention_norm = make_norm(config, config.width) if has_norm else nn.Identity()
        self.attention = Attention(config, causal, layer)
        self.cross_norm = make_norm(config, config.width) if cross else None
        self.cross_attention = CrossAttention(config) if cross else None
        self.mlp_norm = make_norm(config, config.width)
        self.mlp = MLP(config)
        self.dropout = nn.Dropout(config.dropout) if config.dropout else nn.Identity()
        self.norm_after = config.norm_place == "after"
        both = config.norm_place == "both"
        self.attention_out_norm = make_norm(config, config.width) if both else nn.Identity()
        self.cross_out_norm = make_norm(config, config.width) if both and cross else nn.Identity()
        self.mlp_out_norm = make_norm(config, config.width) if both else nn.Identity()

    def forward(self, x: Tensor, rows: Rows, cache: Cache | None = None, memory: Memory | None = None) -> Tensor:
        x = self._add(x, self.attention_norm, lambda x: self.attention_out_norm(self.attention(x, rows, cache)))
        if self.cross_attention is not None and self.cross_norm is not None:
            cross = self.cross_attention
            of_source = cache if isinstance(cache, DecoderCache | PagedLayer) else None
            x = self._add(x, self.cross_norm, lambda x: self.cross_out_norm(cross(x, memory, of_source)))
        return self._add(x, self.mlp_norm, lambda x: self.mlp_out_norm(self.mlp(x)))

    def _add(self, x: Tensor, norm: nn.Module, part: Callable[[Tensor], Tensor]) -> Tensor:
        if self.norm_after:
            return norm(x + self.dropout(part(x)))
        return x + self.dropout(part(norm(x)))


class Model(nn.Module):
    """Base class of all models."""

    hf_model_type: str | None = None  # the format that it was read from, if it was

    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.parameters())


class Stack(Model):
    """Positions, blocks and the last norm: from the embeddings of tokens to their final states.

    Args:
        config: what it is made of.
        causal: tokens see no later ones.
        layers: number of blocks.
        cross: the blocks attend to the states of an encoder too.
        embedding: of the tokens, where the stack owns it.
    """

    def __init__(
        self,
        config: TransformerConfig,
        *,
        causal: bool,
        layers: int,
        cross: bool = False,
        embedding: nn.Embedding | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.causal = causal
        if embedding is not None:
            self.embedding = embedding
        learned = config.positions == "learned"
        places = config.prefix + config.longest + config.position_offset
        self.position_embedding = nn.Embedding(places, config.width) if learned else None
        self.relative = RelativeBias(config, causal) if config.positions == "relative" else None
        self.embedding_norm = make_norm(config, config.width) if config.embedding_norm else nn.Identity()
        self.dropout = nn.Dropout(config.dropout) if config.dropout else nn.Identity()
        self.blocks = nn.ModuleList(Block(config, causal, layer, cross) for layer in range(layers))
        self.norm = nn.Identity() if config.norm_place == "after" else make_norm(config, config.width)

    def run(
        self,
        x: Tensor,
        *,
        positions: Tensor | None = None,
        segment_ids: Tensor | None = None,
        mask: Tensor | None = None,
        caches: Sequence[Cache] | None = None,
        memory: Memory | None = None,
        prefix: int = 0,
    ) -> Tensor:
        """Final states ``(B, S, C)`` of tokens with embeddings ``x`` ``(B, S, C)``; the rest as in the models.

        The first ``prefix`` of them see each other in both directions; with caches there are no others.
        """
        past, length, given = extent(x, caches)
        self._check(x.shape[0], length, segment_ids, mask, caches)
        if positions is None:
            positions = count_positions(mask, past, x.shape[1], x.device) if given is None else given
        rows = self._rows(x, (past, length, given), positions, segment_ids, mask)
        if prefix:
            some = prefix < x.shape[1]
            intervals = fastattn.intervals.prefix_lm(x.shape[1], prefix, device=x.device) if some else None
            rows = rows._replace(sees_all=not some, intervals=intervals)
        if self.config.embedding_scale != 1:
            x = x * self.config.embedding_scale
        if self.position_embedding is not None:
            x = x + self.position_embedding(positions + self.config.position_offset)
        elif self.config.positions == "sinusoidal":
            x = x + sinusoidal(positions, x.shape[-1]).to(x.dtype)
        x = self.dropout(self.embedding_norm(x))
        for layer, block in enumerate(self.blocks):
            x = block(x, rows, caches[layer] if caches else None, memory)
        return self.norm(x)

    def _rows(
        self,
        x: Tensor,
        extent: tuple[int, int, Tensor | None],
        positions: Tensor,
        segment_ids: Tensor | None,
        mask: Tensor | None,
    ) -> Rows:
        """Inputs of attention that all layers share."""
        config, (past, length, places) = self.config, extent
        rotary = local_rotary = None
        if config.positions == "rope":
            dtype = torch.promote_types(x.dtype, torch.float32)
            head_dim = config.head_shape.head_dim
            rotary = local_rotary = rotary_tables(positions, head_dim, config.rope_base, dtype, config.rope_scaling)
            if config.local_rope_base is not None:
                local_rotary = rotary_tables(positions, head_dim, config.local_rope_base, dtype)
        segments: Segments = segment_ids
        if mask is not None:
            every = segments_of(mask) if segment_ids is None else segment_ids.masked_fill(~mask, PADDING)
            segments = (every[:, past:], every) if past else every
        slopes = alibi_slopes(config.heads, x.device) if config.positions == "alibi" else None
        bias = None
        if self.relative is not None:
            bias = self.relative(torch.arange(past, length, device=x.device) if places is None else places, length)
        return Rows(segments, rotary, local_rotary, slopes, bias)

    def _check(
        self,
        batch: int,
        length: int,
        segment_ids: Tensor | None,
        mask: Tensor | None,
        caches: Sequence[Cache] | None,
    ) -> None:
        most = self.config.longest + self.config.prefix
        if length > most:
            allowed = f"at most max_length = {most}"
            raise input_error("tokens", f"{length} in a row", allowed, "Shorten the text, or train a longer model.")
        if caches and segment_ids is not None:
            todo = "A cache holds one document for each row; generate without segments."
            raise input_error("segment_ids", "a tensor together with caches", "one of the two", todo)
        if caches and isinstance(caches[0], PagedLayer) and mask is not None:
            raise input_error("mask", "a tensor together with pages", "None", "Their sequences have no padding.")
        if mask is not None and (mask.dtype != torch.bool or mask.shape != (batch, length)):
            given = f"shape {tuple(mask.shape)}, {mask.dtype}"
            todo = "True is a token, False padding; with caches it covers the tokens in them too."
            raise input_error("mask", given, f"torch.bool of shape (B, S) = {(batch, length)}", todo)

    def empty_caches(self, batch: int, max_length: int | None, like: Tensor) -> list[KVCache]:
        """A cache for each layer, on the device and in the dtype of ``like``."""
        _, kv_heads, head_dim = self.config.head_shape
        sizes = (batch, max_length or self.config.prefix + self.config.longest, kv_heads, head_dim)
        return [DecoderCache(*sizes, device=like.device, dtype=like.dtype) for _ in self.blocks]

    def flops_per_row(self, length: int, memory_length: int = 0) -> float:
        """FLOPs of training, forward and backward, on one row of ``length`` tokens that attend to ``memory_length``.

        Each weight that multiplies costs 6 (a multiply and an add, once forward and twice backward). Attention costs
        14 for each kept pair, head and head dim: two products forward, five backward, as the fused kernels do.
        """
        config = self.config
        heads, _, head_dim = config.head_shape
        weights = {name: p.numel() for name, p in self.blocks.named_parameters() if p.dim() == 2}
        of_memory = sum(size for name, size in weights.items() if "cross_attention.kv" in name)
        pairs = 0.0
        for layer in range(len(self.blocks)):
            is_local = config.window is not None and layer not in config.global_layers
            seen = min(length, (config.window or 0) + 1) if is_local else length
            kept = seen * (seen + 1) / 2 + (length - seen) * seen
            pairs += (kept if self.causal else 2 * kept - length) + length * memory_length
        products = 6 * (length * (sum(weights.values()) - of_memory) + memory_length * of_memory)
        return products + 14 * heads * head_dim * pairs


@torch.no_grad()
def initialise(model: nn.Module, config: TransformerConfig) -> None:
    """GPT-2's scheme: normal of 0.02, and less where blocks add to the stream, so that its size stays even."""
    names = dict(model.named_parameters())
    added = [name for name in names if name.endswith(("attention.out.weight", "mlp.down.weight"))]
    stacks = 2 if config.kind in ("encoder-decoder", "image-text") else 1
    for name, parameter in names.items():
        if parameter.dim() == 2:
            std = 0.02 / config.logit_scale if name == "embedding.weight" else 0.02
            nn.init.normal_(parameter, std=std / math.sqrt(len(added) / stacks) if name in added else std)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)


def check_kind(model: nn.Module, config: TransformerConfig, kind: Kind) -> None:
    """Raise InputError unless ``config`` describes models of this kind."""
    if config.kind != kind:
        todo = "fastattn.lm.models.make_model(config) chooses the class."
        raise input_error("config", f"kind {config.kind!r}", f"kind {kind!r} for {type(model).__name__}", todo)


def check_tokens(name: str, tokens: Tensor) -> None:
    """Raise InputError unless ``tokens`` are rows of numbers."""
    if tokens.dim() != 2 or tokens.is_floating_point():
        given = f"shape {tuple(tokens.shape)}, {tokens.dtype}"
        raise input_error(name, given, "(B, S), int64", f"Add the batch: {name}[None].")


def extent(x: Tensor, caches: Sequence[Cache] | None) -> tuple[int, int, Tensor | None]:
    """Tokens of a row before these and with these, and the positions of these where their cache has decided on them."""
    first = caches[0] if caches else None
    if isinstance(first, PagedLayer):
        return 0, first.longest, first.positions
    past = first.length if first is not None else 0
    return past, past + x.shape[1], None


def count_positions(mask: Tensor | None, past: int, length: int, device: torch.device) -> Tensor:
    """The place of each of the last ``length`` tokens among those that are none of the padding."""
    if mask is None:
        return torch.arange(past, past + length, device=device)
    return (mask.cumsum(dim=1) - 1).clamp(min=0)[:, past:]


def segments_of(mask: Tensor) -> Tensor:
    """Segment ids ``(B, S)``, int32, in which padding is a segment of its own."""
    return (~mask).int() * PADDING


class RMSNorm(nn.RMSNorm):
    """RMSNorm in the precision of its weight, under autocast too."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype))


class ZeroRMSNorm(RMSNorm):
    """RMSNorm times ``1 + weight``, so that a weight of zero is none, as Gemma stores it."""

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        normalised = F.rms_norm(x.float(), self.normalized_shape, eps=self.eps)
        return (normalised * (1 + self.weight.float())).to(x.dtype)


def make_norm(config: TransformerConfig, width: int) -> nn.Module:
    """The normalisation that the config names, over the last ``width`` numbers."""
    if config.norm != "layer":
        return (RMSNorm if config.norm == "rms" else ZeroRMSNorm)(width, eps=config.norm_eps or 1e-6)
    return nn.LayerNorm(width, eps=config.norm_eps or 1e-5, bias=config.bias)


def make_activation(config: TransformerConfig) -> nn.Module:
    """The function between the matrices of the MLP."""
    if config.activation == "swiglu":
        return nn.SiLU()
    if config.activation == "relu":
        return nn.ReLU()
    return nn.GELU(approximate="none" if config.activation.endswith("-exact") else "tanh")


def soft_capped(logits: Tensor, cap: float | None) -> Tensor:
    """``cap * tanh(logits / cap)``; None caps nothing."""
    return logits if cap is None else cap * torch.tanh(logits / cap)
