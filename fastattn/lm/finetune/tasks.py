"""The tasks of fine-tuning: for each the head of its model, how examples become tokens and labels, the loss, how the
model's answers are read, and how they are scored. What fields an example has stands in ``examples.py``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from fastattn.errors import input_error
from fastattn.lm.finetune.examples import Example
from fastattn.lm.finetune.scores import answer_scores, entity_scores, is_bio, label_scores, text_scores
from fastattn.lm.generate import Sampling, generate
from fastattn.lm.generate.decode import ENDED
from fastattn.lm.models import SequenceClassifier, SpanExtractor, TokenClassifier, TransformerConfig
from fastattn.lm.train.data import IGNORED
from fastattn.lm.train.example_rows import ExampleBatch, Feature, padded
from fastattn.lm.train.special_tokens import SpecialTokens
from fastattn.lm.train.tasks import cross_entropy, target_loss

_LONGEST_ANSWER = 30  # tokens, as in the papers on extractive question answering


class Task(ABC):
    """A task, for one model.

    Args:
        tokenizer: of the model.
        config: of the model.
        labels: names of the labels, for the tasks that have them.
        length: most tokens in a row; None is the model's.

    Raises:
        InputError: the model is of a kind that cannot serve the task, or ``length`` is more than it can read.
    """

    name: ClassVar[str]
    kinds: ClassVar[tuple[str, ...]]  # of the models that can be trained for it; the first is the usual one
    label_field: ClassVar[str | None] = None
    answer_field: ClassVar[str | None] = None  # of the tasks whose answer is a text that the model writes

    def __init__(
        self,
        tokenizer: Tokenizer,
        config: TransformerConfig,
        labels: Sequence[str] = (),
        length: int | None = None,
    ) -> None:
        if config.kind not in self.kinds:
            todo = f"Take a checkpoint or a preset of that kind for {self.name}."
            raise input_error("model", f"one of kind {config.kind}", " or ".join(self.kinds), todo)
        if length is not None and not 8 <= length <= config.max_length:
            allowed = f"8 ... {config.max_length}, the longest row of the model"
            raise input_error("length", length, allowed, "Leave it out for the longest.")
        self.tokenizer, self.length, self.labels = tokenizer, length or config.max_length, tuple(labels)
        self.has_types = config.token_types > 1
        self.special = SpecialTokens.of(tokenizer)
        self.numbers = {label: number for number, label in enumerate(labels)}

    @abstractmethod
    def add_head(self, backbone: Any) -> nn.Module:
        """The model of the task."""

    @abstractmethod
    def features(self, example: Example) -> list[Feature]:
        """The rows that an example becomes: one, or several if it is too long."""

    @abstractmethod
    def loss(self, model: nn.Module, batch: ExampleBatch) -> Tensor:
        """Nats, summed over the labels of the batch."""

    @abstractmethod
    def answers(self, model: nn.Module, examples: Sequence[Example]) -> list[Any]:
        """The model's answers to a few examples."""

    @abstractmethod
    def scores(self, answers: Sequence[Any], examples: Sequence[Example]) -> dict[str, float]:
        """Scores of the answers, by name."""

    def ids(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def number(self, example: Example, label: str) -> int:
        """The number of a label; raises DataError if the model has not learned it."""
        if label not in self.numbers:
            known = ", ".join(self.labels[:10]) + (", ..." if len(self.labels) > 10 else "")
            raise example.error(str(self.label_field), f"the model knows no label {label!r}, but {known}.")
        return self.numbers[label]

    def pair(self, first: list[int], second: list[int]) -> Feature:
        """``begin first end second end``, ``first`` cut to what fits, and what belongs to which."""
        room = self.length - len(second) - bool(second)
        tokens = self.special.around(first, room)
        types = [0] * len(tokens)
        if second:
            tokens, types = [*tokens, *second, self.special.end], types + [1] * (len(second) + 1)
        return {"tokens": tokens} | ({"token_types": types} if self.has_types else {})

    def is_longest(self, feature: Feature) -> bool:
        """Whether a row is as long as it can be, as it is where an example was cut."""
        return max(len(feature.get(name, ())) for name in ("tokens", "source", "target")) >= self.length

    def batch(self, examples: Sequence[Example], model: nn.Module) -> ExampleBatch:
        """The first row of each example, on the device of the model."""
        device = next(model.parameters()).device
        return padded([self.features(example)[0] for example in examples]).to(device)


def label_names(task: type[Task], examples: Sequence[Example]) -> tuple[str, ...]:
    """All labels of the examples, sorted; none for a task without."""
    if task.label_field is None:
        return ()
    given = (example.fields[task.label_field] for example in examples)
    return tuple(sorted({name for x in given for name in ([x] if isinstance(x, str) else x)}))


class Classify(Task):
    """A label for a text, or for two that are compared."""

    name = "classify"
    kinds = ("encoder", "decoder")
    label_field = "label"

    def add_head(self, backbone: Any) -> nn.Module:
        return SequenceClassifier(backbone, len(self.labels), labels=self.labels)

    def features(self, example: Example) -> list[Feature]:
        first, second = self.ids(example.fields["text"]), self.ids(example.fields.get("text_pair", ""))
        label = [self.number(example, example.fields["label"])]
        return [self.pair(first, second[: self.length // 2]) | {"labels": label}]

    def loss(self, model: nn.Module, batch: ExampleBatch) -> Tensor:
        return cross_entropy(model(batch["tokens"], **batch.more_inputs()), batch["labels"][:, 0])

    def answers(self, model: nn.Module, examples: Sequence[Example]) -> list[str]:
        batch = self.batch(examples, model)
        logits = model(batch["tokens"], **batch.more_inputs())
        return [self.labels[number] for number in logits.argmax(dim=-1).tolist()]

    def scores(self, answers: Sequence[str], examples: Sequence[Example]) -> dict[str, float]:
        expected = [self.number(example, example.fields["label"]) for example in examples]
        return label_scores([self.numbers[answer] for answer in answers], expected, len(self.labels))


class Tag(Task):
    """A label for each word. It is learned and read at the word's first token; what does not fit counts as wrong.

    Where the labels are BIO, whole entities are scored, too.
    """

    name = "tag"
    kinds = ("encoder", "decoder")
    label_field = "labels"

    def add_head(self, backbone: Any) -> nn.Module:
        return TokenClassifier(backbone, len(self.labels), labels=self.labels)

    def features(self, example: Example) -> list[Feature]:
        tokens, labels = self.special.opening(), [IGNORED] * len(self.special.opening())
        for word, label in zip(example.fields["words"], example.fields["labels"], strict=True):
            ids = self.ids(" " + word) or [self.special.end]  # a word that the tokenizer drops has a place, too
            tokens += ids
            labels += [self.number(example, label), *[IGNORED] * (len(ids) - 1)][: len(ids)]
        tokens, labels = [*tokens[: self.length - 1], self.special.end], [*labels[: self.length - 1], IGNORED]
        return [{"tokens": tokens, "labels": labels}]

    def loss(self, model: nn.Module, batch: ExampleBatch) -> Tensor:
        return cross_entropy(model(batch["tokens"], **batch.more_inputs()), batch["labels"])

    def answers(self, model: nn.Module, examples: Sequence[Example]) -> list[list[str | None]]:
        batch = self.batch(examples, model)
        chosen = model(batch["tokens"], **batch.more_inputs()).argmax(dim=-1)
        found: list[list[str | None]] = []
        for example, row, labels in zip(examples, chosen, batch["labels"], strict=True):
            names: list[str | None] = [self.labels[number] for number in row[labels != IGNORED].tolist()]
            found.append(names + [None] * (len(example.fields["words"]) - len(names)))
        return found

    def scores(self, answers: Sequence[list[str | None]], examples: Sequence[Example]) -> dict[str, float]:
        expected = [self.number(example, label) for example in examples for label in example.fields["labels"]]
        # A word without an answer is given a label beyond all others, which is never right.
        given = [len(self.labels) if name is None else self.numbers[name] for names in answers for name in names]
        found = label_scores(given, expected, len(self.labels) + (len(self.labels) in given))
        if is_bio(self.labels):
            spans = [[name or "O" for name in names] for names in answers]
            found |= entity_scores(spans, [example.fields["labels"] for example in examples])
        return found


class Answer(Task):
    """The part of a context that answers a question. A long context is read in windows that overlap by half."""

    name = "qa"
    kinds = ("encoder", "decoder")

    def add_head(self, backbone: Any) -> nn.Module:
        return SpanExtractor(backbone)

    def features(self, example: Example) -> list[Feature]:
        return [feature for feature, _ in self._windows(example)]

    def _windows(self, example: Example) -> list[tuple[Feature, list[tuple[int, int] | None]]]:
        """Each window and the characters of the context behind each of its tokens. Without the answer it is token 0."""
        question = self.ids(example.fields["question"])[: self.length // 2]
        context = self.tokenizer.encode(example.fields["context"], add_special_tokens=False)
        before = len(self.special.around(question, self.length))
        room = self.length - before - 1
        begin = example.fields["answer_start"]
        end = begin + len(example.fields["answer"])
        inside = [n for n, (first, last) in enumerate(context.offsets) if first < end and last > begin]
        starts = [0]
        while starts[-1] + room < len(context.ids):
            starts.append(starts[-1] + max(1, room // 2))
        windows = []
        for start in starts:
            feature = self.pair(question, context.ids[start : start + room])
            offsets = [None] * before + context.offsets[start : start + room]
            is_whole = inside and start <= inside[0] and inside[-1] < start + room
            places = [inside[0] - start + before, inside[-1] - start + before] if is_whole else [0, 0]
            windows.append((feature | {"labels": places}, [*offsets, None]))
        return windows

    def loss(self, model: nn.Module, batch: ExampleBatch) -> Tensor:
        starts, ends = model(batch["tokens"], **batch.more_inputs())
        return cross_entropy(starts, batch["labels"][:, 0]) + cross_entropy(ends, batch["labels"][:, 1])

    def answers(self, model: nn.Module, examples: Sequence[Example]) -> list[str]:
        return [self._answer(model, example) for example in examples]

    def _answer(self, model: nn.Module, example: Example) -> str:
        windows = self._windows(example)
        batch = padded([feature for feature, _ in windows]).to(next(model.parameters()).device)
        starts, ends = (x.float().log_softmax(dim=-1).cpu() for x in model(batch["tokens"], **batch.more_inputs()))
        best, text = -torch.inf, ""
        for start, end, (_, offsets) in zip(starts, ends, windows, strict=True):
            possible = torch.tensor([place is not None for place in offsets])
            size = len(offsets)
            sums = start[:size, None] + end[None, :size]  # [first token, last token]
            allowed = possible[:, None] & possible & torch.ones(size, size).triu().tril(_LONGEST_ANSWER - 1).bool()
            score = sums.masked_fill(~allowed, -torch.inf)
            first, last = divmod(int(score.argmax()), size)
            if score[first, last] > best and (begin := offsets[first]) and (finish := offsets[last]):
                best, text = float(score[first, last]), example.fields["context"][begin[0] : finish[1]].strip()
        return text

    def scores(self, answers: Sequence[str], examples: Sequence[Example]) -> dict[str, float]:
        return answer_scores(answers, [example.fields["answer"] for example in examples])


class _Writing(Task):
    """A task whose answer is a text that the model writes."""

    answer_field: ClassVar[str]

    def add_head(self, backbone: Any) -> nn.Module:
        return backbone

    def write(self, model: Any, begin: list[list[int]], source: list[list[int]] | None = None) -> list[str]:
        """The likeliest next tokens of each row, one after the other, up to its end, as text."""
        sampling, end = Sampling(temperature=0), self.special.end
        steps = generate(model, begin, self.length, sampling, source=source, stop_token=end)
        rows = torch.stack(list(steps), dim=1).tolist()
        return [self.tokenizer.decode([token for token in row if token not in (end, ENDED)]) for row in rows]

    def scores(self, answers: Sequence[str], examples: Sequence[Example]) -> dict[str, float]:
        return text_scores(answers, [example.fields[self.answer_field] for example in examples])


class Seq2Seq(_Writing):
    """A text for a text: translation, summarisation."""

    name = "seq2seq"
    kinds = ("encoder-decoder",)
    answer_field = "target"

    def features(self, example: Example) -> list[Feature]:
        target = self.ids(example.fields["target"])[: self.length - 1]
        source = self.special.around(self.ids(example.fields["source"]), self.length)
        return [
            {
                "source": source,
                "target": [self.special.target, *target],
                "labels": [*target, self.special.end],
            }
        ]

    def loss(self, model: nn.Module, batch: ExampleBatch) -> Tensor:
        return target_loss(model, batch)

    def answers(self, model: Any, examples: Sequence[Example]) -> list[str]:
        sources = [self.features(example)[0]["source"] for example in examples]
        return self.write(model, [[self.special.target] for _ in sources], sources)


class Instruct(_Writing):
    """A response to a prompt, right after it: learned from the tokens of the response alone."""

    name = "instruct"
    kinds = ("decoder",)
    answer_field = "response"

    def features(self, example: Example) -> list[Feature]:
        response = self.ids(example.fields["response"])[: self.length - 1]
        prompt = self.prompt(example)[-(self.length - len(response)) :]
        labels = [IGNORED] * (len(prompt) - 1) + [*response, self.special.end]
        return [{"tokens": prompt + response, "labels": labels}]

    def prompt(self, example: Example) -> list[int]:
        return [*self.special.opening(), *self.ids(example.fields["prompt"])] or [self.special.end]

    def loss(self, model: nn.Module, batch: ExampleBatch) -> Tensor:
        return cross_entropy(model(batch["tokens"], **batch.more_inputs()), batch["labels"])

    def answers(self, model: Any, examples: Sequence[Example]) -> list[str]:
        return self.write(model, [self.prompt(example)[-(self.length // 2) :] for example in examples])


TASKS: dict[str, type[Task]] = {task.name: task for task in (Classify, Tag, Answer, Seq2Seq, Instruct)}
