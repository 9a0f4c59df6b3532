"""A model's answers to examples, and how good they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from fastattn.lm.finetune.examples import Example
from fastattn.lm.finetune.tasks import Task
from fastattn.lm.train.example_rows import ExampleRows
from fastattn.lm.train.metrics import bits_per_byte, perplexity

_BATCH = 32


def answer_all(task: Task, model: nn.Module, examples: Sequence[Example], show_progress: bool = False) -> list[Any]:
    """The answer to each example, in their order; the model is used as it is, best in evaluation mode."""
    sizes = [len(str(example.fields)) for example in examples]
    order = sorted(range(len(examples)), key=lambda number: sizes[number])  # little padding in a batch
    answers: dict[int, Any] = {}
    with torch.no_grad(), tqdm(total=len(order), desc="answer", unit="example", disable=not show_progress) as bar:
        for start in range(0, len(order), _BATCH):
            numbers = order[start : start + _BATCH]
            found = task.answers(model, [examples[number] for number in numbers])
            answers.update(zip(numbers, found, strict=True))
            bar.update(len(numbers))
    return [answers[number] for number in range(len(examples))]


def score(task: Task, model: nn.Module, examples: Sequence[Example], show_progress: bool = False) -> dict[str, float]:
    """Loss and scores by name. Where the model writes, perplexity and bits per byte of the expected texts, too."""
    features = [feature for example in examples for feature in task.features(example)]
    device = next(model.parameters()).device
    nats, labels = 0.0, 0
    bar = tqdm(total=len(features), desc="loss", unit="row", disable=not show_progress)
    with torch.no_grad(), bar:
        for batch in ExampleRows(features, _BATCH).sample(len(features), _BATCH):
            nats += float(task.loss(model, batch.to(device)))
            labels += batch.num_labels()
            bar.update(min(_BATCH, len(features) - bar.n))
    loss = nats / max(labels, 1)
    found = {"loss": loss}
    if task.answer_field is not None:
        size = sum(len(example.fields[task.answer_field].encode()) for example in examples)
        found |= {"perplexity": perplexity(loss), "bits per byte": bits_per_byte(loss, labels, max(size, 1))}
    return found | task.scores(answer_all(task, model, examples, show_progress), examples)
