"""Mixtures of corpora by weight.

The corpus that a row comes from is a pure function of the seed and the row's number, so a run over a mixture resumes
exactly, like one over a single corpus.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from fastattn.errors import DataError, input_error
from fastattn.lm.train.data import Batch, PackedRows, stack
from fastattn.lm.train.metrics import unigram_entropy
from fastattn.lm.train.tokens import Corpus, CorpusFacts

_BLOCK = 256  # rows in which the weights are kept, if none of them is very small


def split_weight(given: str) -> tuple[str, float | None]:
    """A path and its weight, as in ``books:0.7``; None where no weight is given.

    Example:
        >>> from fastattn.lm.train.mixture import split_weight
        >>> split_weight("books:0.7"), split_weight("hf:imdb:train")
        (('books', 0.7), ('hf:imdb:train', None))
    """
    path, colon, number = given.rpartition(":")
    if not colon or Path(given).exists():
        return given, None
    try:
        return path, float(number)
    except ValueError:
        return given, None


def split_weights(given: Sequence[str], flag: str) -> tuple[list[str], list[float] | None]:
    """Paths and their weights; None where no path has one.

    Raises:
        InputError: some have a weight and others have none, or one is not positive.
    """
    pairs = [split_weight(text) for text in given]
    weights = [weight for _, weight in pairs if weight is not None]
    if weights and len(weights) < len(pairs):
        without = next(path for path, weight in pairs if weight is None)
        raise input_error(flag, f"{without} without a weight", "a weight for each, or for none", "Write PATH:WEIGHT.")
    for path, weight in pairs:
        if weight is not None and not 0 < weight < math.inf:
            raise input_error(flag, f"{path}:{weight:g}", "positive weights", "They need not add up to 1.")
    return [path for path, _ in pairs], weights or None


@dataclass(frozen=True)
class Mixture:
    """Corpora with one tokenizer, and the part of the training rows that comes from each.

    Attributes:
        corpora: at least one.
        weights: positive; only their ratios count.

    Raises:
        DataError: the corpora have different tokenizers.
    """

    corpora: tuple[Corpus, ...]
    weights: tuple[float, ...] = (1.0,)

    def __post_init__(self) -> None:
        first, *others = (corpus.tokenizer().to_str() for corpus in self.corpora)
        for corpus, other in zip(self.corpora[1:], others, strict=True):
            if other != first:
                todo = f"prepare it with --tokenizer {self.corpora[0].folder}"
                raise DataError(f"{corpus.folder} has another tokenizer than {self.corpora[0].folder}: {todo}.")

    @property
    def parts(self) -> tuple[float, ...]:
        """The weights, which add up to 1."""
        return tuple(weight / sum(self.weights) for weight in self.weights)

    @property
    def facts(self) -> CorpusFacts:
        """Those of all corpora together."""
        known = [corpus.facts for corpus in self.corpora]
        if len(known) == 1:
            return known[0]
        sums: dict[str, Any] = {
            name: {split: sum(getattr(facts, name)[split] for facts in known) for split in getattr(known[0], name)}
            for name in ("documents", "tokens", "text_bytes")
        }
        prints = [[facts.fingerprint, part] for facts, part in zip(known, self.parts, strict=True)]
        fingerprint = hashlib.sha256(repr(prints).encode()).hexdigest()
        skipped = [skip for facts in known for skip in facts.skipped]
        return replace(known[0], fingerprint=fingerprint, skipped=skipped, **sums)

    def tokenizer(self) -> Tokenizer:
        return self.corpora[0].tokenizer()

    def rows(self, split: str, length: int, seed: int | None = None) -> PackedRows | MixedRows:
        """Rows of "train" or "held_out"; see ``PackedRows``."""
        packed = [PackedRows(corpus.split(split), length, seed) for corpus in self.corpora]
        return packed[0] if len(packed) == 1 else MixedRows(packed, self.parts, seed)

    def unigram_entropy(self) -> float:
        """Of the held-out tokens; see there."""
        counts = [corpus.split("held_out").counts(corpus.facts.vocab_size) for corpus in self.corpora]
        if len(counts) == 1:
            return unigram_entropy(counts[0])
        return unigram_entropy(sum(part * x / x.sum() for part, x in zip(self.parts, counts, strict=True)))

    def bytes_per_label(self) -> float:
        """Bytes of held-out text for each token that is predicted."""
        found = 0.0
        for part, corpus in zip(self.parts, self.corpora, strict=True):
            facts = corpus.facts
            found += part * facts.text_bytes["held_out"] / (facts.tokens["held_out"] - facts.documents["held_out"])
        return found


class MixedRows:
    """Rows of several corpora: in each block of some hundred rows as many of each as its part says, in random order.

    Args:
        packed: the rows of each.
        parts: of the mixture; they add up to 1.
        seed: of the order of the corpora within a block.
    """

    def __init__(self, packed: Sequence[PackedRows], parts: Sequence[float], seed: int | None = None) -> None:
        self.packed, self.seed = packed, seed
        self.block = max(_BLOCK, math.ceil(4 / min(parts)))  # so that each occurs in each
        self._edges = np.cumsum([0.0, *parts[:-1]])
        self._blocks: dict[int, tuple[NDArray[np.int64], NDArray[np.int64]]] = {}

    @property
    def num_rows(self) -> int:
        """Rows of an epoch of each corpus together."""
        return sum(rows.num_rows for rows in self.packed)

    def batch(self, step: int, rows: int) -> Batch:
        """Rows ``step * rows ... (step + 1) * rows`` of the endless sequence."""
        return stack([self.packed[corpus].row(number) for corpus, number in map(self.place, _range(step, rows))])

    def sample(self, rows: int, batch_rows: int) -> Iterator[Batch]:
        """At most ``rows`` rows, of each corpus its part, evenly spaced over its first epoch."""
        count = min(rows, self.num_rows)
        ends = [*np.round(self._edges[1:] * count).astype(int).tolist(), count]
        begins = [0, *ends[:-1]]
        for packed, begin, end in zip(self.packed, begins, ends, strict=True):
            yield from packed.sample(max(end - begin, 1), batch_rows)

    def place(self, index: int) -> tuple[int, int]:
        """The corpus that row ``index`` comes from, and the row's number in the sequence of that corpus."""
        block, place = divmod(index, self.block)
        if block not in self._blocks:
            before, after = (
                np.diff([*np.round(self._edges * n * self.block), n * self.block]) for n in (block, block + 1)
            )
            corpora = np.repeat(np.arange(len(self.packed)), (after - before).astype(np.int64))
            np.random.default_rng([self.seed or 0, block]).shuffle(corpora)
            self._blocks = {block: (corpora, before.astype(np.int64))}
        corpora, done = self._blocks[block]
        corpus = int(corpora[place])
        return corpus, int(done[corpus] + (corpora[:place] == corpus).sum())


def _range(step: int, rows: int) -> range:
    return range(step * rows, (step + 1) * rows)


def of_folders(given: str | Sequence[str]) -> Mixture:
    """The mixture of the corpora in folders that ``fastattn prepare`` made, as in ``["books:0.7", "code:0.3"]``."""
    paths, weights = split_weights([given] if isinstance(given, str) else given, "corpus")
    corpora = tuple(Corpus.open(Path(path)) for path in paths)
    equal = tuple(float(corpus.facts.tokens["train"]) for corpus in corpora)  # each token as often as the others
    return Mixture(corpora, tuple(weights) if weights else equal)
