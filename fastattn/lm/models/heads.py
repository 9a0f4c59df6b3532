"""Heads on the final states of a backbone: masked tokens, a label of the text, labels of tokens, a span.

The head of a causal language model is part of ``Decoder``, that of translation of ``EncoderDecoder``.
Shapes: B batch, S tokens in a row, C width, V vocabulary, L labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastattn.errors import input_error
from fastattn.lm.models.blocks import Model, make_activation, make_norm
from fastattn.lm.models.config import TransformerConfig
from fastattn.lm.models.decoder import Decoder
from fastattn.lm.models.encoder import Encoder, VisionEncoder

Backbone = Encoder | VisionEncoder | Decoder
Pool = Literal["first", "mean", "last"]
_POOL_OF: dict[str, Pool] = {"encoder": "first", "vision": "first", "decoder": "last"}


class _Head(Model):
    """A backbone and something after it."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone

    @property
    def config(self) -> TransformerConfig:
        return self.backbone.config

    def hidden(
        self,
        inputs: Tensor,
        *,
        positions: Tensor | None = None,
        segment_ids: Tensor | None = None,
        mask: Tensor | None = None,
        token_types: Tensor | None = None,
    ) -> Tensor:
        """The final states ``(B, S, C)`` of the backbone; an image has none of the other arguments."""
        if isinstance(self.backbone, Encoder):
            return self.backbone(
                inputs, positions=positions, segment_ids=segment_ids, mask=mask, token_types=token_types
            )
        if token_types is not None:
            raise input_error("token_types", "a tensor", "None, as the backbone is no Encoder", "Leave it out.")
        if isinstance(self.backbone, Decoder):
            return self.backbone.hidden(inputs, positions=positions, segment_ids=segment_ids, mask=mask)
        for name, x in (("positions", positions), ("segment_ids", segment_ids), ("mask", mask)):
            if x is not None:
                raise input_error(name, "a tensor", "None, as the backbone reads images", "Leave it out.")
        return self.backbone(inputs)

    def flops_per_token(self, length: int) -> float:
        """FLOPs of training on one token, forward and backward, in rows of ``length`` tokens, one document to a row."""
        own = (p.numel() for name, p in self.named_parameters() if p.dim() == 2 and not name.startswith("backbone."))
        if isinstance(self.backbone, Decoder):
            of_backbone = self.backbone.flops_per_row(length) / length  # its output layer is not used
        else:
            of_backbone = self.backbone.flops_per_token(length)
        return of_backbone + 6 * sum(own)


