"""GLUE as one command: a model fine-tuned for each of its tasks in turn, and the average of their scores.

Source:
    Wang et al., "GLUE: a multi-task benchmark and analysis platform for natural language understanding", 2019.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import torch

from fastattn.errors import DataError, input_error
from fastattn.files import write_text
from fastattn.lm.finetune.config import FinetuneConfig, resumed_config
from fastattn.lm.finetune.run import finetune
from fastattn.lm.train.checkpoint import find_checkpoint, sorted_steps
from fastattn.lm.train.log import aligned


@dataclass(frozen=True)
class GlueTask:
    """A task of GLUE.

    Attributes:
        task: of fine-tuning.
        metrics: whose mean is its score; a metric of several files counts once for each.
    """

    task: str
    metrics: tuple[str, ...]


# WNLI is in no usual average, as its development set is adversarial to its training set.
GLUE = {
    "CoLA": GlueTask("classify", ("Matthews",)),
    "SST-2": GlueTask("classify", ("accuracy",)),
    "MRPC": GlueTask("classify", ("F1 (second label)", "accuracy")),
    "STS-B": GlueTask("regression", ("Pearson", "Spearman")),
    "QQP": GlueTask("classify", ("F1 (second label)", "accuracy")),
    "MNLI": GlueTask("classify", ("accuracy",)),
    "QNLI": GlueTask("classify", ("accuracy",)),
    "RTE": GlueTask("classify", ("accuracy",)),
    "WNLI": GlueTask("classify", ("accuracy",)),
}
_NOT_AVERAGED = {"WNLI"}


@dataclass(frozen=True)
class GlueOutcome:
    """The scores of the tasks, in [0, 100], and their average without WNLI; None if a run was stopped."""

    scores: dict[str, float]
    signal: int | None = None

    @property
    def average(self) -> float | None:
        kept = [score for name, score in self.scores.items() if name not in _NOT_AVERAGED]
        return fmean(kept) if kept and self.signal is None else None

    def table(self) -> str:
        """The scores as aligned lines."""
        average = self.average
        shown = {name: f"{score:.1f}" for name, score in self.scores.items()}
        return aligned(shown | {"average": "not known yet" if average is None else f"{average:.1f}"})


def find_glue(folder: Path) -> dict[str, Path]:
    """The folders of GLUE's tasks below ``folder``, by the names of the tasks.

    Raises:
        DataError: there is none.
    """
    known = {_plain(name): name for name in GLUE}
    below = sorted(folder.iterdir()) if folder.is_dir() else []
    found = {known[_plain(path.name)]: path for path in below if path.is_dir() and _plain(path.name) in known}
    if not found:
        raise DataError(f"{folder} has no folder of a task of GLUE: {', '.join(GLUE)}.")
    return {name: found[name] for name in GLUE if name in found}


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def run_glue(
    out: Path,
    config: FinetuneConfig,
    *,
    device: torch.device | str = "cpu",
    show_progress: bool = True,
) -> GlueOutcome:
    """Fine-tune and score a model for each task of GLUE; a task that is done is not done again.

    Args:
        out: folder that receives a run for each task, and ``glue.json``.
        config: of the runs; its ``data`` is the folder of GLUE, its ``task`` is not used.
        device: where to train.
        show_progress: show progress bars.

    Raises:
        DataError: the folder holds no task of GLUE, or a run cannot use its data.
        InputError: a setting is out of range.
    """
    if not isinstance(config.data, str) or config.eval or config.columns:
        raise input_error("data", config.data, "one folder, without eval and columns", "Give the folder of GLUE.")
    scores: dict[str, float] = {}
    for name, folder in find_glue(Path(config.data)).items():
        path = out / name / "scores.json"
        if not path.exists():
            signal = _run(out / name, config, name, folder, device, show_progress)
            if signal is not None:
                return GlueOutcome(scores, signal)
        scores[name] = _score(name, path)
    outcome = GlueOutcome(scores)
    write_text(out / "glue.json", json.dumps(scores | {"average": outcome.average}, indent=1) + "\n")
    return outcome


def _run(
    out: Path, config: FinetuneConfig, name: str, data: Path, device: torch.device | str, show_progress: bool
) -> int | None:
    """Run one task, or go on with it; the number of the signal that stopped it."""
    resume = find_checkpoint(out) if sorted_steps(out / "checkpoints") else None
    if resume is not None:
        own = resumed_config(resume, {})
    else:
        own = dataclasses.replace(config, task=GLUE[name].task, data=str(data))
    if show_progress:
        print(f"--- {name}", flush=True)
    return finetune(out, own, device=device, resume=resume, show_progress=show_progress).progress.signal


def _score(name: str, path: Path) -> float:
    """The score of a task in [0, 100], from the scores of its run."""
    try:
        found: Mapping[str, float] = json.loads(path.read_text(encoding="utf-8"))
        metrics = GLUE[name].metrics
        kept = [value for key, value in found.items() if any(key == m or key.startswith(f"{m} (") for m in metrics)]
        return 100 * fmean(kept)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise DataError(f"{path} does not hold the scores of a run ({error}): remove it and run again.") from error
