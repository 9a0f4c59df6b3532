"""Guesses of the next tokens for speculative decoding: by a smaller model, or from the text itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch

from fastattn.lm.generate.protocols import DecoderModel, evaluating
from fastattn.lm.generate.sequences import Cached

LONGEST_MATCH = 3  # tokens at the end of a text that are looked for earlier in it; fewer if there is no match
BRANCHES = 2  # continuations, with different first tokens, that a match may propose
Texts = Mapping[int, Sequence[int]]  # by row


class Drafter(Protocol):
    """A source of guesses. The text of a row grows from call to call."""

    def propose(self, texts: Texts) -> dict[int, list[list[int]]]:
        """For each row guesses of what follows its text, the best first; none for a row that is left out."""


class Lookup:
    """Guesses that a text goes on as it did after an earlier occurrence of its last tokens.

    Args:
        longest: tokens of a guess.

    Source:
        Saxena, "Prompt lookup decoding", 2023.

    Example:
        >>> from fastattn.lm.generate.drafts import Lookup
        >>> Lookup(longest=4).propose({0: [7, 8, 9, 5, 1, 7, 8]})
        {0: [[9, 5, 1, 7]]}
    """

    def __init__(self, longest: int) -> None:
        self.longest = longest
        self._ends: dict[int, dict[tuple[int, ...], list[int]]] = {}
        self._known: dict[int, int] = {}

    def propose(self, texts: Texts) -> dict[int, list[list[int]]]:
        return {row: self._of_row(row, text) for row, text in texts.items()}

    def _of_row(self, row: int, text: Sequence[int]) -> list[list[int]]:
        ends = self._noted(row, text)
        for length in range(min(LONGEST_MATCH, len(text)), 0, -1):
            guesses: dict[int, list[int]] = {}
            for end in reversed(ends.get(tuple(text[-length:]), ())):
                period = len(text) - end  # what follows is copied, and once that is used up, what was copied
                guesses.setdefault(text[end], [text[end + n % period] for n in range(self.longest)])
                if len(guesses) == BRANCHES:
                    break
            if guesses:
                return list(guesses.values())
        return []

    def _noted(self, row: int, text: Sequence[int]) -> dict[tuple[int, ...], list[int]]:
        """Where a few tokens end in the text of a row, and others follow."""
        ends = self._ends.setdefault(row, {})
        for end in range(self._known.get(row, 1), len(text)):
            for length in range(1, min(LONGEST_MATCH, end) + 1):
                ends.setdefault(tuple(text[end - length : end]), []).append(end)
        self._known[row] = len(text)
        return ends


class Assistant:
    """Guesses of a smaller model for the same tokens, each the likeliest.

    Args:
        model: the smaller one.
        rows: the number of texts.
        max_length: the most tokens of a text.
        longest: tokens of a guess.
        page_size: of its cache, as in ``generate``.

    Source:
        Leviathan et al., "Fast inference from transformers via speculative decoding", 2023.
    """

    def __init__(
        self, model: DecoderModel, rows: int, max_length: int, longest: int, page_size: int | None = None
    ) -> None:
        self.model, self.longest = model, longest
        self.room = min(max_length + longest, model.config.longest)
        # a rejected guess must not have pushed anything out of a window
        self._sequences = Cached(model, rows, self.room, page_size=page_size, keeps_all=True)
        self._names = [self._sequences.add() for _ in range(rows)]
        self._read: list[list[int]] = [[] for _ in range(rows)]  # tokens in the cache

    def propose(self, texts: Texts) -> dict[int, list[list[int]]]:
        rows = [row for row, text in texts.items() if len(text) + self.longest - 1 <= self.room]
        if not rows:
            return {}
        names = [self._names[row] for row in rows]
        with evaluating(self.model):
            logits = self._sequences.feed(names, [self._unread(row, texts[row]) for row in rows])
            guesses = [logits.argmax(-1)]
            while len(guesses) < self.longest:
                guesses.append(self._sequences.feed(names, guesses[-1]).argmax(-1))
        made = torch.stack(guesses, dim=1).tolist()
        for row, guess in zip(rows, made, strict=True):
            self._read[row] = [*texts[row], *guess[:-1]]
        return {row: [guess] for row, guess in zip(rows, made, strict=True)}

    def _unread(self, row: int, text: Sequence[int]) -> list[int]:
        """The tokens of a text, at least the last, that are not in the cache; those that are in vain are dropped."""
        read = self._read[row]
        same = next((n for n, (a, b) in enumerate(zip(read, text, strict=False)) if a != b), min(len(read), len(text)))
        same = min(same, len(text) - 1)
        self._sequences.cache.truncate(self._names[row], same)
        return list(text[same:])
