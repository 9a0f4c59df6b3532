"""Tagging: a label for each word."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from fastattn.lm.finetune.examples import Example
from fastattn.lm.finetune.scores import entities, entity_scores, is_bio, label_scores
from fastattn.lm.finetune.tasks.base import Prediction, Task
from fastattn.lm.models import TokenClassifier
from fastattn.lm.train.data import IGNORED
from fastattn.lm.train.example_rows import ExampleBatch, Feature
from fastattn.lm.train.tasks import cross_entropy


class Tag(Task):
    """A label for each word. It is learned and read at the word's first token; what does not fit counts as wrong.

    Where the labels are BIO, whole entities are scored, too.
    """

    name = "tag"
    kinds = ("encoder", "decoder")
    label_field = "labels"

    def add_head(self, backbone: Any) -> nn.Module:
        return TokenClassifier(backbone, len(self.labels), labels=self.labels)

    def _tokens(self, example: Example) -> tuple[list[int], list[int]]:
        """The tokens of a row, and the place of the first token of each word that fits."""
        tokens, starts = self.special.opening(), []
        for word in example.fields["words"]:
            starts.append(len(tokens))
            tokens += self.ids(" " + word) or [self.special.end]  # a word that the tokenizer drops has a place, too
        last = self.length - 1
        return [*tokens[:last], self.special.end], [start for start in starts if start < last]

    def inputs(self, example: Example) -> list[Feature]:
        return [{"tokens": self._tokens(example)[0]}]

    def features(self, example: Example) -> list[Feature]:
        tokens, starts = self._tokens(example)
        labels = [IGNORED] * len(tokens)
        for start, label in zip(starts, example.fields["labels"], strict=False):
            labels[start] = self.number(example, label)
        return [{"tokens": tokens, "labels": labels}]

    def loss(self, model: nn.Module, batch: ExampleBatch) -> Tensor:
        return cross_entropy(model(batch["tokens"], **batch.more_inputs()), batch["labels"])

    def predict(self, model: nn.Module, examples: Sequence[Example], most: int | None = None) -> list[Prediction]:
        """The "labels" of the words, None for those that do not fit, their "probabilities", and BIO's "spans"."""
        batch = self.batch(examples, model)
        chances = model(batch["tokens"], **batch.more_inputs()).float().softmax(dim=-1).cpu()
        found = []
        for example, row in zip(examples, chances, strict=True):
            best, numbers = row[self._tokens(example)[1]].max(dim=-1)
            rest = [None] * (len(example.fields["words"]) - len(numbers))
            labels = [self.labels[number] for number in numbers.tolist()] + rest
            prediction: Prediction = {"labels": labels, "probabilities": best.tolist() + rest}
            if is_bio(self.labels):
                prediction["spans"] = _spans(example.fields["words"], labels)
            found.append(prediction)
        return found

    def scores(self, predictions: Sequence[Prediction], examples: Sequence[Example]) -> dict[str, float]:
        answers = [x["labels"] for x in predictions]
        expected = [self.number(example, label) for example in examples for label in example.fields["labels"]]
        # A word without an answer is given a label beyond all others, which is never right.
        given = [len(self.labels) if name is None else self.numbers[name] for names in answers for name in names]
        found = label_scores(given, expected, len(self.labels) + (len(self.labels) in given))
        if is_bio(self.labels):
            spans = [[name or "O" for name in names] for names in answers]
            found |= entity_scores(spans, [example.fields["labels"] for example in examples])
        return found


def _spans(words: Sequence[str], labels: Sequence[str | None]) -> list[dict[str, Any]]:
    """The entities that BIO labels mark: their kind, their text, and their first word and the one after the last."""
    found = sorted(entities(name or "O" for name in labels), key=lambda entity: entity[1])
    return [
        {"label": kind, "text": " ".join(words[begin:end]), "start": begin, "end": end} for kind, begin, end in found
    ]
