"""The training loop: steps, evaluation, log, checkpoints, progress bar. It is independent of attention, text and task.

Step ``n`` depends on the weights, the optimizer's state and ``(seed, n)`` alone, dropout included, so a run that was
stopped or killed goes on as if it had not been: on a CPU bit for bit. Several processes share the rows of each step
and decide together, so that a run may go on with more or fewer of them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, Self

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from fastattn.errors import DataError, input_error
from fastattn.lm.train.checkpoint import Checkpoint, save_checkpoint
from fastattn.lm.train.context import ContextGroup, check_context_parallel
from fastattn.lm.train.log import Log, TensorBoard, WeightsAndBiases, Window
from fastattn.lm.train.metrics import peak_flops
from fastattn.lm.train.optim import make_optimizer, update
from fastattn.lm.train.parallel import check_sharing, gradients_later, ranks, wrap_parallel
from fastattn.lm.train.plots import plot_losses
from fastattn.lm.train.recompute import recompute_blocks
from fastattn.lm.train.settings import Progress, TrainConfig
from fastattn.lm.train.signals import stop_signals
from fastattn.lm.train.user_data import UserBatch, as_rows, is_of_torch


class Batch(Protocol):
    """Rows to learn from or to be judged on."""

    def to(self, device: torch.device) -> Self:
        """The same rows on a device."""

    def split(self, rows: int) -> Iterable[Self]:
        """Parts of at most ``rows`` rows."""

    def num_labels(self) -> int:
        """Number of known labels, over which the loss is a sum; on the host."""


class Rows(Protocol):
    """Training rows: an endless sequence of them, a pure function of data and seed."""

    def batch(self, step: int, rows: int) -> Any:
        """The ``Batch`` of rows ``step * rows ... (step + 1) * rows`` of the sequence."""


class HeldOutRows(Protocol):
    """Rows to be judged on."""

    def sample(self, rows: int, batch_rows: int) -> Iterable[Any]:
        """At most ``rows`` rows, the same each time, as ``Batch``es of at most ``batch_rows``."""


Loss = Callable[[nn.Module, Any], Tensor]
TorchData = Dataset[Any] | DataLoader[Any]
Evaluate = Callable[[nn.Module], dict[str, float]]


def _of_values(loss: Loss) -> Loss:
    """The loss, given the value of a batch of the user's own."""
    return lambda model, batch: loss(model, batch.value if isinstance(batch, UserBatch) else batch)


def _config_of(model: nn.Module) -> dict[str, Any]:
    to_dict = getattr(getattr(model, "config", None), "to_dict", None)
    return {} if to_dict is None else to_dict()


