"""The assignment of tokens to ranks, and what two ranks' tokens have to compute with each other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from fastattn.errors import input_error
from fastattn.spec import AttentionSpec, full_range, tile_range


@dataclass(frozen=True)
class Run:
    """Tokens of one document that a rank holds side by side.

    Attributes:
        document: its number in the row.
        begin: where the document begins in the row.
        length: of the document.
        at: their positions in the document.
        first: where they begin in the rank's tensors.
    """

    document: int
    begin: int
    length: int
    at: range
    first: int

    @property
    def in_row(self) -> range:
        return range(self.begin + self.at.start, self.begin + self.at.stop)


@dataclass(frozen=True)
class SequenceSharding:
    """The assignment of the tokens of a row to ranks.

    Attributes:
        group: the ranks; None is all of them.
        head_tail: each rank holds an early and a late chunk of each document, for balanced work under causal masks.
            False: tokens in order.
        lengths: of the documents that are packed end to end in a row, any numbers: tokens attend inside their own, and
            each document is shared out by itself. None: the row is one document, of a length that all chunks divide.

    Example:
        >>> import os, torch, torch.distributed as dist
        >>> from fastattn.integrations.context_parallel import SequenceSharding, ring_attention
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> sharding = SequenceSharding(lengths=(27, 1, 36))
        >>> q = torch.randn(2, 64, 8, 32)
        >>> mine = sharding.shard(q)
        >>> sharding.unshard(ring_attention(mine, mine, mine, sharding, causal=True)).shape
        torch.Size([2, 64, 8, 32])
        >>> dist.destroy_process_group()
    """

    group: dist.ProcessGroup | None = None
    head_tail: bool = True
    lengths: tuple[int, ...] | None = None

    @property
    def size(self) -> int:
        return dist.get_world_size(self.group)

    @property
    def rank(self) -> int:
        return dist.get_rank(self.group)

    def processes(self) -> dist.ProcessGroup:
        """The group, where None stands for all ranks."""
        group = self.group or dist.group.WORLD
        assert group is not None  # a group has been initialised
        return group

    def runs(self, length: int, rank: int) -> list[range]:
        """The places in a row of ``length`` that a rank holds, as runs in the order of its local tensor.

        Raises:
            InputError: the chunks do not divide ``length``, or it is not that of the documents.
        """
        return [run.in_row for run in self.runs_in_documents(length, rank)]

    def runs_in_documents(self, length: int, rank: int) -> list[Run]:
        """As ``runs``, with the documents. Document ``n`` takes the ranks from ``n`` on, so that short ones spread."""
        found, first, begin = list[Run](), 0, 0
        chunks = self.size * (2 if self.head_tail else 1)
        for document, size in enumerate(self._documents(length)):
            turn = (rank + document) % self.size if self.lengths is not None else rank
            for n in (turn, chunks - 1 - turn) if self.head_tail else (turn,):
                at = range(n * size // chunks, (n + 1) * size // chunks)
                if at:
                    found.append(Run(document, begin, size, at, first))
                    first += len(at)
            begin += size
        return found

    def num_tokens(self, length: int, rank: int) -> int:
        """The number of tokens of a row of ``length`` that a rank holds."""
        return sum(map(len, self.runs(length, rank)))

    def row_length(self, tokens: int) -> int:
        """The length of a row of which this rank holds ``tokens``.

        Raises:
            InputError: it does not hold so many.
        """
        length = tokens * self.size if self.lengths is None else sum(self.lengths)
        held = self.num_tokens(length, self.rank)
        if tokens != held:
            raise input_error("q", f"{tokens} tokens", f"{held}, those of this rank", "Use sharding.shard.")
        return length

    def positions(self, length: int, device: torch.device | str | None = None) -> Tensor:
        """The positions of this rank's tokens in their documents, for rotary embedding and the like."""
        return _joined([run.at for run in self.runs_in_documents(length, self.rank)], device)

    def places(self, length: int, device: torch.device | str | None = None) -> Tensor:
        """The places of this rank's tokens in the row: ``positions``, unless there are several documents."""
        return _joined(self.runs(length, self.rank), device)

    def shard(self, x: Tensor, dim: int = 1) -> Tensor:
        """This rank's part of a tensor that every rank holds whole."""
        return x.index_select(dim, self.places(x.shape[dim], x.device))

    def unshard(self, x: Tensor, dim: int = 1) -> Tensor:
        """The whole tensor on every rank, from everyone's part. No gradient flows through it."""
        length = self.row_length(x.shape[dim])
        tokens = [self.num_tokens(length, rank) for rank in range(self.size)]
        mine = x.detach().movedim(dim, 0).contiguous()
        padded = mine.new_zeros((max(tokens), *mine.shape[1:]))
        padded[: len(mine)] = mine
        parts = [torch.empty_like(padded) for _ in tokens]
        dist.all_gather(parts, padded, group=self.group)
        whole = torch.cat([part[:n] for part, n in zip(parts, tokens, strict=True)])
        return whole.index_select(0, self.order(length).argsort().to(x.device)).movedim(0, dim)

    def order(self, length: int) -> Tensor:
        """The places in the row of what rank 0 holds, then rank 1, ..."""
        return _joined([run for rank in range(self.size) for run in self.runs(length, rank)], None)

    def _documents(self, length: int) -> Sequence[int]:
        if self.lengths is not None:
            if sum(self.lengths) != length or min(self.lengths, default=0) < 0:
                allowed = f"{sum(self.lengths)}, the sum of the documents' lengths {self.lengths}"
                raise input_error("length", length, allowed, "Make the sharding for the row, none of them negative.")
            return self.lengths
        chunks = self.size * (2 if self.head_tail else 1)
        if length % chunks:
            allowed = f"a multiple of {chunks}, the number of chunks"
            raise input_error("length", length, allowed, f"Pad it at its end, or pass lengths=({length},).")
        return (length,)


