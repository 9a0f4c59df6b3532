"""The decoder of text about an image: an encoder of images, and a decoder that reads its states before the text.

Shapes: B batch, P tokens of an image, S tokens of text, C width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastattn.errors import input_error
from fastattn.lm.models.blocks import Cache, check_kind, check_tokens, initialise
from fastattn.lm.models.config import TransformerConfig
from fastattn.lm.models.decoder import LanguageStack
from fastattn.lm.models.encoder import VisionEncoder
from fastattn.lm.models.recording import Weights, with_weights


class ImageTextDecoder(LanguageStack):
    """An image and text in, logits of each next token of the text out; without an image a language model.

    A ``VisionEncoder`` reads the image, a linear layer projects its states, and the decoder reads them before the text.
    They see each other in both directions, and the text sees them and what precedes it (prefix-LM). Padding belongs
    after the text, where nothing sees it.

    Args:
        config: what it is made of; its kind is "image-text".

    Source:
        Liu et al., "Visual instruction tuning", 2023; Beyer et al., "PaliGemma", 2024 (the mask).

    Example:
        >>> import torch
        >>> from fastattn.lm.models import ImageTextDecoder, preset
        >>> model = ImageTextDecoder(preset("image-text-mini", vocab_size=300))
        >>> model(torch.randint(300, (2, 7)), images=torch.randn(2, 3, 32, 32)).shape
        torch.Size([2, 7, 300])
    """

    def __init__(self, config: TransformerConfig) -> None:
        check_kind(self, config, "image-text")
        super().__init__(config)
        self.vision = VisionEncoder(config.vision)
        self.projection = nn.Linear(config.width, config.width)
        initialise(self, config)

    def forward(
        self,
        tokens: Tensor,
        *,
        images: Tensor | None = None,
        prefix: Tensor | None = None,
        caches: Sequence[Cache] | None = None,
        return_weights: bool = False,
    ) -> Tensor | tuple[Tensor, Weights]:
        """Logits of the token that follows each token.

        Args:
            tokens: ``(B, S)``, int64.
            images: ``(B, channels, image_size, image_size)``; None is text alone, or goes on after ``caches``.
            prefix: ``(B, P, C)``, from ``read``, instead of reading the images again.
            caches: one for each layer, from ``make_caches``; the tokens are appended to them, after those of an image.
            return_weights: also return the attention weights, as ``recorded_weights`` gives them; slower.

        Returns:
            ``(B, S, V)``; with ``return_weights`` also the weights.

        Raises:
            InputError: more tokens than ``max_length``, images of another size, or another number of them.
        """
        if return_weights:
            return with_weights(self, tokens, images=images, prefix=prefix, caches=caches)
        return self.logits(self.hidden(tokens, images=images, prefix=prefix, caches=caches))

    def hidden(
        self,
        tokens: Tensor,
        *,
        images: Tensor | None = None,
        prefix: Tensor | None = None,
        caches: Sequence[Cache] | None = None,
    ) -> Tensor:
        """The final states ``(B, S, C)`` of which ``forward`` makes logits; the arguments are the same."""
        check_tokens("tokens", tokens)
        if images is not None:
            prefix = self.read(images)
        x = self.embedding(tokens)
        if prefix is None:
            return self.run(x, caches=caches)
        if len(prefix) != len(x):
            raise input_error("images", f"{len(prefix)} of them", f"{len(x)}, one for each row", "Repeat them.")
        if caches is not None:
            self.begin(prefix, caches)
            return self.run(x, caches=caches)
        return self.run(torch.cat([prefix.to(x.dtype), x], dim=1), prefix=prefix.shape[1])[:, prefix.shape[1] :]

    def read(self, images: Tensor) -> Tensor:
        """The tokens of images before the text, ``(B, P, C)``."""
        return self.projection(self.vision(images))

    def begin(self, prefix: Tensor, caches: Sequence[Cache]) -> None:
        """Put the tokens of images into empty caches, or into the step of a ``PagedKVCache`` that was made for them."""
        self.run(prefix, caches=caches, prefix=prefix.shape[1])

    def flops_per_token(self, length: int) -> float:
        """FLOPs of training on one token, forward and backward, in rows of ``length`` tokens, an image's included."""
        config, prefix = self.config, self.config.prefix
        heads, _, head_dim = config.head_shape
        both_ways = len(self.blocks) * prefix * (prefix - 1) / 2  # pairs that a causal mask leaves out
        of_image = prefix * (self.vision.flops_per_token() + 6 * self.projection.weight.numel())
        of_head = 6 * (length - prefix) * config.vocab_size * config.width
        return (self.flops_per_row(length) + 14 * heads * head_dim * both_ways + of_image + of_head) / length
