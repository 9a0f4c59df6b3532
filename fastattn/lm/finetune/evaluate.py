"""Scores of a checkpoint on a file, for ``fastattn evaluate``."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from tqdm import tqdm

from fastattn.errors import DataError, input_error
from fastattn.files import write_text
from fastattn.lm.data import Skipped, find_sources, read_documents
from fastattn.lm.finetune.config import saved_config
from fastattn.lm.finetune.datasets import Dataset, read_dataset
from fastattn.lm.finetune.examples import Example
from fastattn.lm.finetune.load import Finetuned, is_finetuned, load_finetuned
from fastattn.lm.finetune.scores import Baseline, score_table
from fastattn.lm.finetune.scoring import score
from fastattn.lm.finetune.start import load_start
from fastattn.lm.finetune.tasks import Prediction
from fastattn.lm.models import MaskedLM
from fastattn.lm.train.checkpoint import Checkpoint
from fastattn.lm.train.data import PackedRows
from fastattn.lm.train.hf_folder import AnySource
from fastattn.lm.train.log import aligned
from fastattn.lm.train.metrics import bits_per_byte, perplexity
from fastattn.lm.train.special_tokens import SpecialTokens
from fastattn.lm.train.tasks import find_objective
from fastattn.lm.train.tokens import TokenFile

_BATCH = 16
LONGEST = 4096  # tokens in a row of text, where the model could read more


@dataclass(frozen=True)
class Evaluation:
    """Scores of a checkpoint.

    Attributes:
        task: an objective of pre-training or a task of fine-tuning.
        checkpoint: its folder.
        data: what it was evaluated on.
        sizes: how much that was, by name.
        scores: by name. Losses are in nats per label.
        baseline: scores without a model, for the tasks that have such answers.
    """

    task: str
    checkpoint: str
    data: str
    sizes: dict[str, int]
    scores: dict[str, float]
    baseline: Baseline | None = None

    def table(self) -> str:
        """Everything as aligned lines."""
        facts: dict[str, object] = {"task": self.task, "checkpoint": self.checkpoint, **self.sizes}
        if self.baseline is not None:
            return f"{aligned(facts)}\n{score_table(self.scores, [self.baseline])}"
        return aligned(facts | {name: f"{value:.4f}" for name, value in self.scores.items()})

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=1) + "\n"


def evaluate(
    checkpoint: AnySource,
    data: Sequence[str],
    *,
    columns: Mapping[str, str] | None = None,
    device: torch.device | str = "cpu",
    attention: str | None = None,
    limit: int | None = None,
    predictions: Path | None = None,
    show_progress: bool = True,
) -> Evaluation:
    """Score a checkpoint: of fine-tuning on examples of its task, of pre-training on text.

    Args:
        checkpoint: of ``fastattn train`` or ``fastattn finetune``, or a folder in Hugging Face's format.
        data: a file of examples, see ``fastattn.lm.finetune.datasets``; for a pre-trained model files, folders and
            patterns of text.
        columns: as in ``read_dataset``.
        device: where to compute.
        attention: "fastattn" or "eager", instead of what the run used.
        limit: only the first so many examples, or rows of text; None is all.
        predictions: also write each example and the prediction for it there, as JSON lines.
        show_progress: show progress bars.

    Raises:
        DataError: the checkpoint or the data cannot be used.
        InputError: ``columns`` or ``predictions`` for a model of pre-training.
    """
    if is_finetuned(checkpoint):
        found = load_finetuned(checkpoint, device, attention)
        dataset = read_dataset([Path(path) for path in data], found.task.name, columns)
        return _of_task(found, dataset, checkpoint, limit, predictions, show_progress)
    for name, value in (("columns", columns), ("predictions", predictions)):
        if value:
            raise input_error(name, value, "nothing for a model of pre-training", "Give a model of fastattn finetune.")
    return _of_text(checkpoint, data, device, attention, limit, show_progress)


def _of_task(
    found: Finetuned,
    dataset: Dataset,
    checkpoint: AnySource,
    limit: int | None,
    predictions: Path | None,
    show_progress: bool,
) -> Evaluation:
    examples, lines = dataset.examples[:limit], list[str]()

    def note(example: Example, prediction: Prediction) -> None:
        lines.append(json.dumps({"example": example.fields, "prediction": prediction}, ensure_ascii=False) + "\n")

    reference = None
    if found.task.needs_reference and isinstance(checkpoint, Checkpoint):
        reference = load_start(saved_config(checkpoint))[1].to(next(found.model.parameters()).device)
    each = None if predictions is None else note
    scores = score(found.task, found.model, examples, show_progress, each, reference)
    if predictions is not None:
        write_text(predictions, "".join(lines))
    sizes, baseline = {"examples": len(examples)}, found.task.baseline(examples)
    return Evaluation(found.task.name, str(checkpoint.folder), dataset.name, sizes, scores, baseline)


def _of_text(
    checkpoint: AnySource,
    data: Sequence[str],
    device: torch.device | str,
    attention: str | None,
    limit: int | None,
    show_progress: bool,
) -> Evaluation:
    model, tokenizer = checkpoint.load_pretrained(device, attention), checkpoint.tokenizer()
    length = min(model.config.max_length, LONGEST)
    name = _objective(checkpoint, model)
    task = find_objective(name)(tokenizer, length)
    skipped: list[Skipped] = []
    texts = [document.text for document in read_documents(find_sources(data), skipped)]
    if not texts:
        reasons = "; ".join(f"{skip.name}: {skip.reason}" for skip in skipped[:3])
        raise DataError(f"There is no text to evaluate on ({reasons}).")
    packed = PackedRows(_as_tokens(texts, tokenizer), length)
    rows = min(limit or packed.num_rows, packed.num_rows)
    nats, labels = 0.0, 0
    bar = tqdm(total=rows, desc="evaluate", unit="row", disable=not show_progress)
    with torch.no_grad(), bar:
        for batch in task.rows(packed).sample(rows, _BATCH):
            on_device = batch.to(torch.device(device))
            nats += float(task.loss(model, on_device))
            labels += batch.num_labels()
            bar.update(min(_BATCH, rows - bar.n))
    loss = nats / max(labels, 1)
    scores = {"loss": loss, "perplexity": perplexity(loss)}
    if task.name == "causal" and rows == packed.num_rows:
        scores["bits per byte"] = bits_per_byte(loss, labels, sum(len(text.encode()) for text in texts))
    sizes = {"documents": len(texts), "tokens": labels, "files skipped": len(skipped)}
    return Evaluation(task.name, str(checkpoint.folder), ", ".join(data), sizes, scores)


def _objective(checkpoint: AnySource, model: Any) -> str:
    """The objective that a model was pre-trained with."""
    if isinstance(checkpoint, Checkpoint):
        return checkpoint.trainer_state()["settings"].get("run", {}).get("objective", "causal")
    return "masked" if isinstance(model, MaskedLM) else "causal"


def _as_tokens(texts: Sequence[str], tokenizer: Tokenizer) -> TokenFile:
    """The tokens of texts in memory, each text between its special tokens."""
    special = SpecialTokens.of(tokenizer)
    encoded = tokenizer.encode_batch(list(texts), add_special_tokens=False)
    documents = [np.array([*special.opening(), *encoding.ids, special.end], np.uint32) for encoding in encoded]
    return TokenFile(np.concatenate(documents), np.cumsum([0, *map(len, documents)]))
