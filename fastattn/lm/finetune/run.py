"""The whole of a fine-tuning run, from files of examples to a scored model: what ``fastattn finetune`` calls."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import nn

from fastattn.errors import DataError, input_error
from fastattn.files import write_text
from fastattn.lm.data import text_rank
from fastattn.lm.finetune.adapters import Lora, Method, add_adapters, choose_trained, merge_adapters
from fastattn.lm.finetune.examples import Example, read_examples
from fastattn.lm.finetune.scoring import answer_all, score
from fastattn.lm.finetune.tasks import TASKS, Task, label_names
from fastattn.lm.models import TransformerConfig, from_pretrained, make_model, preset
from fastattn.lm.train.checkpoint import Checkpoint, find_checkpoint, sorted_steps
from fastattn.lm.train.example_rows import ExampleRows
from fastattn.lm.train.log import aligned
from fastattn.lm.train.loop import Trainer
from fastattn.lm.train.optim import OptimConfig
from fastattn.lm.train.parallel import ranks
from fastattn.lm.train.settings import Progress, RunSettings, TrainConfig
from fastattn.lm.train.tasks import preset_for
from fastattn.lm.train.tokens import load_tokenizer, train_tokenizer

_TRAIN = TrainConfig(batch=16, eval_rows=256, optim=OptimConfig(lr=3e-4, weight_decay=0.01))


@dataclass(frozen=True)
class FinetuneConfig(RunSettings):
    """A fine-tuning run. It starts from exactly one of ``checkpoint``, ``pretrained`` and ``preset``.

    Attributes:
        task: a key of ``fastattn.lm.finetune.tasks.TASKS``.
        data: a .jsonl, .csv or .tsv file of examples; their fields stand in ``fastattn.lm.finetune.examples``.
        eval: another one to evaluate on; None holds out a part of ``data``.
        checkpoint: folder of a run of fastattn, whose newest checkpoint is the start.
        pretrained: folder of a model in Hugging Face's format, with its ``tokenizer.json``.
        preset: size of a model that starts from nothing, a key of ``fastattn.lm.models.PRESETS``.
        method: "full", "frozen" (the head alone is trained) or "lora".
        lora_rank: as in ``Lora``, as are the next two.
        lora_alpha: see there.
        lora_dropout: see there.
        vocab_size: of the tokenizer that is learned where the model starts from nothing.
        held_out: part of ``data`` that is held out if there is no ``eval``, chosen by the hash of each example.
        length: most tokens in a row; None is the model's.
        dropout: probability of dropping; None is the model's.
        attention: "fastattn" or "eager".
        epochs: passes over the examples.
        steps: updates of the weights, instead of ``epochs``.
        train: the training itself; its number of steps follows from the two above.
    """

    task: str
    data: str
    eval: str | None = None
    checkpoint: str | None = None
    pretrained: str | None = None
    preset: str | None = None
    method: Method = "full"
    lora_rank: int = 8
    lora_alpha: float = 16.0
    lora_dropout: float = 0.0
    vocab_size: int = 4096
    held_out: float = 0.1
    length: int | None = None
    dropout: float | None = None
    attention: str = "fastattn"
    epochs: float = 3.0
    steps: int | None = None
    train: TrainConfig = field(default_factory=lambda: _TRAIN)

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise input_error("task", repr(self.task), ", ".join(TASKS), "See fastattn finetune --help.")
        starts = [f"--{name}" for name in ("checkpoint", "pretrained", "preset") if getattr(self, name) is not None]
        if len(starts) != 1:
            allowed = "one of --checkpoint, --pretrained and --preset"
            raise input_error("the start", " and ".join(starts) or "none", allowed, "Say where the weights come from.")
        if not 0 < self.epochs < math.inf:
            raise input_error("epochs", self.epochs, "a positive number", "3 is usual.")
        if self.steps is not None and self.steps < 1:
            raise input_error("steps", self.steps, "a positive int, or None", "None goes by epochs.")
        if self.length is not None and self.length < 8:
            raise input_error("length", self.length, "an int >= 8, or None", "None is the model's longest row.")
        if not 0 < self.held_out < 1:
            raise input_error("held_out", self.held_out, "a fraction between 0 and 1", "0.1 holds out one in ten.")
        _ = self.lora  # checks its fields

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


@dataclass(frozen=True)
class Outcome:
    """What came of a run.

    Attributes:
        progress: where it stands.
        scores: of the held-out examples by name; empty if the run was stopped before its end.
        examples: their numbers, "train" and "held out"; "longest" are the rows of "train" that are as long as a row can
            be, most of them because the example was cut.
        parameters: their numbers, "all" and "trained".
        checkpoint: the newest, or the best if the run keeps it.
    """

    progress: Progress
    scores: dict[str, float]
    examples: dict[str, int]
    parameters: dict[str, int]
    checkpoint: Checkpoint

    def facts(self) -> dict[str, float | int | str]:
        """The figures of the run by name."""
        return {
            "examples": self.examples["train"],
            "examples held out": self.examples["held out"],
            "rows cut to the longest length": self.examples["longest"],
            "parameters": self.parameters["all"],
            "parameters trained": self.parameters["trained"],
            "steps": self.progress.step,
            "training seconds": round(self.progress.seconds, 1),
            **{f"held-out {name}": round(value, 4) for name, value in self.scores.items()},
            "checkpoint": str(self.checkpoint.folder),
        }

    def summary(self) -> str:
        """The figures as aligned lines."""
        return aligned(self.facts())


def finetune(
    out: Path,
    config: FinetuneConfig,
    *,
    device: torch.device | str = "cpu",
    resume: Checkpoint | None = None,
    show_progress: bool = True,
) -> Outcome:
    """Read the examples, take the model, train it, and leave checkpoints, a log and the scores in ``out``.

    Args:
        out: folder of the run.
        config: see ``FinetuneConfig``; a continuation takes it from ``resumed_config``.
        device: where to train.
        resume: the checkpoint to go on from; None starts a new run, which ``out`` must not hold already.
        show_progress: show progress bars.

    Raises:
        DataError: the examples, the model or ``out`` cannot be used.
        InputError: a setting is out of range or does not fit the model.
    """
    import sacrebleu  # noqa: F401  # says at once, not after the training, that scores need these two
    import torchmetrics  # noqa: F401

    if resume is None and sorted_steps(out / "checkpoints"):
        raise DataError(f"{str(out)!r} already holds a run: add --resume to go on with it, or choose another --out.")
    examples, held_out = _examples(config)
    task, model = _fresh(config, examples, held_out) if resume is None else _unfilled(resume, config.attention)
    torch.manual_seed(config.train.seed)
    choose_trained(model, config.method, config.lora, has_head=task.answer_field is None)
    features = [feature for example in examples for feature in task.features(example)]
    held_out_features = [feature for example in held_out for feature in task.features(example)]
    training = config.training(len(features))
    rows = ExampleRows(features, training.batch, training.seed), ExampleRows(held_out_features, training.batch)
    fingerprint = _fingerprint([*examples, *held_out])
    settings = {"finetune": config.to_dict(), "labels": list(task.labels), "fingerprint": fingerprint}
    sample = held_out[:: -(-len(held_out) // training.eval_rows)]  # evenly spaced
    trainer = Trainer(
        model.to(device), task.tokenizer, rows, training, out, loss=task.loss, settings=settings,
        evaluate=None if task.answer_field else lambda model: task.scores(answer_all(task, model, sample), sample),
        model_config=_config_of(model).to_dict(), show_progress=show_progress,
    )  # fmt: skip
    if resume is None:
        trainer.log.forget_after(0)  # of a run that was killed before its first checkpoint
    elif resume.trainer_state()["settings"].get("fingerprint") != fingerprint:
        raise DataError("The examples are not what the run was trained on: restore the files, or start a new --out.")
    else:
        trainer.resume(resume)
    progress = trainer.run()
    checkpoint = find_checkpoint(out, best=True)
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    scores: dict[str, float] = {}
    if progress.signal is None and ranks().leads:
        best = load_finetuned(checkpoint, device)
        scores = score(best.task, best.model, held_out, show_progress)
        write_text(out / "scores.json", json.dumps(scores, indent=1) + "\n")
    return Outcome(
        progress, scores,
        {"train": len(examples), "held out": len(held_out), "longest": sum(map(task.is_longest, features))},
        {"all": sum(size for size, _ in sizes), "trained": sum(size for size, is_trained in sizes if is_trained)},
        checkpoint,
    )  # fmt: skip


@dataclass(frozen=True)
class Finetuned:
    """A fine-tuned model, in evaluation mode, and its task."""

    model: nn.Module
    task: Task


def is_finetuned(checkpoint: Checkpoint) -> bool:
    """Whether ``fastattn finetune`` made the checkpoint."""
    return "finetune" in checkpoint.trainer_state().get("settings", {})


def load_finetuned(
    checkpoint: Checkpoint, device: torch.device | str = "cpu", attention: str | None = None
) -> Finetuned:
    """The model with its weights, adapters merged into them, and its task; ``attention`` overrides the run's.

    Raises:
        DataError: the checkpoint is damaged, or not of a fine-tuning run.
    """
    task, model = _unfilled(checkpoint, attention)
    config = _settings(checkpoint)
    if config.method == "lora":
        add_adapters(model, config.lora)
    checkpoint.load_weights(model)
    if config.method == "lora":
        merge_adapters(model)
    return Finetuned(model.to(device).eval(), task)


def load_writer(checkpoint: Checkpoint, device: torch.device | str, attention: str | None) -> nn.Module:
    """The model of a task that writes; raises DataError for the other tasks."""
    found = load_finetuned(checkpoint, device, attention)
    if found.task.answer_field is None:
        name = found.task.name
        raise DataError(f"{checkpoint.folder} is a model for {name}, which writes no text: see fastattn evaluate.")
    return found.model


def resumed_config(checkpoint: Checkpoint, flags: dict[str, Any]) -> FinetuneConfig:
    """The settings of the run that wrote ``checkpoint``, with those of ``flags`` that a continuation may change.

    Raises:
        DataError: the checkpoint's settings cannot be read.
        InputError: a flag would make it another run.
    """
    return _settings(checkpoint).continued(flags, {"epochs", "steps"})


def _settings(checkpoint: Checkpoint) -> FinetuneConfig:
    try:
        return FinetuneConfig.from_dict(checkpoint.trainer_state()["settings"]["finetune"])
    except (KeyError, TypeError) as error:
        path = checkpoint.folder / "trainer.json"
        raise DataError(f"{path} does not hold the settings of a fastattn finetune run ({error}).") from error


def _unfilled(checkpoint: Checkpoint, attention: str | None = None) -> tuple[Task, nn.Module]:
    """The task of a checkpoint, and its model without the weights."""
    config = checkpoint.config()
    if attention is not None:
        config = TransformerConfig.from_dict(config.to_dict() | {"attention": attention})
    settings, labels = _settings(checkpoint), checkpoint.trainer_state()["settings"]["labels"]
    task = TASKS[settings.task](checkpoint.tokenizer(), config, labels, settings.length)
    return task, task.add_head(make_model(config))


def _fresh(config: FinetuneConfig, examples: Sequence[Example], held_out: Sequence[Example]) -> tuple[Task, nn.Module]:
    """The task and the model at the start of a run; a label of ``data`` may be so rare that all of it is held out."""
    task = TASKS[config.task]
    torch.manual_seed(config.train.seed)
    tokenizer, backbone = _start(config, task, examples)
    labels = label_names(task, examples if config.eval else [*examples, *held_out])
    ready = task(tokenizer, backbone.config, labels, config.length)
    return ready, ready.add_head(backbone)


def _start(config: FinetuneConfig, task: type[Task], examples: Sequence[Example]) -> tuple[Tokenizer, Any]:
    """Tokenizer and backbone: of a checkpoint, of a folder in Hugging Face's format, or new ones."""
    if config.preset is not None:
        tokenizer = train_tokenizer(_texts(examples), config.vocab_size)
        sizes = preset(preset_for(task.kinds, config.preset), tokenizer.get_vocab_size())
        return tokenizer, make_model(config.adjusted(sizes))
    if config.pretrained is not None:
        folder = _pretrained_folder(config.pretrained)
        tokenizer = load_tokenizer(folder / "tokenizer.json")
        found: Any = from_pretrained(folder)
    else:
        checkpoint = find_checkpoint(Path(str(config.checkpoint)))
        tokenizer = checkpoint.tokenizer()
        found = load_finetuned(checkpoint).model if is_finetuned(checkpoint) else checkpoint.load_model()
    backbone: Any = getattr(found, "backbone", found)
    fresh = make_model(config.adjusted(backbone.config))
    fresh.load_state_dict(backbone.state_dict())
    return tokenizer, fresh


