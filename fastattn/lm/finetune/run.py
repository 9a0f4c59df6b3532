"""A fine-tuning run, from files of examples to a scored model; ``fastattn finetune`` calls it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastattn.errors import DataError
from fastattn.files import read_limited, write_text
from fastattn.lm.data import text_rank
from fastattn.lm.finetune.adapters import choose_trained
from fastattn.lm.finetune.config import FinetuneConfig
from fastattn.lm.finetune.datasets import Dataset, find_splits, read_dataset
from fastattn.lm.finetune.examples import Example
from fastattn.lm.finetune.load import build_without_weights, load_finetuned, make_task, task_class
from fastattn.lm.finetune.scores import Baseline, score_table
from fastattn.lm.finetune.scoring import predict_all, score
from fastattn.lm.finetune.start import Start, check_start, load_start
from fastattn.lm.finetune.tasks import Task
from fastattn.lm.generate.chat import DEFAULT_TEMPLATE
from fastattn.lm.models import TransformerConfig, make_model
from fastattn.lm.train.checkpoint import Checkpoint, find_checkpoint
from fastattn.lm.train.data import IGNORED
from fastattn.lm.train.example_rows import ExampleRows, Feature
from fastattn.lm.train.log import aligned
from fastattn.lm.train.loop import Trainer
from fastattn.lm.train.parallel import ranks
from fastattn.lm.train.run import run_folder, start_or_resume
from fastattn.lm.train.settings import Progress
from fastattn.lm.train.tokens import train_tokenizer


@dataclass(frozen=True)
class Outcome:
    """The outcome of a fine-tuning run.

    Attributes:
        progress: where it stands.
        scores: of the held-out examples by name; empty if the run was stopped before its end.
        examples: their numbers, "train" and "held out"; "longest" are the rows of "train" that are as long as a row can
            be, most of them because the example was cut.
        parameters: their numbers, "all" and "trained".
        checkpoint: the newest, or the best if the run keeps it.
        baseline: of the held-out examples, for tasks that have answers without a model; None while ``scores`` is empty.
    """

    progress: Progress
    scores: dict[str, float]
    examples: dict[str, int]
    parameters: dict[str, int]
    checkpoint: Checkpoint
    baseline: Baseline | None = None

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
        """The figures as aligned lines, and the held-out scores beside those of the baseline."""
        if self.baseline is None:
            return aligned(self.facts())
        facts = {name: value for name, value in self.facts().items() if not name.startswith("held-out ")}
        return f"{aligned(facts)}\n\nheld out\n{score_table(self.scores, [self.baseline])}"


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

    if resume is None:
        check_start(config)
    with run_folder(out, config.train, resume):
        prepared = _prepare(out, config, device, resume, show_progress)
        progress = start_or_resume(prepared.trainer, resume, prepared.fingerprint, "examples are")
        return _outcome(out, prepared, progress, device, show_progress)


def make_trainer(
    out: Path, config: FinetuneConfig, device: torch.device | str = "cpu", *, show_progress: bool = True
) -> Trainer:
    """The trainer of a new run."""
    check_start(config)
    return _prepare(out, config, device, None, show_progress).trainer


@dataclass(frozen=True)
class _Prepared:
    """A run that is ready to train."""

    config: FinetuneConfig
    task: Task
    trainer: Trainer
    features: list[Feature]
    data: _Data
    fingerprint: str


def _prepare(
    out: Path, config: FinetuneConfig, device: torch.device | str, resume: Checkpoint | None, show_progress: bool
) -> _Prepared:
    data = _read_data(config)
    if show_progress:
        print("\n".join(found.summary() for found in data.read), flush=True)
    examples, held_out = data.train, data.all_held_out
    if resume is None:
        task, model = _fresh(config, data)
    else:
        task, model = build_without_weights(resume, config.attention)
    features = [feature for example in examples for feature in task.features(example)]
    held_out_features = [feature for example in held_out for feature in task.features(example)]
    if task.needs_reference:
        start = (model if resume is None else load_start(config)[1]).to(device)
        features = task.with_reference(start, features, show_progress)
        held_out_features = task.with_reference(start, held_out_features, show_progress)
    torch.manual_seed(config.train.seed)
    choose_trained(model, config.method, config.lora, has_head=task.answer_field is None)
    training = config.training(len(features))
    rows = (
        ExampleRows(features, training.batch, training.seed, task.collate),
        ExampleRows(held_out_features, training.batch, collate=task.collate),
    )
    fingerprint = _fingerprint([*examples, *held_out])
    settings: dict[str, Any] = {
        "finetune": config.to_dict(), "labels": list(task.labels), "fingerprint": fingerprint
    }  # fmt: skip
    if task.compares:
        settings["compares"] = True
    if task.chat_template is not None:
        settings["chat_template"] = task.chat_template
    if task.reads_images:
        settings["pixels"] = task.pixels.to_dict()
    sample = held_out[:: -(-len(held_out) // training.eval_rows)]  # evenly spaced
    trainer = Trainer(
        model.to(device), task.tokenizer, rows, training, out, loss=task.loss, settings=settings,
        evaluate=None if task.answer_field else lambda model: task.scores(predict_all(task, model, sample), sample),
        model_config=_config_of(model).to_dict(), show_progress=show_progress,
        flops_per_label=_flops_per_label(model, features) if config.method == "full" else None,
    )  # fmt: skip
    return _Prepared(config, task, trainer, features, data, fingerprint)


def _flops_per_label(model: Any, features: Sequence[Feature]) -> float:
    """FLOPs of training for each label, on average over the rows."""
    lengths = Counter[tuple[int, ...]]()  # of rows: few are different, and a count of FLOPs takes its time
    for feature in features:
        if "source" in feature:
            lengths[len(feature["target"]), len(feature["source"])] += 1
        elif "image" in feature:
            lengths[(model.config.image_tokens + len(feature.get("tokens", ())),)] += 1
        else:
            lengths.update((len(feature[name]),) for name in ("tokens", "chosen", "rejected") if name in feature)
    labels = sum(label != IGNORED for feature in features for label in feature["labels"])
    flops = sum(count * size[0] * model.flops_per_token(*size) for size, count in lengths.items())
    return flops / max(labels, 1)


def _outcome(
    out: Path, prepared: _Prepared, progress: Progress, device: torch.device | str, show_progress: bool
) -> Outcome:
    """Score the run, unless it was stopped, and tell what came of it."""
    checkpoint = find_checkpoint(out, best=True)
    task, data = prepared.task, prepared.data
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in prepared.trainer.model.parameters()]
    scores: dict[str, float] = {}
    baseline: Baseline | None = None
    if progress.signal is None and ranks().leads:
        best = load_finetuned(checkpoint, device)
        reference = load_start(prepared.config)[1].to(device) if task.needs_reference else None
        for name, examples in data.held_out.items():
            found = score(best.task, best.model, examples, show_progress, reference=reference)
            scores |= _named(found, name)
            if (easy := best.task.baseline(examples)) is not None:
                before = {} if baseline is None else baseline.scores
                baseline = dataclasses.replace(easy, scores=before | _named(easy.scores, name))
        write_text(out / "scores.json", json.dumps(scores, indent=1) + "\n")
    return Outcome(
        progress, scores,
        {"train": len(data.train), "held out": len(data.all_held_out),
         "longest": sum(map(task.is_longest, prepared.features))},
        {"all": sum(size for size, _ in sizes), "trained": sum(size for size, is_trained in sizes if is_trained)},
        checkpoint, baseline,
    )  # fmt: skip


def _named(scores: dict[str, float], name: str) -> dict[str, float]:
    """Scores of one file of several, by names that tell which."""
    return {f"{key} ({name})" if name else key: value for key, value in scores.items()}


def _fresh(config: FinetuneConfig, data: _Data) -> tuple[Task, nn.Module]:
    """The task and the model at the start of a run; a label of ``data`` may be so rare that all of it is held out."""
    task = task_class(config)
    torch.manual_seed(config.train.seed)
    labels = task.label_names([*data.train, *data.all_held_out] if data.is_split else data.train)
    tokenizer, backbone, template, pixels = _start(config, task, data.train)
    if config.chat_template is not None:
        template = read_limited(Path(config.chat_template))
    if template is None and (config.task == "chat" or (config.task == "dpo" and _has_messages(data))):
        template = DEFAULT_TEMPLATE
    ready = make_task(config, tokenizer, backbone.config, labels, template, pixels)
    ready.compares = all("text_pair" in example.fields for example in data.train)
    return ready, ready.add_head(ready.prepared(backbone))


def _has_messages(data: _Data) -> bool:
    return isinstance(data.train[0].fields["prompt"], list)


def _start(config: FinetuneConfig, task: type[Task], examples: Sequence[Example]) -> Start:
    """A checkpoint, a folder in Hugging Face's format, or a new tokenizer and model."""
    if config.preset is None:
        return load_start(config)
    tokenizer = train_tokenizer(_texts(examples), config.vocab_size) if task.reads_text else None
    return Start(tokenizer, make_model(config.fresh(tokenizer.get_vocab_size() if tokenizer else 0)))


