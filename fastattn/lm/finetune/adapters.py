"""Choice of the trained parameters: all, the head alone, or low-rank adapters (LoRA, through ``peft``).

Source:
    Hu et al., "LoRA: low-rank adaptation of large language models", 2022.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from torch import nn

from fastattn.errors import input_error

Method = Literal["full", "frozen", "lora"]


@dataclass(frozen=True)
class Lora:
    """Low-rank adapters on every matrix of the blocks: ``W + alpha / rank * B @ A``.

    Attributes:
        rank: rows of A and columns of B.
        alpha: factor on their product, divided by the rank.
        dropout: probability of dropping the inputs of A.
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise input_error("lora_rank", self.rank, "a positive int", "8 is usual.")
        if not self.alpha > 0:
            raise input_error("lora_alpha", self.alpha, "a positive number", "Twice the rank is usual.")
        if not 0 <= self.dropout < 1:
            raise input_error("lora_dropout", self.dropout, "a probability in [0, 1)", "0 turns it off.")


def check_method(method: Method, has_head: bool) -> None:
    """Raise InputError for an unknown method, or if it leaves nothing to train."""
    if method not in get_args(Method):
        raise input_error("method", repr(method), ", ".join(get_args(Method)), "full trains all weights.")
    if method == "frozen" and not has_head:
        todo = "The task has no head to train on a frozen model; lora keeps the model's own weights, too."
        raise input_error("method", "'frozen'", "full or lora", todo)


def choose_trained(model: nn.Module, method: Method, lora: Lora, has_head: bool) -> None:
    """Leave gradients to what ``method`` trains; "lora" adds adapters, which change nothing before they are trained.

    Args:
        model: of a task; with a head, its backbone is ``model.backbone``.
        method: "full", "frozen" (the head alone) or "lora" (adapters, and the head if there is one).
        lora: sizes of the adapters.
        has_head: whether the model has a head of its own.

    Raises:
        InputError: an unknown method, or nothing is left to train.
    """
    check_method(method, has_head)
    if method == "full":
        return
    has_fresh_pooler = getattr(getattr(model, "backbone", None), "has_fresh_pooler", False)
    head = {
        name
        for name, _ in model.named_parameters()
        # a pooler that was added for the head is a part of it; one that came with the backbone is not
        if has_head and (not name.startswith("backbone.") or ("pooler." in name and has_fresh_pooler))
    }
    if method == "lora":
        add_adapters(model, lora)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in head or ".lora_" in name)


def add_adapters(model: nn.Module, lora: Lora) -> None:
    """Wrap each matrix of the blocks in ``model`` with an adapter."""
    from peft import LoraConfig, inject_adapter_in_model

    targets = [name for name, x in model.named_modules() if isinstance(x, nn.Linear) and ".blocks." in f".{name}"]
    config = LoraConfig(r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=targets)  # type: ignore[arg-type]
    inject_adapter_in_model(config, model)


def merge_adapters(model: nn.Module) -> None:
    """Add the adapters to the matrices and remove them: the same function, with the names of a plain model."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in list(model.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge()
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, module.get_base_layer())
