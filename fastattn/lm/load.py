"""Models that generate text, from any checkpoint of fastattn."""

from __future__ import annotations

from typing import Any

import torch

from fastattn.lm.finetune.load import is_finetuned, load_generative_model
from fastattn.lm.train.checkpoint import Checkpoint


def load_model(checkpoint: Checkpoint, device: torch.device | str = "cpu", attention: str | None = None) -> Any:
    """The model of a checkpoint with its weights, in evaluation mode.

    Args:
        checkpoint: of pre-training, or of fine-tuning for a task whose answer is generated text.
        device: where to put it.
        attention: "fastattn" or "eager", instead of what the run used.

    Raises:
        DataError: the checkpoint is damaged, or its model has the head of a task: see ``load_finetuned``.
    """
    if is_finetuned(checkpoint):
        return load_generative_model(checkpoint, device, attention)
    return checkpoint.load_pretrained(device, attention)
