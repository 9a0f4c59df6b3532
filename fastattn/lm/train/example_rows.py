"""Batches of labelled examples: padded, rows of about one length together, a pure function of (data, seed, step)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastattn.errors import DataError
from fastattn.lm.train.data import IGNORED

Feature = dict[str, list[Any]]  # one row: what the model reads, and "labels", which may be floats
_MASKS = {"tokens": "mask", "source": "source_mask"}
_READ = (*_MASKS, "target", "chosen", "rejected")  # what the model reads; padding of the last three counts
_POOL = 32  # batches in which rows are sorted by length


@dataclass(frozen=True)
class ExampleBatch:
    """Rows by name: what is in their features, ``(B, S)`` int64, and which of it is no padding, bool, if any is.

    Attributes:
        tensors: of the rows.
        image_tokens: that an image of the rows is read as; 0 if they have none.
    """

    tensors: dict[str, Tensor]
    image_tokens: int = 0

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def get(self, name: str) -> Tensor | None:
        return self.tensors.get(name)

    def more_inputs(self) -> dict[str, Tensor]:
        """Inputs of a model besides the tokens."""
        return {name: x for name, x in self.tensors.items() if name not in ("tokens", "labels")}

    def to(self, device: torch.device) -> ExampleBatch:
        if device.type != "cuda":
            return self._with({name: x.to(device) for name, x in self.tensors.items()})
        return self._with({name: x.pin_memory().to(device, non_blocking=True) for name, x in self.tensors.items()})

    def split(self, rows: int) -> Iterator[ExampleBatch]:
        """Parts of at most ``rows`` rows."""
        for parts in zip(*(x.split(rows) for x in self.tensors.values()), strict=True):
            yield self._with(dict(zip(self.tensors, parts, strict=True)))

    def _with(self, tensors: dict[str, Tensor]) -> ExampleBatch:
        return dataclasses.replace(self, tensors=tensors)

    def num_labels(self) -> int:
        labels = self.tensors["labels"]
        return labels.numel() if labels.is_floating_point() else int((labels != IGNORED).sum())

    def num_tokens(self) -> int:
        """Tokens that the model reads, without padding."""
        read = ((name, self.tensors[name]) for name in _READ if name in self.tensors)
        masks = {name: self.tensors.get(mask) for name, mask in _MASKS.items()}
        of_text = sum(x.numel() if (mask := masks.get(name)) is None else int(mask.sum()) for name, x in read)
        return of_text + self.image_tokens * len(self.tensors["labels"])


def padded(features: Sequence[Feature]) -> ExampleBatch:
    """Features as one batch; padding is 0, and ``IGNORED`` in the labels."""
    tensors: dict[str, Tensor] = {}
    for name in features[0]:
        lengths = torch.tensor([len(feature[name]) for feature in features])
        dtype = np.float32 if isinstance(features[0][name][0], float) else np.int64
        rows = np.full((len(features), int(lengths.max())), IGNORED if name.endswith("labels") else 0, dtype)
        for row, feature in zip(rows, features, strict=True):
            row[: len(feature[name])] = feature[name]
        tensors[name] = torch.from_numpy(rows)
        if name in _MASKS and int(lengths.min()) < rows.shape[1]:  # without a mask attention is faster
            tensors[_MASKS[name]] = torch.arange(rows.shape[1]) < lengths[:, None]
    return ExampleBatch(tensors)


class ExampleRows:
    """Features in an order shuffled for each epoch, but with rows of about the same length next to each other.

    An epoch leaves out the rest that does not fill a batch, another one each time.

    Args:
        features: at least one.
        batch: rows that are padded together.
        seed: of the order.
        collate: makes a batch of features.
    """

    def __init__(
        self,
        features: Sequence[Feature],
        batch: int,
        seed: int = 0,
        collate: Callable[[Sequence[Feature]], ExampleBatch] = padded,
    ) -> None:
        if not features:
            raise DataError("There are no examples to learn from.")
        self.features, self.seed, self.collate = features, seed, collate
        self.group = min(batch, len(features))
        self._lengths = np.array([sum(map(len, feature.values())) for feature in features])
        self._orders: dict[int, NDArray[np.int64]] = {}

    def batch(self, step: int, rows: int) -> ExampleBatch:
        """Rows ``step * rows ... (step + 1) * rows`` of the endless sequence of epochs."""
        size = len(self.features) // self.group * self.group
        places = (divmod(index, size) for index in range(step * rows, (step + 1) * rows))
        return self.collate([self.features[self._order(epoch)[place]] for epoch, place in places])

    def sample(self, rows: int, batch_rows: int) -> Iterator[ExampleBatch]:
        """At most ``rows`` rows, evenly spaced over the features, the shortest first."""
        count = min(rows, len(self.features))
        chosen = sorted((i * len(self.features) // count for i in range(count)), key=lambda i: (self._lengths[i], i))
        for start in range(0, count, batch_rows):
            yield self.collate([self.features[i] for i in chosen[start : start + batch_rows]])

    def _order(self, epoch: int) -> NDArray[np.int64]:
        if epoch not in self._orders:
            random = np.random.default_rng([self.seed, epoch])
            shuffled = random.permutation(len(self.features))[: len(self.features) // self.group * self.group]
            pool = _POOL * self.group
            pools = (shuffled[start : start + pool] for start in range(0, len(shuffled), pool))
            ordered = np.concatenate([pool[np.argsort(self._lengths[pool], kind="stable")] for pool in pools])
            self._orders = {epoch: random.permutation(ordered.reshape(-1, self.group)).reshape(-1)}
        return self._orders[epoch]
