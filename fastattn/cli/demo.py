"""``fastattn demo``: check, measure and train on real text on this machine, with a report."""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastattn.cli import device, info
from fastattn.errors import DataError, input_error
from fastattn.files import write_text

if TYPE_CHECKING:
    import torch

    from fastattn.lm.train import Outcome, RunConfig, Trainer

_MARK = ".fastattn-demo"  # marks a folder that an earlier demo made, which may be overwritten
PROMPTS = ("def main(", "import ", "class ")


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    text = (
        "Run info, verify --quick, a comparison of speed and memory with eager attention and torch's, and a short "
        "training of a language model on the source of Python's standard library. A report with plots goes to --out."
    )
    parser = commands.add_parser("demo", help="check, measure and train in a few minutes", description=text)
    parser.add_argument(
        "--out", type=Path, default=Path("fastattn-demo"), metavar="DIR", help="folder of the report (fastattn-demo)"
    )
    parser.add_argument("--minutes", type=float, default=1.8, metavar="M", help="time for the training (default 1.8)")
    parser.add_argument("--data", nargs="+", default=(), metavar="PATH", help="other text to train on")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    device.add_flag(parser)
    parser.set_defaults(run=run)


@dataclass
class Report:
    """The report of the demo: Markdown, and figures for JSON."""

    folder: Path
    text: list[str] = field(default_factory=lambda: ["# fastattn demo"])
    figures: dict[str, Any] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    @contextlib.contextmanager
    def section(self, title: str) -> Iterator[None]:
        """Announce a part and time it."""
        print(f"\n== {title}", flush=True)
        self.text.append(f"## {title}")
        began = time.perf_counter()
        yield
        self.seconds[title] = round(time.perf_counter() - began, 1)

    def block(self, text: str) -> None:
        """Show preformatted text on the terminal and in the report."""
        print(text, flush=True)
        self.text.append(f"```text\n{text}\n```")

    def say(self, text: str) -> None:
        print(text, flush=True)
        self.text.append(text)

    def write(self) -> None:
        self.figures["seconds"] = self.seconds
        took = ", ".join(f"{title.lower()} {seconds:.0f} s" for title, seconds in self.seconds.items())
        text = "\n\n".join([*self.text, f"Time: {took}."]) + "\n"
        write_text(self.folder / "report.md", text)
        write_text(self.folder / "report.json", json.dumps(self.figures, indent=1) + "\n")


def run(args: argparse.Namespace) -> int:
    if not args.minutes > 0:
        raise input_error("--minutes", args.minutes, "a positive number", "1.8 is the default.")
    target = device.choose(args.device)
    report = Report(_own_folder(args.out))
    with report.section("This machine"):
        report.figures["info"] = info.facts()
        report.block(info.as_text(report.figures["info"]))
    is_right = _verify(report, target)
    _speed(report, target)
    outcome = _train(report, args, target)
    _sample(report, outcome, target)
    report.write()
    print(f"\nReport: {args.out / 'report.md'}")
    return 0 if is_right else 1


def _own_folder(folder: Path) -> Path:
    """``folder``, if it is empty or was made by an earlier demo, whose run is removed; any other raises."""
    if folder.exists() and not (folder / _MARK).exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise DataError(f"{str(folder)!r} exists and was not made by fastattn demo: choose another --out.")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _MARK).touch()
    shutil.rmtree(folder / "run" / "checkpoints", ignore_errors=True)
    (folder / "run" / "log.jsonl").unlink(missing_ok=True)
    return folder


def _verify(report: Report, target: torch.device) -> bool:
    from fastattn.testing.verify import verify

    with report.section("Numerics against fp64"):
        found = verify(device=str(target), quick=True)
        report.figures["verify"] = found.to_dict()
        report.block(found.table())
    return found.ok


def _speed(report: Report, target: torch.device) -> None:
    from fastattn.measure.speed import speed_table

    with report.section("Speed and memory"):
        found = speed_table(str(target), quick=True)
        report.figures["speed"] = found.to_dict()
        report.block(found.table())
        with _plotting(report):
            found.plot(report.folder / "speed.png")
            report.text.append("![speed](speed.png)")


def _train(report: Report, args: argparse.Namespace, target: torch.device) -> Outcome:
    from fastattn.lm.train import Log, pretrain

    with report.section("Training"):
        folder = report.folder / "run"
        config = _fitting_config(folder, args, target)
        outcome = pretrain(folder, config, device=target, show_progress=not args.quiet)
        if outcome.progress.signal is not None or outcome.progress.held_out_loss is None:
            raise KeyboardInterrupt
        report.figures["training"] = outcome.facts()
        report.block(outcome.summary())
        loss, entropy = outcome.progress.held_out_loss, outcome.unigram_entropy
        report.say(
            f"Held-out loss {loss:.3f} nats per token; a model that ignores context cannot get under the unigram "
            f"entropy, {entropy:.3f}."
        )
        with _plotting(report):
            from fastattn.lm.train.plots import plot_losses

            levels = {"unigram entropy of the text": entropy}
            plot_losses(Log(folder / "log.jsonl").records(), levels, report.folder / "loss.png")
            report.text.append("![loss](loss.png)")
    return outcome


def _fitting_config(folder: Path, args: argparse.Namespace, target: torch.device) -> RunConfig:
    """The config of a tiny model, with as many steps as the machine can do in the time."""
    from fastattn.lm.train import RunConfig, make_trainer

    # A small vocabulary and few rows make steps cheap; in a short training the number of steps matters most.
    flags = {"batch": 4, "lr": 4e-3, "log_every": 5, "eval_rows": 48}
    config = RunConfig(data=tuple(args.data), vocab_size=2048).changed(flags)
    trainer, _ = make_trainer(folder, config, device=target, show_progress=not args.quiet)
    threads, seconds = _fastest_threads(trainer)
    steps = max(20, int(60 * args.minutes / seconds))
    every = max(10, steps // 8)
    print(f"{args.minutes:g} minutes: {steps} steps of {seconds:.2f} s, CPU threads: {threads}", flush=True)
    times = {"steps": steps, "max_minutes": 1.5 * args.minutes}
    return config.changed(times | {"eval_every": every, "save_every": every})


def _fastest_threads(trainer: Trainer) -> tuple[int, float]:
    """Set torch's threads to the number that is fastest now, and return it with the time of a step.

    For so small a model all cores of a large or busy machine are slower than a few.
    """
    import torch

    most = torch.get_num_threads()
    times = {}
    for threads in sorted({1, 2, 4, 8, most}):
        if threads <= most:
            torch.set_num_threads(threads)
            times[threads] = trainer.seconds_per_step()
    fastest = min(times, key=lambda threads: times[threads])
    torch.set_num_threads(fastest)
    return fastest, times[fastest]


def _sample(report: Report, outcome: Outcome, target: torch.device) -> None:
    from fastattn.lm.generate import Sampling, stream_text

    with report.section("What it writes"):
        model, tokenizer = outcome.checkpoint.load_pretrained(target), outcome.checkpoint.tokenizer()
        samples = {}
        for prompt in PROMPTS:
            pieces = stream_text(model, tokenizer, prompt, 60, Sampling(temperature=0.7, top_p=0.9, seed=0))
            samples[prompt] = prompt + "".join(pieces)
            report.block(samples[prompt])
        report.figures["samples"] = samples


@contextlib.contextmanager
def _plotting(report: Report) -> Iterator[None]:
    """Plots are optional: without matplotlib the report says how to get them."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        report.say("No plot: matplotlib is missing (pip install 'fastattn[bench]').")
