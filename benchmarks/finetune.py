"""``python -m benchmarks finetune``: a classifier by fastattn, and by the recipe of Hugging Face's example script.

Both start from one BERT with fresh weights, so that nothing is downloaded, learn which package of the standard library
a docstring comes from, and are scored on modules that they did not see. Length, epochs, batch, rate, decay and clipping
agree; the schedules are each one's own: cosine here, linear in ``run_classification.py``.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tokenizers import processors
from tqdm import tqdm

from benchmarks import command_line, tables
from fastattn.errors import InputError
from fastattn.lm.examples.stdlib import docstrings, largest_packages, split_by_module
from fastattn.lm.finetune import FinetuneConfig, finetune
from fastattn.lm.models import Encoder, preset, save_pretrained
from fastattn.lm.train.tokens import END, START, train_tokenizer

COLUMNS = ["trainer", "accuracy", "each seed", "training"]
OURS, HUGGING_FACE = "fastattn finetune", "Hugging Face's run_classification.py"
_LENGTH, _BATCH, _RATE = 64, 32, 1e-3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    command_line.add_common(parser)
    parser.add_argument("--seeds", type=int, default=3, help="runs of each (default: 3)")
    parser.add_argument("--epochs", type=float, default=3.0, help="passes over the examples (default: 3)")
    parser.add_argument("--examples", type=int, default=2000, help="to learn from, at most (default: 2000)")


class Text(NamedTuple):
    text: str
    label: str


@dataclass(frozen=True)
class Setting:
    """What both trainers share."""

    train: list[Text]
    held_out: list[Text]
    epochs: float
    device: torch.device
    folder: Path  # with the model to start from in it

    @property
    def labels(self) -> list[str]:
        return sorted({item.label for item in (*self.train, *self.held_out)})

    @property
    def start(self) -> Path:
        return self.folder / "bert"


def run(args: argparse.Namespace) -> int:
    for name in ("seeds", "examples"):
        if getattr(args, name) < 1:
            raise InputError(f"--{name}: got {getattr(args, name)}; allowed: at least 1.")
    device = command_line.device(args)
    record = command_line.record(args, device.type, device)
    seeds, examples = (1, 64) if args.quick else (args.seeds, args.examples)
    with tempfile.TemporaryDirectory() as folder:
        train, held_out = _texts(examples)
        setting = Setting(train, held_out, args.epochs, device, Path(folder))
        _write_start(setting)
        sizes = {"train": len(train), "held out": len(held_out), "classes": len(setting.labels)}
        record.set(columns=COLUMNS, setting=sizes | {"epochs": args.epochs, "seeds": seeds})
        record.add(_baseline(setting))
        for name, trainer in ((OURS, _ours), (HUGGING_FACE, _theirs)):
            found = [trainer(setting, seed) for seed in tqdm(range(seeds), desc=name, disable=args.quiet)]
            record.add(_row(name, found))
    record.finish(device)
    print(tables.table(record.data))
    return 0


def _texts(examples: int) -> tuple[list[Text], list[Text]]:
    found = docstrings()
    packages = largest_packages(found, fewest_modules=5, fewest_items=60)
    parts = split_by_module([item for item in found if item.package in packages])
    chosen = (part[:: -(-len(part) // most)] for part, most in zip(parts, (examples, examples // 2), strict=True))
    train, held_out = ([Text(item.text, item.package) for item in part] for part in chosen)
    return train, held_out


def _write_start(setting: Setting) -> None:
    """A BERT with fresh weights and the tokenizer of the texts, as transformers loads it."""
    tokenizer = train_tokenizer((item.text for item in setting.train), 2048)
    begin, end = (tokenizer.token_to_id(mark) for mark in (START, END))
    marks = [(START, begin), (END, end)]
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{START} $A {END}", special_tokens=marks)
    torch.manual_seed(0)
    sizes = preset("bert-tiny", tokenizer.get_vocab_size())
    model = Encoder(dataclasses.replace(sizes, pooler=True, dropout=0.1))
    special = {"bos": begin, "eos": end, "pad": end}
    save_pretrained(model, setting.start, tokenizer=tokenizer, special_tokens=special)


def _baseline(setting: Setting) -> dict[str, str]:
    usual = Counter(item.label for item in setting.train).most_common(1)[0][0]
    share = sum(item.label == usual for item in setting.held_out) / len(setting.held_out)
    name = f"always {usual}, the largest class"
    return {"trainer": name, "accuracy": f"{share:.3f}", "each seed": "", "training": ""}


def _row(name: str, found: Sequence[tuple[float, float]]) -> dict[str, str]:
    scores, seconds = zip(*found, strict=True)
    spread = f" ± {statistics.stdev(scores):.3f}" if len(scores) > 1 else ""
    return {
        "trainer": name, "accuracy": f"{statistics.fmean(scores):.3f}{spread}",
        "each seed": ", ".join(f"{score:.3f}" for score in scores),
        "training": tables.seconds(statistics.median(seconds)),
    }  # fmt: skip


def _ours(setting: Setting, seed: int) -> tuple[float, float]:
    """Accuracy, and seconds of training."""
    paths = []
    for name, items in (("train", setting.train), ("held_out", setting.held_out)):
        paths.append(setting.folder / f"{name}.jsonl")
        paths[-1].write_text("\n".join(json.dumps(item._asdict()) for item in items), encoding="utf-8")
    config = FinetuneConfig(
        "classify", str(paths[0]), eval=str(paths[1]), pretrained=str(setting.start), length=_LENGTH,
        epochs=setting.epochs, batch=_BATCH, lr=_RATE, final_lr=0.0, warmup=0.0, weight_decay=0.0, betas=(0.9, 0.999),
        seed=seed, eval_every=1 << 30, save_every=1 << 30, precision="float32",
    )  # fmt: skip
    outcome = finetune(setting.folder / f"fastattn-{seed}", config, device=setting.device, show_progress=False)
    return outcome.scores["accuracy"], outcome.progress.seconds


def _theirs(setting: Setting, seed: int) -> tuple[float, float]:
    """As ``_ours``."""
    from transformers import (
        AutoModelForSequenceClassification,
        AutoTokenizer,
        DataCollatorWithPadding,
        PrinterCallback,
        Trainer,
        set_seed,
    )
    from transformers.utils.logging import disable_progress_bar, set_verbosity_error

    disable_progress_bar()
    set_verbosity_error()  # the head is new, as it should be
    set_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(setting.start)
    model = AutoModelForSequenceClassification.from_pretrained(setting.start, num_labels=len(setting.labels))
    train, held_out = (list(_rows(setting, tokenizer, items)) for items in (setting.train, setting.held_out))
    trainer = Trainer(
        model, _arguments(setting, seed), train_dataset=train, data_collator=DataCollatorWithPadding(tokenizer)
    )
    trainer.remove_callback(PrinterCallback)
    seconds = trainer.train().metrics["train_runtime"]
    found = trainer.predict(held_out)  # type: ignore[arg-type]
    right = found.predictions.argmax(-1) == [row["labels"] for row in held_out]
    return float(right.mean()), seconds


def _rows(setting: Setting, tokenizer: Any, items: Sequence[Text]) -> Iterator[dict[str, Any]]:
    for item in items:
        row = tokenizer(item.text, truncation=True, max_length=_LENGTH)
        names = ("input_ids", "attention_mask")
        yield {name: row[name] for name in names} | {"labels": setting.labels.index(item.label)}


def _arguments(setting: Setting, seed: int) -> Any:
    from transformers import TrainingArguments

    return TrainingArguments(
        output_dir=str(setting.folder / f"hf-{seed}"), num_train_epochs=setting.epochs, learning_rate=_RATE,
        per_device_train_batch_size=_BATCH, per_device_eval_batch_size=_BATCH, seed=seed, max_grad_norm=1.0,
        use_cpu=setting.device.type == "cpu", report_to=[], save_strategy="no", logging_strategy="no",
        disable_tqdm=True,
    )  # fmt: skip
