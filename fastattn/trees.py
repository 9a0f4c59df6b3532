"""Trees of new tokens: the words of a tree mask, the bits in them, and the positions that follow from them.

``spec.py`` has the definition. Everything here is torch operators that wait for no device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fastattn.errors import input_error
from fastattn.spec import tree_bit, tree_depth

WORD = 32  # bits


def tree_mask(parents: Sequence[int]) -> Tensor:
    """The words of one tree ``(1, S_new, ceil(S_new / 32))``, int32, for ``attention_with_kv_cache(tree_mask=)``.

    Args:
        parents: for each new token the index of the one that it follows, an earlier one; -1 follows the cache.

    Raises:
        InputError: a parent is not an earlier token.

    Example:
        >>> from fastattn.nn import tree_mask
        >>> tree_mask([-1, 0, 1, 0, 3]).flatten().tolist()
        [1, 3, 7, 9, 25]
    """
    rows = ancestors(parents)
    return words_of(torch.from_numpy(rows))[None]


def ancestors(parents: Sequence[int]) -> np.ndarray:
    """``(S, S)`` boolean: each token's ancestors and the token itself.

    Raises:
        InputError: a parent is not an earlier token.
    """
    rows = np.eye(len(parents), dtype=bool)
    for token, parent in enumerate(parents):
        if not -1 <= parent < token:
            given, todo = f"{parent} for token {token}", "Order the tokens so that parents come first."
            raise input_error("parents", given, f"-1 to {token - 1}, an earlier token", todo)
        if parent >= 0:
            rows[token] |= rows[parent]
    return rows


def words_of(bits: Tensor) -> Tensor:
    """Boolean ``(..., n)`` as int32 words ``(..., ceil(n / 32))``."""
    words = -(-bits.shape[-1] // WORD)
    padded = torch.nn.functional.pad(bits.int(), (0, words * WORD - bits.shape[-1])).unflatten(-1, (words, WORD))
    shifts = torch.arange(WORD, dtype=torch.int32, device=bits.device)
    return (padded << shifts).sum(-1, dtype=torch.int32)


def bits_of(words: Tensor, count: int) -> Tensor:
    """The first ``count`` bits of int32 ``(..., W)``, boolean ``(..., count)``."""
    word, bit = tree_bit(torch.arange(count, dtype=torch.int32, device=words.device))
    return (words[..., word.long()] >> bit & 1).bool()


def words_of_trees(trees: Sequence[np.ndarray], is_packed: bool) -> np.ndarray:
    """The words of several trees, each as ``ancestors`` gives it: ``(n, S, W)`` of one size, packed ``(T, W)``."""
    longest = max(map(len, trees))
    rows = [np.pad(tree, ((0, 0), (0, longest - len(tree)))) for tree in trees]
    bits = np.concatenate(rows) if is_packed else np.stack(rows)
    return words_of(torch.from_numpy(bits)).numpy()


def check_words(tree: Tensor, shape: tuple[int, ...]) -> None:
    """Raise InputError unless ``tree`` has these words: ``(B, S, W)``, of which the first may be 1, or ``(T, W)``."""
    is_packed = len(shape) == 2
    fits = tree.dim() == len(shape) and tree.shape[-2:] == shape[-2:] and (is_packed or tree.shape[0] in (1, shape[0]))
    if not fits or tree.dtype != torch.int32:
        name = "(T_q, W)" if is_packed else "(1|B, S_new, W)"
        todo = "Or a boolean mask with a column for each new token; fastattn.nn.tree_mask makes words of parents."
        raise input_error("tree_mask", f"shape {tuple(tree.shape)}, {tree.dtype}", f"int32 {name} = {shape}", todo)


@dataclass(frozen=True)
class Tree:
    """The trees of a call.

    Attributes:
        bits: ``(B, S, S)``, the new tokens that each query row sees; of a packed call S is the longest.
        depths: ``(B, S)``, int64.
        before: ``(B,)``, positions before the call, int64.
    """

    bits: Tensor
    depths: Tensor
    before: Tensor

    @classmethod
    def of(cls, bits: Tensor, before: Tensor) -> Tree:
        batch = before.shape[0]
        depths = tree_depth(bits.sum(-1))
        return cls(bits.expand(batch, -1, -1), depths.expand(batch, -1), before.long())

    def sees(self, b: Tensor, i: Tensor, of: Tensor, j: Tensor) -> Tensor:
        """Whether row ``i`` of sequence ``b`` sees key ``j`` of sequence ``of``; they broadcast, and ``b == of`` where
        it matters."""
        new = j - self.before[of]
        return (new < 0) | self.bits[b, i, new.clamp(0, self.bits.shape[2] - 1)]

    def position(self, b: Tensor, j: Tensor) -> Tensor:
        """The position of key ``j`` in its path; rows beyond the new tokens keep their own."""
        new = j - self.before[b]
        longest = self.depths.shape[1]
        in_tree = (new >= 0) & (new < longest)
        return torch.where(in_tree, self.before[b] + self.depths[b, new.clamp(0, longest - 1)], j)

    def kept_pairs(self, rows: Tensor, left: int | None) -> int:
        """The number of pairs that are kept, where each sequence has so many ``rows`` and a window keeps ``left``."""
        depths, bits = self.depths.cpu(), self.bits.cpu()
        before = self.before.cpu()[:, None].expand(depths.shape)
        if left is not None:
            bits = bits & (depths[:, None] >= depths[..., None] - left)
            before = torch.minimum(before, (left - depths).clamp(min=0))
        exists = torch.arange(depths.shape[1]) < rows[:, None]
        return int(bits.sum() + (before * exists).sum())
