"""Fine-tuned models from their checkpoints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import nn

from fastattn.errors import DataError, input_error
from fastattn.lm.data.images import Pixels
from fastattn.lm.finetune.adapters import add_adapters, merge_adapters
from fastattn.lm.finetune.config import CONVERSATIONS, FinetuneConfig, saved_config
from fastattn.lm.finetune.examples import FIELDS, Example, checked
from fastattn.lm.finetune.scoring import predict_all
from fastattn.lm.finetune.tasks import TASKS, Prediction, Task
from fastattn.lm.finetune.tasks.prefer import Prefer
from fastattn.lm.models import TransformerConfig, make_model
from fastattn.lm.train.checkpoint import Checkpoint
from fastattn.lm.train.hf_folder import AnySource, HFFolder


@dataclass(frozen=True)
class Finetuned:
    """A fine-tuned model, in evaluation mode, and its task."""

    model: nn.Module
    task: Task

    def predict(
        self, inputs: Sequence[str | Mapping[str, Any]], *, batch: int = 32, show_progress: bool = False
    ) -> list[Prediction]:
        """Predict for inputs without targets.

        Args:
            inputs: dicts with the input fields of the task (see ``fastattn.lm.finetune.examples``), or, where the task
                has one, its text alone.
            batch: how many at a time.
            show_progress: show a progress bar.

        Returns:
            a dict for each input, in their order: of "classify" "label", "probability" and "probabilities"; of
            "regression" "value"; of "multilabel" "labels" and "probabilities"; of "tag" "labels", "probabilities" and,
            for BIO labels, "spans"; of "qa" "answer", "start", "end" and "score"; of "seq2seq" "target"; of "instruct"
            "response".

        Raises:
            DataError: an input lacks a field, or one is of the wrong type.
            InputError: ``batch`` is not positive.

        Example:
            >>> import pathlib, tempfile
            >>> from fastattn.lm.finetune import FinetuneConfig, finetune, load_finetuned
            >>> folder = pathlib.Path(tempfile.mkdtemp())
            >>> _ = (folder / "data.csv").write_text("text,label\\n" + "up,yes\\ndown,no\\n" * 4)
            >>> data = str(folder / "data.csv")
            >>> config = FinetuneConfig("classify", data, eval=data, preset="tiny", vocab_size=300, steps=2)
            >>> outcome = finetune(folder / "run", config, show_progress=False)
            >>> prediction = load_finetuned(outcome.checkpoint).predict(["up"])[0]
            >>> sorted(prediction["probabilities"])
            ['no', 'yes']
        """
        if batch < 1:
            raise input_error("batch", batch, "a positive int", "It counts inputs.")
        return predict_all(self.task, self.model, [*map(self._example, inputs, count(1))], show_progress, batch)

    def _example(self, given: str | Mapping[str, Any], number: int) -> Example:
        name = self.task.name
        fields = {FIELDS[name].inputs[0]: given} if isinstance(given, str) else dict(given)
        return checked(Example(f"input {number}", fields), name, labelled=False)


def is_finetuned(source: AnySource) -> bool:
    """Whether the model has a task: a checkpoint of ``fastattn finetune``, a folder with a head of Hugging Face's."""
    if isinstance(source, HFFolder):
        return source.task is not None
    return "finetune" in source.trainer_state().get("settings", {})


def load_finetuned(
    checkpoint: AnySource, device: torch.device | str = "cpu", attention: str | None = None
) -> Finetuned:
    """The model with its weights, adapters merged into them, and its task.

    Args:
        checkpoint: of a fine-tuning run; or a folder in Hugging Face's format, whose head names the task.
        device: where to put the model.
        attention: "fastattn" or "eager", instead of what the run used.

    Raises:
        DataError: the checkpoint or folder is damaged, or has no task.
    """
    if isinstance(checkpoint, HFFolder):
        return _of_folder(checkpoint, device, attention)
    task, model = build_without_weights(checkpoint, attention)
    config = saved_config(checkpoint)
    if config.method == "lora":
        add_adapters(model, config.lora)
    checkpoint.load_weights(model)
    if config.method == "lora":
        merge_adapters(model)
    return Finetuned(model.to(device).eval(), task)


def _of_folder(folder: HFFolder, device: torch.device | str, attention: str | None) -> Finetuned:
    if folder.task is None:
        todo = "it has the head of no task: fine-tune it with fastattn finetune --pretrained"
        raise DataError(f"{folder.folder} is a model of text alone; {todo}.")
    kind, model = TASKS[folder.task], folder.load_pretrained(device, attention)
    labels = ("0.0", "1.0") if folder.task == "regression" else getattr(model, "labels", ())
    if not kind.reads_text:
        return Finetuned(model, kind(None, model.config, labels, pixels=folder.pixels))
    tokenizer = folder.tokenizer()
    task = kind(tokenizer, model.config, labels)
    task.special = folder.special_tokens(tokenizer)
    task.compares = folder.compares
    return Finetuned(model, task)


def load_generative_model(
    checkpoint: AnySource, device: torch.device | str = "cpu", attention: str | None = None
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
    kind = task_class(settings)
    tokenizer = checkpoint.tokenizer() if kind.reads_text else None
    pixels = checkpoint.pixels if kind.reads_images else None
    task = make_task(settings, tokenizer, config, labels, checkpoint.chat_template, pixels)
    task.compares = checkpoint.trainer_state()["settings"].get("compares", False)
    return task, task.add_head(make_model(config))


def task_class(config: FinetuneConfig) -> type[Task]:
    """The class of a run's task."""
    return TASKS[config.task]


def make_task(
    config: FinetuneConfig,
    tokenizer: Tokenizer | None,
    model: TransformerConfig,
    labels: Sequence[str],
    chat_template: str | None,
    pixels: Pixels | None,
) -> Task:
    """The task of a run, for its model."""
    template = chat_template if config.task in CONVERSATIONS else None
    task = task_class(config)(tokenizer, model, labels, config.length, template, pixels)
    task.augment = config.augment
    if isinstance(task, Prefer):
        task.beta = config.dpo_beta
    return task
