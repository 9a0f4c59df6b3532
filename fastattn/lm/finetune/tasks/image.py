"""Tasks on images: a label, a caption, the answer to a question."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from fastattn.lm.finetune.examples import Example
from fastattn.lm.finetune.tasks.base import Prediction
from fastattn.lm.finetune.tasks.classify import Classify
from fastattn.lm.finetune.tasks.generate import Instruct
from fastattn.lm.train.example_rows import ExampleBatch, Feature
from fastattn.lm.train.tasks import cross_entropy


class ClassifyImage(Classify):
    """A label for an image: a vision encoder, whose class token stands for the whole."""

    name = "image"
    kinds = ("vision",)
    reads_text = False
    reads_images = True

    def inputs(self, example: Example) -> list[Feature]:
        return [self.image(example)]

    def features(self, example: Example) -> list[Feature]:
        return [self.image(example) | {"labels": [self.number(example, example.fields["label"])]}]

    def loss(self, model: nn.Module, batch: ExampleBatch) -> Tensor:
        return cross_entropy(model(self.images(model, batch)), batch["labels"][:, 0])

    def outputs(self, model: nn.Module, examples: Sequence[Example]) -> Tensor:
        return model(self.images(model, self.batch(examples, model))).float().cpu()


class Caption(Instruct):
    """A text for an image, which the decoder reads before it."""

    name = "caption"
    kinds = ("image-text",)
    answer_field = "text"
    reads_images = True

    def inputs(self, example: Example) -> list[Feature]:
        return [self.image(example) | row for row in super().inputs(example)]

    def features(self, example: Example) -> list[Feature]:
        return [self.image(example) | row for row in super().features(example)]

    def prompt(self, example: Example) -> list[int]:
        return self.special.opening() or [self.special.end]

    def loss(self, model: nn.Module, batch: ExampleBatch) -> Tensor:
        return cross_entropy(model(batch["tokens"], images=self.images(model, batch)), batch["labels"])

    def predict(self, model: Any, examples: Sequence[Example], most: int | None = None) -> list[Prediction]:
        """The text."""
        images = self.images(model, self.batch(examples, model))
        return self.write(model, [self.prompt(example)[-(self.length // 2) :] for example in examples], most, images)


class AnswerAboutImage(Caption):
    """The answer to a question about an image, right after the question."""

    name = "vqa"
    answer_field = "answer"

    def prompt(self, example: Example) -> list[int]:
        return [*super().prompt(example), *self.ids(example.fields["question"])]
