"""Sequences that attention to a cache reads together: their rows, their positions, and the pairs that are kept."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from fastattn.spec import AttentionSpec, keep
from fastattn.trees import Tree


@dataclass(frozen=True)
class Group:
    """Sequences that are read together.

    Attributes:
        index: their indices, ascending; a slice where they follow each other, so that it makes views.
        count: how many they are.
        rows: query rows of each, or the most that one has.
        s_q, s_kv: their lengths, ints that all share or ``[n, 1, 1, 1]``.
        span: positions that some query row keeps.
        full: positions that every query row keeps.
        tree: of the new tokens of all sequences.
    """

    index: Tensor | slice
    count: int
    rows: int
    s_q: Tensor | int
    s_kv: Tensor | int
    span: tuple[int, int]
    full: tuple[int, int]
    tree: Tree | None = None

    def in_trees(self, tree: Tree) -> Group:
        """The group with the trees of a call: of their tokens no row sees all."""
        full = (0, 0) if self.full == (0, 0) else (self.full[0], min(self.full[1], int(tree.before.min())))
        return dataclasses.replace(self, tree=tree, full=full)

    def rows_and_keys(self, span: tuple[int, int], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Sequences ``[n, 1, 1, 1]``, query rows ``[1, 1, rows, 1]`` and keys ``[1, 1, 1, C]``."""
        b = torch.arange(self.tree.before.shape[0] if self.tree else self.count, device=device)
        i, j = torch.arange(self.rows, device=device), torch.arange(*span, device=device)
        return (b[self.index] if self.tree else b)[:, None, None, None], i[:, None], j[None, None, None]

    def positions(self, span: tuple[int, int], device: torch.device) -> tuple[Tensor, Tensor]:
        """Positions of query rows and keys, ``[1|n, 1, rows, 1]`` and ``[1|n, 1, 1, C]``."""
        b, i, j = self.rows_and_keys(span, device)
        return (i, j) if self.tree is None else (self.tree.depths[b, i], self.tree.position(b, j))

    def kept(self, spec: AttentionSpec, span: tuple[int, int], device: torch.device) -> Tensor:
        """``[n, 1, rows, C]``."""
        kept = keep(spec, *self.positions(span, device), self.s_q, self.s_kv)
        if self.tree is not None:
            b, i, j = self.rows_and_keys(span, device)
            kept = kept & self.tree.sees(b, i, b, j)
        return kept.expand(self.count, 1, -1, -1)
