"""The interfaces through which generation reaches a model, so that it depends on none of them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, Protocol, TypeGuard

from torch import Tensor, nn


class LanguageModelConfig(Protocol):
    """Fields of a model's config that generation reads; see ``fastattn.lm.models.TransformerConfig``."""

    @property
    def kind(self) -> str: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def positions(self) -> str: ...
    @property
    def cache_window(self) -> int | None: ...
    @property
    def longest(self) -> int: ...
    @property
    def head_shape(self) -> tuple[int, int, int]: ...


class LanguageModel(Protocol):
    """A model that predicts the next token."""

    training: bool
    embedding: nn.Embedding

    @property
    def config(self) -> LanguageModelConfig: ...
    @property
    def cached_layers(self) -> int:
        """Layers that keep keys and values of earlier tokens."""

    def logits(self, hidden: Tensor) -> Tensor: ...
    def train(self, mode: bool = True) -> Any: ...
    def eval(self) -> Any: ...


class DecoderModel(LanguageModel, Protocol):
    """A model that continues its own tokens."""

    def hidden(self, tokens: Tensor, *, caches: Sequence[Any] | None = None) -> Tensor: ...


class EncoderDecoderModel(LanguageModel, Protocol):
    """A model that reads a source and generates a target."""

    def encode(self, source: Tensor, source_mask: Tensor | None = None) -> Tensor: ...
    def hidden(
        self,
        source: Tensor | None,
        target: Tensor,
        *,
        source_mask: Tensor | None = None,
        caches: Sequence[Any] | None = None,
        memory: Tensor | None = None,
    ) -> Tensor: ...


class ImageTextModel(LanguageModel, Protocol):
    """A model that continues text after an image."""

    def read(self, images: Tensor) -> Tensor: ...
    def begin(self, prefix: Tensor, caches: Sequence[Any]) -> None: ...
    def hidden(
        self, tokens: Tensor, *, prefix: Tensor | None = None, caches: Sequence[Any] | None = None
    ) -> Tensor: ...


Model = DecoderModel | EncoderDecoderModel | ImageTextModel


def is_decoder(model: Any) -> TypeGuard[DecoderModel]:
    """Whether the model continues its prompt instead of answering a source."""
    return getattr(getattr(model, "config", None), "kind", None) == "decoder"


def is_encoder_decoder(model: Any) -> TypeGuard[EncoderDecoderModel]:
    """Whether the model answers a source."""
    return getattr(getattr(model, "config", None), "kind", None) == "encoder-decoder"


def is_image_text(model: Any) -> TypeGuard[ImageTextModel]:
    """Whether the model continues its prompt after an image."""
    return getattr(getattr(model, "config", None), "kind", None) == "image-text"


@contextlib.contextmanager
def evaluating(model: Model) -> Iterator[None]:
    """The model in evaluation mode, and afterwards as it was."""
    if not model.training:  # going through all modules at each step would take a quarter of the time
        yield
        return
    model.eval()
    try:
        yield
    finally:
        model.train()
