"""What a run tells while it goes: the log of JSON lines, and the sums that its next line is made of."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from fastattn.files import saying_why, write_text


def aligned(figures: Mapping[str, object]) -> str:
    """Figures as lines, their values below each other."""
    width = max(map(len, figures))
    return "\n".join(f"{name:<{width}}  {'not known yet' if x is None else x}" for name, x in figures.items())


class Log:
    """A file of JSON lines; the last line may be torn by a kill."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, record: Mapping[str, float]) -> None:
        with saying_why(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")

    def records(self) -> list[dict[str, float]]:
        """All whole lines."""
        if not self.path.exists():
            return []
        found = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(ValueError):
                found.append(json.loads(line))
        return found

    def forget_after(self, step: int) -> None:
        """Drop the lines of later steps, and a torn one."""
        kept = [record for record in self.records() if record["step"] <= step]
        write_text(self.path, "".join(json.dumps(record) + "\n" for record in kept))


@dataclass
class Window:
    """Sums over the steps since the last line of the log, left on the device so that no step waits for it."""

    losses: list[Tensor] = field(default_factory=list)
    norms: list[Tensor] = field(default_factory=list)
    labels: int = 0
    began: float = field(default_factory=time.perf_counter)

    def add(self, loss: Tensor, norm: Tensor, labels: int) -> None:
        self.losses.append(loss)
        self.norms.append(norm)
        self.labels += labels

    def means(self) -> tuple[float, float, float]:
        """Loss, norm of the gradient, labels per second."""
        loss, norm = float(torch.stack(self.losses).mean()), float(torch.stack(self.norms).mean())
        return loss, norm, self.labels / (time.perf_counter() - self.began)
