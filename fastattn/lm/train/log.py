"""The log of a run: JSON lines, TensorBoard, Weights & Biases, and the sums that the next line is computed from."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastattn.errors import input_error
from fastattn.files import saying_why, write_text
from fastattn.lm.train.parallel import Ranks


def aligned(figures: Mapping[str, object]) -> str:
    """Figures as lines, their values below each other."""
    width = max(map(len, figures))
    return "\n".join(f"{name:<{width}}  {'not known yet' if x is None else x}" for name, x in figures.items())


class Log:
    """A file of JSON lines; the last line may be torn by a kill.

    Args:
        path: of the file.
        writes: whether this process writes it; of several, one does.
    """

    def __init__(self, path: Path, writes: bool = True) -> None:
        self.path, self.writes = path, writes

    def write(self, record: Mapping[str, float]) -> None:
        if not self.writes:
            return
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
        if not self.writes:
            return
        kept = [record for record in self.records() if record["step"] <= step]
        write_text(self.path, "".join(json.dumps(record) + "\n" for record in kept))


class TensorBoard:
    """The log for TensorBoard: each number of a record a curve over steps.

    Raises:
        InputError: TensorBoard is not installed.
    """

    def __init__(self, folder: Path, step: int) -> None:
        self._writer = self.load_writer()(str(folder), purge_step=step + 1)  # forgets what a killed run wrote after it

    @staticmethod
    def load_writer() -> Any:
        """The class that writes; raises InputError if TensorBoard is not installed."""
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise input_error("tensorboard", True, "False here", "It is missing: pip install tensorboard") from error
        return SummaryWriter

    def write(self, record: Mapping[str, float]) -> None:
        for name, value in record.items():
            if name != "step":
                self._writer.add_scalar(name, value, int(record["step"]))

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """The log for Weights & Biases: each number of a record a curve over steps.

    The environment variables of ``wandb`` choose where it goes: ``WANDB_MODE=offline`` keeps it in ``folder``, for
    ``wandb sync``; ``WANDB_PROJECT`` names the project, which is otherwise "fastattn".

    Args:
        folder: of the run; receives ``wandb/``, with the id by which a continuation goes on with the same curves.
        settings: shown beside the curves.

    Raises:
        InputError: ``wandb`` is not installed.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        wandb = self.load_module()
        path = folder / "wandb" / "id"
        if not path.exists():
            write_text(path, secrets.token_hex(4))
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "fastattn"), name=folder.resolve().name, dir=str(folder),
            id=path.read_text(encoding="utf-8"), resume="allow", config=dict(settings),
        )  # fmt: skip
        # By our own step: that of wandb cannot go back to a checkpoint after a kill.
        self._run.define_metric("*", step_metric="step")

    @staticmethod
    def load_module() -> Any:
        """The module ``wandb``; raises InputError if it is not installed."""
        try:
            import wandb
        except ImportError as error:
            raise input_error("wandb", True, "False here", "It is missing: pip install wandb") from error
        return wandb

    def write(self, record: Mapping[str, float]) -> None:
        self._run.log(dict(record))

    def close(self) -> None:
        self._run.finish()


@dataclass
class Window:
    """Sums over the steps since the last line of the log, left on the device so that no step waits for it."""

    losses: list[Tensor] = field(default_factory=list)
    norms: list[Tensor] = field(default_factory=list)
    labels: list[Tensor | int] = field(default_factory=list)
    began: float = field(default_factory=time.perf_counter)

    def add(self, loss: Tensor, norm: Tensor, labels: Tensor | int) -> None:
        self.losses.append(loss)
        self.norms.append(norm)
        self.labels.append(labels)

    def means(self, ranks: Ranks) -> tuple[float, float, int, float]:
        """Loss and norm of the gradient; labels, and labels per second."""
        loss, norm = float(ranks.sum(torch.stack(self.losses).mean())), float(torch.stack(self.norms).mean())
        labels = int(sum(self.labels))
        return loss, norm, labels, labels / (time.perf_counter() - self.began)
