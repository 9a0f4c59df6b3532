"""Tasks whose answer is generated text."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fastattn.errors import DataError
from fastattn.lm.finetune.examples import Example
from fastattn.lm.finetune.scores import Baseline, first_sentence, text_scores
from fastattn.lm.finetune.tasks.base import Prediction, Task
from fastattn.lm.generate import ChatTemplate, Sampling, generate
from fastattn.lm.generate.decode import ENDED
from fastattn.lm.train.data import IGNORED
from fastattn.lm.train.example_rows import ExampleBatch, Feature
from fastattn.lm.train.tasks import cross_entropy, target_loss


class _Generates(Task):
    """A task whose answer is generated text."""

    answer_field: ClassVar[str]

    @property
    def ends(self) -> tuple[int, ...]:
        """The tokens that end an answer."""
        return (self.special.end,)

    def add_head(self, backbone: Any) -> nn.Module:
        return backbone

    def write(
        self, model: Any, begin: list[list[int]], most: int | None, source: list[list[int]] | Tensor | None = None
    ) -> list[Prediction]:
        """The likeliest next tokens of each row, one after the other, up to its end, as text."""
        count = min(most or self.length, self.length)
        steps = generate(model, begin, count, Sampling(temperature=0), source=source, stop_token=self.ends)
        rows = torch.stack(list(steps), dim=1).tolist()
        texts = (self.tokenizer.decode([x for x in row if x not in (*self.ends, ENDED)]) for row in rows)
        return [{self.answer_field: text} for text in texts]

    def scores(self, predictions: Sequence[Prediction], examples: Sequence[Example]) -> dict[str, float]:
        given = [x[self.answer_field] for x in predictions]
        return text_scores(given, [example.fields[self.answer_field] for example in examples])


class Seq2Seq(_Generates):
    """A text for a text: translation, summarisation."""

    name = "seq2seq"
    kinds = ("encoder-decoder",)
    answer_field = "target"

    def inputs(self, example: Example) -> list[Feature]:
        return [{"source": self.special.around(self.ids(example.fields["source"]), self.length)}]

    def features(self, example: Example) -> list[Feature]:
        target = self.ids(example.fields["target"])[: self.length - 1]
        labels = [*target, self.special.end]
        return [self.inputs(example)[0] | {"target": [self.special.target, *target], "labels": labels}]

    def loss(self, model: nn.Module, batch: ExampleBatch) -> Tensor:
        return target_loss(model, batch)

    def predict(self, model: Any, examples: Sequence[Example], most: int | None = None) -> list[Prediction]:
        """The "target"."""
        sources = [self.inputs(example)[0]["source"] for example in examples]
        return self.write(model, [[self.special.target] for _ in sources], most, sources)

    def baseline(self, examples: Sequence[Example]) -> Baseline:
        """The lead of a text, which summaries have to beat; of a single sentence, a copy of it."""
        first = [{"target": first_sentence(example.fields["source"])} for example in examples]
        return Baseline("the first sentence of the source", self.scores(first, examples))


class _Responds(_Generates):
    """A decoder that goes on after a prompt."""

    kinds: ClassVar[tuple[str, ...]] = ("decoder",)
    answer_field = "response"

    @abstractmethod
    def prompt(self, example: Example) -> list[int]:
        """The tokens before the response."""

    def inputs(self, example: Example) -> list[Feature]:
        return [{"tokens": self.prompt(example)}]

    def loss(self, model: nn.Module, batch: ExampleBatch) -> Tensor:
        return cross_entropy(model(batch["tokens"], **batch.more_inputs()), batch["labels"])

    def predict(self, model: Any, examples: Sequence[Example], most: int | None = None) -> list[Prediction]:
        """The "response"."""
        return self.write(model, [self.prompt(example)[-(self.length // 2) :] for example in examples], most)


class Instruct(_Responds):
    """A response to a prompt, right after it: learned from the tokens of the response alone."""

    name = "instruct"

    def features(self, example: Example) -> list[Feature]:
        response = self.ids(example.fields[self.answer_field])[: self.length - 1]
        prompt = self.prompt(example)[-(self.length - len(response)) :]
        labels = [IGNORED] * (len(prompt) - 1) + [*response, self.special.end]
        return [{"tokens": prompt + response, "labels": labels}]

    def prompt(self, example: Example) -> list[int]:
        return [*self.special.opening(), *self.ids(example.fields["prompt"])] or [self.special.end]


class Chat(_Responds):
    """The assistant's turns of a conversation, each learned after all that precedes it.

    The template makes the tokens. A conversation that is too long loses its beginning.
    """

    name = "chat"

    @cached_property
    def template(self) -> ChatTemplate:
        begin, end, _ = self.special.names(self.tokenizer)
        return ChatTemplate(self.chat_template, self.tokenizer, begin=begin, end=end)

    @property
    def ends(self) -> tuple[int, ...]:
        return (*super().ends, *self.template.stops)

    def _messages(self, example: Example) -> list[dict[str, str]]:
        return [*example.fields["messages"], {"role": "assistant", "content": example.fields["response"]}]

    def learned_text(self, example: Example) -> str:
        return "".join(x["content"] for x in self._messages(example) if x["role"] == "assistant")

    def features(self, example: Example) -> list[Feature]:
        try:
            tokens, learned = self.template.learned(self._messages(example))
        except DataError as error:
            raise example.error("messages", str(error)) from error
        labels = [token if is_learned else IGNORED for token, is_learned in zip(tokens, learned, strict=True)]
        return [{"tokens": tokens[:-1][-self.length :], "labels": labels[1:][-self.length :]}]

    def prompt(self, example: Example) -> list[int]:
        return self.template.prompt(example.fields["messages"])
