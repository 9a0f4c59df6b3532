"""The base class of fine-tuning tasks: the model's head, rows of examples, the loss, predictions and scores."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from typing import Any, ClassVar

from tokenizers import Tokenizer
from torch import Tensor, nn

from fastattn.errors import input_error
from fastattn.lm.data.images import ImageReader, Pixels, check_image
from fastattn.lm.finetune.augment import augmented
from fastattn.lm.finetune.examples import Example
from fastattn.lm.finetune.scores import Baseline
from fastattn.lm.models import TransformerConfig
from fastattn.lm.train.example_rows import ExampleBatch, Feature, padded
from fastattn.lm.train.special_tokens import SpecialTokens

Prediction = dict[str, Any]


class Task(ABC):
    """A task, for one model.

    Args:
        tokenizer: of the model; None where the task has no text.
        config: of the model.
        labels: names of the labels, from ``label_names``.
        length: most tokens in a row; None is the model's.
        chat_template: of "chat", see ``fastattn.lm.generate.ChatTemplate``; None is the default one.
        pixels: the way from an image to what the model reads.

    Raises:
        InputError: the model is of a kind that cannot serve the task, or ``length`` is more than it can read.
    """

    name: ClassVar[str]
    kinds: ClassVar[tuple[str, ...]]  # of the models that can be trained for it; the first is the usual one
    label_field: ClassVar[str | None] = None
    answer_field: ClassVar[str | None] = None  # of the tasks whose answer is generated text
    scores_text: ClassVar[bool] = True  # that text is compared with the expected one
    needs_reference: ClassVar[bool] = False  # its loss compares with the model before training
    reads_text: ClassVar[bool] = True
    reads_images: ClassVar[bool] = False
    compares = False  # two texts: every training example had "text_pair"
    augment = "none"  # what training changes in the images, a key of ``fastattn.lm.finetune.augment.AUGMENTATIONS``

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        config: TransformerConfig,
        labels: Sequence[str] = (),
        length: int | None = None,
        chat_template: str | None = None,
        pixels: Pixels | None = None,
    ) -> None:
        self.check_kind(config)
        if length is not None and not 8 <= length <= config.max_length:
            allowed = f"8 ... {config.max_length}, the longest row of the model"
            raise input_error("length", length, allowed, "Leave it out for the longest.")
        self.tokenizer: Any = tokenizer
        self.length, self.labels = length or config.max_length, tuple(labels)
        self.has_types = config.token_types > 1
        self.chat_template, self.config, self.pixels = chat_template, config, pixels or Pixels()
        self.numbers = {label: number for number, label in enumerate(labels)}

    @cached_property
    def special(self) -> SpecialTokens:
        return SpecialTokens.of(self.tokenizer)

    @cached_property
    def reader(self) -> ImageReader:
        return ImageReader(self.config.image_size, self.config.channels, self.pixels.resample)

    @classmethod
    def check_kind(cls, config: TransformerConfig) -> None:
        """Raise InputError unless a model of this config can serve the task."""
        if config.kind not in cls.kinds:
            todo = f"Take a checkpoint or a preset of that kind for {cls.name}."
            raise input_error("model", f"one of kind {config.kind}", " or ".join(cls.kinds), todo)

    @classmethod
    def label_names(cls, examples: Sequence[Example]) -> tuple[str, ...]:
        """The sorted names of the labels in the training examples, which a checkpoint stores."""
        if cls.label_field is None:
            return ()
        given = (example.fields[cls.label_field] for example in examples)
        return tuple(sorted({name for x in given for name in ([x] if isinstance(x, str) else x)}))

    def learned_text(self, example: Example) -> str:
        """The text that is learned, of the tasks whose answer is generated text."""
        return example.fields[str(self.answer_field)]

    def prepared(self, backbone: Any) -> Any:
        """The backbone of a new run, with what the head needs of it."""
        return backbone

    @abstractmethod
    def add_head(self, backbone: Any) -> nn.Module:
        """The model of the task."""

    @abstractmethod
    def inputs(self, example: Example) -> list[Feature]:
        """The rows that the model reads of an example: one, or several if it is too long."""

    @abstractmethod
    def features(self, example: Example) -> list[Feature]:
        """``inputs`` with "labels", which the loss compares with."""

    @abstractmethod
    def loss(self, model: nn.Module, batch: ExampleBatch) -> Tensor:
        """Nats, summed over the labels of the batch."""

    @abstractmethod
    def predict(self, model: nn.Module, examples: Sequence[Example], most: int | None = None) -> list[Prediction]:
        """The model's predictions for a few examples, which need no targets; ``most`` limits generated tokens."""

    @abstractmethod
    def scores(self, predictions: Sequence[Prediction], examples: Sequence[Example]) -> dict[str, float]:
        """Scores of the predictions, by name."""

    def baseline(self, examples: Sequence[Example]) -> Baseline | None:
        """Answers without a model, if the task knows some that are usual to compare with."""
        return None

    def with_reference(self, model: nn.Module, features: Sequence[Feature], show_progress: bool) -> list[Feature]:
        """The features with what the loss needs of the model before training: nothing."""
        return list(features)

    def batch_scores(self, model: nn.Module, batch: ExampleBatch) -> dict[str, float]:
        """Scores that need no predictions, summed over the examples of a batch."""
        return {}

    def ids(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def number(self, example: Example, label: str) -> int:
        """The number of a label; raises DataError if the model has not learned it."""
        if label not in self.numbers:
            known = ", ".join(self.labels[:10]) + (", ..." if len(self.labels) > 10 else "")
            raise example.error(str(self.label_field), f"the model knows no label {label!r}, but {known}.")
        return self.numbers[label]

    def pair(self, first: list[int], second: list[int]) -> Feature:
        """``begin first end second end``, ``first`` cut to what fits, and which of the two each token belongs to."""
        between = [self.special.end] * (self.special.separators - 1)
        room = self.length - bool(second) * (len(between) + len(second) + 1)
        tokens = self.special.around(first, room)
        types = [0] * len(tokens)
        if second:
            second = [*between, *second, self.special.end]
            tokens, types = tokens + second, types + [1] * len(second)
        return {"tokens": tokens} | ({"token_types": types} if self.has_types else {})

    def texts(self, example: Example) -> Feature:
        """A row of the text of an example, and of the text that it is compared with."""
        first, second = self.ids(example.fields["text"]), self.ids(example.fields.get("text_pair", ""))
        return self.pair(first, second[: self.length // 2])

    def image(self, example: Example) -> Feature:
        """The image of an example, which is decoded where its batch is made; raises DataError if it cannot be."""
        check_image(example.fields["image"])
        return {"image": [example.fields["image"]]}

    def collate(self, features: Sequence[Feature]) -> ExampleBatch:
        """Features as one batch."""
        if not self.reads_images:
            return padded(features)
        batch = padded([{name: x for name, x in feature.items() if name != "image"} for feature in features])
        images = self.reader.read([feature["image"][0] for feature in features])
        return ExampleBatch(batch.tensors | {"images": images}, self.config.image_tokens)

    def images(self, model: nn.Module, batch: ExampleBatch) -> Tensor:
        """The images of a batch as the model reads them, in training augmented."""
        images = self.pixels.normalised(batch["images"])
        return augmented(images, self.augment) if model.training else images

    def is_longest(self, feature: Feature) -> bool:
        """Whether a row is as long as it can be, as it is where an example was cut."""
        return max(len(feature.get(name, ())) for name in ("tokens", "source", "target")) >= self.length

    def batch(self, examples: Sequence[Example], model: nn.Module) -> ExampleBatch:
        """The first row of each example, on the device of the model."""
        device = next(model.parameters()).device
        return self.collate([self.inputs(example)[0] for example in examples]).to(device)
