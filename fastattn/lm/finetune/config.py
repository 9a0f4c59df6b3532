"""The settings of a fine-tuning run."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import KW_ONLY, dataclass
from typing import Any

from fastattn.errors import DataError, input_error
from fastattn.lm.finetune.adapters import Lora, Method, check_method
from fastattn.lm.finetune.augment import AUGMENTATIONS
from fastattn.lm.finetune.tasks import TASKS
from fastattn.lm.models import TransformerConfig, preset
from fastattn.lm.train.checkpoint import Checkpoint
from fastattn.lm.train.settings import RunSettings, TrainConfig
from fastattn.lm.train.tasks import preset_for
from fastattn.lm.train.tokens import check_held_out, check_vocabulary_size

CONVERSATIONS = ("chat", "dpo")  # tasks with a chat template


@dataclass(frozen=True)
class FinetuneConfig(RunSettings):
    """A fine-tuning run. It starts from exactly one of ``checkpoint``, ``pretrained`` and ``preset``.

    Attributes:
        task: a key of ``fastattn.lm.finetune.tasks.TASKS``.
        data: a file of examples or a folder with splits, see ``fastattn.lm.finetune.datasets``; for "seq2seq" two files
            whose lines belong together, too.
        eval: files to evaluate on, each by itself; empty takes the folder's, or holds out a part of ``data``.
        columns: pairs of a field of the task and the column that it is taken from.
        checkpoint: folder of a run of fastattn, whose newest checkpoint is the start.
        pretrained: folder of a model in Hugging Face's format, with its ``tokenizer.json``.
        preset: size of a model that starts from nothing, a key of ``fastattn.lm.models.PRESETS``.
        method: "full", "frozen" (the head alone is trained) or "lora".
        lora_rank: as in ``Lora``, as are the next two.
        lora_alpha: see there.
        lora_dropout: see there.
        vocab_size: of the tokenizer that is learned where the model starts from nothing.
        held_out: part of ``data`` that is held out where there is no ``eval``, chosen by the hash of each example.
        chat_template: file of a Jinja template, of "chat" and "dpo"; None is that of the model to start from, or for
            messages the default.
        dpo_beta: of "dpo": the larger, the closer the model stays to what it was; see ``tasks.prefer``.
        image_size: height and width of images, of a model that starts from nothing; None is the preset's.
        patch_size: likewise of the patches that become tokens.
        augment: random changes of images in training: "none", "shift" or "flip", which also shifts.
        length: most tokens in a row; None is the model's.
        dropout: probability of dropping; None is the model's.
        attention: "fastattn" or "eager".
        epochs: passes over the examples, where ``steps`` is None.

    The others are those of ``TrainConfig`` and ``OptimConfig``, by keyword.
    """

    task: str
    data: str | tuple[str, ...]
    eval: str | tuple[str, ...] = ()
    columns: tuple[tuple[str, str], ...] = ()
    checkpoint: str | None = None
    pretrained: str | None = None
    preset: str | None = None
    method: Method = "full"
    lora_rank: int = 8
    lora_alpha: float = 16.0
    lora_dropout: float = 0.0
    vocab_size: int = 4096
    held_out: float = 0.1
    chat_template: str | None = None
    dpo_beta: float = 0.1
    image_size: int | None = None
    patch_size: int | None = None
    augment: str = "none"
    length: int | None = None
    dropout: float | None = None
    attention: str = "fastattn"
    epochs: float = 3.0
    _: KW_ONLY
    steps: int | None = None  # type: ignore[assignment]  # an int in the end, see ``training``
    eval_rows: int = 256
    lr: float = 3e-4
    weight_decay: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.task not in TASKS:
            raise input_error("task", repr(self.task), ", ".join(TASKS), "See fastattn finetune --help.")
        starts = [f"--{name}" for name in ("checkpoint", "pretrained", "preset") if getattr(self, name) is not None]
        if len(starts) != 1:
            allowed = "one of --checkpoint, --pretrained and --preset"
            raise input_error("the start", " and ".join(starts) or "none", allowed, "Say where the weights come from.")
        if self.chat_template is not None and self.task not in CONVERSATIONS:
            raise input_error("chat_template", self.chat_template, "None", "It belongs to the tasks chat and dpo.")
        if self.task == "dpo" and self.preset is not None:
            todo = "A preference is learned by a model that can answer: fine-tune one for chat or instruct first."
            raise input_error("preset", repr(self.preset), "--checkpoint or --pretrained for dpo", todo)
        if not 0 < self.dpo_beta < math.inf:
            raise input_error("dpo_beta", self.dpo_beta, "a positive number", "0.1 is usual.")
        if not 0 < self.epochs < math.inf:
            raise input_error("epochs", self.epochs, "a positive number", "3 is usual.")
        if self.steps is not None and self.steps < 1:
            raise input_error("steps", self.steps, "a positive int, or None", "None goes by epochs.")
        if self.length is not None and self.length < 8:
            raise input_error("length", self.length, "an int >= 8, or None", "None is the model's longest row.")
        task = TASKS[self.task]
        self._check_images()
        check_held_out(self.held_out)
        check_vocabulary_size(self.vocab_size)
        check_method(self.method, has_head=task.answer_field is None)
        _ = self.lora  # checks its fields
        self.fresh(self.vocab_size)  # checks the preset, sizes of images, dropout and attention

    def _check_images(self) -> None:
        task = TASKS[self.task]
        if self.length is not None and not task.reads_text:
            raise input_error("length", self.length, f"None for {self.task}", "Its rows are as long as an image.")
        augment = None if self.augment == "none" else self.augment
        given = {"image_size": self.image_size, "patch_size": self.patch_size, "augment": augment}
        for name, value in given.items():
            if value is not None and not task.reads_images:
                raise input_error(name, value, f"its default for {self.task}", "It belongs to tasks with images.")
            if value is not None and name != "augment" and self.preset is None:
                raise input_error(name, value, "None without --preset", "The model to start from has one.")
        if self.augment not in AUGMENTATIONS:
            raise input_error("augment", repr(self.augment), ", ".join(AUGMENTATIONS), "none changes nothing.")

    def fresh(self, vocab_size: int) -> TransformerConfig:
        """The config of a model that starts from nothing."""
        config = preset(preset_for(TASKS[self.task].kinds, self.preset or "tiny"), vocab_size)
        sizes = {"image_size": self.image_size, "patch_size": self.patch_size}
        given = {name: size for name, size in sizes.items() if size is not None}
        return self.adjusted(dataclasses.replace(config, **given))  # type: ignore[arg-type]  # ints

    @property
    def train(self) -> TrainConfig:
        """The settings of the training loop; ``training`` has the number of steps, too."""
        names = {field.name for field in dataclasses.fields(TrainConfig)} - {"steps"}
        return TrainConfig(**{name: getattr(self, name) for name in names})

    @property
    def lora(self) -> Lora:
        return Lora(self.lora_rank, self.lora_alpha, self.lora_dropout)

    def training(self, features: int) -> TrainConfig:
        """``train`` with the number of steps for so many rows."""
        steps = self.steps or max(1, round(self.epochs * features / self.train.batch))
        return dataclasses.replace(self.train, steps=steps)

    def adjusted(self, config: TransformerConfig) -> TransformerConfig:
        """The config of a model as this run uses it."""
        dropout = config.dropout if self.dropout is None else self.dropout
        return TransformerConfig.from_dict(config.to_dict() | {"attention": self.attention, "dropout": dropout})


def resumed_config(checkpoint: Checkpoint, flags: dict[str, Any]) -> FinetuneConfig:
    """The settings of the run that wrote ``checkpoint``, with those of ``flags`` that a continuation may change.

    Raises:
        DataError: the checkpoint's settings cannot be read.
        InputError: a flag would make it another run.
    """
    return saved_config(checkpoint).continued(flags, {"epochs", "steps"})


def saved_config(checkpoint: Checkpoint) -> FinetuneConfig:
    """The settings of the run that wrote ``checkpoint``; raises DataError if they cannot be read."""
    try:
        return FinetuneConfig.from_dict(checkpoint.trainer_state()["settings"]["finetune"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        path = checkpoint.folder / "trainer.json"
        raise DataError(f"{path} does not hold the settings of a fastattn finetune run ({error}).") from error