def _config_of(model: Any) -> TransformerConfig:
    return model.config


def _texts(examples: Sequence[Example]) -> Iterator[str]:
    """All text of the examples, for a tokenizer to learn from."""
    for example in examples:
        for name, value in example.fields.items():
            if name == "image":
                continue
            if isinstance(value, str):
                yield value
            elif name == "messages" or (name == "prompt" and isinstance(value, list)):
                yield from (message["role"] + "\n" + message["content"] for message in value)
            elif isinstance(value, list):
                yield " " + " ".join(value)


@dataclass(frozen=True)
class _Data:
    """The data sets of a run: one to learn from, one or several to evaluate on."""

    train: list[Example]
    held_out: dict[str, list[Example]]  # by the name of their file, "" if there is one alone
    read: list[Dataset]
    is_split: bool = False  # the examples held out come from the file to learn from

    @property
    def all_held_out(self) -> list[Example]:
        return [example for examples in self.held_out.values() for example in examples]


def _read_data(config: FinetuneConfig) -> _Data:
    paths = [Path(path) for path in _as_tuple(config.data)]
    evals = [[Path(path)] for path in _as_tuple(config.eval)]
    if len(paths) == 1:
        paths, splits = find_splits(paths[0])
        evals = evals or splits
    columns = dict(config.columns)
    train = read_dataset(paths, config.task, columns)
    if len(evals) == 2 and len(_as_tuple(config.data)) == 2:  # two files of lines, like the data
        held_out = [read_dataset([path for files in evals for path in files], config.task, columns)]
    else:
        held_out = [read_dataset(files, config.task, columns) for files in evals]
    if held_out:
        names = [files[0].stem if len(held_out) > 1 else "" for files in evals]
        return _Data(train.examples, dict(zip(names, (x.examples for x in held_out), strict=True)), [train, *held_out])
    rest, kept = _split(config, train.examples)
    return _Data(rest, {"": kept}, [train], is_split=True)


def _as_tuple(paths: str | tuple[str, ...]) -> tuple[str, ...]:
    return (paths,) if isinstance(paths, str) else tuple(paths or ())


def _split(config: FinetuneConfig, examples: list[Example]) -> tuple[list[Example], list[Example]]:
    """Training and held-out examples, by the hash of each."""
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
    sizes = [os.path.getsize(example.fields["image"]) for example in examples if "image" in example.fields]
    return hashlib.sha256((fields + (json.dumps(sizes) if sizes else "")).encode()).hexdigest()
