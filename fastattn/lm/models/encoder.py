"""The encoders of tokens (BERT and similar models) and of images (ViT). ``heads.py`` has the heads for their states.

Shapes: B batch, S tokens in a row, C width.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastattn.errors import input_error
from fastattn.lm.models.blocks import Stack, check_kind, check_tokens, initialise
from fastattn.lm.models.config import PoolerActivation, TransformerConfig
from fastattn.lm.models.recording import Weights, with_weights


class Encoder(Stack):
    """An encoder: every token attends to all of its document, before it and behind it.

    Args:
        config: what it is made of; its kind is "encoder".

    Example:
        >>> import torch
        >>> from fastattn.lm.models import Encoder, preset
        >>> model = Encoder(preset("bert-tiny", vocab_size=300))
        >>> model(torch.randint(300, (2, 16))).shape
        torch.Size([2, 16, 128])
    """

    def __init__(self, config: TransformerConfig) -> None:
        check_kind(self, config, "encoder")
        embedding = nn.Embedding(config.vocab_size, config.width)
        super().__init__(config, causal=False, layers=config.layers, embedding=embedding)
        self.has_fresh_pooler = False  # one that was added after the weights were trained
        self.type_embedding = nn.Embedding(config.token_types, config.width) if config.token_types else None
        self.pooler = nn.Linear(config.width, config.width, bias=config.bias) if config.pooler else None
        initialise(self, config)

    def forward(
        self,
        tokens: Tensor,
        *,
        positions: Tensor | None = None,
        segment_ids: Tensor | None = None,
        mask: Tensor | None = None,
        token_types: Tensor | None = None,
        return_weights: bool = False,
    ) -> Tensor | tuple[Tensor, Weights]:
        """The final state of each token.

        Args:
            tokens: ``(B, S)``, int64.
            positions: ``(S,)`` or ``(B, S)``; None counts from 0, without the padding. Packed documents restart at 0.
            segment_ids: ``(B, S)``: tokens attend inside their own document. None is one document to a row.
            mask: ``(B, S)``, True = a token, False = padding. None is no padding.
            token_types: ``(B, S)``, int64, where the config has ``token_types``; None is type 0.
            return_weights: also return the attention weights, as ``recorded_weights`` gives them; slower.

        Returns:
            ``(B, S, C)``; with ``return_weights`` also the weights. States of padding mean nothing.

        Raises:
            InputError: more tokens than ``max_length``, a mask that does not fit, or types that the config lacks.
        """
        if return_weights:
            options = {"positions": positions, "segment_ids": segment_ids, "mask": mask, "token_types": token_types}
            return with_weights(self, tokens, **options)
        check_tokens("tokens", tokens)
        x = self.embedding(tokens)
        if self.type_embedding is not None:
            x = x + self.type_embedding(torch.zeros_like(tokens) if token_types is None else token_types)
        elif token_types is not None:
            todo = "Make the model with token_types, the number of types, in its config."
            raise input_error("token_types", "a tensor", "None, as the config has no token_types", todo)
        return self.run(x, positions=positions, segment_ids=segment_ids, mask=mask)

    hidden = forward

    def add_pooler(self, activation: PoolerActivation = "tanh") -> None:
        """Add a fresh ``pooler`` to the model and its config, for classifiers in the form of Hugging Face."""
        self.config = dataclasses.replace(self.config, pooler=True, pooler_activation=activation)
        self.has_fresh_pooler = True
        like, width = self.embedding.weight, self.config.width
        self.pooler = nn.Linear(width, width, bias=self.config.bias, device=like.device, dtype=like.dtype)
        nn.init.normal_(self.pooler.weight, std=0.02)
        if self.config.bias:
            nn.init.zeros_(self.pooler.bias)

    def flops_per_token(self, length: int) -> float:
        """FLOPs of training on one token, forward and backward, in rows of ``length`` tokens, one document to a row."""
        return self.flops_per_row(length) / length


class VisionEncoder(Stack):
    """An encoder of images: square patches are its tokens, and a learned one before them stands for the whole.

    Args:
        config: what it is made of; its kind is "vision".

    Source:
        Dosovitskiy et al., "An image is worth 16x16 words", 2021.

    Example:
        >>> import torch
        >>> from fastattn.lm.models import TransformerConfig, VisionEncoder
        >>> config = TransformerConfig(0, 64, 2, 4, kind="vision", positions="learned", image_size=32, patch_size=8)
        >>> VisionEncoder(config)(torch.randn(2, 3, 32, 32)).shape
        torch.Size([2, 17, 64])
    """

    def __init__(self, config: TransformerConfig) -> None:
        check_kind(self, config, "vision")
        super().__init__(config, causal=False, layers=config.layers)
        self.patches = nn.Linear(config.channels * config.patch_size**2, config.width)
        self.class_token = nn.Parameter(torch.zeros(config.width))
        self.pooler = nn.Linear(config.width, config.width, bias=config.bias) if config.pooler else None
        initialise(self, config)

    def forward(self, images: Tensor, *, return_weights: bool = False) -> Tensor | tuple[Tensor, Weights]:
        """The final states of the whole and of its patches, row by row.

        Args:
            images: ``(B, channels, image_size, image_size)``.
            return_weights: also return the attention weights, as ``recorded_weights`` gives them; slower.

        Returns:
            ``(B, 1 + patches, C)``; with ``return_weights`` also the weights.

        Raises:
            InputError: an image has another size.
        """
        if return_weights:
            return with_weights(self, images)
        config = self.config
        expected = (config.channels, config.image_size, config.image_size)
        if images.dim() != 4 or images.shape[1:] != expected:
            allowed = f"(B, {', '.join(map(str, expected))})"
            raise input_error("images", f"shape {tuple(images.shape)}", allowed, "Resize or crop the images.")
        patches = F.unfold(images, config.patch_size, stride=config.patch_size).transpose(1, 2)
        x = self.patches(patches)
        whole = self.class_token.to(x.dtype).expand(x.shape[0], 1, -1)
        return self.run(torch.cat([whole, x], dim=1))

    hidden = forward

    def flops_per_token(self, length: int | None = None) -> float:
        """FLOPs of training on one token of an image, forward and backward; ``length`` is ``config.image_tokens``."""
        length = length or self.config.image_tokens
        return (self.flops_per_row(length) + 6 * (length - 1) * self.patches.weight.numel()) / length