def _pretrained_folder(given: str) -> Path:
    """The folder of a model in Hugging Face's format; raises DataError with what to do if it is none."""
    folder = Path(given)
    if not folder.is_dir():
        todo = f"fastattn downloads nothing itself; fetch a model with: hf download {given} --local-dir {folder.name}"
        raise DataError(f"There is no folder {given!r}: {todo}")
    if not (folder / "tokenizer.json").is_file():
        todo = f"AutoTokenizer.from_pretrained({given!r}).save_pretrained({given!r}) of transformers writes it"
        raise DataError(f"{given} holds no tokenizer.json: {todo}.")
    return folder


def _config_of(model: Any) -> TransformerConfig:
    return model.config


def _texts(examples: Sequence[Example]) -> Iterator[str]:
    """All text of the examples, for a tokenizer to learn from."""
    for example in examples:
        for value in example.fields.values():
            if isinstance(value, str):
                yield value
            elif isinstance(value, list):
                yield " " + " ".join(value)


def _examples(config: FinetuneConfig) -> tuple[list[Example], list[Example]]:
    """Training and held-out examples."""
    examples = read_examples(Path(config.data), config.task)
    if config.eval is not None:
        return examples, read_examples(Path(config.eval), config.task)
    ranks = [text_rank(json.dumps(example.fields, sort_keys=True)) for example in examples]
    threshold = max(config.held_out, min(ranks))
    held_out = [x for x, rank in zip(examples, ranks, strict=True) if rank <= threshold]
    rest = [x for x, rank in zip(examples, ranks, strict=True) if rank > threshold]
    if not rest:
        raise DataError(
            f"{config.data} holds too few different examples to hold some out: give --eval, or more of them."
        )
    return rest, held_out


def _fingerprint(examples: Sequence[Example]) -> str:
    fields = json.dumps([example.fields for example in examples], sort_keys=True)
    return hashlib.sha256(fields.encode()).hexdigest()
