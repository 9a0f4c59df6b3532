"""The start of a run: the lock on its folder, and a new start or a continuation."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from fastattn.errors import DataError
from fastattn.files import only_writer
from fastattn.lm.train.checkpoint import Checkpoint, find_checkpoint, sorted_steps
from fastattn.lm.train.log import TensorBoard, WeightsAndBiases
from fastattn.lm.train.loop import Trainer
from fastattn.lm.train.parallel import check_sharing, ranks
from fastattn.lm.train.settings import Progress, TrainConfig


@contextlib.contextmanager
def run_folder(out: Path, config: TrainConfig, resume: Checkpoint | None) -> Iterator[None]:
    """Check what can be checked before any work, and keep other runs out of ``out`` during the block.

    Args:
        out: folder of the run.
        config: of the training.
        resume: the checkpoint to go on from; None begins a run.

    Raises:
        InputError: this machine or these processes cannot do what ``config`` asks for.
        DataError: another process writes to ``out``, it holds a run already, or a newer checkpoint than ``resume``.
    """
    processes, problem = ranks(), None
    check_sharing(config.batch, config.parallel, processes, config.context_parallel)
    if config.tensorboard:
        TensorBoard.load_writer()
    if config.wandb:
        WeightsAndBiases.load_module()
    with contextlib.ExitStack() as stack:
        if processes.leads:
            try:
                stack.enter_context(only_writer(out.resolve()))
                _check(out, resume)
            except DataError as error:
                problem = str(error)
        problem = processes.from_first(problem)  # or the others would wait for the first one
        if problem is not None:
            raise DataError(problem)
        yield


def _check(out: Path, resume: Checkpoint | None) -> None:
    if resume is None:
        if sorted_steps(out / "checkpoints"):
            todo = "add --resume to go on with it, or choose another --out"
            raise DataError(f"{str(out)!r} already holds a run: {todo}.")
    elif resume.folder.parent == out / "checkpoints" and find_checkpoint(out).folder != resume.folder:
        raise DataError(f"{str(out)!r} was continued by another process meanwhile: resume it again.")


def start_or_resume(trainer: Trainer, resume: Checkpoint | None, fingerprint: str, data: str) -> Progress:
    """Train from the beginning, or from ``resume`` on.

    Args:
        trainer: of the run; its settings hold the ``fingerprint``.
        resume: the checkpoint to go on from; None begins a run.
        fingerprint: of the data.
        data: what it is, for the message.

    Raises:
        DataError: the data are not those that the checkpoint was trained on.
    """
    if resume is None:
        trainer.log.forget_after(0)  # of a run that was killed before its first checkpoint
    elif resume.trainer_state()["settings"].get("fingerprint") != fingerprint:
        raise DataError(f"The {data} not what the run was trained on: restore the files, or start a new --out.")
    else:
        trainer.resume(resume)
    return trainer.run()
