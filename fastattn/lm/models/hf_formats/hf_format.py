"""A format of Hugging Face: the config and the tensor names of one of its model types.

A module of ours that combines several of theirs, such as ``attention.qkv``, concatenates their tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastattn.errors import DataError
from fastattn.lm.models.config import GATED, Activation, TransformerConfig

Json = dict[str, Any]
Tensors = Mapping[str, Tensor]
Table = dict[str, str]  # a module of ours, or a tensor that is in none: the modules of theirs


@dataclass(frozen=True)
class HFFormat:
    """One ``model_type`` of Hugging Face.

    Attributes:
        model_type: its name in ``config.json``.
        kind: of the configs that it can describe.
        prefix: of the names of the backbone's tensors; files of a backbone alone lack it.
        architecture: class of theirs for our model without a head.
        read: our config from theirs and the tensors of the file; raises DataError for what we do not have.
        write: their config from ours; what it cannot say is found by reading it again.
        outside: names outside the blocks.
        blocks: for each stack of blocks of ours, that of theirs and the names in a block; "gated mlp.up" is the name
            of "mlp.up" where the activation is gated.
        heads: for each class of ``heads.py``, their class and its names; "backbone.pooler" where the pooler is part of
            the head.
        also: classes of theirs that one of these heads serves too.
        pools: their classifier has a pooler.
        poolings: for each ``pool`` of ours theirs, ``classifier_pooling``; none where they have the first token alone.
        shapes: of the tensors of theirs that we hold in another shape.
        transposed: their matrices in the blocks are transposed.
        zeros: tensors of theirs that are zero and that we lack; others are refused.
        copies: tensors of theirs that are equal to another, of which we have one; others are refused.
        channels: of the residual stream: for each of theirs the number of ours, given how many there are.
        unused: a pattern of tensors that files may have and nobody needs.
    """

    model_type: str
    kind: str
    prefix: str
    architecture: str
    read: Callable[[Json, Tensors], TransformerConfig]
    write: Callable[[TransformerConfig], Json]
    outside: Table
    blocks: dict[str, tuple[str, Table]]
    heads: dict[str, tuple[str, Table]] = field(default_factory=dict)
    also: dict[str, str] = field(default_factory=dict)
    pools: bool = False
    poolings: Table = field(default_factory=dict)
    shapes: dict[str, Callable[[TransformerConfig], tuple[int, ...]]] = field(default_factory=dict)
    transposed: bool = False
    zeros: dict[str, Callable[[TransformerConfig], Tensor]] = field(default_factory=dict)
    copies: Table = field(default_factory=dict)
    channels: Callable[[int], Tensor] | None = None
    unused: str = "$^"

    def names(self, ours: str, config: TransformerConfig, head: str | None) -> tuple[str, ...]:
        """The tensors of theirs that make up our tensor ``ours`` of a model with ``head``."""
        if head is not None:
            table = self.heads[head][1]
            if not ours.startswith("backbone.") or ours.rpartition(".")[0] in table:
                return tuple(_join(table, ours))
            ours = ours.removeprefix("backbone.")
        for stack, (theirs, table) in self.blocks.items():
            if ours.startswith(stack + "."):
                number, _, rest = ours.removeprefix(stack + ".").partition(".")
                if config.activation in GATED and "gated mlp.up" in table:
                    table = table | {"mlp.up": table["gated mlp.up"]}
                return tuple(f"{theirs}.{number}.{name}" for name in _join(table, rest))
        return tuple(_join(self.outside, ours))

    def reordered(self, tensor: Tensor, ours: str, config: TransformerConfig, *, back: bool = False) -> Tensor:
        """Our tensor ``ours`` with its channels in their order, or ``back`` in ours."""
        dim = _stream_dim(ours)
        if self.channels is None or dim is None:
            return tensor
        order = self.channels(config.width)
        return tensor.index_select(dim, (order.argsort() if back else order).to(tensor.device))


def _stream_dim(ours: str) -> int | None:
    """The dim of a tensor of a block, a norm, an embedding or an output layer that is the residual stream, or None."""
    module, _, kind = ours.rpartition(".")
    name = module.rpartition(".")[2]
    if name in ("out", "down") or name.endswith("norm"):
        return 0
    return 1 if kind == "weight" else None


def _join(table: Table, ours: str) -> Iterator[str]:
    """Their names of a tensor of ours: listed itself, or as one of a module."""
    if ours in table:
        yield table[ours]
        return
    module, _, name = ours.rpartition(".")
    for theirs in table[module].split():
        yield f"{theirs}.{name}"


def refuse(fields: Json, allowed: Json) -> None:
    """Raise DataError where the config asks for what we do not have; a field left out is as it should be."""
    for name, value in allowed.items():
        if fields.get(name, value) != value:
            raise DataError(f"{name} is {fields[name]!r} in config.json, and fastattn has only {value!r} there.")


_ACTIVATIONS: dict[str, Activation] = {
    "gelu_new": "gelu",
    "gelu_pytorch_tanh": "gelu",
    "gelu": "gelu-exact",
    "relu": "relu",
}


def activation(name: str) -> Activation:
    if name not in _ACTIVATIONS:
        raise DataError(f"The activation is {name!r} in config.json; fastattn has {', '.join(_ACTIVATIONS)}.")
    return _ACTIVATIONS[name]


def activation_name(config: TransformerConfig) -> str:
    return next((name for name, ours in _ACTIVATIONS.items() if ours == config.activation), "gelu_new")


def is_tied(tensors: Tensors, head: str, embedding: str, said: bool) -> bool:
    """Whether the output layer is the embedding: a copy of it in the file counts as one where the config says so."""
    if head not in tensors:
        return said
    return said and embedding in tensors and torch.equal(tensors[head], tensors[embedding])
