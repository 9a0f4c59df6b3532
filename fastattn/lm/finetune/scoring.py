"""Predictions of a model for many examples, and their scores."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence

import torch
from torch import nn
from tqdm import tqdm

from fastattn.lm.finetune.examples import Example
from fastattn.lm.finetune.tasks import Prediction, Task
from fastattn.lm.train.example_rows import ExampleRows
from fastattn.lm.train.metrics import bits_per_byte, perplexity

_BATCH = 32


def predict_all(
    task: Task, model: nn.Module, examples: Sequence[Example], show_progress: bool = False, batch: int = _BATCH
) -> list[Prediction]:
    """The prediction for each example, in their order; the model is used as it is, best in evaluation mode.

    A generated answer ends after twice as many tokens as the longest that is expected, where answers are known.
    """
    order, most = list(range(len(examples))), None
    sizes = [len(str(example.fields)) for example in examples]
    order.sort(key=lambda number: sizes[number])  # little padding in a batch
    if task.answer_field is not None and all(task.answer_field in example.fields for example in examples):
        answers = [len(task.ids(example.fields[task.answer_field])) for example in examples]
        order.sort(key=lambda number: answers[number])  # a batch takes as long as its longest answer
        most = 2 * max(answers, default=0) + 8
    found: dict[int, Prediction] = {}
    with torch.no_grad(), tqdm(total=len(order), desc="predict", unit="example", disable=not show_progress) as bar:
        for start in range(0, len(order), batch):
            numbers = order[start : start + batch]
            predictions = task.predict(model, [examples[number] for number in numbers], most)
            found.update(zip(numbers, predictions, strict=True))
            bar.update(len(numbers))
    return [found[number] for number in range(len(examples))]


def score(
    task: Task,
    model: nn.Module,
    examples: Sequence[Example],
    show_progress: bool = False,
    each: Callable[[Example, Prediction], None] | None = None,
    reference: nn.Module | None = None,
) -> dict[str, float]:
    """Loss and scores by name; of generated text perplexity and bits per byte, too.

    Args:
        task: of the model.
        model: used as it is, best in evaluation mode.
        examples: with their targets.
        show_progress: show progress bars.
        each: called with each example and the prediction for it.
        reference: the model before training, for a task that needs it.
    """
    features = [feature for example in examples for feature in task.features(example)]
    device = next(model.parameters()).device
    if task.needs_reference:
        features = task.with_reference(reference or model, features, show_progress)
    nats, labels, sums = 0.0, 0, defaultdict[str, float](float)
    bar = tqdm(total=len(features), desc="loss", unit="row", disable=not show_progress)
    with torch.no_grad(), bar:
        for batch in ExampleRows(features, _BATCH, collate=task.collate).sample(len(features), _BATCH):
            on_device = batch.to(device)
            nats += float(task.loss(model, on_device))
            labels += batch.num_labels()
            for name, value in task.batch_scores(model, on_device).items():
                sums[name] += value
            bar.update(min(_BATCH, len(features) - bar.n))
    loss = nats / max(labels, 1)
    found = {"loss": loss} | {name: value / len(features) for name, value in sums.items()}
    if not task.scores_text and each is None:
        return found
    if task.answer_field is not None and task.scores_text:
        size = sum(len(task.learned_text(example).encode()) for example in examples)
        found |= {"perplexity": perplexity(loss), "bits per byte": bits_per_byte(loss, labels, max(size, 1))}
    predictions = predict_all(task, model, examples, show_progress)
    if each is not None:
        for example, prediction in zip(examples, predictions, strict=True):
            each(example, prediction)
    return found | task.scores(predictions, examples)
