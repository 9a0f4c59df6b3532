"""Sampling of the next token from logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastattn.errors import input_error


@dataclass(frozen=True)
class Sampling:
    """Settings of sampling, applied in this order: repetition penalty, temperature, top-k, top-p, min-p.

    Attributes:
        temperature: divides the logits; 0 always takes the likeliest token (greedy).
        top_k: keep this many likeliest tokens; None is all.
        top_p: keep the fewest likeliest tokens whose probabilities reach this (nucleus); None is all.
        seed: of the draws. Row ``n`` of a batch draws as if it were alone with ``seed + n``; None draws from torch's
            generator.
        min_p: keep the tokens at least this many times as likely as the likeliest; None is all.
        repetition_penalty: divides positive logits, and multiplies negative ones, of tokens that stand in the prompt or
            the text so far; 1 is none.

    Raises:
        InputError: a value is out of range.

    Source:
        Holtzman et al., "The curious case of neural text degeneration", 2020 (top-p); Nguyen et al., "Turning up the
        heat: min-p sampling", 2024; Keskar et al., "CTRL", 2019 (repetition penalty).
    """

    temperature: float = 0.8
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise input_error("temperature", self.temperature, "a number >= 0", "0 takes the likeliest token.")
        if self.top_k is not None and self.top_k < 1:
            raise input_error("top_k", self.top_k, "an int >= 1, or None", "None keeps every token.")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise input_error("top_p", self.top_p, "a probability in (0, 1], or None", "None keeps every token.")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise input_error("min_p", self.min_p, "a ratio in [0, 1], or None", "None keeps every token.")
        if not 0 < self.repetition_penalty < float("inf"):
            todo = "1 is none, more discourages repetition."
            raise input_error("repetition_penalty", self.repetition_penalty, "a number > 0", todo)

    def penalised(self, logits: Tensor, seen: Tensor | None) -> Tensor:
        """``(n, V)`` fp32 logits, those of tokens that are ``seen`` ``(n, V)`` pushed down."""
        logits = logits.float()
        if self.repetition_penalty == 1 or seen is None:
            return logits
        factor = torch.where(logits > 0, 1 / self.repetition_penalty, self.repetition_penalty)
        return torch.where(seen, logits * factor, logits)

    def probabilities(self, logits: Tensor) -> Tensor:
        """``(n, V)`` probabilities from ``(n, V)`` logits; for ``temperature`` > 0."""
        logits = logits.float() / self.temperature
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            least = logits.topk(self.top_k, dim=-1).values[..., -1:]
            logits = logits.masked_fill(logits < least, -torch.inf)
        p = logits.softmax(dim=-1)
        if self.top_p is not None:
            ordered, order = p.sort(dim=-1, descending=True)
            before = ordered.cumsum(dim=-1) - ordered  # the likeliest token has 0 before it and always stays
            p = p.scatter(-1, order, ordered.masked_fill(before >= self.top_p, 0.0))
        if self.min_p is not None:
            p = p.masked_fill(p < self.min_p * p.amax(dim=-1, keepdim=True), 0.0)
        return p / p.sum(dim=-1, keepdim=True)

    def choose(self, logits: Tensor, draws: Tensor | None, seen: Tensor | None = None) -> Tensor:
        """The next tokens.

        Args:
            logits: ``(n, V)``.
            draws: ``(n,)`` uniform numbers in [0, 1): each picks its token from the cumulated probabilities; None takes
                the likeliest.
            seen: ``(n, V)`` boolean, tokens that the repetition penalty is for.

        Returns:
            ``(n,)``, int64.
        """
        logits = self.penalised(logits, seen)
        if self.temperature == 0 or draws is None:
            return logits.argmax(dim=-1)
        cumulated = self.probabilities(logits).double().cumsum(dim=-1)
        # the total is 1 but for rounding; scaled by it, a draw never lies beyond the last token that is kept
        at = draws.to(cumulated)[:, None] * cumulated[:, -1:]
        return torch.searchsorted(cumulated, at, right=True)[:, 0].clamp(max=logits.shape[-1] - 1)


class Draws:
    """Uniform numbers for rows, each from a generator of its own, so that a row's do not depend on the others."""

    def __init__(self, sampling: Sampling) -> None:
        self._seed, self._is_greedy = sampling.seed, sampling.temperature == 0
        self._generators: dict[int, torch.Generator] = {}

    def __call__(self, rows: Sequence[int], device: torch.device) -> Tensor | None:
        """``(n,)`` numbers in [0, 1), the next of each row; None where nothing is drawn."""
        if self._is_greedy:
            return None
        if self._seed is None:
            return torch.rand(len(rows), dtype=torch.float64).to(device, non_blocking=True)
        for row in rows:
            if row not in self._generators:
                self._generators[row] = torch.Generator().manual_seed(self._seed + row)
        numbers = [torch.rand((), generator=self._generators[row], dtype=torch.float64) for row in rows]
        return torch.stack(numbers).to(device, non_blocking=True)
