"""Guesses of what follows a text, as a tree of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass
class DraftTree:
    """Guesses of what follows a text, those with a common beginning merged. Token 0 is the last of the text itself."""

    tokens: list[int]
    parents: list[int] = field(default_factory=lambda: [-1])
    children: dict[tuple[int, int], int] = field(default_factory=dict)  # (parent, token) -> token

    @classmethod
    def of(cls, last: int, guesses: Sequence[Sequence[int]], most: int, depth: int) -> DraftTree:
        """A tree of at most ``most`` tokens besides the last of the text, and ``depth`` levels of them."""
        tree = cls([last])
        for guess in guesses:
            at = 0
            for token in guess[:depth]:
                child = tree.children.get((at, token))
                if child is None:
                    if len(tree.tokens) > most:
                        break
                    child = tree._add(at, token)
                at = child
        return tree

    def _add(self, parent: int, token: int) -> int:
        self.tokens.append(token)
        self.parents.append(parent)
        self.children[parent, token] = len(self.tokens) - 1
        return len(self.tokens) - 1

    def path(self, token: int) -> list[int]:
        """The tokens that lead to one, those of the text left out, itself included."""
        found = []
        while token > 0:
            found.append(self.tokens[token])
            token = self.parents[token]
        return found[::-1]

    @property
    def is_chain(self) -> bool:
        return self.parents == list(range(-1, len(self.parents) - 1))
