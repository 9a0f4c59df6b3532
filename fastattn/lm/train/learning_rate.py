"""A search for the learning rate: train with rates that grow from step to step, and see where the loss falls fastest.

Source:
    Smith, "Cyclical learning rates for training neural networks", 2017, section 3.3.
"""

from __future__ import annotations

import contextlib
import json
import math
from dataclasses import asdict, dataclass

import numpy as np
from tqdm import tqdm

from fastattn.errors import DataError, input_error
from fastattn.files import write_text
from fastattn.lm.train.log import aligned
from fastattn.lm.train.loop import Trainer
from fastattn.lm.train.plots import plot_rates

_SMOOTHING = 0.9  # part of the mean of the losses that stays at each step
_NOISE = 0.05  # part of the first loss that is no fall
_DIVERGED = 2.0  # times the fall so far by which the loss may rise again


@dataclass(frozen=True)
class RateSearch:
    """The rates that were tried and the losses there.

    Attributes:
        rates: from low to high.
        losses: smoothed, nats per label.
        suggestion: where the loss falls fastest with the logarithm of the rate.
        highest: the rate of the lowest loss; above it training diverges.
    """

    rates: list[float]
    losses: list[float]
    suggestion: float
    highest: float

    def table(self) -> str:
        """The figures as aligned lines."""
        shown = {"suggested --lr": self.suggestion, "largest useful": self.highest, "steps": len(self.rates)}
        return aligned({name: f"{value:.2g}" if isinstance(value, float) else value for name, value in shown.items()})


def find_rate(
    trainer: Trainer, *, lowest: float = 1e-6, highest: float = 1.0, steps: int = 100, show_progress: bool = True
) -> RateSearch:
    """Search with a trainer that is then of no further use, as its model has been trained.

    Args:
        trainer: of a run; ``lr.json`` and ``lr.png`` go into its folder.
        lowest: first rate.
        highest: last rate; the search ends before it once the loss rises.
        steps: at most so many.
        show_progress: show a progress bar.

    Raises:
        InputError: the rates or the number of steps are out of range.
        DataError: the loss did not fall at any rate.
    """
    if not 0 < lowest < highest < math.inf:
        given = f"{lowest} and {highest}"
        raise input_error("lowest and highest", given, "0 < lowest < highest", "1e-6 and 1 are usual.")
    if steps < 20:
        raise input_error("steps", steps, "at least 20", "100 is usual.")
    rates, losses, mean = [], list[float](), 0.0
    bar = tqdm(np.geomspace(lowest, highest, steps).tolist(), desc="rates", unit="step", disable=not show_progress)
    for step, rate in enumerate(bar):
        loss = float(trainer.ranks.sum(trainer.train_step(step, rate)))
        mean = _SMOOTHING * mean + (1 - _SMOOTHING) * loss
        smoothed = mean / (1 - _SMOOTHING ** (step + 1))
        if not math.isfinite(loss) or _has_diverged(losses, smoothed):
            break
        rates.append(rate)
        losses.append(smoothed)
    found = _judged(rates, losses)
    if trainer.ranks.leads:
        write_text(trainer.folder / "lr.json", json.dumps(asdict(found), indent=1) + "\n")
        with contextlib.suppress(ModuleNotFoundError):  # matplotlib is optional
            plot_rates(found.rates, found.losses, found.suggestion, trainer.folder / "lr.png")
    return found


def _has_diverged(losses: list[float], loss: float) -> bool:
    return len(losses) > 10 and loss - min(losses) > _DIVERGED * (losses[0] - min(losses)) + _NOISE * losses[0]


def _judged(rates: list[float], losses: list[float]) -> RateSearch:
    lowest = int(np.argmin(losses)) if losses else 0
    if lowest < 3:
        raise DataError("The loss fell at no learning rate: check the data, or search from a lower rate.")
    slopes = np.gradient(np.array(losses[: lowest + 1]), np.log(rates[: lowest + 1]))
    return RateSearch(rates, losses, rates[int(np.argmin(slopes))], rates[lowest])
