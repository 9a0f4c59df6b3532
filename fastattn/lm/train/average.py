"""Averages of checkpoints: the mean of their weights, which often scores better than the newest.

Source:
    Vaswani et al., "Attention is all you need", 2017, section 6.1; Izmailov et al., "Averaging weights leads to wider
    optima and better generalization", 2018.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from fastattn.errors import DataError, input_error
from fastattn.files import new_folder
from fastattn.lm.train.checkpoint import Checkpoint, find_checkpoint, read_tensors, sorted_steps, write_checksums

_COPIED = ("config.json", "tokenizer.json")


def find_checkpoints(paths: Sequence[Path], last: int) -> list[Checkpoint]:
    """The checkpoints at ``paths``, or the ``last`` newest of a run's folder.

    Raises:
        InputError: ``last`` is less than 2.
        DataError: there are fewer than two, or one is damaged.
    """
    if last < 2:
        raise input_error("last", last, "at least 2", "An average needs two checkpoints.")
    found = [path for path in paths if not sorted_steps(path / "checkpoints")]
    found += [step for path in paths for step in sorted_steps(path / "checkpoints")[-last:]]
    if len(found) < 2:
        todo = "train with --keep 5, say, or name several checkpoints"
        raise DataError(f"{', '.join(map(str, paths))}: {len(found)} checkpoint, where an average needs two: {todo}.")
    return [find_checkpoint(path) for path in found]


def average_checkpoints(checkpoints: Sequence[Checkpoint], out: Path) -> Checkpoint:
    """Write the mean of the weights to the folder ``out``, a checkpoint without an optimizer.

    Args:
        checkpoints: of one run, or of runs of one model.
        out: must not exist.

    Raises:
        DataError: ``out`` exists, a checkpoint is damaged, or they are of different models.

    Every weight is summed in float64 and rounded once.
    """
    if out.exists():
        raise DataError(f"{str(out)!r} exists: choose another --out.")
    newest = checkpoints[-1]
    total: dict[str, Tensor] = {}
    for checkpoint in checkpoints:
        tensors = read_tensors(checkpoint.folder / "model.safetensors")
        if checkpoint.model_config() != newest.model_config() or (total and tensors.keys() != total.keys()):
            raise DataError(f"{checkpoint.folder} and {newest.folder} hold different models, which have no average.")
        for name, tensor in tensors.items():
            total[name] = total.get(name, torch.zeros((), dtype=torch.float64)) + tensor.to(torch.float64)
    kinds = {name: tensor.dtype for name, tensor in tensors.items()}
    mean = {name: (value / len(checkpoints)).to(kinds[name]) for name, value in total.items()}
    state = newest.trainer_state() | {"averaged": [str(checkpoint.folder) for checkpoint in checkpoints]}
    with new_folder(out) as folder:
        save_file(mean, folder / "model.safetensors")
        for name in _COPIED:
            if (newest.folder / name).is_file():
                shutil.copyfile(newest.folder / name, folder / name)
        (folder / "trainer.json").write_text(json.dumps(state, indent=1), encoding="utf-8")
        write_checksums(folder)
    return Checkpoint(out)
