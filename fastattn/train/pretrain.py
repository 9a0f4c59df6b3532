"""The whole of a pre-training run, from paths to a trained model: what ``fastattn train`` calls."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fastattn.errors import DataError, input_error
from fastattn.models import Decoder, TransformerConfig, preset
from fastattn.train.checkpoint import Checkpoint, find_checkpoint, sorted_steps
from fastattn.train.data import PackedRows
from fastattn.train.loop import Trainer
from fastattn.train.metrics import bits_per_byte, perplexity, unigram_entropy
from fastattn.train.optim import OptimConfig
from fastattn.train.settings import Progress, TrainConfig
from fastattn.train.tasks import next_token_loss
from fastattn.train.text import find_files
from fastattn.train.tokens import Corpus, prepare

# What may differ between a run and its continuation; the rest would make it another run.
_TRAIN_MAY_CHANGE = (
    "steps", "max_minutes", "eval_every", "eval_rows", "patience", "metric", "greater_is_better", "keep_best",
    "save_every", "keep", "log_every", "micro_batch", "precision",
)  # fmt: skip
_MAY_CHANGE = {"attention"} | {f"train.{name}" for name in _TRAIN_MAY_CHANGE}


@dataclass(frozen=True)
class RunConfig:
    """A pre-training run.

    Attributes:
        data: files, folders and patterns of text; empty is the Python standard library's own source.
        preset: size of the model, a key of ``fastattn.models.PRESETS``.
        vocab_size: of the tokenizer, which is learned from the text.
        held_out: part of the documents kept for the held-out loss.
        length: tokens in a row; None is the preset's.
        window: as in ``TransformerConfig``, as are the next two.
        dropout: see there.
        attention: see there.
        train: the training itself.
    """

    data: tuple[str, ...] = ()
    preset: str = "tiny"
    vocab_size: int = 4096
    held_out: float = 0.05
    length: int | None = None
    window: int | None = None
    dropout: float = 0.0
    attention: str = "fastattn"
    train: TrainConfig = field(default_factory=TrainConfig)

    def model_config(self, vocab_size: int) -> TransformerConfig:
        """The model's config, with the vocabulary the tokenizer really has."""
        fields = preset(self.preset, vocab_size).to_dict()
        fields |= {"window": self.window, "dropout": self.dropout, "attention": self.attention}
        if self.length is not None:
            fields["max_length"] = self.length
        return TransformerConfig.from_dict(fields)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> RunConfig:
        train = dict(fields["train"])
        optim = dict(train["optim"])
        optim["betas"] = tuple(optim["betas"])
        train["optim"] = OptimConfig(**optim)
        return cls(**(fields | {"data": tuple(fields["data"]), "train": TrainConfig(**train)}))

    def changed(self, flags: dict[str, Any]) -> RunConfig:
        """A copy with fields replaced; ``flags`` has names like "preset", "train.steps", "train.optim.lr"."""
        optim = {name.removeprefix("train.optim."): x for name, x in flags.items() if name.startswith("train.optim.")}
        train = {name.removeprefix("train."): x for name, x in flags.items() if name.count(".") == 1}
        own = {name: x for name, x in flags.items() if "." not in name}
        train["optim"] = dataclasses.replace(self.train.optim, **optim)
        return dataclasses.replace(self, **own, train=dataclasses.replace(self.train, **train))

    def value(self, name: str) -> Any:
        """The field of a name as in ``changed``."""
        value: Any = self
        for part in name.split("."):
            value = getattr(value, part)
        return value


@dataclass(frozen=True)
class Outcome:
    """What came of a run.

    Attributes:
        progress: where it stands.
        corpus: the data.
        unigram_entropy: of the held-out tokens, nats per token: what no model that ignores context can beat.
        num_parameters: of the model.
        checkpoint: the newest.
    """

    progress: Progress
    corpus: Corpus
    unigram_entropy: float
    num_parameters: int
    checkpoint: Checkpoint

    def facts(self) -> dict[str, float | int | str | None]:
        """The figures of the run by name; None for losses that a stopped run did not get to."""
        progress, corpus = self.progress, self.corpus.facts
        labels = corpus.tokens["held_out"] - corpus.documents["held_out"]
        held_out = progress.held_out_loss
        bits = None if held_out is None else bits_per_byte(held_out, labels, corpus.text_bytes["held_out"])
        return {
            "parameters": self.num_parameters,
            "vocabulary": corpus.vocab_size,
            "documents": corpus.documents["train"],
            "documents held out": corpus.documents["held_out"],
            "tokens of text": corpus.tokens["train"],
            "steps": progress.step,
            "tokens trained on": progress.tokens,
            "training seconds": round(progress.seconds, 1),
            "tokens per second": round(progress.tokens / progress.seconds) if progress.seconds else 0,
            "training loss (nats per token)": _rounded(progress.loss),
            "held-out loss (nats per token)": _rounded(held_out),
            "unigram entropy of the held-out text (nats per token)": _rounded(self.unigram_entropy),
            "held-out perplexity": _rounded(None if held_out is None else perplexity(held_out)),
            "held-out bits per byte": _rounded(bits),
            "files skipped": len(corpus.skipped),
            "checkpoint": str(self.checkpoint.folder),
        }

    def summary(self) -> str:
        """The figures as aligned lines, and the first files that could not be used."""
        figures = self.facts()
        width = max(map(len, figures))
        lines = [f"{name:<{width}}  {'not known yet' if value is None else value}" for name, value in figures.items()]
        skipped = [f"  skipped {skip['name']}: {skip['reason']}" for skip in self.corpus.facts.skipped]
        return "\n".join(lines + skipped[:10] + [f"  ... and {len(skipped) - 10} more"] * (len(skipped) > 10))


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


