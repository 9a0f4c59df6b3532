"""User-defined data for ``Trainer``: map-style and iterable data sets of torch, and data loaders.

Each becomes an endless sequence of batches that depends on the seed alone, so runs resume exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from operator import itemgetter
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate

from fastattn.errors import DataError, input_error
from fastattn.lm.train.data import IGNORED


@dataclass(frozen=True)
class UserBatch:
    """Tensors, or tuples, lists and dicts of them, with one row for each example; other values stay as they are."""

    value: Any

    def to(self, device: torch.device) -> UserBatch:
        return UserBatch(_mapped(lambda x: x.to(device), self.value))

    def split(self, rows: int) -> Iterator[UserBatch]:
        """Parts of at most ``rows`` rows."""
        for start in range(0, self.rows(), rows):
            yield UserBatch(_mapped(itemgetter(slice(start, start + rows)), self.value))

    def num_labels(self) -> int:
        """Labels that are not ``IGNORED`` if it is a dict with integer "labels", else rows."""
        labels = self.value.get("labels") if isinstance(self.value, Mapping) else None
        if isinstance(labels, Tensor) and not labels.is_floating_point():
            return int((labels != IGNORED).sum())
        return self.rows()

    def rows(self) -> int:
        """Rows of its first tensor."""
        first = next(_tensors(self.value), None)
        if first is None or not first.dim():
            given = f"a batch of type {type(self.value).__name__}"
            raise input_error("data", given, "tensors with a row for each example", "See torch's default_collate.")
        return len(first)


def _mapped(function: Callable[[Tensor], Any], value: Any) -> Any:
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, Mapping):
        return {name: _mapped(function, item) for name, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_mapped(function, item) for item in value))
    if isinstance(value, tuple | list):
        return type(value)(_mapped(function, item) for item in value)
    return value


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping | tuple | list):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(item)


def is_of_torch(data: object) -> bool:
    """Whether ``as_rows`` takes it."""
    return isinstance(data, Dataset | DataLoader)


def as_rows(data: Any, seed: int) -> Any:
    """Rows for the trainer.

    Args:
        data: a map-style ``Dataset``, shuffled anew in each epoch; an ``IterableDataset``, in its own order; or a
            ``DataLoader``, in that of its sampler, whose generator is seeded in each epoch.
        seed: of the order.

    An epoch's rest that does not fill a batch is completed from the next epoch; a data loader's is left out.
    """
    if isinstance(data, DataLoader):
        return LoaderRows(data, seed)
    return IterableRows(data, seed) if isinstance(data, IterableDataset) else DatasetRows(data, seed)


class DatasetRows:
    """A map-style data set: a permutation for each epoch."""

    def __init__(self, data: Any, seed: int) -> None:
        if not len(data):
            raise DataError("The data set is empty.")
        self.data, self.seed = data, seed
        self._orders: dict[int, NDArray[np.int64]] = {}

    def batch(self, step: int, rows: int) -> UserBatch:
        """Rows ``step * rows ... (step + 1) * rows`` of the endless sequence of epochs."""
        places = (divmod(index, len(self.data)) for index in range(step * rows, (step + 1) * rows))
        return UserBatch(default_collate([self.data[int(self._order(epoch)[place])] for epoch, place in places]))

    def sample(self, rows: int, batch_rows: int) -> Iterator[UserBatch]:
        """At most ``rows`` rows, evenly spaced."""
        count = min(rows, len(self.data))
        chosen = [number * len(self.data) // count for number in range(count)]
        for start in range(0, count, batch_rows):
            yield UserBatch(default_collate([self.data[n] for n in chosen[start : start + batch_rows]]))

    def _order(self, epoch: int) -> NDArray[np.int64]:
        if epoch not in self._orders:
            self._orders = {epoch: np.random.default_rng([self.seed, epoch]).permutation(len(self.data))}
        return self._orders[epoch]


class _Sequential:
    """Items of an endless sequence of epochs by number: read in order, and from the beginning for an earlier one.

    What an epoch draws from torch's generator before its first item depends on the seed and the epoch alone.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._at, self._items = 0, self._endless()

    def epoch(self, number: int) -> Iterator[Any]:
        """The items of one pass."""
        raise NotImplementedError

    def _endless(self) -> Iterator[Any]:
        number = 0
        while True:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self.seed * 1_000_003 + number)
                items = iter(self.epoch(number))
                first = list(islice(items, 1))
            if not first:
                raise DataError(f"The data gave nothing in epoch {number}.")
            yield from first
            yield from items
            number += 1

    def take(self, begin: int, count: int) -> list[Any]:
        """Items ``begin ... begin + count``; those before are read and dropped."""
        if begin < self._at:
            self._at, self._items = 0, self._endless()
        with torch.random.fork_rng(devices=[]):  # or dropout would depend on how often the run was resumed
            for _ in islice(self._items, begin - self._at):
                pass
        self._at = begin + count
        return list(islice(self._items, count))


class IterableRows(_Sequential):
    """An iterable data set, which must give the same items in each process and after each start.

    One with a method ``set_epoch``, as those of ``datasets`` have, is told the number of the epoch.
    """

    def __init__(self, data: Any, seed: int) -> None:
        self.data = data
        super().__init__(seed)

    def epoch(self, number: int) -> Iterator[Any]:
        if hasattr(self.data, "set_epoch"):
            self.data.set_epoch(number)
        return iter(self.data)

    def batch(self, step: int, rows: int) -> UserBatch:
        """As of ``DatasetRows``."""
        return UserBatch(default_collate(self.take(step * rows, rows)))

    def sample(self, rows: int, batch_rows: int) -> Iterator[UserBatch]:
        """The first ``rows`` rows."""
        source = islice(self.epoch(0), rows)
        while found := list(islice(source, batch_rows)):
            yield UserBatch(default_collate(found))


class LoaderRows(_Sequential):
    """A data loader: a batch of it for each step and process."""

    def __init__(self, data: Any, seed: int) -> None:
        self.data = data
        super().__init__(seed)

    def epoch(self, number: int) -> Iterator[Any]:
        """The full batches of a pass."""
        if self.data.generator is not None:
            self.data.generator.manual_seed(self.seed * 1_000_003 + number)
        size = self.data.batch_size
        return (batch for batch in self.data if size in (None, UserBatch(batch).rows()))

    def batch(self, step: int, rows: int) -> UserBatch:
        """Batch ``step``, which must have ``rows`` rows."""
        (found,) = self.take(step, 1)
        batch = UserBatch(found)
        if batch.rows() != rows:
            todo = "Give both the same size; of several processes each takes its part of the trainer's."
            raise input_error("batch", rows, f"{batch.rows()}, that of the data loader", todo)
        return batch

    def sample(self, rows: int, batch_rows: int) -> Iterator[UserBatch]:
        """Batches of the first epoch up to ``rows`` rows."""
        for item in self.epoch(0):
            batch = next(UserBatch(item).split(rows))
            rows -= batch.rows()
            yield from batch.split(batch_rows)
            if rows <= 0:
                return
