"""The examples that come with fastattn: real data that is on every machine, a baseline, and a model that beats it.

Each writes its data as files in the form that users bring their own, and then does what the commands ``fastattn train``
and ``fastattn finetune`` do with them. What is held out comes from modules of which nothing was seen.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastattn.errors import DataError, input_error
from fastattn.files import write_text
from fastattn.lm.data import find_files
from fastattn.lm.examples.stdlib import (
    Summary,
    docstrings,
    held_out_files,
    largest_packages,
    sentences,
    split_by_module,
    summaries,
    words,
)
from fastattn.lm.examples.summary_rows import copied_rows, first_line, first_words, sentence_rows, summary_rows
from fastattn.lm.finetune import FinetuneConfig, finetune, load_finetuned
from fastattn.lm.finetune.datasets import read_examples
from fastattn.lm.finetune.evaluate import evaluate
from fastattn.lm.finetune.run import Outcome
from fastattn.lm.finetune.scores import Baseline, label_scores, score_table, text_scores
from fastattn.lm.finetune.scoring import predict_all
from fastattn.lm.train.checkpoint import Checkpoint
from fastattn.lm.train.log import aligned
from fastattn.lm.train.metrics import unigram_entropy
from fastattn.lm.train.pretrain import RunConfig, pretrain
from fastattn.lm.train.settings import TrainConfig

Records = Sequence[dict[str, str]]


@dataclass(frozen=True)
class Result:
    """The outcome of an example on held-out data.

    Attributes:
        name: of the example.
        question: what it is about.
        baselines: what the model has to be better than.
        metrics: the scores that count, by the names that they have there and in ``model``.
        greater_is_better: whether a greater one is better.
        model: scores of the model.
        examples: how many there are, "train" and "held out".
        seconds: that all of it took.
        cpu_seconds: of all cores, which on a machine with other work is the fairer figure.
        samples: what the model says, beside what was expected.
        checkpoint: of the model, below ``out``.
        out: the folder of the example.
        command: that made it.
    """

    name: str
    question: str
    baselines: list[Baseline]
    metrics: list[str]
    greater_is_better: bool
    model: dict[str, float]
    examples: dict[str, int]
    seconds: float
    cpu_seconds: float
    samples: list[dict[str, str]]
    checkpoint: str
    out: Path
    command: str

    @property
    def beats_baseline(self) -> bool:
        """Whether the model is better than every baseline, by every score that counts."""
        sign = 1 if self.greater_is_better else -1
        return all(
            sign * self.model[metric] > sign * baseline.scores[metric]
            for metric in self.metrics
            for baseline in self.baselines
        )

    def verdict(self) -> str:
        """The model beside the best of the baselines, by each score that counts."""
        best = max if self.greater_is_better else min
        pairs = (
            f"{metric} {self.model[metric]:.3g} against {best(x.scores[metric] for x in self.baselines):.3g}"
            for metric in self.metrics
        )
        which = "the baseline" if len(self.baselines) == 1 else "every baseline"
        return f"{'better' if self.beats_baseline else 'NOT better'} than {which}: {', '.join(pairs)}"

    def table(self) -> str:
        """Everything as text to read."""
        lines = [self.question, "", "held out", score_table(self.model, self.baselines, self.metrics)]
        facts: dict[str, object] = {f"examples, {name}": count for name, count in self.examples.items()}
        facts |= {"seconds": round(self.seconds, 1), "seconds of CPU": round(self.cpu_seconds, 1)}
        facts["checkpoint"] = self.out / self.checkpoint
        lines += ["", aligned(facts)]
        if self.samples:
            lines += ["", "expected: answered"]
        lines += [f"  {sample['expected']!r}: {sample['answer']!r}" for sample in self.samples]
        return "\n".join(lines)

    def to_json(self) -> str:
        """The record, without the folder, which is of this machine."""
        fields = dataclasses.asdict(self) | {"beats baseline": self.beats_baseline}
        return json.dumps({name: x for name, x in fields.items() if name != "out"}, indent=1) + "\n"


def run_example(
    name: str, out: Path, *, device: torch.device | str = "cpu", steps: int | None = None, show_progress: bool = True
) -> Result:
    """Make the data of an example, train, and compare with the baseline; everything is left in ``out``.

    Args:
        name: a key of ``EXAMPLES``.
        out: a folder that does not exist or is empty.
        device: where to train.
        steps: fewer updates of the weights than the example takes, to see it work.
        show_progress: show progress bars.

    Raises:
        InputError: there is no such example.
        DataError: ``out`` holds something, or cannot be written.
    """
    if name not in EXAMPLES:
        raise input_error("example", repr(name), ", ".join(EXAMPLES), "See fastattn example --help.")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(f"{str(out)!r} holds something already: choose another --out.")
    result = EXAMPLES[name](_Place(name, out, device, steps, show_progress))
    write_text(out / "result.json", result.to_json())
    return result


@dataclass(frozen=True)
class _Place:
    """The name, folder, device and time limit of an example."""

    name: str
    out: Path
    device: torch.device | str
    steps: int | None
    show_progress: bool
    began: float = dataclasses.field(default_factory=time.perf_counter)
    cpu_began: float = dataclasses.field(default_factory=time.process_time)

    def write(self, name: str, records: Records) -> str:
        """Records as a .jsonl file in the folder; its path."""
        path = self.out / "data" / f"{name}.jsonl"
        write_text(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
        return str(path)

    def training(self, config: TrainConfig) -> TrainConfig:
        steps = min(config.steps, self.steps or config.steps)
        return dataclasses.replace(config, steps=steps, eval_every=max(1, steps // 4), save_every=max(1, steps // 4))

    def finetune(self, folder: str, config: FinetuneConfig) -> Outcome:
        """The outcome of a run in the folder; raises KeyboardInterrupt if it was stopped."""
        train = self.training(config.training(0))
        say = f"fastattn finetune --task {config.task} --data {config.data} ..."
        print(f"{folder}: {say} ({train.steps} steps)", flush=True)
        config = dataclasses.replace(config, **dataclasses.asdict(train))
        outcome = finetune(self.out / folder, config, device=self.device, show_progress=self.show_progress)
        if outcome.progress.signal is not None:
            raise KeyboardInterrupt
        return outcome

    def seconds(self) -> dict[str, float]:
        """The time taken so far, by the fields of ``Result``."""
        return {"seconds": time.perf_counter() - self.began, "cpu_seconds": time.process_time() - self.cpu_began}


# Of short trainings from nothing.
_SHORT: dict[str, Any] = {"eval_rows": 128, "log_every": 20, "keep": 1, "weight_decay": 0.1}


def _classify(place: _Place) -> Result:
    """Classify a docstring by the package it comes from."""
    found = docstrings()
    packages = largest_packages(found, fewest_modules=5, fewest_items=60)
    train, held_out = split_by_module([item for item in found if item.package in packages])
    records = [[{"text": item.text, "label": item.package} for item in part] for part in (train, held_out)]
    data, eval_data = place.write("train", records[0]), place.write("held_out", records[1])
    outcome = place.finetune(
        "run",
        FinetuneConfig(
            task="classify", data=data, eval=eval_data, preset="tiny", vocab_size=2048, length=64,
            steps=480, batch=32, lr=1e-3, final_lr=0.05, **_SHORT,
        ),
    )  # fmt: skip
    expected = [item.package for item in held_out]
    usual = Counter(item.package for item in train).most_common(1)[0][0]
    numbers = {package: number for number, package in enumerate(packages)}
    baseline = label_scores([numbers[usual]] * len(expected), [numbers[x] for x in expected], len(packages))
    return _judged(
        place, outcome.checkpoint, outcome.scores,
        [Baseline(f"always the package with the most docstrings, {usual}", baseline)], ["accuracy"],
        question=f"Which of {len(packages)} packages of the standard library does a docstring come from?",
        examples={"train": len(train), "held out": len(held_out)},
        samples=_samples(outcome.checkpoint, eval_data, "label", place),
    )  # fmt: skip


def _summarise(place: _Place) -> Result:
    """A function's docstring from its words."""
    train, held_out = split_by_module(summaries())
    known = {item.module for item in held_out}, {words(item.summary) for item in held_out}
    prose = [item for item in sentences() if item.module not in known[0] and words(item.text) not in known[1]]
    rows = summary_rows(train)
    texts = [*(row["source"] for row in rows), *(row["target"] for row in rows), *(item.text for item in prose)]
    data = place.write("copying", copied_rows(texts))
    copying = place.finetune("copying", _seq2seq(data, 500, 0.3, preset="mini"))
    data = place.write("writing", [*sentence_rows(prose * 2, train), *summary_rows(train, variants=2)])
    writing = place.finetune("writing", _seq2seq(data, 1200, 0.3, checkpoint=str(copying.checkpoint.folder)))
    data, eval_data = place.write("train", summary_rows(train, 4)), place.write("held_out", summary_rows(held_out))
    outcome = place.finetune(
        "run", _seq2seq(data, 300, 0.05, checkpoint=str(writing.checkpoint.folder), eval_data=eval_data)
    )
    count, expected = _best_count(train), [item.summary for item in held_out]
    easy = {
        "the first line of the function, its name and arguments": [first_line(item) for item in held_out],
        f"the first {count} words of the function, the number that is best on the training functions": [
            first_words(item, count) for item in held_out
        ],
    }
    baselines = [Baseline(what, text_scores(answers, expected)) for what, answers in easy.items()]
    return _judged(
        place, outcome.checkpoint, outcome.scores, baselines, ["ROUGE-1", "ROUGE-2", "ROUGE-L", "BLEU"],
        question="What is the first line of a function's docstring?",
        examples={"train": len(train), "sentences": len(prose), "held out": len(held_out)},
        samples=_samples(outcome.checkpoint, eval_data, "target", place),
    )  # fmt: skip


