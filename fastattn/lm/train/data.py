"""Packing documents into rows. The batch of a step is a pure function of (data, seed, step), so runs can resume.

The documents, in an order shuffled for each epoch, are laid end to end and cut into rows of equal length. The label of
a token is the one that follows it in its own document, and is left out at a document's end. So within an epoch every
token is an input once, and every token but the first of its document a label once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastattn.errors import DataError, input_error
from fastattn.lm.train.tokens import TokenFile

IGNORED = -100  # torch's default ignore_index of the cross entropy


@dataclass(frozen=True)
class Batch:
    """Rows of packed documents, all ``(B, S)`` and int64, but for ``segment_ids``, int32.

    Attributes:
        tokens: inputs.
        labels: the token that follows each input in its document; ``IGNORED`` where none does.
        positions: of each token in its document's part of the row, from 0.
        segment_ids: number of the document within the row, from 0. Padding is a segment of its own.
    """

    tokens: Tensor
    labels: Tensor
    positions: Tensor
    segment_ids: Tensor

    def to(self, device: torch.device) -> Batch:
        if device.type != "cuda":
            return Batch(*(x.to(device) for x in self._tensors()))
        return Batch(*(x.pin_memory().to(device, non_blocking=True) for x in self._tensors()))

    def split(self, rows: int) -> Iterator[Batch]:
        """Parts of at most ``rows`` rows."""
        for parts in zip(*(x.split(rows) for x in self._tensors()), strict=True):
            yield Batch(*parts)

    def num_labels(self) -> int:
        return int((self.labels != IGNORED).sum())

    def _tensors(self) -> tuple[Tensor, ...]:
        return self.tokens, self.labels, self.positions, self.segment_ids


class PackedRows:
    """The rows of a token file.

    Args:
        file: the documents.
        length: S, tokens in a row.
        seed: of the order of documents and rows; None keeps the order of the file.

    Raises:
        InputError: ``length`` is not positive.
        DataError: the file has no tokens.
    """

    def __init__(self, file: TokenFile, length: int, seed: int | None = None) -> None:
        if length < 1:
            raise input_error("length", length, "a positive int", "It is the number of tokens in a row.")
        if not len(file.tokens):
            raise DataError("The token file is empty: remove its folder and prepare the data again.")
        self.file, self.length, self.seed = file, length, seed
        self._epochs: dict[int, _Epoch] = {}

    @property
    def num_rows(self) -> int:
        """Rows in an epoch; the last one may be padded."""
        return -(-len(self.file.tokens) // self.length)

    def batch(self, step: int, rows: int) -> Batch:
        """Rows ``step * rows ... (step + 1) * rows`` of the endless sequence of epochs."""
        return stack([self.row(index) for index in range(step * rows, (step + 1) * rows)])

    def row(self, index: int) -> Row:
        """Row ``index`` of the endless sequence of epochs."""
        return self._row(*divmod(index, self.num_rows))

    def sample(self, rows: int, batch_rows: int) -> Iterator[Batch]:
        """At most ``rows`` rows, evenly spaced over the first epoch, in batches: for evaluation."""
        count = min(rows, self.num_rows)
        slots = [i * self.num_rows // count for i in range(count)]
        for start in range(0, count, batch_rows):
            yield stack([self._row(0, slot) for slot in slots[start : start + batch_rows]])

    def _row(self, epoch: int, slot: int) -> Row:
        if epoch not in self._epochs:
            self._epochs = {epoch: _Epoch.shuffled(self.file, self.num_rows, self.seed, epoch)}
        plan = self._epochs[epoch]
        return _fill_row(self.file, plan, int(plan.row_order[slot]) * self.length, self.length)


Row = tuple[NDArray[np.int64], ...]  # tokens, labels, positions, segments


@dataclass(frozen=True)
class _Epoch:
    """The order of one pass over the documents."""

    order: NDArray[np.int64]  # documents as they are laid end to end
    ends: NDArray[np.int64]  # where each of them ends in that line
    row_order: NDArray[np.int64]

    @classmethod
    def shuffled(cls, file: TokenFile, num_rows: int, seed: int | None, epoch: int) -> _Epoch:
        lengths = np.diff(file.offsets)
        order, row_order = np.arange(len(lengths)), np.arange(num_rows)
        if seed is not None:
            random = np.random.default_rng([seed, epoch])
            order, row_order = random.permutation(order), random.permutation(row_order)
        return cls(order, np.cumsum(lengths[order]), row_order)


def _fill_row(file: TokenFile, epoch: _Epoch, begin: int, length: int) -> Row:
    """Cut ``length`` tokens out of the line of documents from ``begin`` on, padded at its end."""
    tokens, positions, segments = (np.zeros(length, np.int64) for _ in range(3))
    labels = np.full(length, IGNORED, np.int64)
    place = int(np.searchsorted(epoch.ends, begin, side="right"))
    at = segment = 0
    while at < length and place < len(epoch.order):
        stop = int(file.offsets[epoch.order[place] + 1])
        start = stop - int(epoch.ends[place] - begin - at)
        count = min(length - at, stop - start)
        labelled = min(count, stop - start - 1)  # the last token of a document has no label
        tokens[at : at + count] = file.tokens[start : start + count]
        labels[at : at + labelled] = file.tokens[start + 1 : start + 1 + labelled]
        positions[at : at + count] = np.arange(count)
        segments[at : at + count] = segment
        at, place, segment = at + count, place + 1, segment + 1
    positions[at:] = np.arange(length - at)
    segments[at:] = segment
    return tokens, labels, positions, segments


def stack(rows: list[Row]) -> Batch:
    """Rows as one batch."""
    tokens, labels, positions, segments = (torch.from_numpy(np.stack(x)) for x in zip(*rows, strict=True))
    return Batch(tokens, labels, positions, segments.int())
