"""Extractive question answering."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastattn.lm.finetune.examples import Example
from fastattn.lm.finetune.scores import answer_scores
from fastattn.lm.finetune.tasks.base import Prediction, Task
from fastattn.lm.models import SpanExtractor
from fastattn.lm.train.example_rows import ExampleBatch, Feature, padded
from fastattn.lm.train.tasks import cross_entropy

_LONGEST_ANSWER = 30  # tokens, as in the papers on extractive question answering
_NONE = "no answer"
Offsets = list[tuple[int, int] | None]


class Answer(Task):
    """The part of a context that answers a question. A long context is read in windows that overlap by half.

    A model that has learned from questions without an answer (SQuAD 2.0) may give none: where the first token of a
    window is likelier than every span. Its "labels" say so.
    """

    name = "qa"
    kinds = ("encoder", "decoder")

    @classmethod
    def label_names(cls, examples: Sequence[Example]) -> tuple[str, ...]:
        return (_NONE,) if any(example.fields["answer"] == "" for example in examples) else ()

    def add_head(self, backbone: Any) -> nn.Module:
        return SpanExtractor(backbone)

    def inputs(self, example: Example) -> list[Feature]:
        return [feature for feature, _ in self._windows(example)]

    def features(self, example: Example) -> list[Feature]:
        begin = example.fields["answer_start"]
        end = begin + len(example.fields["answer"])
        rows = []
        for feature, offsets in self._windows(example):
            inside = [n for n, x in enumerate(offsets) if x is not None and x[0] < end and x[1] > begin]
            is_whole = inside and _covers(offsets, begin, end)
            rows.append(feature | {"labels": [inside[0], inside[-1]] if is_whole else [0, 0]})
        return rows

    def _windows(self, example: Example) -> list[tuple[Feature, Offsets]]:
        """Each window, and the characters of the context behind each of its tokens."""
        question = self.ids(example.fields["question"])[: self.length // 2]
        context = self.tokenizer.encode(example.fields["context"], add_special_tokens=False)
        before = len(self.special.around(question, self.length))
        room = self.length - before - 1
        starts = [0]
        while starts[-1] + room < len(context.ids):
            starts.append(starts[-1] + max(1, room // 2))
        windows = []
        for start in starts:
            feature = self.pair(question, context.ids[start : start + room])
            windows.append((feature, [*[None] * before, *context.offsets[start : start + room], None]))
        return windows

    def loss(self, model: nn.Module, batch: ExampleBatch) -> Tensor:
        starts, ends = model(batch["tokens"], **batch.more_inputs())
        return cross_entropy(starts, batch["labels"][:, 0]) + cross_entropy(ends, batch["labels"][:, 1])

    def predict(self, model: nn.Module, examples: Sequence[Example], most: int | None = None) -> list[Prediction]:
        """The "answer", its first character "start" and "end" in the context, and its "score" in [0, 1].

        The score is the probability of both ends within their window. Without an answer, "start" and "end" are None.
        """
        return [self._answer(model, example) for example in examples]

    def _answer(self, model: nn.Module, example: Example) -> Prediction:
        windows = self._windows(example)
        batch = padded([feature for feature, _ in windows]).to(next(model.parameters()).device)
        starts, ends = (x.float().log_softmax(dim=-1).cpu() for x in model(batch["tokens"], **batch.more_inputs()))
        best, place, none = -math.inf, None, math.inf
        for start, end, (_, offsets) in zip(starts, ends, windows, strict=True):
            none = min(none, float(start[0] + end[0]))
            possible = torch.tensor([x is not None for x in offsets])
            size = len(offsets)
            sums = start[:size, None] + end[None, :size]  # [first token, last token]
            allowed = possible[:, None] & possible & torch.ones(size, size).triu().tril(_LONGEST_ANSWER - 1).bool()
            score = sums.masked_fill(~allowed, -torch.inf)
            first, last = divmod(int(score.argmax()), size)
            if score[first, last] > best and (begin := offsets[first]) and (finish := offsets[last]):
                best, place = float(score[first, last]), (begin[0], finish[1])
        if place is None or (self.labels and none > best):
            return {"answer": "", "start": None, "end": None, "score": math.exp(none)}
        text = example.fields["context"][place[0] : place[1]]
        begins = place[0] + len(text) - len(text.lstrip())
        return {"answer": text.strip(), "start": begins, "end": begins + len(text.strip()), "score": math.exp(best)}

    def scores(self, predictions: Sequence[Prediction], examples: Sequence[Example]) -> dict[str, float]:
        expected = [example.fields.get("answers") or [example.fields["answer"]] for example in examples]
        return answer_scores([x["answer"] for x in predictions], expected)


def _covers(offsets: Offsets, begin: int, end: int) -> bool:
    """Whether the characters from ``begin`` to ``end`` stand in a window."""
    known = [x for x in offsets if x is not None]
    return bool(known) and known[0][0] <= begin and known[-1][1] >= end
