"""Objectives of pre-training: the model, the rows and the loss of each.

A loss is a sum over the labels of a batch, in nats. Fine-tuning tasks are in ``fastattn.lm.finetune``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn

from fastattn.errors import input_error
from fastattn.lm.models import PRESETS, MaskedLM, TransformerConfig, make_model
from fastattn.lm.train.data import IGNORED, Batch, PackedRows
from fastattn.lm.train.example_rows import ExampleBatch, padded
from fastattn.lm.train.mixture import MixedRows
from fastattn.lm.train.objectives import corrupt_spans, mask_tokens, span_counts
from fastattn.lm.train.special_tokens import SpecialTokens, mask_token, sentinel_tokens
from fastattn.lm.train.tokens import vocabulary_size

_FAMILIES = {  # of presets of one size
    "decoder": "", "encoder": "encoder-", "encoder-decoder": "seq2seq-", "vision": "vit-", "image-text": "image-text-",
}  # fmt: skip
_HELD_OUT = 1 << 31  # seeds what is hidden in held-out rows; those of training are smaller


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """In nats, summed over the labels ``(...)`` that are not ``IGNORED``, of logits ``(..., V)``."""
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=IGNORED, reduction="sum")


def next_token_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Cross entropy of each token's successor; of a hidden token, where the batch asks for those."""
    logits = model(batch.tokens, positions=batch.positions, segment_ids=batch.segment_ids)  # [B, S, V]
    return cross_entropy(logits, batch.labels)


def target_loss(model: nn.Module, batch: ExampleBatch) -> Tensor:
    """Cross entropy of each token of a target, given its source and the target before it."""
    logits = model(batch["source"], batch["target"], source_mask=batch.get("source_mask"))
    return cross_entropy(logits, batch["labels"])


class Causal:
    """Each token from those before it: a decoder.

    Args:
        tokenizer: of the text; receives the special tokens that the objective needs.
        length: tokens in a row.
    """

    name: ClassVar[str] = "causal"
    kind: ClassVar[str] = "decoder"

    def __init__(self, tokenizer: Tokenizer, length: int) -> None:
        self.length = length

    def model(self, config: TransformerConfig) -> nn.Module:
        """A model with fresh weights."""
        return make_model(config)

    def rows(self, packed: PackedRows | MixedRows) -> Any:
        """Rows for the trainer, made from rows of packed documents."""
        return packed

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """Nats, summed over the labels of the batch."""
        return next_token_loss(model, batch)

    def flops_per_label(self, model: Any) -> float:
        """FLOPs of training for each label."""
        return model.flops_per_token(self.length)


class Masked(Causal):
    """Hidden tokens from all others in their document: an encoder. See ``mask_tokens``."""

    name = "masked"
    kind = "encoder"
    rate: ClassVar[float] = 0.15

    def __init__(self, tokenizer: Tokenizer, length: int) -> None:
        super().__init__(tokenizer, length)
        special = SpecialTokens.of(tokenizer)
        self.ordinary = vocabulary_size(tokenizer)
        self.mask = mask_token(tokenizer)
        self.special = [x for x in (special.begin, special.end, self.mask) if x is not None]

    def model(self, config: TransformerConfig) -> nn.Module:
        return MaskedLM(make_model(config))  # type: ignore[arg-type]  # which refuses what is no encoder

    def rows(self, packed: PackedRows | MixedRows) -> HiddenRows:
        return HiddenRows(packed, self)

    def hide(self, batch: Batch, random: Sequence[np.random.Generator]) -> Batch:
        options: dict[str, Any] = {"mask": self.mask, "vocab_size": self.ordinary, "special": self.special}
        rows = [
            mask_tokens(tokens, draws, rate=self.rate, **options)
            for tokens, draws in zip(batch.tokens.numpy(), random, strict=True)
        ]
        tokens, labels = (torch.from_numpy(np.stack(x)) for x in zip(*rows, strict=True))
        return dataclasses.replace(batch, tokens=tokens, labels=labels)

    def flops_per_label(self, model: Any) -> float:
        return model.flops_per_token(self.length) / self.rate


