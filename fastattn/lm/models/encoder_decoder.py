"""The encoder-decoder: one sequence in, another out (the original Transformer and T5).

Shapes: B batch, S_s tokens of a source, S_t of a target, C width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastattn.errors import input_error
from fastattn.lm.models.blocks import Cache, Memory, Model, Stack, check_kind, check_tokens, initialise, soft_capped
from fastattn.lm.models.config import TransformerConfig
from fastattn.lm.models.generating import Generates
from fastattn.lm.models.recording import Weights, with_weights
from fastattn.nn import KVCache


class EncoderDecoder(Generates, Model):
    """A source and the beginning of its target in, logits of each next token of the target out.

    Args:
        config: what it is made of; its kind is "encoder-decoder". Both sides share one vocabulary.

    Source:
        Vaswani et al., "Attention is all you need", 2017; Raffel et al., "Exploring the limits of transfer learning
        with a unified text-to-text transformer", 2020.

    Example:
        >>> import torch
        >>> from fastattn.lm.models import EncoderDecoder, preset
        >>> model = EncoderDecoder(preset("seq2seq-tiny", vocab_size=300))
        >>> source, target = torch.randint(300, (2, 16)), torch.randint(300, (2, 9))
        >>> model(source, target).shape
        torch.Size([2, 9, 300])
    """

    def __init__(self, config: TransformerConfig) -> None:
        check_kind(self, config, "encoder-decoder")
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        self.encoder = Stack(config, causal=False, layers=config.layers)
        self.decoder = Stack(config, causal=True, layers=config.decoder_layers or config.layers, cross=True)
        self.head = None if config.tie_embeddings else nn.Linear(config.width, config.vocab_size, bias=False)
        initialise(self, config)

    def forward(
        self,
        source: Tensor | None,
        target: Tensor,
        *,
        source_mask: Tensor | None = None,
        target_mask: Tensor | None = None,
        caches: Sequence[Cache] | None = None,
        memory: Tensor | None = None,
        return_weights: bool = False,
    ) -> Tensor | tuple[Tensor, Weights]:
        """Logits of the token that follows each token of the target.

        Args:
            source: ``(B, S_s)``, int64; not read, and may be None, where ``memory`` or filled ``caches`` are given.
            target: ``(B, S_t)``, int64: the target so far, or what of it the caches do not hold yet.
            source_mask: ``(B, S_s)``, True = a token, False = padding. None is no padding. Give it with ``memory`` too;
                the caches remember it.
            target_mask: ``(B, S_t)`` likewise; with caches ``(B, length + S_t)``, of the tokens in them too.
            caches: from ``make_caches``; the tokens are appended to them, and the keys and values of the source are
                kept in them at the first call.
            memory: from ``encode``, instead of encoding the source again.
            return_weights: also return the attention weights, as ``recorded_weights`` gives them; slower.

        Returns:
            ``(B, S_t, V)``; with ``return_weights`` also the weights.

        Raises:
            InputError: too many tokens, a mask that does not fit, or no source in any form.
        """
        options: dict[str, Any] = {
            "source_mask": source_mask,
            "target_mask": target_mask,
            "caches": caches,
            "memory": memory,
        }
        if return_weights:
            return with_weights(self, source, target, **options)
        x = self.hidden(source, target, **options)
        return self.logits(x)

    def hidden(
        self,
        source: Tensor | None,
        target: Tensor,
        *,
        source_mask: Tensor | None = None,
        target_mask: Tensor | None = None,
        caches: Sequence[Cache] | None = None,
        memory: Tensor | None = None,
    ) -> Tensor:
        """The final states ``(B, S_t, C)`` of which ``forward`` makes logits; the arguments are the same."""
        check_tokens("target", target)
        is_known = bool(caches) and all(getattr(x, "source", None) is not None for x in caches or ())
        read = None
        if not is_known:
            if memory is None:
                if source is None:
                    todo = "The target is generated from one of them."
                    raise input_error("source", "None", "tokens, unless memory or filled caches are given", todo)
                memory = self.encode(source, source_mask)
            _check_memory(memory, source_mask, target)
            read = Memory(memory, source_mask)
        return self.decoder.run(self.embedding(target), mask=target_mask, caches=caches, memory=read)

    def encode(self, source: Tensor, source_mask: Tensor | None = None) -> Tensor:
        """The states of the encoder ``(B, S_s, C)``; the arguments are those of ``forward``."""
        check_tokens("source", source)
        return self.encoder.run(self.embedding(source), mask=source_mask)

    def logits(self, hidden: Tensor) -> Tensor:
        """``(..., V)`` of final states ``(..., C)``."""
        if self.config.logit_scale != 1:
            hidden = hidden * self.config.logit_scale
        logits = F.linear(hidden, self.embedding.weight) if self.head is None else self.head(hidden)
        return soft_capped(logits, self.config.logit_softcap)

    @property
    def cached_layers(self) -> int:
        """Layers of the decoder, which keep keys and values of earlier tokens."""
        return len(self.decoder.blocks)

    def make_caches(self, batch: int, max_length: int | None = None) -> list[KVCache]:
        """An empty cache for each layer of the decoder, with room for ``max_length`` tokens (None: the config's)."""
        return self.decoder.empty_caches(batch, max_length, self.embedding.weight)

    def flops_per_token(self, length: int, source_length: int | None = None) -> float:
        """FLOPs of training on one token of a target of ``length`` tokens, its share of the source included.

        Args:
            length: S_t.
            source_length: S_s; None is ``length``.
        """
        source_length = source_length or length
        rows = self.encoder.flops_per_row(source_length) + self.decoder.flops_per_row(length, source_length)
        return rows / length + 6 * self.config.vocab_size * self.config.width


def _check_memory(memory: Tensor, source_mask: Tensor | None, target: Tensor) -> None:
    if memory.dim() != 3 or memory.shape[0] != target.shape[0]:
        allowed = f"(B, S_s, C) with B = {target.shape[0]}, that of the target"
        todo = "Encode one source for each target; repeat_interleave its rows for several."
        raise input_error("memory", f"shape {tuple(memory.shape)}", allowed, todo)
    if source_mask is not None and (source_mask.shape != memory.shape[:2] or source_mask.dtype != torch.bool):
        given = f"shape {tuple(source_mask.shape)}, {source_mask.dtype}"
        allowed = f"torch.bool of shape (B, S_s) = {tuple(memory.shape[:2])}"
        raise input_error("source_mask", given, allowed, "Give that of the source.")
