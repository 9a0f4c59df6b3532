"""Training the bundled models: text to tokens to batches to checkpoints. Needs ``pip install 'fastattn[train]'``."""

from fastattn.train.checkpoint import Checkpoint, find_checkpoint
from fastattn.train.loop import Progress, TrainConfig, Trainer
from fastattn.train.optim import OptimConfig
from fastattn.train.pretrain import Outcome, RunConfig, pretrain, resumed_config

__all__ = [
    "Checkpoint",
    "OptimConfig",
    "Outcome",
    "Progress",
    "RunConfig",
    "TrainConfig",
    "Trainer",
    "find_checkpoint",
    "pretrain",
    "resumed_config",
]