class MaskedLM(_Head):
    """Masked language modelling: the token that stood at each place.

    Args:
        backbone: an encoder. Its embedding is the output layer too.

    Source:
        Devlin et al., "BERT: pre-training of deep bidirectional transformers", 2019.

    Example:
        >>> import torch
        >>> from fastattn.lm.models import Encoder, MaskedLM, preset
        >>> model = MaskedLM(Encoder(preset("bert-tiny", vocab_size=300)))
        >>> model(torch.randint(300, (2, 16))).shape
        torch.Size([2, 16, 300])
    """

    backbone: Encoder

    def __init__(self, backbone: Encoder) -> None:
        if not isinstance(backbone, Encoder):
            raise input_error("backbone", type(backbone).__name__, "an Encoder", "The others see no masked tokens.")
        super().__init__(backbone)
        config = backbone.config
        self.transform = _linear(config, config.width, config.bias)
        self.act = make_activation(config)
        self.norm = make_norm(config, config.width)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))
        _freeze_pooler(backbone)

    def forward(
        self,
        tokens: Tensor,
        *,
        positions: Tensor | None = None,
        segment_ids: Tensor | None = None,
        mask: Tensor | None = None,
        token_types: Tensor | None = None,
    ) -> Tensor:
        """Logits ``(B, S, V)``; the arguments are those of ``Encoder``."""
        x = self.hidden(tokens, positions=positions, segment_ids=segment_ids, mask=mask, token_types=token_types)
        return self.logits(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """``(..., V)`` of final states ``(..., C)``; those of the masked tokens alone are enough for their loss."""
        x = self.norm(self.act(self.transform(hidden)))
        return F.linear(x, self.backbone.embedding.weight, self.bias)

    def flops_per_token(self, length: int) -> float:
        """As of the other heads, with the output layer."""
        return super().flops_per_token(length) + 6 * self.backbone.embedding.weight.numel()


class SequenceClassifier(_Head):
    """A label for a row of tokens or an image.

    Args:
        backbone: an encoder, a vision encoder or a decoder.
        num_labels: L.
        labels: their names; None is "0", "1", ...
        pool: the state that stands for the row: the "first", the "last" that is no padding, or the "mean" of those that
            are none. None is the last of a decoder and the first of the others. A backbone with a ``pooler`` uses it.
        dropout: before the output layer, in training; None is that of the config.

    Raises:
        InputError: the number of labels, their names or ``pool`` do not fit.

    Example:
        >>> import torch
        >>> from fastattn.lm.models import Encoder, SequenceClassifier, preset
        >>> model = SequenceClassifier(Encoder(preset("encoder-tiny", vocab_size=300)), 2, labels=("bad", "good"))
        >>> tokens = torch.randint(300, (2, 16))
        >>> mask = torch.arange(16) < torch.tensor([[16], [9]])
        >>> model(tokens, mask=mask).shape
        torch.Size([2, 2])
    """

    def __init__(
        self,
        backbone: Backbone,
        num_labels: int,
        *,
        labels: Sequence[str] | None = None,
        pool: Pool | None = None,
        dropout: float | None = None,
    ) -> None:
        super().__init__(backbone)
        self.labels = _check_labels(num_labels, labels)
        self.pool = pool or _POOL_OF[backbone.config.kind]
        if self.pool not in get_args(Pool):
            raise input_error("pool", repr(pool), "'first', 'mean' or 'last'", "None chooses by the backbone.")
        self.transform = _make_transform(backbone.config)
        self.dropout = _dropout(backbone.config, dropout)
        self.output = _linear(backbone.config, num_labels)

    def forward(self, inputs: Tensor, *, mask: Tensor | None = None, token_types: Tensor | None = None) -> Tensor:
        """Logits of the labels.

        Args:
            inputs: tokens ``(B, S)``, or images.
            mask: ``(B, S)``, True = a token, False = padding.
            token_types: as in ``Encoder``.

        Returns:
            ``(B, L)``.
        """
        x = self._pooled(self.hidden(inputs, mask=mask, token_types=token_types), mask)
        pooler = None if isinstance(self.backbone, Decoder) else self.backbone.pooler
        if pooler is not None:
            x = pooler(x).tanh() if self.config.pooler_activation == "tanh" else pooler(x).relu()
        return self.output(self.dropout(self.transform(x)))

    def _pooled(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """``(B, C)`` of ``(B, S, C)``."""
        if mask is None:
            return x.mean(dim=1) if self.pool == "mean" else x[:, 0 if self.pool == "first" else -1]
        if self.pool == "mean":
            shares = mask.to(x.dtype) / mask.sum(dim=1, keepdim=True).clamp(min=1)
            return (x * shares[..., None]).sum(dim=1)
        places = torch.arange(mask.shape[1], device=mask.device) * mask
        chosen = places.argmax(dim=1) if self.pool == "last" else mask.int().argmax(dim=1)
        return x[torch.arange(x.shape[0], device=x.device), chosen]

    def flops_per_token(self, length: int) -> float:
        """As of the other heads, the output layer being used once a row."""
        of_backbone = super().flops_per_token(length) - 6 * self.output.weight.numel()
        return of_backbone + 6 * self.output.weight.numel() / length


class TokenClassifier(_Head):
    """A label for each token: parts of speech, named entities.

    Args:
        backbone: an encoder or a decoder.
        num_labels: L.
        labels: their names; None is "0", "1", ...
        dropout: before the output layer, in training; None is that of the config.

    Example:
        >>> import torch
        >>> from fastattn.lm.models import Encoder, TokenClassifier, preset
        >>> model = TokenClassifier(Encoder(preset("encoder-tiny", vocab_size=300)), num_labels=5)
        >>> model(torch.randint(300, (2, 16))).shape
        torch.Size([2, 16, 5])
    """

    def __init__(
        self,
        backbone: Encoder | Decoder,
        num_labels: int,
        *,
        labels: Sequence[str] | None = None,
        dropout: float | None = None,
    ) -> None:
        super().__init__(backbone)
        self.labels = _check_labels(num_labels, labels)
        self.transform = _make_transform(backbone.config)
        self.dropout = _dropout(backbone.config, dropout)
        self.output = _linear(backbone.config, num_labels)
        _freeze_pooler(backbone)

    def forward(
        self,
        tokens: Tensor,
        *,
        positions: Tensor | None = None,
        segment_ids: Tensor | None = None,
        mask: Tensor | None = None,
        token_types: Tensor | None = None,
    ) -> Tensor:
        """Logits ``(B, S, L)``; the arguments are those of ``Encoder``."""
        x = self.hidden(tokens, positions=positions, segment_ids=segment_ids, mask=mask, token_types=token_types)
        return self.output(self.dropout(self.transform(x)))


class SpanExtractor(_Head):
    """Extractive question answering: where in the tokens an answer starts and ends.

    Args:
        backbone: an encoder or a decoder.

    Example:
        >>> import torch
        >>> from fastattn.lm.models import Encoder, SpanExtractor, preset
        >>> model = SpanExtractor(Encoder(preset("encoder-tiny", vocab_size=300)))
        >>> start, end = model(torch.randint(300, (2, 16)))
        >>> start.shape, end.shape
        (torch.Size([2, 16]), torch.Size([2, 16]))
    """

    def __init__(self, backbone: Encoder | Decoder) -> None:
        super().__init__(backbone)
        self.transform = _make_transform(backbone.config)
        self.output = _linear(backbone.config, 2)
        _freeze_pooler(backbone)

    def forward(
        self,
        tokens: Tensor,
        *,
        positions: Tensor | None = None,
        segment_ids: Tensor | None = None,
        mask: Tensor | None = None,
        token_types: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Logits of the first and of the last token of the answer.

        Args:
            tokens: ``(B, S)``; the others too are those of ``Encoder``.

        Returns:
            two tensors ``(B, S)``, ``-inf`` at padding.
        """
        x = self.hidden(tokens, positions=positions, segment_ids=segment_ids, mask=mask, token_types=token_types)
        start, end = self.output(self.transform(x)).unbind(dim=-1)
        if mask is None:
            return start, end
        return start.masked_fill(~mask, -torch.inf), end.masked_fill(~mask, -torch.inf)


class _Transform(nn.Module):
    """What ModernBERT has before the output layer of every head: a layer, its activation and a norm."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.dense = _linear(config, config.width, config.bias)
        self.act = make_activation(config)
        self.norm = make_norm(config, config.width)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.act(self.dense(x)))


def _make_transform(config: TransformerConfig) -> nn.Module:
    return _Transform(config) if config.head_transform else nn.Identity()


def _linear(config: TransformerConfig, size: int, bias: bool = True) -> nn.Linear:
    layer = nn.Linear(config.width, size, bias=bias)
    nn.init.normal_(layer.weight, std=0.02)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


def _dropout(config: TransformerConfig, probability: float | None) -> nn.Dropout:
    return nn.Dropout(config.dropout if probability is None else probability)


def _freeze_pooler(backbone: Backbone) -> None:
    """A pooler takes no part in this head, so it gets no gradient: leave it as it is."""
    pooler = None if isinstance(backbone, Decoder) else backbone.pooler
    if pooler is not None:
        pooler.requires_grad_(False)


def _check_labels(num_labels: int, labels: Sequence[str] | None) -> tuple[str, ...]:
    if not isinstance(num_labels, int) or num_labels < 1:
        raise input_error("num_labels", repr(num_labels), "a positive int", "It is the number of labels.")
    if labels is None:
        return tuple(map(str, range(num_labels)))
    if len(labels) != num_labels or len(set(labels)) != num_labels:
        given = f"{len(labels)} names, {len(set(labels))} different"
        raise input_error("labels", given, f"num_labels = {num_labels} different ones", "Name each label once.")
    return tuple(labels)