class Span(Causal):
    """Hidden spans from the rest of the row: an encoder-decoder. See ``corrupt_spans``.

    A row is one text to it, the documents in it divided by their special tokens, as for T5.
    """

    name = "span"
    kind = "encoder-decoder"

    def __init__(self, tokenizer: Tokenizer, length: int) -> None:
        super().__init__(tokenizer, length)
        self.special_tokens = SpecialTokens.of(tokenizer)
        self.sentinels = sentinel_tokens(tokenizer, span_counts(length)[1])

    def rows(self, packed: PackedRows | MixedRows) -> HiddenRows:
        return HiddenRows(packed, self)

    def hide(self, batch: Batch, random: Sequence[np.random.Generator]) -> ExampleBatch:
        features = []
        for row, segments, draws in zip(batch.tokens.numpy(), batch.segment_ids.numpy(), random, strict=True):
            tokens = _without_padding(row, segments, self.special_tokens)
            spans = corrupt_spans(tokens, draws, sentinels=self.sentinels, end=self.special_tokens.end)
            target = spans.target.tolist()
            feature = {
                "source": spans.source.tolist(),
                "target": [self.special_tokens.target, *target[:-1]],
                "labels": target,
            }
            features.append(feature)
        return padded(features)

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        return target_loss(model, batch)

    def flops_per_label(self, model: Any) -> float:
        hidden, spans = span_counts(self.length)
        return model.flops_per_token(hidden + spans + 1, self.length - hidden + spans)


def _without_padding(row: np.ndarray, segments: np.ndarray, special: SpecialTokens) -> np.ndarray:
    """A row of packed documents without the padding after the last of them, which is a segment of zeros.

    A document that begins with its mark and nothing more looks the same in one token, which is no loss.
    """
    last = segments == segments[-1]
    is_padding = segments[-1] > 0 and not row[last].any() and row[~last][-1] == special.end
    return row[~last] if is_padding else row


class HiddenRows:
    """Packed rows with something hidden in each, drawn from the run's seed and the row's number in the sequence."""

    def __init__(self, rows: PackedRows | MixedRows, objective: Masked | Span) -> None:
        self.packed, self.objective = rows, objective

    def batch(self, step: int, rows: int) -> Any:
        """As of ``PackedRows``."""
        return self._hidden(self.packed.batch(step, rows), self.packed.seed or 0, step * rows)

    def sample(self, rows: int, batch_rows: int) -> Iterator[Any]:
        """As of ``PackedRows``; the same is hidden each time."""
        first = 0
        for batch in self.packed.sample(rows, batch_rows):
            yield self._hidden(batch, _HELD_OUT, first)
            first += len(batch.tokens)

    def _hidden(self, batch: Batch, seed: int, first: int) -> Any:
        return self.objective.hide(batch, [np.random.default_rng([seed, first + n]) for n in range(len(batch.tokens))])


OBJECTIVES: dict[str, type[Causal]] = {objective.name: objective for objective in (Causal, Masked, Span)}


def preset_for(kinds: Sequence[str], name: str) -> str:
    """The preset that ``name`` means where a model of one of ``kinds`` is wanted: "tiny" may be "encoder-tiny".

    Raises:
        InputError: there is no preset of this name and such a kind.
    """
    known = {key: fields.get("kind", "decoder") for key, fields in PRESETS.items()}
    for kind in kinds:
        for candidate in (_FAMILIES[kind] + name, name):
            if known.get(candidate) == kind:
                return candidate
    usable = ", ".join(key for key, kind in known.items() if kind in kinds)
    raise input_error("preset", repr(name), usable, f"A model of kind {' or '.join(kinds)} is needed.")


def find_objective(name: str) -> type[Causal]:
    """An objective by name; raises InputError if there is none."""
    if name not in OBJECTIVES:
        raise input_error("objective", repr(name), ", ".join(OBJECTIVES), "causal is that of language models.")
    return OBJECTIVES[name]
