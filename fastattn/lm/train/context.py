"""Context parallel in training: consecutive processes share each row, of which each holds some tokens."""

from __future__ import annotations

import contextlib
import dataclasses
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import nn

from fastattn.errors import input_error
from fastattn.integrations.context_parallel import SequenceSharding, sharded
from fastattn.lm.train.data import Batch
from fastattn.lm.train.parallel import Ranks


@dataclass(frozen=True)
class ContextGroup:
    """The processes that share rows with this one.

    Attributes:
        number: of the group.
        count: of groups.
        group: its processes; None where each process has rows of its own.
    """

    number: int
    count: int
    group: dist.ProcessGroup | None = None

    @classmethod
    def of(cls, processes: Ranks, size: int) -> ContextGroup:
        """Groups of ``size`` consecutive processes; every process must call it."""
        number, count = processes.rank // size, processes.size // size
        if size == 1:
            return cls(number, count)
        groups = [dist.new_group(range(n * size, (n + 1) * size)) for n in range(count)]
        return cls(number, count, groups[number])

    def share(self, batch: Any) -> Any:
        """The tokens of a batch that are this process's.

        Raises:
            InputError: the rows are not packed documents.
        """
        if self.group is None:
            return batch
        if not isinstance(batch, Batch):
            todo = "Decoders and encoders learn from packed documents by fastattn train."
            raise input_error("context_parallel", f"more than 1 with a {type(batch).__name__}", "1", todo)
        sharding = self._sharding(batch.tokens.shape[1])
        return Batch(*(sharding.shard(getattr(batch, field.name)) for field in dataclasses.fields(batch)))

    def attending(self, batch: Any) -> contextlib.AbstractContextManager[None]:
        """Within the block attention sees the whole rows of ``batch``, as ``rows.batch`` gave it."""
        if self.group is None:
            return contextlib.nullcontext()
        return sharded(self._sharding(batch.tokens.shape[1]))

    def _sharding(self, length: int) -> SequenceSharding:
        return SequenceSharding(self.group, lengths=(length,))


def check_context_parallel(size: int, model: nn.Module, compile: bool) -> None:
    """Raise InputError unless ``size`` processes can share the rows of ``model``."""
    if size == 1:
        return
    positions = getattr(getattr(model, "config", None), "positions", None)
    for name, value, allowed in (
        ("positions", positions if positions == "relative" else None, "other than 'relative'"),
        ("compile", compile or None, "False"),
    ):
        if value is not None:
            todo = "A relative bias is computed from whole rows, and torch.compile cannot see the other processes."
            raise input_error(name, f"{value!r} with context_parallel={size}", allowed, todo)
