"""Preference tuning: of two responses to a prompt, make the chosen one likelier than the rejected one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from fastattn.errors import DataError
from fastattn.lm.finetune.examples import Example
from fastattn.lm.finetune.tasks.base import Prediction
from fastattn.lm.finetune.tasks.generate import Chat
from fastattn.lm.train.data import IGNORED
from fastattn.lm.train.example_rows import ExampleBatch, Feature, padded

_SIDES = ("chosen", "rejected")


class Prefer(Chat):
    """Direct preference optimisation.

    With the log probabilities of the chosen response c and the rejected response r under the model p and under the
    model before training q, the loss of a pair is

        margin = beta * ((log p(c) - log q(c)) - (log p(r) - log q(r)))
        loss   = -log sigmoid(margin)

    Those under q are computed once, before training, so that only one model is in memory.

    Source:
        Rafailov et al., "Direct preference optimization: your language model is secretly a reward model", 2023.
    """

    name = "dpo"
    scores_text = False
    needs_reference = True
    beta = 0.1

    def _messages(self, example: Example) -> list[dict[str, str]]:
        prompt = example.fields["prompt"]
        return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt

    def prompt(self, example: Example) -> list[int]:
        if self.chat_template is not None:
            return self.template.prompt(self._messages(example))
        if not isinstance(example.fields["prompt"], str):
            raise example.error("prompt", "the model has no chat template for messages: give one with --chat-template.")
        return [*self.special.opening(), *self.ids(example.fields["prompt"])] or [self.special.end]

    @property
    def ends(self) -> tuple[int, ...]:
        return super().ends if self.chat_template is not None else (self.special.end,)

    def features(self, example: Example) -> list[Feature]:
        """A row of tokens and labels for each response; the beginning of what is too long is cut off."""
        feature: Feature = {}
        for side in _SIDES:
            try:
                tokens, labels = self._row(example, example.fields[side])
            except DataError as error:
                raise example.error(side, str(error)) from error
            feature |= {side: tokens, f"{side}_labels": labels}
        return [feature | {"labels": [0]}]  # one label for each pair

    def _row(self, example: Example, response: str) -> tuple[list[int], list[int]]:
        prompt = self.prompt(example)
        if self.chat_template is not None:
            messages = [*self._messages(example), {"role": "assistant", "content": response}]
            tokens, learned = self.template.learned(messages)
            labels = [
                x if is_learned and n >= len(prompt) else IGNORED
                for n, (x, is_learned) in enumerate(zip(tokens, learned, strict=True))
            ]
            return tokens[:-1][-self.length :], labels[1:][-self.length :]
        answer = [*self.ids(response)[: self.length - 1], self.special.end]
        prompt = prompt[-(self.length - len(answer) + 1) :]
        return [*prompt, *answer[:-1]], [IGNORED] * (len(prompt) - 1) + answer

    def with_reference(self, model: nn.Module, features: Sequence[Feature], show_progress: bool) -> list[Feature]:
        """The features with the log probabilities of both responses under the model before training."""
        device, found = next(model.parameters()).device, list[Feature]()
        was_training = model.training
        model.eval()
        with (
            torch.no_grad(),
            tqdm(total=len(features), desc="reference", unit="pair", disable=not show_progress) as bar,
        ):
            for feature in features:  # one by one: a pair has the same numbers whatever it is padded with
                values = self._log_probabilities(model, padded([feature]).to(device))[:, 0].tolist()
                found.append(feature | {"reference": values})
                bar.update()
        model.train(was_training)
        return found

    def _log_probabilities(self, model: nn.Module, batch: ExampleBatch) -> Tensor:
        """Of the chosen and of the rejected responses, ``(2, B)``."""
        width = max(batch[side].shape[1] for side in _SIDES)
        tokens, labels = (
            torch.cat([F.pad(batch[side + end], (0, width - batch[side].shape[1]), value=fill) for side in _SIDES])
            for end, fill in (("", 0), ("_labels", IGNORED))
        )
        logits = model(tokens).float()  # [2B, S, V]; padding follows the tokens, which do not see it
        nats = F.cross_entropy(logits.transpose(1, 2), labels, ignore_index=IGNORED, reduction="none").sum(-1)
        return -nats.reshape(2, -1)

    def margins(self, model: nn.Module, batch: ExampleBatch) -> Tensor:
        """The margin of each pair; it is positive where the model prefers the chosen response more than before."""
        gained = self._log_probabilities(model, batch) - batch["reference"].T
        return self.beta * (gained[0] - gained[1])

    def loss(self, model: nn.Module, batch: ExampleBatch) -> Tensor:
        return -F.logsigmoid(self.margins(model, batch)).sum()

    def batch_scores(self, model: nn.Module, batch: ExampleBatch) -> dict[str, float]:
        margins = self.margins(model, batch)
        return {"preference accuracy": float((margins > 0).sum()), "margin": float(margins.sum())}

    def scores(self, predictions: Sequence[Prediction], examples: Sequence[Example]) -> dict[str, float]:
        """None: a generated response is neither right nor wrong."""
        return {}

    def is_longest(self, feature: Feature) -> bool:
        return max(len(feature[side]) for side in _SIDES) >= self.length

    def learned_text(self, example: Example) -> str:
        return example.fields["chosen"]

    def add_head(self, backbone: Any) -> nn.Module:
        return backbone
