"""``python -m benchmarks train``: training steps of one GPT-2 by three trainers, and of an LSTM of its size.

The transformers begin with the same weights and see the same batches of the standard library's source as bytes. Their
optimizer and schedule are the same, but Hugging Face's warm-up begins at a rate of 0, a step later than the others'.
Steps run in turn: Hugging Face's Trainer owns its loop, and lets the others do a step after each of its own.
``nanoGPT's recipe`` is a model of torch's own modules around ``scaled_dot_product_attention`` with a loop by hand, and
the settings of that project. Its row without attention, whose loss is no result, takes the values as they are: what any
attention is added to, and so the limit of what a faster one can gain.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks import command_line, tables
from benchmarks.model_step import source_bytes
from fastattn.errors import InputError
from fastattn.lm.models import from_pretrained
from fastattn.lm.train import OptimConfig, TrainConfig, Trainer
from fastattn.lm.train.optim import make_optimizer, update
from fastattn.lm.train.tasks import cross_entropy
from fastattn.measure.memory import cannot_measure_process, cuda_peak, process_peak
from fastattn.measure.timing import Timing

COLUMNS = ["trainer", "precision", "tokens/s", "step", "fastattn is", "peak memory", "loss"]
PRECISIONS = {"fp32": None, "bf16": torch.bfloat16}
VOCABULARY = 256  # bytes
OURS, HUGGING_FACE = "fastattn", "Hugging Face"
RECIPE = "nanoGPT's recipe"
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
CAUSAL: Attend = partial(F.scaled_dot_product_attention, is_causal=True)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    command_line.add_common(parser)
    parser.add_argument("--width", type=int, default=384, help="of the model, 64 for each head (default: 384)")
    parser.add_argument("--layers", type=int, default=6, help="(default: 6)")
    parser.add_argument("--length", type=int, default=1024, help="tokens in a row (default: 1024)")
    parser.add_argument("--batch", type=int, default=2, help="rows (default: 2)")
    parser.add_argument("--steps", type=int, default=20, help="(default: 20)")


@dataclass(frozen=True)
class Setting:
    """What all contenders share."""

    width: int
    layers: int
    length: int
    batch: int
    steps: int
    device: torch.device
    folder: Path

    @classmethod
    def of(cls, args: argparse.Namespace, device: torch.device, folder: Path) -> Setting:
        sizes = {name: getattr(args, name) for name in ("width", "layers", "length", "batch", "steps")}
        if args.quick:
            sizes |= {"width": 64, "layers": 1, "length": 32, "batch": 2, "steps": 4}
        least = {"width": 64, "length": 2, "steps": 3}
        for name, number in sizes.items():
            if number < least.get(name, 1):
                raise InputError(f"--{name}: got {number}; allowed: at least {least.get(name, 1)}.")
        if sizes["width"] % 64:
            raise InputError(f"--width: got {sizes['width']}; allowed: multiples of 64, the width of a head.")
        return cls(**sizes, device=device, folder=folder)

    @property
    def heads(self) -> int:
        return self.width // 64

    @property
    def optim(self) -> OptimConfig:
        """nanoGPT's: AdamW with betas 0.9 and 0.95, decay of matrices, clipping at 1, warm-up and cosine."""
        return OptimConfig(lr=1e-3, final_lr=0.1, warmup=max(1, self.steps // 10), weight_decay=0.1, clip=1.0)

    def batches(self) -> list[Tensor]:
        """``(batch, length + 1)`` bytes for each step."""
        count = self.steps * self.batch * (self.length + 1)
        return list(source_bytes(count).to(self.device).view(self.steps, self.batch, self.length + 1))


class Contender(Protocol):
    name: str
    model: nn.Module

    def step(self, number: int) -> Tensor:
        """Do an update, and return its loss."""


@dataclass
class Measured:
    """Seconds and loss of each step of a contender, and the peak memory of its last one, which is not timed."""

    seconds: list[float] = field(default_factory=list)
    losses: list[Any] = field(default_factory=list)
    peak: int | None = None

    def do(self, step: Callable[[], Tensor], is_last: bool, device: torch.device) -> None:
        began = time.perf_counter()
        if is_last:
            self.peak, loss = peak_of(step, device)
        else:
            loss = step()
        self.losses.append(float(loss))  # waits for the device
        self.seconds.append(time.perf_counter() - began)


def peak_of(step: Callable[[], Tensor], device: torch.device) -> tuple[int | None, Tensor]:
    """The peak memory of a step, None if this machine cannot tell, and its loss."""
    if device.type == "cuda":
        losses: list[Tensor] = []
        return cuda_peak(lambda: losses.append(step())), losses[0]
    return process_peak(step) if not cannot_measure_process() else (None, step())


def mean_loss(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())


# --- contenders


@dataclass(frozen=True)
class Bytes:
    """A batch for fastattn's Trainer."""

    tokens: Tensor
    labels: Tensor

    def to(self, device: torch.device) -> Bytes:
        return Bytes(self.tokens.to(device), self.labels.to(device))

    def split(self, rows: int) -> Iterator[Bytes]:
        for tokens, labels in zip(self.tokens.split(rows), self.labels.split(rows), strict=True):
            yield Bytes(tokens, labels)

    def num_labels(self) -> int:
        return self.labels.numel()


class Ours:
    """fastattn's Trainer on fastattn's decoder."""

    name = OURS

    def __init__(self, setting: Setting, gpt2: Path, precision: str) -> None:
        self.model = from_pretrained(gpt2).to(setting.device)
        self._batches = setting.batches()
        named = "bfloat16" if PRECISIONS[precision] else "float32"
        optim: dict[str, Any] = dataclasses.asdict(setting.optim)
        config = TrainConfig(steps=setting.steps, batch=setting.batch, precision=named, **optim)  # type: ignore[arg-type]
        folder = setting.folder / f"fastattn-{precision}"
        data: Any = (self, self)
        self._trainer = Trainer(self.model, None, data, config, folder, loss=self._loss, show_progress=False)

    def batch(self, step: int, rows: int) -> Bytes:
        return Bytes(self._batches[step][:, :-1], self._batches[step][:, 1:])

    @staticmethod
    def _loss(model: nn.Module, batch: Bytes) -> Tensor:
        return cross_entropy(model(batch.tokens), batch.labels)

    def step(self, number: int) -> Tensor:
        return self._trainer.train_step(number)


class PlainGPT2(nn.Module):
    """GPT-2 in torch's own modules."""

    def __init__(self, setting: Setting, attend: Attend = CAUSAL) -> None:
        super().__init__()
        self.tokens, self.positions = (nn.Embedding(count, setting.width) for count in (VOCABULARY, setting.length))
        self.blocks = nn.ModuleList(PlainBlock(setting.width, setting.heads, attend) for _ in range(setting.layers))
        self.norm = nn.LayerNorm(setting.width)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = block(x)
        return F.linear(self.norm(x), self.tokens.weight)

    @torch.no_grad()
    def load(self, state: dict[str, Tensor]) -> None:
        """Take the weights of Hugging Face's GPT-2, whose matrices are transposed."""
        names = {"tokens": "wte", "positions": "wpe", "norm": "ln_f", "blocks": "h"}
        parts = {"first": "ln_1", "qkv": "attn.c_attn", "out": "attn.c_proj", "second": "ln_2"}
        parts |= {"up": "mlp.c_fc", "down": "mlp.c_proj"}
        for name, parameter in self.named_parameters():
            first, *rest = name.split(".")
            path = [names[first], *(parts.get(word, word) for word in rest)]
            given = state[".".join(["transformer", *path])]
            is_matrix = path[0] == "h" and given.dim() == 2
            parameter.copy_(given.T if is_matrix else given)


class PlainBlock(nn.Module):
    def __init__(self, width: int, heads: int, attend: Attend) -> None:
        super().__init__()
        self.heads, self.attend = heads, attend
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(self.first(x)).chunk(3, -1)
        )
        x = x + self.out(self.attend(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.second(x)), approximate="tanh"))


