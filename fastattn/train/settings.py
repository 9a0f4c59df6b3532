"""What a training run is told and where it stands: ``TrainConfig`` and ``Progress``. No torch, no behaviour."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

from fastattn.errors import input_error
from fastattn.train.optim import OptimConfig

Precision = Literal["auto", "float32", "bfloat16"]


@dataclass(frozen=True)
class TrainConfig:
    """How long, on how much and how often.

    Attributes:
        steps: updates of the weights in all.
        max_minutes: stop earlier when the run has taken this long, over all its parts; None is no limit.
        batch: rows in each update.
        micro_batch: rows computed at once, their gradients added up; None is ``batch``.
        seed: of the initial weights, the order of the data and dropout.
        eval_every: steps between evaluations; there is one at the end, too.
        eval_rows: rows of a held-out loss, evenly spaced over the held-out text.
        patience: stop after this many evaluations in a row without a new best ``metric``; None never does.
        metric: what is best: "held_out_loss", or one of the trainer's own metrics.
        greater_is_better: whether a greater ``metric`` is better.
        keep_best: keep the checkpoint of the best evaluation, too; on with ``patience``.
        save_every: steps between checkpoints; also written at the end and when interrupted.
        keep: newest checkpoints kept.
        log_every: steps between lines of the log, which hold means over them; a checkpoint adds one.
        precision: "bfloat16" autocasts; "auto" does so on a GPU.
        optim: the optimizer.
    """

    steps: int = 1000
    max_minutes: float | None = None
    batch: int = 16
    micro_batch: int | None = None
    seed: int = 0
    eval_every: int = 100
    eval_rows: int = 64
    patience: int | None = None
    metric: str = "held_out_loss"
    greater_is_better: bool = False
    keep_best: bool = False
    save_every: int = 100
    keep: int = 2
    log_every: int = 10
    precision: Precision = "auto"
    optim: OptimConfig = field(default_factory=OptimConfig)

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "eval_every", "eval_rows", "save_every", "keep", "log_every"):
            if getattr(self, name) < 1:
                raise input_error(name, getattr(self, name), "a positive int", "Give at least 1.")
        if self.max_minutes is not None and not self.max_minutes > 0:
            raise input_error("max_minutes", self.max_minutes, "a positive number, or None", "None is no limit.")
        if self.micro_batch is not None and not 1 <= self.micro_batch <= self.batch:
            raise input_error("micro_batch", self.micro_batch, f"1 ... batch {self.batch}", "None is the whole batch.")
        if self.patience is not None and self.patience < 1:
            raise input_error("patience", self.patience, "a positive int, or None", "None never stops early.")
        if not 0 <= self.seed < 2**31:
            raise input_error("seed", self.seed, "an int in [0, 2**31)", "0 is as good as any.")
        if self.precision not in get_args(Precision):
            names = ", ".join(get_args(Precision))
            raise input_error("precision", repr(self.precision), names, "auto is bfloat16 on a GPU, else float32.")

    @property
    def keeps_best(self) -> bool:
        return self.keep_best or self.patience is not None


@dataclass
class Progress:
    """Where a run stands.

    Attributes:
        step: updates done.
        tokens: labels learned from.
        seconds: spent in steps and evaluations, over all resumed parts.
        loss: mean over the last logged steps, nats per label; None before there is one.
        held_out_loss: the newest, nats per label; None before there is one.
        metrics: the newest of the trainer's own metrics.
        best: the best value of ``TrainConfig.metric`` so far; None before there is one.
        best_step: where it was seen.
        stale: evaluations since then.
        signal: the signal that stopped the run, if one did.
    """

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    loss: float | None = None
    held_out_loss: float | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    best: float | None = None
    best_step: int | None = None
    stale: int = 0
    signal: int | None = None
