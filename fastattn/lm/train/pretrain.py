"""A pre-training run, from paths to a trained model; ``fastattn train`` calls it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastattn.errors import DataError, input_error
from fastattn.lm.data.sources import Source, find_sources
from fastattn.lm.models import TransformerConfig, preset
from fastattn.lm.train.checkpoint import Checkpoint, find_checkpoint
from fastattn.lm.train.log import aligned
from fastattn.lm.train.loop import Trainer
from fastattn.lm.train.metrics import bits_per_byte, perplexity
from fastattn.lm.train.mixture import Mixture, of_folders, split_weights
from fastattn.lm.train.parallel import ranks
from fastattn.lm.train.prepare import prepare
from fastattn.lm.train.run import run_folder, start_or_resume
from fastattn.lm.train.settings import Progress, RunSettings
from fastattn.lm.train.tasks import find_objective, preset_for
from fastattn.lm.train.tokens import check_held_out, check_vocabulary_size, vocabulary_size


@dataclass(frozen=True)
class RunConfig(RunSettings):
    """A pre-training run.

    Attributes:
        data: files, folders and patterns of text, and ``hf:`` names; empty is the Python standard library's own source.
            With weights, as in ``("books:0.7", "code:0.3")``, they are mixed in these parts.
        corpus: a folder that ``fastattn prepare`` made, or several, with or without weights, instead of ``data``,
            ``vocab_size`` and ``held_out``.
        objective: what is learned: "causal" (a decoder), "masked" (an encoder) or "span" (an encoder-decoder).
        preset: size of the model, a key of ``fastattn.lm.models.PRESETS``; "tiny" is that of the objective's kind.
        vocab_size: of the tokenizer, which is learned from the text.
        held_out: part of the documents kept for the held-out loss.
        length: tokens in a row; None is the preset's.
        window: as in ``TransformerConfig``, as are the next two.
        dropout: see there.
        attention: see there.

    The others are those of ``TrainConfig`` and ``OptimConfig``, by keyword.
    """

    data: tuple[str, ...] = ()
    objective: str = "causal"
    corpus: str | tuple[str, ...] | None = None
    preset: str = "tiny"
    vocab_size: int = 4096
    held_out: float = 0.05
    length: int | None = None
    window: int | None = None
    dropout: float = 0.0
    attention: str = "fastattn"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.length is not None and self.length < 1:
            raise input_error("length", self.length, "a positive int, or None", "None is the preset's.")
        split_weights(self.data, "data")
        check_vocabulary_size(self.vocab_size)
        check_held_out(self.held_out)
        self.model_config(self.vocab_size)  # checks the objective, the preset and what the model takes

    def model_config(self, vocab_size: int) -> TransformerConfig:
        """The model's config, with the vocabulary the tokenizer really has."""
        fields = preset(preset_for([find_objective(self.objective).kind], self.preset), vocab_size).to_dict()
        fields |= {"window": self.window, "dropout": self.dropout, "attention": self.attention}
        if self.length is not None:
            fields["max_length"] = self.length
        return TransformerConfig.from_dict(fields)


@dataclass(frozen=True)
class Outcome:
    """The outcome of a pre-training run.

    Attributes:
        progress: where it stands.
        corpus: the data.
        objective: what was learned.
        unigram_entropy: of the held-out tokens, nats per token: what no model that ignores context can beat.
        num_parameters: of the model.
        checkpoint: the newest.
    """

    progress: Progress
    corpus: Mixture
    objective: str
    unigram_entropy: float
    num_parameters: int
    checkpoint: Checkpoint

    def facts(self) -> dict[str, float | int | str | None]:
        """The figures of the run by name; None for losses that a stopped run did not get to."""
        progress, corpus = self.progress, self.corpus.facts
        held_out = progress.held_out_loss
        bits = {}
        if self.objective == "causal":  # the others do not predict every token
            bytes_each = self.corpus.bytes_per_label()
            per_byte = None if held_out is None else bits_per_byte(held_out, 1, bytes_each)
            bits = {"held-out bits per byte": _rounded(per_byte)}
        return {
            "objective": self.objective,
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
            **bits,
            "files skipped": len(corpus.skipped),
            "checkpoint": str(self.checkpoint.folder),
        }

    def summary(self) -> str:
        """The figures as aligned lines, and the first files that could not be used."""
        lines = [aligned(self.facts())]
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
    with run_folder(out, config.train, resume):
        trainer, corpus = make_trainer(out, config, device=device, show_progress=show_progress)
        progress = start_or_resume(trainer, resume, corpus.facts.fingerprint, "text is")
    entropy = corpus.unigram_entropy()
    return Outcome(progress, corpus, config.objective, entropy, _num_parameters(trainer.model), find_checkpoint(out))


def _num_parameters(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def make_trainer(
    out: Path, config: RunConfig, *, device: torch.device | str = "cpu", show_progress: bool = True
) -> tuple[Trainer, Mixture]:
    """The trainer of a new run and its data."""
    corpus = _corpus(out, config, show_progress)
    tokenizer = corpus.tokenizer()
    length = config.model_config(corpus.facts.vocab_size).max_length
    objective = find_objective(config.objective)(tokenizer, length)  # which may add tokens
    torch.manual_seed(config.train.seed)
    model = objective.model(config.model_config(vocabulary_size(tokenizer))).to(device)
    rows = objective.rows(corpus.rows("train", length, config.train.seed))
    held_out_rows = objective.rows(corpus.rows("held_out", length))
    settings = {"run": config.to_dict(), "fingerprint": corpus.facts.fingerprint}
    levels = {"unigram entropy of the text": corpus.unigram_entropy()}
    trainer = Trainer(
        model, tokenizer, (rows, held_out_rows), config.train, out, loss=objective.loss,
        flops_per_label=objective.flops_per_label(model), levels=levels,
        settings=settings, show_progress=show_progress,
    )  # fmt: skip
    return trainer, corpus


def _corpus(out: Path, config: RunConfig, show_progress: bool) -> Mixture:
    if config.corpus is not None:
        return of_folders(config.corpus)
    paths, weights = split_weights(config.data, "data")
    options: dict[str, Any] = {"held_out": config.held_out, "progress": show_progress and ranks().leads}
    with ranks().first_alone():
        whole = prepare(_sources(paths, out), out / "corpus", vocab_size=config.vocab_size, **options)
        if weights is None:
            return Mixture((whole,))
        options["tokenizer"] = whole.folder  # learned from all of them
        parts = [prepare(_sources([path], out), out / "corpus", **options) for path in paths]
        return Mixture(tuple(parts), tuple(weights))


def _sources(paths: Sequence[str], out: Path) -> list[Source]:
    """The files and data sets, without what the run itself writes among them."""
    written = [out.resolve() / name for name in ("corpus", "checkpoints", "log.jsonl")]
    return [
        source
        for source in find_sources(paths)
        if not (isinstance(source, Path) and any(source.is_relative_to(name) for name in written))
    ]


def resumed_config(checkpoint: Checkpoint, flags: dict[str, Any]) -> RunConfig:
    """The settings of the run that wrote ``checkpoint``, with those of ``flags`` that a continuation may change.

    Raises:
        DataError: the checkpoint's settings cannot be read.
        InputError: a flag would make it another run.
    """
    try:
        saved = RunConfig.from_dict(checkpoint.trainer_state()["settings"]["run"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        path = checkpoint.folder / "trainer.json"
        raise DataError(f"{path} does not hold the settings of a fastattn train run ({error}).") from error
    return saved.continued(flags)