def pretrain(
    out: Path,
    config: RunConfig,
    *,
    device: torch.device | str = "cpu",
    resume: Checkpoint | None = None,
    show_progress: bool = True,
) -> Outcome:
    """Tokenise, build the model, train it, and leave checkpoints and a log in ``out``.

    Args:
        out: folder of the run.
        config: see ``RunConfig``; a continuation takes it from ``resumed_config``.
        device: where to train.
        resume: the checkpoint to go on from; None starts a new run, which ``out`` must not hold already.
        show_progress: show progress bars.

    Raises:
        DataError: the text cannot be used, ``out`` holds a run, or the disk is full.
        InputError: a setting is out of range.
    """
    if resume is None and sorted_steps(out / "checkpoints"):
        raise DataError(f"{str(out)!r} already holds a run: add --resume to go on with it, or choose another --out.")
    trainer, corpus = make_trainer(out, config, device=device, show_progress=show_progress)
    if resume is not None:
        known = resume.trainer_state()["settings"].get("fingerprint")
        if known != corpus.facts.fingerprint:
            raise DataError("The text is not what the run was trained on: restore the files, or start a new --out.")
        trainer.resume(resume)
    else:
        trainer.log.forget_after(0)  # of a run that was killed before its first checkpoint
    progress = trainer.run()
    entropy = unigram_entropy(corpus.split("held_out").counts(corpus.facts.vocab_size))
    return Outcome(progress, corpus, entropy, _num_parameters(trainer.model), find_checkpoint(out))


def _num_parameters(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def make_trainer(
    out: Path, config: RunConfig, *, device: torch.device | str = "cpu", show_progress: bool = True
) -> tuple[Trainer, Corpus]:
    """The trainer of a new run and its data."""
    written = [out.resolve() / name for name in ("corpus", "checkpoints", "log.jsonl")]  # by a run inside its data
    files = [path for path in find_files(config.data) if not any(path.is_relative_to(name) for name in written)]
    corpus = prepare(
        files, out / "corpus", vocab_size=config.vocab_size, held_out=config.held_out, progress=show_progress
    )
    model_config = config.model_config(corpus.facts.vocab_size)
    torch.manual_seed(config.train.seed)
    model = Decoder(model_config).to(device)
    rows = PackedRows(corpus.split("train"), model_config.max_length, config.train.seed)
    held_out_rows = PackedRows(corpus.split("held_out"), model_config.max_length)
    settings = {"run": config.to_dict(), "fingerprint": corpus.facts.fingerprint}
    trainer = Trainer(
        model, corpus.tokenizer(), (rows, held_out_rows), config.train, out, loss=next_token_loss,
        flops_per_label=model.flops_per_token(model_config.max_length), settings=settings,
        show_progress=show_progress,
    )  # fmt: skip
    return trainer, corpus


def resumed_config(checkpoint: Checkpoint, flags: dict[str, Any]) -> RunConfig:
    """The settings of the run that wrote ``checkpoint``, with those of ``flags`` that a continuation may change.

    Raises:
        DataError: the checkpoint's settings cannot be read.
        InputError: a flag would make it another run.
    """
    try:
        saved = RunConfig.from_dict(checkpoint.trainer_state()["settings"]["run"])
    except (KeyError, TypeError) as error:
        path = checkpoint.folder / "trainer.json"
        raise DataError(f"{path} does not hold the settings of a fastattn train run ({error}).") from error
    wanted = saved.changed(flags)
    for name in flags.keys() - _MAY_CHANGE:
        before, after = saved.value(name), wanted.value(name)
        if before != after:
            todo = "Leave the flag out when resuming, or start a new --out."
            raise input_error("--" + name.rpartition(".")[2].replace("_", "-"), after, f"{before}, as before", todo)
    return wanted
