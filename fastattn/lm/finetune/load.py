"""Fine-tuned models from their checkpoints."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from fastattn.errors import DataError
from fastattn.lm.finetune.adapters import add_adapters, merge_adapters
from fastattn.lm.finetune.config import saved_config
from fastattn.lm.finetune.tasks import TASKS, Task
from fastattn.lm.models import TransformerConfig, make_model
from fastattn.lm.train.checkpoint import Checkpoint


@dataclass(frozen=True)
class Finetuned:
    """A fine-tuned model, in evaluation mode, and its task."""

    model: nn.Module
    task: Task


def is_finetuned(checkpoint: Checkpoint) -> bool:
    """Whether ``fastattn finetune`` made the checkpoint."""
    return "finetune" in checkpoint.trainer_state().get("settings", {})


def load_finetuned(
    checkpoint: Checkpoint, device: torch.device | str = "cpu", attention: str | None = None
) -> Finetuned:
    """The model with its weights, adapters merged into them, and its task; ``attention`` overrides the run's.

    Raises:
        DataError: the checkpoint is damaged, or not of a fine-tuning run.
    """
    task, model = build_without_weights(checkpoint, attention)
    config = saved_config(checkpoint)
    if config.method == "lora":
        add_adapters(model, config.lora)
    checkpoint.load_weights(model)
    if config.method == "lora":
        merge_adapters(model)
    return Finetuned(model.to(device).eval(), task)


def load_generative_model(
    checkpoint: Checkpoint, device: torch.device | str = "cpu", attention: str | None = None
) -> nn.Module:
    """The model of a task whose answer is generated text; raises DataError for the other tasks."""
    found = load_finetuned(checkpoint, device, attention)
    if found.task.answer_field is None:
        name = found.task.name
        raise DataError(f"{checkpoint.folder} is a model for {name}, which generates no text: see fastattn evaluate.")
    return found.model


def build_without_weights(checkpoint: Checkpoint, attention: str | None = None) -> tuple[Task, nn.Module]:
    """The task of a checkpoint, and its model without the weights."""
    config = checkpoint.config()
    if attention is not None:
        config = TransformerConfig.from_dict(config.to_dict() | {"attention": attention})
    settings, labels = saved_config(checkpoint), checkpoint.trainer_state()["settings"]["labels"]
    task = TASKS[settings.task](checkpoint.tokenizer(), config, labels, settings.length)
    return task, task.add_head(make_model(config))
