"""Corruption of the inputs in pre-training: masked tokens for an encoder, masked spans for an encoder-decoder.

Each function changes one row of tokens with the draws of a generator, and nothing else. The caller seeds the
generator from the run's seed and the row's place in the data, so that a resumed run hides the same tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastattn.errors import input_error
from fastattn.lm.train.data import IGNORED

Ints = NDArray[np.int64]


class Masked(NamedTuple):
    """A row with hidden tokens, and what was there: ``(S,)`` each, labels ``IGNORED`` where nothing is asked."""

    tokens: Ints
    labels: Ints


class Spans(NamedTuple):
    """A row without its hidden spans, and the spans: each span is one sentinel in ``source``, and follows the same
    sentinel in ``target``."""

    source: Ints
    target: Ints


def mask_tokens(
    tokens: Ints,
    random: np.random.Generator,
    *,
    mask: int,
    vocab_size: int,
    special: Sequence[int],
    rate: float = 0.15,
) -> Masked:
    """Hide tokens as BERT does: of those chosen, 80 % become ``mask``, 10 % a random token, 10 % stay.

    Args:
        tokens: ``(S,)``.
        random: what to draw from.
        mask: the id that stands for a hidden token.
        vocab_size: random tokens are below it; give the number of ordinary tokens.
        special: ids that are never chosen, neither to be hidden nor as the random token.
        rate: part of the tokens that is chosen.

    Raises:
        InputError: ``rate`` is not in (0, 1), or there is no ordinary token.

    Source:
        Devlin et al., "BERT", 2019, section 3.1; drawn anew for each row as in Liu et al., "RoBERTa", 2019.

    Example:
        >>> import numpy as np
        >>> from fastattn.lm.train.objectives import mask_tokens
        >>> row = np.arange(100, 300)
        >>> hidden = mask_tokens(row, np.random.default_rng(0), mask=300, vocab_size=300, special=[0, 1])
        >>> bool(((hidden.labels == row) | (hidden.labels == -100)).all())
        True
    """
    _check_rate(rate)
    ordinary = np.setdiff1d(np.arange(vocab_size), special)
    if not len(ordinary):
        raise input_error("vocab_size", vocab_size, "more than the special tokens", "Give the tokenizer's size.")
    chosen = (random.random(len(tokens)) < rate) & ~np.isin(tokens, special)
    fate = random.random(len(tokens))
    replacement = random.choice(ordinary, len(tokens))
    hidden = np.where(chosen & (fate < 0.8), mask, tokens)
    hidden = np.where(chosen & (fate >= 0.8) & (fate < 0.9), replacement, hidden)
    return Masked(hidden, np.where(chosen, tokens, IGNORED))


def corrupt_spans(
    tokens: Ints,
    random: np.random.Generator,
    *,
    sentinels: Sequence[int],
    end: int,
    rate: float = 0.15,
    mean_span: float = 3.0,
) -> Spans:
    """Hide spans as T5 does: ``rate`` of the tokens in spans of ``mean_span`` on average, at random places.

        tokens   a b c d e f g h i j
        source   a b <0> f g h <1> j
        target   <0> c d e <1> i <end>

    The lengths of source and target depend on the number of tokens alone, so rows of one length make a batch.

    Args:
        tokens: ``(S,)``, at least 2.
        random: what to draw from.
        sentinels: ids that stand for the spans, in order.
        end: id that ends the target.
        rate: part of the tokens that is hidden.
        mean_span: mean number of tokens in a span.

    Raises:
        InputError: too few tokens or sentinels, or a number out of range.

    Source:
        Raffel et al., "Exploring the limits of transfer learning with a unified text-to-text transformer", 2020,
        section 3.1.4.

    Example:
        >>> import numpy as np
        >>> from fastattn.lm.train.objectives import corrupt_spans
        >>> spans = corrupt_spans(np.arange(10, 30), np.random.default_rng(0), sentinels=[1, 2, 3], end=0)
        >>> len(spans.source), len(spans.target)
        (18, 5)
    """
    _check_rate(rate)
    if not mean_span >= 1:
        raise input_error("mean_span", mean_span, "a number >= 1", "T5 takes 3.")
    if len(tokens) < 2:
        raise input_error("tokens", f"{len(tokens)} of them", "at least 2", "A span needs something around it.")
    hidden, spans = span_counts(len(tokens), rate, mean_span)
    if len(sentinels) < spans:
        todo = f"A row of {len(tokens)} tokens has {spans} spans."
        raise input_error("sentinels", f"{len(sentinels)} of them", f"at least {spans}", todo)
    hidden_lengths = _random_parts(hidden, spans, random)
    kept_lengths = _random_parts(len(tokens) - hidden, spans, random)
    source: list[Ints] = []
    target: list[Ints] = []
    at = 0
    for sentinel, kept, gone in zip(np.array(sentinels[:spans]), kept_lengths, hidden_lengths, strict=True):
        source += [tokens[at : at + kept], sentinel[None]]
        target += [sentinel[None], tokens[at + kept : at + kept + gone]]
        at += kept + gone
    return Spans(np.concatenate(source), np.concatenate([*target, np.array([end])]))


def span_counts(length: int, rate: float = 0.15, mean_span: float = 3.0) -> tuple[int, int]:
    """Number of hidden tokens among ``length``, and number of spans they are in."""
    hidden = min(max(round(length * rate), 1), length - 1)
    return hidden, min(max(round(hidden / mean_span), 1), hidden, length - hidden)


def _random_parts(total: int, parts: int, random: np.random.Generator) -> Ints:
    """``parts`` positive numbers that add up to ``total``, every such list equally likely."""
    cuts = np.sort(random.choice(total - 1, parts - 1, replace=False)) + 1
    return np.diff(np.concatenate([[0], cuts, [total]]))


def _check_rate(rate: float) -> None:
    if not 0 < rate < 1:
        raise input_error("rate", rate, "a part in (0, 1)", "0.15 is usual.")
