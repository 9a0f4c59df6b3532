"""Recording the attention weights of a model while it runs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from fastattn.lm.models.blocks import Attention, CrossAttention

Weights = dict[str, list[Tensor]]


@contextlib.contextmanager
def recorded_weights(model: nn.Module) -> Iterator[Weights]:
    """The attention weights of what the model computes in the block, by the reference formula: slower, and O(S^2).

    Args:
        model: any of ``fastattn.lm.models``, with a head or without.

    Yields:
        a dict that each call of the model fills: a list with the weights ``(B, H_q, S_q, S_kv)`` of each layer, fp32,
        by "self" or, of an encoder-decoder, "encoder", "decoder" and "cross"; "vision" is a part that reads an image.

    Example:
        >>> import torch
        >>> from fastattn.lm.models import Decoder, preset, recorded_weights
        >>> model = Decoder(preset("tiny", vocab_size=300))
        >>> with recorded_weights(model) as weights:
        ...     logits = model(torch.randint(300, (1, 5)))
        >>> len(weights["self"]), weights["self"][0].shape
        (4, torch.Size([1, 4, 5, 5]))
    """
    found: Weights = {}
    modules = [(_kind(name), x) for name, x in model.named_modules() if isinstance(x, Attention | CrossAttention)]
    for kind, module in modules:
        module.weights = found.setdefault(kind, [])
    try:
        yield found
    finally:
        for _, module in modules:
            module.weights = None


def with_weights(model: nn.Module, *inputs: Tensor | None, **options: Any) -> tuple[Any, Weights]:
    """The output of a call, and the attention weights that it used."""
    with recorded_weights(model) as weights:
        return model(*inputs, **options), weights


def _kind(name: str) -> str:
    """The kind of an attention module by its name in the model."""
    if "cross_attention" in name:
        return "cross"
    stack = name.removeprefix("backbone.").partition(".")[0]
    return stack if stack in ("encoder", "decoder", "vision") else "self"