def _seq2seq(
    data: str, steps: int, final_lr: float, *, preset: str | None = None, checkpoint: str | None = None,
    eval_data: str | None = None,
) -> FinetuneConfig:  # fmt: skip
    """One of the runs of ``_summarise``; all of them read and write the same tokens."""
    return FinetuneConfig(
        task="seq2seq", data=data, vocab_size=2048, held_out=0.005, length=48,
        preset=preset, checkpoint=checkpoint, eval=eval_data or (), steps=steps, batch=64, lr=3e-3,
        final_lr=final_lr, **_SHORT,
    )  # fmt: skip


def _best_count(train: Sequence[Summary]) -> int:
    """The number of first words of a function closest to its summary, by ROUGE-L on some training functions."""
    some = train[:: max(1, len(train) // 500)]
    expected = [item.summary for item in some]

    def rouge(count: int) -> float:
        return text_scores([first_words(item, count) for item in some], expected)["ROUGE-L"]

    return max(range(3, 13), key=rouge)


def _code(place: _Place) -> Result:
    """The next token of Python's own source."""
    files = find_files()
    kept = held_out_files(files)
    folders = {"train": place.out / "data" / "train", "held_out": place.out / "data" / "held_out"}
    sizes: Counter[str] = Counter()
    for number, path in enumerate(files):
        split = "held_out" if path in kept else "train"
        folders[split].mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, folders[split] / f"{number:04d}-{path.name}")
        sizes[split] += 1
    train = place.training(TrainConfig(steps=600, batch=4, lr=4e-3, final_lr=0.05, **_SHORT))
    print(f"run: fastattn train --data {folders['train']} ... ({train.steps} steps)", flush=True)
    config = RunConfig(data=(str(folders["train"]),), preset="tiny", vocab_size=2048, **dataclasses.asdict(train))
    outcome = pretrain(place.out / "run", config, device=place.device, show_progress=place.show_progress)
    if outcome.progress.signal is not None:
        raise KeyboardInterrupt
    found = evaluate(
        outcome.checkpoint, [str(folders["held_out"])], device=place.device, show_progress=place.show_progress
    )
    usual = "how often each token occurs in those very modules: the best loss that ignores all context"
    baseline = Baseline(usual, {"loss": _entropy_of(outcome.checkpoint, folders["held_out"])})
    return _judged(
        place, outcome.checkpoint, found.scores, [baseline], ["loss"], greater_is_better=False,
        question="What is the next token in the source of modules that were never seen?",
        examples={"train": sizes["train"], "held out": sizes["held_out"]}, samples=[],
    )  # fmt: skip


def _entropy_of(checkpoint: Checkpoint, folder: Path) -> float:
    """Unigram entropy of the files in a folder, in nats for each token of a checkpoint's tokenizer."""
    tokenizer = checkpoint.tokenizer()
    counts = np.zeros(tokenizer.get_vocab_size(), np.int64)
    for path in sorted(folder.iterdir()):
        ids = tokenizer.encode(path.read_text(encoding="utf-8"), add_special_tokens=False).ids
        counts += np.bincount(ids, minlength=len(counts))
    return unigram_entropy(counts)


def _judged(
    place: _Place, checkpoint: Checkpoint, scores: dict[str, float], baselines: list[Baseline], metrics: list[str], *,
    question: str, examples: dict[str, int], samples: list[dict[str, str]],
    greater_is_better: bool = True,
) -> Result:  # fmt: skip
    command = f"fastattn example {place.name}" + (f" --steps {place.steps}" if place.steps else "")
    return Result(
        name=place.name, question=question, baselines=baselines, metrics=metrics, greater_is_better=greater_is_better,
        model=scores, examples=examples, samples=samples, out=place.out, command=command,
        checkpoint=str(checkpoint.folder.relative_to(place.out)), **place.seconds(),
    )  # fmt: skip


def _samples(checkpoint: Checkpoint, data: str, field: str, place: _Place, count: int = 8) -> list[dict[str, str]]:
    """A few of the model's answers, evenly spaced over the held-out examples."""
    found = load_finetuned(checkpoint, place.device)
    examples = read_examples(Path(data), found.task.name)
    some = examples[:: max(1, len(examples) // count)][:count]
    answers = predict_all(found.task, found.model, some)
    return [{"expected": x.fields[field], "answer": answer[field]} for x, answer in zip(some, answers, strict=True)]


EXAMPLES: dict[str, Callable[[_Place], Result]] = {"classify": _classify, "summarise": _summarise, "code": _code}