class Trainer:
    """Trains a model on rows of any kind.

    Args:
        model: on its device, in every process the same. Parameters that do not require gradients are left as they are.
        tokenizer: stored in each checkpoint; None stores none.
        data: training rows and held-out rows; or for each a ``Dataset``, ``IterableDataset`` or ``DataLoader`` of
            torch, see ``fastattn.lm.train.user_data``.
        config: how long and how often.
        folder: of the run; receives ``log.jsonl``, ``loss.png`` and ``checkpoints/``.
        loss: what to minimise: the sum over the labels of a batch, of the model that it is given and calls. Of data of
            torch it is given the batches as they are.
        evaluate: further metrics at each evaluation, of the model in evaluation mode; they go into the log.
        flops_per_label: of training, for the log; None leaves it out.
        levels: losses to compare with, drawn into ``loss.png``.
        model_config: stored in each checkpoint, for whoever rebuilds the model; None is ``model.config.to_dict()``, or
            nothing if the model has no such config.
        settings: stored in each checkpoint, for whoever resumes it.
        show_progress: show a progress bar.

    Raises:
        InputError: the processes cannot share the rows of a batch or the model; see ``check_sharing``.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Tokenizer | None,
        data: tuple[Rows | TorchData, HeldOutRows | TorchData],
        config: TrainConfig,
        folder: Path,
        *,
        loss: Loss,
        evaluate: Evaluate | None = None,
        flops_per_label: float | None = None,
        levels: Mapping[str, float] | None = None,
        model_config: dict[str, Any] | None = None,
        settings: dict[str, Any] | None = None,
        show_progress: bool = True,
    ) -> None:
        self.ranks = ranks()
        check_sharing(config.batch, config.parallel, self.ranks, config.context_parallel)
        check_context_parallel(config.context_parallel, model, config.compile)
        self.model, self.tokenizer, self.config, self.folder = model, tokenizer, config, folder
        rows: Any = [as_rows(given, config.seed) if is_of_torch(given) else given for given in data]
        self.rows, self.held_out_rows = rows
        self.loss, self.evaluate = _of_values(loss), evaluate
        self.flops_per_label, self.levels = flops_per_label, levels or {}
        self.model_config = _config_of(model) if model_config is None else model_config
        self.settings = settings or {}
        self.show_progress = show_progress and self.ranks.leads
        self.device = next(model.parameters()).device
        self._context = ContextGroup.of(self.ranks, config.context_parallel)
        if config.recompute:
            recompute_blocks(model)
        self._runner = wrap_parallel(model, config.parallel, self.ranks)  # what the loss of training calls
        if config.compile:
            model.compile()  # in place, so the names of weights stay; after FSDP has put its hooks there
        self.optimizer = make_optimizer(model, config)
        self.progress = Progress()
        self.log = Log(folder / "log.jsonl", self.ranks.leads)
        self._curves: list[TensorBoard | WeightsAndBiases] = []
        self._window = Window()
        self._shown: dict[str, str] = {}
        self._must_stop = self._interrupted = False
        self._draw_after = -math.inf

    def resume(self, checkpoint: Checkpoint) -> None:
        """Go on from ``checkpoint``; forgets what was logged after it."""
        state = checkpoint.trainer_state()
        checkpoint.load_weights(self.model)
        checkpoint.load_optimizer(self.optimizer, self.model)
        try:
            self.progress = Progress(**state["progress"], step=state["step"])
        except (KeyError, TypeError, ValueError) as error:
            path = checkpoint.folder / "trainer.json"
            raise DataError(f"{path} does not hold what fastattn writes there ({error}).") from error
        self.log.forget_after(self.progress.step)

    def run(self) -> Progress:
        """Train to the end that the config sets; SIGINT or SIGTERM end the run early, with a checkpoint."""
        config, progress = self.config, self.progress
        bar = tqdm(total=config.steps, initial=progress.step, desc="train", unit="step", disable=not self.show_progress)
        with bar, self._logging(), stop_signals(progress, alone=self.ranks.size == 1):
            self._agree()
            while not self._is_over():
                began = time.perf_counter()
                self._window.add(*self._train_step(progress.step))
                progress.step += 1
                self._agree(time.perf_counter() - began)
                if progress.step % config.log_every == 0:
                    self._log_window()
                if progress.step % config.eval_every == 0 and not self._is_over():
                    self._evaluate()
                progress.seconds += time.perf_counter() - began
                if progress.step % config.save_every == 0 and not self._is_over():
                    self._save()
                bar.set_postfix(self._shown, refresh=False)
                bar.update()
            if not self._interrupted and progress.evaluated_step != progress.step:
                self._evaluate()
            self._save(is_last=True)
            bar.set_postfix(self._shown)
        return progress

    def _agree(self, running: float = 0.0) -> None:
        """Let all processes stop after the same step: those that time and signals, which differ, ask for."""
        limit, progress = self.config.max_minutes, self.progress
        is_late = limit is not None and progress.seconds + running >= 60 * limit
        number, late = self.ranks.most(progress.signal or 0, is_late)
        self._must_stop, self._interrupted = bool(number or late), bool(number)
        if number:
            progress.signal = int(number)

    def _is_over(self) -> bool:
        progress, patience = self.progress, self.config.patience
        is_stale = patience is not None and progress.stale >= patience
        return progress.step >= self.config.steps or is_stale or self._must_stop

    @contextlib.contextmanager
    def _logging(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            if self.config.tensorboard and self.ranks.leads:
                self._curves.append(TensorBoard(self.folder / "tensorboard", self.progress.step))
            if self.config.wandb and self.ranks.leads:
                self._curves.append(WeightsAndBiases(self.folder, self.settings))
            for curves in self._curves:
                stack.callback(curves.close)
            stack.callback(self._curves.clear)
            yield

    def train_step(self, step: int, rate: float | None = None) -> Tensor:
        """Do the update of this number alone, and return its loss per label; ``run`` also logs, evaluates and saves.

        Args:
            step: decides the rows and what dropout draws.
            rate: the learning rate; None is that of the schedule.
        """
        return self._train_step(step, rate)[0]

    def seconds_per_step(self, trials: int = 3) -> float:
        """Median time of an update. It trains the model, so make another trainer for the run."""
        times = []
        for step in range(trials + 1):  # the first one warms up
            began = time.perf_counter()
            float(self._train_step(step)[0])
            times.append(time.perf_counter() - began)
        return statistics.median(times[1:])

    def held_out_loss(self, rows: int | None = None) -> float:
        """Mean loss in nats per label over ``rows`` held-out rows (None: as configured), without dropout."""
        number, count = self._context.number, self._context.count
        sums = torch.zeros(2, dtype=torch.float64)
        batch_rows = self.config.micro_batch or self.config.batch // count
        batches = iter(self.held_out_rows.sample(rows or self.config.eval_rows, batch_rows))
        with self._evaluating():
            while turn := list(islice(batches, count)):  # a batch for each group; those left over repeat one
                whole = turn[number % len(turn)]
                batch = self._context.share(whole)
                with self._context.attending(whole):
                    found = float(self.loss(self.model, batch.to(self.device)))
                if number < len(turn):
                    sums += torch.tensor([found, batch.num_labels()], dtype=torch.float64)
        total, labels = self.ranks.sum(sums).tolist()
        return total / max(labels, 1)

    @contextlib.contextmanager
    def _evaluating(self) -> Iterator[None]:
        was_training = self.model.training
        self.model.eval()
        with torch.no_grad(), self._autocast():
            yield
        self.model.train(was_training)

    def _train_step(self, step: int, rate: float | None = None) -> tuple[Tensor, Tensor, Tensor | int]:
        """Loss per label (this process's part of the sum), norm of the gradient and number of labels of one update."""
        config, context, rank, size = self.config, self._context, self.ranks.rank, self.ranks.size
        self.model.train()
        torch.manual_seed((config.seed * 1_000_003 + step) * size + rank)  # what dropout draws from
        whole = self.rows.batch(step * context.count + context.number, config.batch // context.count)
        batch = context.share(whole)
        self._window.read(batch)
        labels: Tensor | int = batch.num_labels()
        if size > 1:
            labels = self.ranks.sum(torch.tensor(labels, device=self.device))
        weight = 1 / max(labels, 1) if isinstance(labels, int) else 1 / labels.clamp(min=1)
        parts = list(batch.split(config.micro_batch or config.batch))
        total = torch.zeros((), device=self.device)
        for number, part in enumerate(parts, 1):
            with gradients_later(self._runner, number < len(parts)), context.attending(whole):
                with self._autocast():
                    loss = self.loss(self._runner, part.to(self.device)) * weight
                (loss * size).backward()  # the mean over processes is taken of gradients, where we want the sum
            total += loss.detach()
        rate = config.rate(step, config.steps) if rate is None else rate
        return total, update(self.optimizer, self.model, rate, config.clip), labels

    def _autocast(self) -> torch.autocast:
        precision = self.config.precision
        enabled = precision == "bfloat16" or (precision == "auto" and self.device.type == "cuda")
        return torch.autocast(self.device.type, torch.bfloat16, enabled=enabled)

    def _log_window(self) -> None:
        """Write the means since the last line of the log. Waits for the device."""
        window, self._window = self._window, Window()
        if not window.losses:
            return
        loss, norm, labels, speed = window.means(self.ranks)
        step = self.progress.step
        if not math.isfinite(loss) or not math.isfinite(norm):
            raise FloatingPointError(
                f"The loss is not finite at step {step} (loss {loss:g}, gradient norm {norm:g}); earlier "
                "checkpoints are intact. Lower --lr, or raise --warmup."
            )
        self.progress.loss = loss
        self.progress.tokens += labels
        rate = self.config.rate(step - 1, self.config.steps)
        record = {"step": step, "loss": loss, "lr": rate, "grad_norm": norm}
        record["tokens_per_second"] = speed * window.num_tokens(self.ranks) / max(labels, 1)
        self._record(record | self._hardware_use(speed))

    def _hardware_use(self, speed: float) -> dict[str, float]:
        """TFLOP/s and, where the peak of the device is known, the part of it that is used (MFU)."""
        if self.flops_per_label is None:
            return {}
        flops, peak = speed * self.flops_per_label, peak_flops(self.device)
        return {"tflops": flops / 1e12} | ({"mfu": flops / peak / self.ranks.size} if peak else {})

    def _record(self, record: dict[str, float]) -> None:
        """Write to the log, to what draws its curves, and beside the progress bar."""
        self.log.write(record)
        for curves in self._curves:
            curves.write(record)
        formats = {"loss": ".3f", "held_out_loss": ".3f", "tokens_per_second": ",.0f", "mfu": ".1%"}
        names = {"held_out_loss": "held-out", "tokens_per_second": "tok/s"}
        self._shown |= {names.get(n, n): format(record[n], how) for n, how in formats.items() if n in record}

    @contextlib.contextmanager
    def _apart(self) -> Iterator[None]:
        """Exclude the time spent in the block from the speed in the log."""
        began = time.perf_counter()
        yield
        self._window.began += time.perf_counter() - began

    def _evaluate(self) -> None:
        progress = self.progress
        with self._apart():
            progress.held_out_loss = self.held_out_loss()
            if self.evaluate is not None:
                with self._evaluating():
                    progress.metrics = self.ranks.from_first(self.evaluate(self.model))
        progress.evaluated_step = progress.step
        found = progress.metrics | {"held_out_loss": progress.held_out_loss}
        self._record({"step": progress.step} | found)
        if self._is_best(found) and self.config.keeps_best:
            self._save()

    def _is_best(self, found: dict[str, float]) -> bool:
        """Note whether the metric that counts is the best one yet."""
        progress, name = self.progress, self.config.metric
        if name not in found:
            raise input_error("metric", repr(name), ", ".join(sorted(found)), "Choose one that is measured.")
        sign = 1 if self.config.greater_is_better else -1
        if progress.best is None or sign * found[name] > sign * progress.best:
            progress.best, progress.best_step, progress.stale = found[name], progress.step, 0
            return True
        progress.stale += 1
        return False

    def _save(self, is_last: bool = False) -> None:
        self._log_window()  # refuses a loss that is not finite
        progress = dataclasses.asdict(self.progress)
        del progress["step"], progress["signal"]
        best = self.progress.best_step if self.config.keeps_best else None
        state = {"progress": progress, "settings": self.settings, "kept_best": best}
        with self._apart():
            save_checkpoint(
                self.folder / "checkpoints", self.progress.step, self.model, self.optimizer, state,
                model_config=self.model_config, tokenizer=self.tokenizer, keep=self.config.keep, keep_also=best,
                processes=self.ranks,
            )  # fmt: skip
            self._draw(is_last)

    def _draw(self, is_last: bool) -> None:
        """Draw the loss curve, if the last time is long enough ago that drawing takes less than 5 % of it."""
        began = time.perf_counter()
        if not self.ranks.leads or (began < self._draw_after and not is_last):
            return
        try:
            plot_losses(self.log.records(), self.levels, self.folder / "loss.png")
        except ModuleNotFoundError as error:
            if error.name != "matplotlib":
                raise
            if self.show_progress and is_last:
                tqdm.write("No loss curve: matplotlib is missing (pip install 'fastattn[bench]').")
        now = time.perf_counter()
        self._draw_after = now + 20 * (now - began)
