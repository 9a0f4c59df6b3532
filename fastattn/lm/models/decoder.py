"""The decoder language model: tokens in, logits of each next token out. Its parts are in ``blocks.py``.

Shapes: B batch, S tokens in a row, C width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from fastattn.lm.models.blocks import Cache, Stack, check_kind, check_tokens, initialise, soft_capped
from fastattn.lm.models.config import TransformerConfig
from fastattn.lm.models.generating import Generates
from fastattn.lm.models.recording import Weights, with_weights
from fastattn.nn import KVCache


class LanguageStack(Generates, Stack):
    """A stack with an output layer: what decoders of text, and of text about an image, have in common."""

    def __init__(self, config: TransformerConfig) -> None:
        embedding = nn.Embedding(config.vocab_size, config.width)
        super().__init__(config, causal=True, layers=config.layers, embedding=embedding)
        # A tied output layer has no weight of its own, so that nothing is stored or decayed twice.
        self.head = None if config.tie_embeddings else nn.Linear(config.width, config.vocab_size, bias=False)

    def logits(self, hidden: Tensor) -> Tensor:
        """``(..., V)`` of final states ``(..., C)``."""
        if self.config.logit_scale != 1:
            hidden = hidden * self.config.logit_scale
        logits = F.linear(hidden, self.embedding.weight) if self.head is None else self.head(hidden)
        return soft_capped(logits, self.config.logit_softcap)

    @property
    def cached_layers(self) -> int:
        """Layers that keep keys and values of earlier tokens."""
        return len(self.blocks)

    def make_caches(self, batch: int, max_length: int | None = None) -> list[KVCache]:
        """An empty key/value cache for each layer, with room for ``max_length`` tokens (None: the config's)."""
        return self.empty_caches(batch, max_length, self.embedding.weight)


class Decoder(LanguageStack):
    """A decoder language model: tokens in, logits of each next token out.

    Args:
        config: what it is made of; its kind is "decoder".

    Raises:
        InputError: ``config`` is of another kind.

    Example:
        >>> import torch
        >>> from fastattn.lm.models import Decoder, preset
        >>> model = Decoder(preset("tiny", vocab_size=300))
        >>> model(torch.randint(300, (2, 16))).shape
        torch.Size([2, 16, 300])
    """

    def __init__(self, config: TransformerConfig) -> None:
        check_kind(self, config, "decoder")
        super().__init__(config)
        initialise(self, config)

    def forward(
        self,
        tokens: Tensor,
        *,
        positions: Tensor | None = None,
        segment_ids: Tensor | None = None,
        mask: Tensor | None = None,
        caches: Sequence[Cache] | None = None,
        return_weights: bool = False,
    ) -> Tensor | tuple[Tensor, Weights]:
        """Logits of the token that follows each token.

        Args:
            tokens: ``(B, S)``, int64.
            positions: ``(S,)`` or ``(B, S)``; None counts on from the tokens in ``caches``, without the padding. Packed
                documents restart at 0.
            segment_ids: ``(B, S)``: tokens attend inside their own document. None is one document to a row.
            mask: ``(B, S)``, True = a token, False = padding, on either side; with caches ``(B, length + S)``, of the
                tokens in them too. None is no padding.
            caches: one for each layer, from ``make_caches`` or the layers of a ``PagedKVCache``'s step; the tokens are
                appended to them.
            return_weights: also return the attention weights, as ``recorded_weights`` gives them; slower.

        Returns:
            ``(B, S, V)``; with ``return_weights`` also the weights.

        Raises:
            InputError: more tokens than ``max_length``, a mask that does not fit, or segments together with caches.
        """
        if return_weights:
            return with_weights(self, tokens, positions=positions, segment_ids=segment_ids, mask=mask, caches=caches)
        x = self.hidden(tokens, positions=positions, segment_ids=segment_ids, mask=mask, caches=caches)
        return self.logits(x)

    def hidden(
        self,
        tokens: Tensor,
        *,
        positions: Tensor | None = None,
        segment_ids: Tensor | None = None,
        mask: Tensor | None = None,
        caches: Sequence[Cache] | None = None,
    ) -> Tensor:
        """The final states ``(B, S, C)`` of which ``forward`` makes logits; the arguments are the same."""
        check_tokens("tokens", tokens)
        x = self.embedding(tokens)
        return self.run(x, positions=positions, segment_ids=segment_ids, mask=mask, caches=caches)

    def flops_per_token(self, length: int) -> float:
        """FLOPs of training on one token, forward and backward, in rows of ``length`` tokens, one document to a row."""
        return self.flops_per_row(length) / length + 6 * self.config.vocab_size * self.config.width
