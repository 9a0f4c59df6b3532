"""Tasks on a whole text, or two that are compared: a label, any number of labels, a number."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastattn.errors import DataError
from fastattn.lm.finetune.examples import Example
from fastattn.lm.finetune.scores import label_scores, multilabel_scores, regression_scores
from fastattn.lm.finetune.tasks.base import Prediction, Task
from fastattn.lm.models import Encoder, SequenceClassifier
from fastattn.lm.models.convert import pooler_of_classifiers
from fastattn.lm.train.example_rows import ExampleBatch, Feature
from fastattn.lm.train.tasks import cross_entropy


class _OfText(Task):
    """A task with a ``SequenceClassifier``."""

    kinds: ClassVar[tuple[str, ...]] = ("encoder", "decoder")

    def inputs(self, example: Example) -> list[Feature]:
        if self.compares and "text_pair" not in example.fields:
            todo = "Give it, or name its column: --field text_pair=COLUMN"
            raise DataError(f"{example.place} has no 'text_pair', and the model learned to compare two texts. {todo}.")
        return [self.texts(example)]

    def prepared(self, backbone: Any) -> Any:
        """The backbone with a pooler where the classifiers of Hugging Face have one, so that the model can go there."""
        if isinstance(backbone, Encoder) and not backbone.config.pooler:
            activation = pooler_of_classifiers(backbone)
            if activation is not None:
                backbone.add_pooler(activation)
        return backbone

    def outputs(self, model: nn.Module, examples: Sequence[Example]) -> Tensor:
        """The model's outputs ``(B, L)`` in fp32, on the host."""
        batch = self.batch(examples, model)
        return model(batch["tokens"], **batch.more_inputs()).float().cpu()

    def named(self, values: Tensor) -> dict[str, float]:
        """A number for each label, by name."""
        return dict(zip(self.labels, values.tolist(), strict=True))


class Classify(_OfText):
    """A label for a text, or for two that are compared."""

    name = "classify"
    label_field = "label"

    @classmethod
    def label_names(cls, examples: Sequence[Example]) -> tuple[str, ...]:
        names = super().label_names(examples)
        numbers = [number for name in names if (number := _as_number(name)) is not None]
        if len(numbers) == len(names) and any(not number.is_integer() for number in numbers):
            fraction = next(name for name in names if not float(name).is_integer())
            raise DataError(
                f"The labels are {len(names):,} numbers with fractions, such as {fraction}, which are no classes: "
                "predict numbers with --task regression."
            )
        return names

    def add_head(self, backbone: Any) -> nn.Module:
        return SequenceClassifier(backbone, len(self.labels), labels=self.labels)

    def features(self, example: Example) -> list[Feature]:
        return [self.texts(example) | {"labels": [self.number(example, example.fields["label"])]}]

    def loss(self, model: nn.Module, batch: ExampleBatch) -> Tensor:
        return cross_entropy(model(batch["tokens"], **batch.more_inputs()), batch["labels"][:, 0])

    def predict(self, model: nn.Module, examples: Sequence[Example], most: int | None = None) -> list[Prediction]:
        """The likeliest "label", its "probability", and the "probabilities" of all."""
        found = []
        for values in self.outputs(model, examples).softmax(dim=-1):
            number = int(values.argmax())
            prediction = {"label": self.labels[number], "probability": float(values[number])}
            found.append(prediction | {"probabilities": self.named(values)})
        return found

    def scores(self, predictions: Sequence[Prediction], examples: Sequence[Example]) -> dict[str, float]:
        expected = [self.number(example, example.fields["label"]) for example in examples]
        return label_scores([self.numbers[x["label"]] for x in predictions], expected, len(self.labels))


def _as_number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


class MultiLabel(_OfText):
    """Any number of labels for a text: each by itself, those with a probability above one half."""

    name = "multilabel"
    label_field = "labels"

    @classmethod
    def label_names(cls, examples: Sequence[Example]) -> tuple[str, ...]:
        names = super().label_names(examples)
        if not names:
            raise DataError("No example has a label; multilabel needs some with at least one.")
        return names

    def add_head(self, backbone: Any) -> nn.Module:
        return SequenceClassifier(backbone, len(self.labels), labels=self.labels)

    def features(self, example: Example) -> list[Feature]:
        given = {self.number(example, label) for label in example.fields["labels"]}
        return [self.texts(example) | {"labels": [int(number in given) for number in range(len(self.labels))]}]

    def loss(self, model: nn.Module, batch: ExampleBatch) -> Tensor:
        logits, labels = model(batch["tokens"], **batch.more_inputs()), batch["labels"]
        return F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype), reduction="sum")

    def predict(self, model: nn.Module, examples: Sequence[Example], most: int | None = None) -> list[Prediction]:
        """The "labels", and the "probabilities" of all."""
        found = []
        for values in self.outputs(model, examples).sigmoid():
            chosen = [name for name, value in zip(self.labels, values.tolist(), strict=True) if value > 0.5]
            found.append({"labels": chosen, "probabilities": self.named(values)})
        return found

    def scores(self, predictions: Sequence[Prediction], examples: Sequence[Example]) -> dict[str, float]:
        given = [[name in x["labels"] for name in self.labels] for x in predictions]
        wanted = [[name in example.fields["labels"] for name in self.labels] for example in examples]
        return multilabel_scores(given, wanted)


class Regression(_OfText):
    """A number for a text, or for two that are compared.

    The model learns it in units of the standard deviation of the training labels, from their mean; both are the
    "labels" that a checkpoint remembers.
    """

    name = "regression"

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.mean, self.deviation = map(float, self.labels)

    @classmethod
    def label_names(cls, examples: Sequence[Example]) -> tuple[str, ...]:
        values = [example.fields["label"] for example in examples]
        return repr(statistics.fmean(values)), repr(statistics.pstdev(values) or 1.0)

    def add_head(self, backbone: Any) -> nn.Module:
        return SequenceClassifier(backbone, 1, labels=("value",))

    def features(self, example: Example) -> list[Feature]:
        return [self.texts(example) | {"labels": [(example.fields["label"] - self.mean) / self.deviation]}]

    def loss(self, model: nn.Module, batch: ExampleBatch) -> Tensor:
        """Squared errors, in squares of the standard deviation."""
        values = model(batch["tokens"], **batch.more_inputs())
        return F.mse_loss(values, batch["labels"].to(values.dtype), reduction="sum")

    def predict(self, model: nn.Module, examples: Sequence[Example], most: int | None = None) -> list[Prediction]:
        """The "value"."""
        values = self.outputs(model, examples)[:, 0].to(torch.float64) * self.deviation + self.mean
        return [{"value": value} for value in values.tolist()]

    def scores(self, predictions: Sequence[Prediction], examples: Sequence[Example]) -> dict[str, float]:
        return regression_scores([x["value"] for x in predictions], [x.fields["label"] for x in examples])
