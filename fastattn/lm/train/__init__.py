"""Training the bundled models: text to tokens to batches to checkpoints. Needs ``pip install 'fastattn[train]'``."""

from fastattn.lm.train.average import average_checkpoints
from fastattn.lm.train.checkpoint import Checkpoint, find_checkpoint
from fastattn.lm.train.hf_folder import HFFolder, find_model
from fastattn.lm.train.learning_rate import find_rate
from fastattn.lm.train.log import Log
from fastattn.lm.train.loop import Trainer
from fastattn.lm.train.optim import OptimConfig
from fastattn.lm.train.pretrain import Outcome, RunConfig, make_trainer, pretrain, resumed_config
from fastattn.lm.train.settings import Progress, TrainConfig

__all__ = [
    "Checkpoint",
    "HFFolder",
    "Log",
    "OptimConfig",
    "Outcome",
    "Progress",
    "RunConfig",
    "TrainConfig",
    "Trainer",
    "average_checkpoints",
    "find_checkpoint",
    "find_model",
    "find_rate",
    "make_trainer",
    "pretrain",
    "resumed_config",
]
