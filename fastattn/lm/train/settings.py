"""Settings of a training run, all in one flat config by the names of the command line's flags, and its ``Progress``."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Self, get_args

from fastattn.errors import input_error
from fastattn.lm.train.optim import OptimConfig
from fastattn.lm.train.parallel import Parallel

Precision = Literal["auto", "float32", "bfloat16"]


@dataclass(frozen=True, kw_only=True)
class TrainConfig(OptimConfig):
    """Settings of the training loop, beside those of the optimizer.

    Attributes:
        steps: updates of the weights in all.
        max_minutes: stop earlier when the run has taken this long, over all its parts; None is no limit.
        batch: rows in each update.
        micro_batch: rows that a process computes at once, their gradients added up; None is its part of ``batch``.
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
        compile: let ``torch.compile`` make kernels of the model; the first step then takes a minute or so.
        recompute: compute activations again in the backward pass, but for those of attention, to save memory.
        parallel: how several processes share the work: "ddp" or "fsdp"; "auto" is "fsdp" if the model is too large.
        context_parallel: processes that share each row, of which each holds some tokens; 1 gives each rows of its own.
        tensorboard: also write the log for TensorBoard, into ``tensorboard/``.
        wandb: also write it for Weights & Biases, into ``wandb/`` or to its server; see ``WeightsAndBiases``.
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
    compile: bool = False
    recompute: bool = False
    parallel: Parallel = "auto"
    context_parallel: int = 1
    tensorboard: bool = False
    wandb: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        positive = ("steps", "batch", "eval_every", "eval_rows", "save_every", "keep", "log_every", "context_parallel")
        for name in positive:
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
        if self.parallel not in get_args(Parallel):
            names = ", ".join(get_args(Parallel))
            raise input_error("parallel", repr(self.parallel), names, "auto is fsdp if the model is too large for ddp.")

    @property
    def keeps_best(self) -> bool:
        return self.keep_best or self.patience is not None


# What may differ between a run and its continuation; the rest would make it another run.
_MAY_CHANGE = {
    "steps", "max_minutes", "eval_every", "eval_rows", "patience", "metric", "greater_is_better", "keep_best",
    "save_every", "keep", "log_every", "micro_batch", "precision", "compile", "recompute", "parallel", "tensorboard",
    "wandb", "attention",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class RunSettings(TrainConfig):
    """Base of the configs of runs, which have the fields of ``TrainConfig`` besides their own."""

    def __post_init__(self) -> None:
        _ = self.train  # checks its fields

    @property
    def train(self) -> TrainConfig:
        """The settings of the training loop."""
        return TrainConfig(**{field.name: getattr(self, field.name) for field in dataclasses.fields(TrainConfig)})

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Self:
        """The inverse of ``to_dict``; raises KeyError or TypeError for fields that are not those of the class.

        Runs of fastattn 0.1 have a field "train", and in it "optim", in place of their fields.
        """
        train = dict(fields.get("train", {}))
        found = dict(train.pop("optim", {})) | train | {name: x for name, x in fields.items() if name != "train"}
        _ = found["steps"]
        typed: dict[str, Any] = {name: tuple(x) if isinstance(x, list) else x for name, x in found.items()}
        return cls(**typed)

    def changed(self, flags: Mapping[str, Any]) -> Self:
        """A copy with fields replaced."""
        return dataclasses.replace(self, **flags)

    def continued(self, flags: Mapping[str, Any], may_change: set[str] | None = None) -> Self:
        """A copy for going on with the run: with those of ``flags`` that may change then.

        Args:
            flags: fields and their values.
            may_change: names of fields that may change besides those of every run.

        Raises:
            InputError: a flag would make it another run.
        """
        wanted = self.changed(flags)
        for name in flags.keys() - _MAY_CHANGE - (may_change or set()):
            before, after = getattr(self, name), getattr(wanted, name)
            if before != after:
                todo = "Leave the flag out when resuming, or start a new --out."
                raise input_error("--" + name.replace("_", "-"), after, f"{before}, as before", todo)
        return wanted


@dataclass
class Progress:
    """The state of a run.

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
        evaluated_step: of the newest evaluation; None before there is one.
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
    evaluated_step: int | None = None
    signal: int | None = None