class LSTM(nn.Module):
    """A language model of recurrent layers, the baseline that transformers replaced."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, width)
        self.layers = nn.LSTM(width, width, layers, batch_first=True)

    def forward(self, tokens: Tensor) -> Tensor:
        return F.linear(self.layers(self.tokens(tokens))[0], self.tokens.weight)


class Loop:
    """A training loop by hand."""

    def __init__(self, name: str, model: nn.Module, setting: Setting, precision: str) -> None:
        self.name, self.model, self._setting = name, model.to(setting.device), setting
        self._batches, self._dtype = setting.batches(), PRECISIONS[precision]
        self._optimizer = make_optimizer(self.model, setting.optim)

    def step(self, number: int) -> Tensor:
        batch, optim = self._batches[number], self._setting.optim
        with torch.autocast(self._setting.device.type, torch.bfloat16, enabled=self._dtype is not None):
            logits = self.model(batch[:, :-1])
            loss = mean_loss(logits, batch[:, 1:])
        loss.backward()
        update(self._optimizer, self.model, optim.rate(number, self._setting.steps), optim.clip)
        return loss.detach()


# --- Hugging Face's Trainer, which lets the others take their turns


def new_gpt2(setting: Setting) -> Any:
    """Hugging Face's GPT-2 with fresh weights and no dropout."""
    from transformers import GPT2Config, GPT2LMHeadModel
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=setting.length, n_embd=setting.width, n_layer=setting.layers,
        n_head=setting.heads, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
        use_cache=False, attn_implementation="sdpa",
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def train_in_turn(setting: Setting, gpt2: Any, others: Sequence[Contender], precision: str) -> dict[str, Measured]:
    """Train with Hugging Face's Trainer, and do a step of every other contender after each of its own."""
    from transformers import PrinterCallback, TrainerCallback
    from transformers import Trainer as HFTrainer

    found = {name: Measured() for name in (HUGGING_FACE, *(other.name for other in others))}
    theirs = found[HUGGING_FACE]

    class Turns(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.began = time.perf_counter()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            number = state.global_step - 1
            theirs.losses[-1] = float(theirs.losses[-1])  # waits for the device
            theirs.seconds.append(time.perf_counter() - self.began)
            for other in others:
                found[other.name].do(partial(other.step, number), number == setting.steps - 1, setting.device)

    class InTurn(HFTrainer):
        def training_step(self, *args: Any) -> Tensor:
            step = partial(super().training_step, *args)
            if self.state.global_step == setting.steps - 1:
                theirs.peak, loss = peak_of(step, setting.device)
            else:
                loss = step()
            theirs.losses.append(loss)
            return loss

    rows = [row for batch in setting.batches() for row in batch.cpu()]
    trainer = InTurn(
        gpt2, hf_arguments(setting, precision), train_dataset=[{"input_ids": x[:-1], "labels": x[1:]} for x in rows],
        compute_loss_func=lambda outputs, labels, **_: mean_loss(outputs.logits, labels), callbacks=[Turns()],
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return found


def hf_arguments(setting: Setting, precision: str) -> Any:
    """The settings of the others, as Hugging Face's Trainer names them."""
    from transformers import TrainingArguments

    optim = setting.optim
    return TrainingArguments(
        output_dir=str(setting.folder / f"hf-{precision}"), max_steps=setting.steps, learning_rate=optim.lr,
        per_device_train_batch_size=setting.batch, weight_decay=optim.weight_decay, adam_beta1=optim.betas[0],
        adam_beta2=optim.betas[1], max_grad_norm=1.0, warmup_steps=int(optim.warmup), bf16=precision == "bf16",
        lr_scheduler_type="cosine_with_min_lr", lr_scheduler_kwargs={"min_lr_rate": optim.final_lr},
        use_cpu=setting.device.type == "cpu", report_to=[], save_strategy="no", logging_strategy="no",
        disable_tqdm=True, train_sampling_strategy="sequential",
    )  # fmt: skip


# --- the command


def run(args: argparse.Namespace) -> int:
    device = command_line.device(args)
    record = command_line.record(args, device.type, device)
    with tempfile.TemporaryDirectory() as folder:
        setting = Setting.of(args, device, Path(folder))
        fields = ("width", "layers", "length", "batch", "steps")
        record.set(columns=COLUMNS, setting={name: getattr(setting, name) for name in fields})
        for precision in tqdm(PRECISIONS, desc="train", disable=args.quiet):
            for row in _rows(setting, precision):
                record.add(row)
    record.finish(device)
    print(tables.table(record.data))
    return 0


def _rows(setting: Setting, precision: str) -> Iterator[dict[str, str]]:
    gpt2 = new_gpt2(setting)
    stored = setting.folder / "gpt2"
    gpt2.save_pretrained(stored)
    plain, bare = PlainGPT2(setting), PlainGPT2(setting, attend=lambda q, k, v: v)
    for model in (plain, bare):
        model.load(gpt2.state_dict())
    lstm = LSTM(setting.width, _lstm_layers(setting))
    others = [
        Ours(setting, stored, precision),
        Loop(RECIPE, plain, setting, precision),
        Loop(f"{RECIPE} without attention", bare, setting, precision),
        Loop("LSTM", lstm, setting, precision),
    ]
    found = train_in_turn(setting, gpt2, others, precision)
    models = {HUGGING_FACE: gpt2} | {other.name: other.model for other in others}
    ours = _timed(found[OURS])
    for name in (OURS, *(name for name in found if name != OURS)):
        measured = found[name]
        timing = _timed(measured)
        yield {
            "trainer": f"{name}, {sum(p.numel() for p in models[name].parameters()) / 1e6:.1f} M parameters",
            "precision": precision,
            "tokens/s": f"{setting.batch * setting.length / timing.median:,.0f}",
            "step": f"{tables.seconds(timing.median)} ±{timing.spread:.0%}",
            "fastattn is": "" if name == OURS else f"{ours.times_faster_than(timing):.2f}×",
            "peak memory": "–" if measured.peak is None else tables.size(measured.peak),
            "loss": f"{measured.losses[0]:.3f} to {measured.losses[-1]:.3f}",
        }


def _timed(measured: Measured) -> Timing:
    """Without the first step, which warms up, and the last, whose memory was measured."""
    return Timing(tuple(measured.seconds[1:-1]))


def _lstm_layers(setting: Setting) -> int:
    """As many layers, of 8 width² weights each, as come nearest to the transformer's 12 width²."""
    return max(1, round(12 * setting.layers / 8))
