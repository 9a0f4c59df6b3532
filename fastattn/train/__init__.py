"""Training the bundled models: text to tokens to batches to checkpoints. Needs ``pip install 'fastattn[train]'``."""

from fastattn.train.checkpoint import Checkpoint, find_checkpoint
from fastattn.train.log import Log
from fastattn.train.loop import Trainer
from fastattn.train.optim import OptimConfig
from fastattn.train.pretrain import Outcome, RunConfig, make_trainer, pretrain, resumed_config
from fastattn.train.settings import Progress, TrainConfig

__all__ = [
    "Checkpoint",
    "Log",
    "OptimConfig",
    "Outcome",
    "Progress",
    "RunConfig",
    "TrainConfig",
    "Trainer",
    "find_checkpoint",
    "make_trainer",
    "pretrain",
    "resumed_config",
]
