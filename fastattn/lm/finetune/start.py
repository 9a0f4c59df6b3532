"""The weights that a fine-tuning run starts from: a checkpoint of fastattn, or a folder in Hugging Face's format."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer

from fastattn.errors import DataError
from fastattn.lm.data.images import Pixels
from fastattn.lm.finetune.config import FinetuneConfig
from fastattn.lm.finetune.load import is_finetuned, load_finetuned
from fastattn.lm.finetune.tasks import TASKS
from fastattn.lm.models import make_model
from fastattn.lm.train.checkpoint import Checkpoint, find_checkpoint
from fastattn.lm.train.hf_folder import AnySource, HFFolder


class Start(NamedTuple):
    """What a run starts from."""

    tokenizer: Tokenizer | None
    backbone: Any
    chat_template: str | None = None
    pixels: Pixels | None = None


def load_start(config: FinetuneConfig) -> Start:
    """The start of a run from ``checkpoint`` or ``pretrained``.

    Raises:
        DataError: there are no such weights.
    """
    source: AnySource
    task = TASKS[config.task]
    if config.pretrained is not None:
        source = HFFolder(_pretrained_folder(config.pretrained, task.reads_text))
    else:
        source = find_checkpoint(Path(str(config.checkpoint)))
    is_tuned = isinstance(source, Checkpoint) and is_finetuned(source)
    found: Any = load_finetuned(source).model if is_tuned else source.load_pretrained()
    backbone: Any = getattr(found, "backbone", found)
    task.check_kind(backbone.config)  # before a tokenizer that it may not have
    with torch.device("meta"):  # the weights exist once
        fresh = make_model(config.adjusted(backbone.config))
    fresh.load_state_dict(backbone.state_dict(), assign=True)
    tokenizer = source.tokenizer() if task.reads_text else None
    return Start(tokenizer, fresh, source.chat_template, source.pixels if task.reads_images else None)


def check_start(config: FinetuneConfig) -> None:
    """Raise DataError if the weights to start from are not there."""
    if config.pretrained is not None:
        _pretrained_folder(config.pretrained, TASKS[config.task].reads_text)
    if config.checkpoint is not None:
        find_checkpoint(Path(config.checkpoint))


def _pretrained_folder(given: str, has_text: bool) -> Path:
    """The folder of a model in Hugging Face's format; raises DataError with what to do if it is none."""
    folder = Path(given)
    if not folder.is_dir():
        todo = f"fastattn downloads nothing itself; fetch a model with: hf download {given} --local-dir {folder.name}"
        raise DataError(f"There is no folder {given!r}: {todo}")
    if has_text and not (folder / "tokenizer.json").is_file():
        todo = f"AutoTokenizer.from_pretrained({given!r}).save_pretrained({given!r}) of transformers writes it"
        raise DataError(f"{given} holds no tokenizer.json: {todo}.")
    return folder
