"""The training loop: steps, held-out loss, log, checkpoints, progress bar. It knows neither attention nor text.

Step ``n`` depends on the weights, the optimizer's state and ``(seed, n)`` alone, dropout included, so a run that was
stopped or killed goes on as if it had not been: on a CPU bit for bit.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import signal
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Literal, get_args

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from tqdm import tqdm

from fastattn.errors import DataError, input_error
from fastattn.files import saying_why, write_text
from fastattn.models import Decoder
from fastattn.train.checkpoint import Checkpoint, save_checkpoint
from fastattn.train.data import Batch, PackedRows
from fastattn.train.metrics import peak_flops
from fastattn.train.optim import OptimConfig, make_optimizer, update
from fastattn.train.tasks import next_token_loss

Precision = Literal["auto", "float32", "bfloat16"]
Loss = Callable[[nn.Module, Batch], Tensor]


@dataclass(frozen=True)
class TrainConfig:
    """How long, on how much and how often.

    Attributes:
        steps: updates of the weights in all.
        max_minutes: stop earlier when the run has taken this long, over all its parts; None is no limit.
        batch: rows in each update.
        micro_batch: rows computed at once, their gradients added up; None is ``batch``.
        seed: of the initial weights, the order of the data and dropout.
        eval_every: steps between held-out losses; also taken at the end.
        eval_rows: rows of a held-out loss, evenly spaced over the held-out text.
        save_every: steps between checkpoints; also written at the end and when interrupted.
        keep: newest checkpoints kept.
        log_every: steps between lines of the log, which hold means over them; a checkpoint adds one.
        precision: "bfloat16" autocasts; "auto" does so on a GPU.
        optim: the optimizer.
    """

    steps: int = 1000
    max_minutes: float | None = None
    batch: int = 16
    micro_batch: int | None = None
    seed: int = 0
    eval_every: int = 100
    eval_rows: int = 64
    save_every: int = 100
    keep: int = 2
    log_every: int = 10
    precision: Precision = "auto"
    optim: OptimConfig = field(default_factory=OptimConfig)

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "eval_every", "eval_rows", "save_every", "keep", "log_every"):
            if getattr(self, name) < 1:
                raise input_error(name, getattr(self, name), "a positive int", "Give at least 1.")
        if self.max_minutes is not None and not self.max_minutes > 0:
            raise input_error("max_minutes", self.max_minutes, "a positive number, or None", "None is no limit.")
        if self.micro_batch is not None and not 1 <= self.micro_batch <= self.batch:
            raise input_error("micro_batch", self.micro_batch, f"1 ... batch {self.batch}", "None is the whole batch.")
        if not 0 <= self.seed < 2**31:
            raise input_error("seed", self.seed, "an int in [0, 2**31)", "0 is as good as any.")
        if self.precision not in get_args(Precision):
            names = ", ".join(get_args(Precision))
            raise input_error("precision", repr(self.precision), names, "auto is bfloat16 on a GPU, else float32.")


@dataclass
class Progress:
    """Where a run stands.

    Attributes:
        step: updates done.
        tokens: labels learned from.
        seconds: spent in steps and held-out losses, over all resumed parts.
        loss: mean over the last logged steps, nats per token; None before there is one.
        held_out_loss: the newest, nats per token; None before there is one.
        signal: the signal that stopped the run, if one did.
    """

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    loss: float | None = None
    held_out_loss: float | None = None
    signal: int | None = None


class Trainer:
    """Trains a model on packed rows.

    Args:
        model: on its device.
        tokenizer: stored in each checkpoint.
        rows: training rows and held-out rows.
        config: how long and how often.
        folder: of the run; receives ``log.jsonl`` and ``checkpoints/``.
        settings: stored in each checkpoint, for whoever resumes it.
        loss: what to minimise.
        show_progress: show a progress bar.
    """

    def __init__(
        self,
        model: Decoder,
        tokenizer: Tokenizer,
        rows: tuple[PackedRows, PackedRows],
        config: TrainConfig,
        folder: Path,
        *,
        settings: dict[str, Any] | None = None,
        loss: Loss = next_token_loss,
        show_progress: bool = True,
    ) -> None:
        self.model, self.tokenizer, self.config, self.folder = model, tokenizer, config, folder
        self.rows, self.held_out_rows = rows
        self.settings = settings or {}
        self.loss = loss
        self.show_progress = show_progress
        self.device = next(model.parameters()).device
        self.optimizer = make_optimizer(model, config.optim)
        self.progress = Progress()
        self.log = Log(folder / "log.jsonl")
        self._window = _Window()

    def resume(self, checkpoint: Checkpoint) -> None:
        """Go on from ``checkpoint``; forgets what was logged after it."""
        state = checkpoint.trainer_state()
        checkpoint.load_weights(self.model)
        checkpoint.load_optimizer(self.optimizer, self.model)
        try:
            self.progress = Progress(**state["progress"], step=state["step"])
        except (KeyError, TypeError) as error:
            path = checkpoint.folder / "trainer.json"
            raise DataError(f"{path} does not hold what fastattn writes there ({error}).") from error
        self.log.forget_after(self.progress.step)

    def run(self) -> Progress:
        """Train up to ``config.steps`` or ``max_minutes``; SIGINT or SIGTERM end the run early, with a checkpoint."""
        config, progress = self.config, self.progress
        bar = tqdm(total=config.steps, initial=progress.step, desc="train", unit="step", disable=not self.show_progress)
        with bar, _stop_signals(progress):
            while not self._is_over():
                began = time.perf_counter()
                self._window.add(*self._train_step(progress.step))
                progress.step += 1
                if progress.step % config.log_every == 0:
                    self._log_window()
                if progress.step % config.eval_every == 0 and not self._is_over():
                    self._evaluate()
                progress.seconds += time.perf_counter() - began
                if progress.step % config.save_every == 0:
                    self._save()
                bar.set_postfix(self._postfix(), refresh=False)
                bar.update()
            if progress.signal is None:
                self._evaluate()
            self._save()
        return progress

    def _is_over(self) -> bool:
        limit, progress = self.config.max_minutes, self.progress
        is_late = limit is not None and progress.seconds >= 60 * limit
        return progress.step >= self.config.steps or is_late or progress.signal is not None

    def seconds_per_step(self, trials: int = 3) -> float:
        """Median time of an update. It trains the model, so make another trainer for the run."""
        times = []
        for step in range(trials + 1):  # the first one warms up
            began = time.perf_counter()
            float(self._train_step(step)[0])
            times.append(time.perf_counter() - began)
        return statistics.median(times[1:])

    def held_out_loss(self, rows: int | None = None) -> float:
        """Mean loss in nats per token over ``rows`` held-out rows (None: as configured), without dropout."""
        was_training = self.model.training
        self.model.eval()
        total, labels = 0.0, 0
        size = self.config.micro_batch or self.config.batch
        with torch.no_grad():
            for batch in self.held_out_rows.sample(rows or self.config.eval_rows, size):
                with self._autocast():
                    total += float(self.loss(self.model, batch.to(self.device)))
                labels += batch.num_labels()
        self.model.train(was_training)
        return total / max(labels, 1)

    def _train_step(self, step: int) -> tuple[Tensor, Tensor, int]:
        """Loss per token, norm of the gradient and number of labels of one update."""
        config = self.config
        self.model.train()
        torch.manual_seed(config.seed * 1_000_003 + step)  # what dropout draws from
        batch = self.rows.batch(step, config.batch)
        labels = batch.num_labels()
        total = torch.zeros((), device=self.device)
        for part in batch.split(config.micro_batch or config.batch):
            with self._autocast():
                loss = self.loss(self.model, part.to(self.device)) / max(labels, 1)
            loss.backward()
            total += loss.detach()
        rate = config.optim.rate(step, config.steps)
        return total, update(self.optimizer, self.model, rate, config.optim.clip), labels

    def _autocast(self) -> torch.autocast:
        precision = self.config.precision
        enabled = precision == "bfloat16" or (precision == "auto" and self.device.type == "cuda")
        return torch.autocast(self.device.type, torch.bfloat16, enabled=enabled)

    def _log_window(self) -> None:
        """Write the means since the last line of the log. Waits for the device."""
        window, self._window = self._window, _Window()
        if not window.losses:
            return
        loss, norm, speed = window.means()
        step = self.progress.step
        if not math.isfinite(loss) or not math.isfinite(norm):
            raise FloatingPointError(
                f"The loss is not finite at step {step} (loss {loss:g}, gradient norm {norm:g}); earlier "
                "checkpoints are intact. Lower --lr, or raise --warmup."
            )
        self.progress.loss = loss
        self.progress.tokens += window.labels
        rate = self.config.optim.rate(step - 1, self.config.steps)
        flops = speed * self.model.flops_per_token(self.rows.length)
        peak = peak_flops(self.device)
        busy = {"mfu": flops / peak} if peak else {}
        self.log.write(
            step=step, loss=loss, lr=rate, grad_norm=norm, tokens_per_second=speed, tflops=flops / 1e12, **busy
        )

    @contextlib.contextmanager
    def _apart(self) -> Iterator[None]:
        """What takes time here does not slow the steps down in the log."""
        began = time.perf_counter()
        yield
        self._window.began += time.perf_counter() - began

    def _evaluate(self) -> None:
        with self._apart():
            self.progress.held_out_loss = self.held_out_loss()
        self.log.write(step=self.progress.step, held_out_loss=self.progress.held_out_loss)

    def _postfix(self) -> dict[str, str]:
        shown = {"loss": self.progress.loss, "held-out": self.progress.held_out_loss}
        texts = {name: f"{value:.3f}" for name, value in shown.items() if value is not None}
        speed = (self.progress.tokens + self._window.labels) / self.progress.seconds
        return texts | {"tok/s": f"{speed:,.0f}"}

    def _save(self) -> None:
        self._log_window()  # refuses a loss that is not finite
        progress = dataclasses.asdict(self.progress)
        del progress["step"], progress["signal"]
        state = {"progress": progress, "settings": self.settings}
        folder = self.folder / "checkpoints"
        model, optimizer, step = self.model, self.optimizer, self.progress.step
        with self._apart():
            save_checkpoint(folder, step, model, optimizer, self.tokenizer, state, self.config.keep)


@dataclass
class _Window:
    """Sums over the steps since the last line of the log, left on the device so that no step waits for it."""

    losses: list[Tensor] = field(default_factory=list)
    norms: list[Tensor] = field(default_factory=list)
    labels: int = 0
    began: float = field(default_factory=time.perf_counter)

    def add(self, loss: Tensor, norm: Tensor, labels: int) -> None:
        self.losses.append(loss)
        self.norms.append(norm)
        self.labels += labels

    def means(self) -> tuple[float, float, float]:
        """Loss, norm of the gradient, tokens per second."""
        loss, norm = float(torch.stack(self.losses).mean()), float(torch.stack(self.norms).mean())
        return loss, norm, self.labels / (time.perf_counter() - self.began)


class Log:
    """A file of JSON lines; the last line may be torn by a kill."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, **record: float) -> None:
        with saying_why(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")

    def records(self) -> list[dict[str, float]]:
        """All whole lines."""
        if not self.path.exists():
            return []
        found = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(ValueError):
                found.append(json.loads(line))
        return found

    def forget_after(self, step: int) -> None:
        """Drop the lines of later steps, and a torn one."""
        kept = [record for record in self.records() if record["step"] <= step]
        write_text(self.path, "".join(json.dumps(record) + "\n" for record in kept))


@contextlib.contextmanager
def _stop_signals(progress: Progress) -> Iterator[None]:
    """Note the first SIGINT or SIGTERM in ``progress`` for the loop to stop at a step's end; a second one acts at once.

    Outside the main thread signals cannot be caught, and are left alone.
    """
    before: dict[int, Any] = {}

    def restore() -> None:
        while before:
            signal.signal(*before.popitem())

    def note(number: int, frame: FrameType | None) -> None:
        progress.signal = number
        restore()

    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, note)
    except ValueError:
        pass
    try:
        yield
    finally:
        restore()
