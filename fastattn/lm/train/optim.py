"""The optimizer and its schedule: AdamW with decay groups, linear warm-up, cosine decay, clipping."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastattn.errors import input_error
from fastattn.lm.train.parallel import whole


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Settings of the optimizer.

    Attributes:
        lr: highest learning rate.
        final_lr: learning rate at the last step, as a part of ``lr``.
        warmup: steps in which the rate rises from 0, or a part of all steps if below 1.
        weight_decay: of matrices; vectors (norms, biases, sinks) are not decayed.
        betas: of AdamW.
        clip: largest norm of the gradient; None is no limit.
    """

    lr: float = 3e-3
    final_lr: float = 0.1
    warmup: float = 0.05
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float | None = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.lr < float("inf"):
            raise input_error("lr", self.lr, "a positive number", "3e-3 suits small models, 3e-4 large ones.")
        if not 0 <= self.final_lr <= 1:
            raise input_error("final_lr", self.final_lr, "a part of lr in [0, 1]", "0.1 is usual.")
        if not 0 <= self.warmup < float("inf"):
            raise input_error("warmup", self.warmup, "a number of steps, or a part of them below 1", "0.05 is usual.")
        if not 0 <= self.weight_decay < float("inf"):
            raise input_error("weight_decay", self.weight_decay, "a number >= 0", "0.1 is usual.")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise input_error("betas", self.betas, "two numbers in [0, 1)", "(0.9, 0.95) is usual.")
        if self.clip is not None and not self.clip > 0:
            raise input_error("clip", self.clip, "a positive number, or None", "1.0 is usual; None is no limit.")

    def rate(self, step: int, steps: int) -> float:
        """The learning rate of ``step`` (from 0) of ``steps``."""
        warmup = self.warmup if self.warmup >= 1 else self.warmup * steps
        if step < warmup:
            return self.lr * (step + 1) / (warmup + 1)
        done = min(1.0, (step - warmup) / max(1.0, steps - 1 - warmup))
        return self.lr * (self.final_lr + (1 - self.final_lr) * 0.5 * (1 + math.cos(math.pi * done)))


def make_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW that decays matrices only, in its fused form where the device has one."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    fused = all(p.device.type in ("cpu", "cuda", "mps") and p.is_floating_point() for p in parameters)
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=config.lr, betas=config.betas, fused=fused)


def update(optimizer: torch.optim.Optimizer, model: nn.Module, rate: float, clip: float | None) -> Tensor:
    """One step at the learning rate ``rate``; the norm of the gradient before it was clipped."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), float("inf") if clip is None else clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return whole(norm)