class Alone(SequenceSharding):
    """The same documents in one process."""

    @property
    def size(self) -> int:
        return 1

    @property
    def rank(self) -> int:
        return 0


def _joined(runs: Sequence[range], device: torch.device | str | None) -> Tensor:
    parts = [torch.arange(run.start, run.stop, device=device) for run in runs]
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64, device=device)


@dataclass(frozen=True)
class Block:
    """Some rows against some keys of one document: slices of two ranks' tensors.

    Attributes:
        rows: of the one.
        keys: of the other.
        columns: the same keys in the whole row.
        spec: the band between them, anchored lower right, and the other scalars.
        document: its number.
        row: position of the first row.
        key: position of the first key.
    """

    rows: slice
    keys: slice
    columns: slice
    spec: AttentionSpec
    document: int
    row: int
    key: int

    @property
    def is_square(self) -> bool:
        """Whether rows and keys are the same tokens. Otherwise none of the keys is among the rows."""
        return self.row == self.key


def blocks(rows: Sequence[Run], keys: Sequence[Run], spec: AttentionSpec) -> Iterator[Block]:
    """What is to be computed between the tokens of two ranks, cut to the band."""
    by_document: dict[int, list[Run]] = {}
    for of_keys in keys:
        by_document.setdefault(of_keys.document, []).append(of_keys)
    for of_rows in rows:
        length = of_rows.length
        for of_keys in by_document.get(of_rows.document, ()):
            begin, end = tile_range(spec, of_rows.at.start, of_rows.at.stop, length, length)
            j0, j1 = max(begin, of_keys.at.start), min(end, of_keys.at.stop)
            begin, end = tile_range(spec.transposed(), j0, j1, length, length)
            i0, i1 = max(begin, of_rows.at.start), min(end, of_rows.at.stop)
            if i0 < i1 and j0 < j1:
                yield Block(
                    _local(of_rows, i0, i1), _local(of_keys, j0, j1), slice(of_keys.begin + j0, of_keys.begin + j1),
                    _between(spec, range(i0, i1), range(j0, j1)), of_rows.document, i0, j0,
                )  # fmt: skip


def _local(run: Run, begin: int, end: int) -> slice:
    first = run.first - run.at.start
    return slice(first + begin, first + end)


def _between(spec: AttentionSpec, rows: range, keys: range) -> AttentionSpec:
    """The band of the whole document as one between some rows and some keys, whose diagonal is lower right."""
    shift = rows.stop - keys.stop
    left = None if spec.left is None else spec.left - shift
    right = None if spec.right is None else spec.right + shift
    between = AttentionSpec(spec.scale, spec.softcap, left, right, dropout_p=spec.dropout_p)
    if full_range(between, 0, len(rows), len(rows), len(keys)) == (0, len(keys)):
        return AttentionSpec(spec.scale, spec.softcap, dropout_p=spec.dropout_p)
    return between
