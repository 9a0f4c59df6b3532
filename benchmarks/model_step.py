"""``python -m benchmarks model``: a training step and generation of a bundled model, by kind of attention.

All variants start from the same weights and see the same batches of the standard library's source as bytes; their
steps run in turn, so that times are comparable and losses can be compared step by step.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import fastattn
from benchmarks import ceilings, command_line, tables
from benchmarks.record import Record
from fastattn import attention_with_kv_cache
from fastattn.errors import InputError
from fastattn.lm.generate import Sampling, generate
from fastattn.lm.models import PRESETS, Decoder, TransformerConfig, preset
from fastattn.lm.train.metrics import peak_flops
from fastattn.lm.train.optim import OptimConfig, make_optimizer, update
from fastattn.measure import memory
from fastattn.measure.peers import eager_attention
from fastattn.measure.timing import compare, stopwatch
from fastattn.measure.workload import Operands, Workload
from fastattn.nn import layer_cache

COLUMNS = [
    "variant", "dtype", "what", "tokens/s", "step", "vs eager", "vs sdpa", "MFU", "of matmul", "peak memory",
    "agreement",
]  # fmt: skip
DTYPES = ("fp32", "bf16")  # bf16: matrix products and attention under autocast, weights in fp32
VOCABULARY = 256  # bytes
DECODERS = [name for name, fields in PRESETS.items() if fields.get("kind", "decoder") == "decoder"]
Attention = Callable[..., Tensor]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    command_line.add_common(parser)
    parser.add_argument("--preset", help=f"of {', '.join(DECODERS)} (default: tiny on a CPU, base on a GPU)")
    parser.add_argument("--batch", type=int, help="rows (default: 8)")
    parser.add_argument("--length", type=int, help="tokens in a row (default: the preset's longest)")
    parser.add_argument("--steps", type=int, help="training steps (default: 50)")
    parser.add_argument("--no-generation", action="store_true", help="training steps alone")
    parser.add_argument(
        "--dtype", nargs="+", choices=DTYPES, help="of matrix products and attention (default: both; bf16 on a GPU)"
    )
    parser.add_argument("--compile", choices=("no", "yes", "both"), help="(default: no on a CPU, both on a GPU)")


@dataclasses.dataclass(frozen=True)
class Setting:
    """The model and data that all variants share."""

    config: TransformerConfig
    batch: int
    length: int
    steps: int
    new_tokens: int
    device: torch.device
    dtype: str = "fp32"

    @classmethod
    def of(cls, args: argparse.Namespace, device: torch.device) -> Setting:
        name = args.preset or ("base" if device.type == "cuda" else "tiny")
        if name not in DECODERS:
            raise InputError(f"--preset: got {name!r}; allowed: {', '.join(DECODERS)}.")
        config = preset(name, VOCABULARY)
        if args.quick:
            config = dataclasses.replace(config, width=64, layers=2, heads=4, kv_heads=2, max_length=64)
        length = args.length or config.max_length
        config = dataclasses.replace(config, max_length=max(length, config.max_length))
        batch, steps = args.batch or (2 if args.quick else 8), args.steps or (4 if args.quick else 50)
        for argument, number, least in (("batch", batch, 1), ("length", length, 2), ("steps", steps, 2)):
            if number < least:
                raise InputError(f"--{argument}: got {number}; allowed: at least {least}.")
        return cls(config, batch, length, steps, new_tokens=8 if args.quick else 64, device=device)

    def batches(self) -> list[Tensor]:
        """``(batch, length + 1)`` bytes of the standard library's source, one for each step."""
        tokens = source_bytes((self.steps + 1) * self.batch * (self.length + 1)).to(self.device)
        return list(tokens.view(self.steps + 1, self.batch, self.length + 1))

    def autocast(self) -> Any:
        return torch.autocast(self.device.type, torch.bfloat16) if self.dtype == "bf16" else contextlib.nullcontext()


def source_bytes(count: int) -> Tensor:
    """The first bytes of the standard library's source, repeated if there are too few."""
    text = bytearray()
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        text += path.read_bytes()
        if len(text) >= count:
            break
    return torch.frombuffer(text * (count // len(text) + 1), dtype=torch.uint8)[:count].long()


class Variant:
    """A model with one kind of attention, trained in step with the others.

    Attributes:
        kind: the kind of attention.
        name: the same, and "compiled" if it is.
        losses: the loss of each step so far.
    """

    def __init__(self, setting: Setting, kind: str, compiled: bool, batches: list[Tensor]) -> None:
        torch.manual_seed(0)
        self.kind = kind
        self.name = f"{kind}, compiled" if compiled else kind
        self.losses: list[Tensor] = []
        self._setting = setting
        self._attention = ATTENTION[kind]
        self._batches = batches
        self.model = Decoder(setting.config).to(setting.device)
        self._forward = torch.compile(self.model) if compiled else self.model
        self._optimizer = make_optimizer(self.model, OptimConfig())

    def train_step(self) -> None:
        batch = self._batches[len(self.losses) % len(self._batches)]
        with mock.patch.object(fastattn, "attention", self._attention):
            with self._setting.autocast():
                logits = self._forward(batch[:, :-1])
            loss = F.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())
            loss.backward()
        update(self._optimizer, self.model, 1e-3, 1.0)
        self.losses.append(loss.detach())  # read later: no wait for the device here

    def generate(self) -> list[list[int]]:
        """Greedy tokens after a prompt of half the length."""
        prompt = self._batches[0][:, : max(1, self._setting.length // 2)]
        decode = attention_with_kv_cache if self._attention is fastattn.attention else _gathering(self._attention)
        with mock.patch.object(layer_cache, "attention_with_kv_cache", decode), self._setting.autocast():
            tokens = list(generate(self.model, prompt, self._setting.new_tokens, Sampling(temperature=0)))
        return torch.stack(tokens).tolist()


def _gathering(attention: Attention) -> Attention:
    """``attention`` on a cache written by hand: append, slice the filled part, attend. All rows have one length."""

    def attend(
        q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, k: Tensor, v: Tensor, *, causal: bool,
        block_table: Tensor, **_: Any,
    ) -> Tensor:  # fmt: skip
        begin = int(lengths[0])
        end, rows = begin + k.shape[1], block_table[:, 0].long()
        k_cache[rows, begin:end], v_cache[rows, begin:end] = k, v
        return attention(q, k_cache[rows, :end], v_cache[rows, :end], causal=causal)

    return attend


def _torch_attention(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, **_: Any) -> Tensor:
    """torch's attention behind the arguments that the presets use."""
    s_q, s_kv = q.shape[1], k.shape[1]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if causal and s_q not in (1, s_kv):
        raise InputError("the model benchmark feeds a prompt at once, then token by token")
    is_grouped = q.shape[1] != k.shape[1]
    out = F.scaled_dot_product_attention(q, k, v, is_causal=causal and s_q > 1, enable_gqa=is_grouped)
    return out.transpose(1, 2)


def _eager_attention(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, **_: Any) -> Tensor:
    """Attention by hand behind the arguments that the presets use."""
    (s_q, heads_q, d_qk), (s_kv, heads_kv, d_v) = q.shape[1:], v.shape[1:]
    workload = Workload(s_q=s_q, s_kv=s_kv, heads_q=heads_q, heads_kv=heads_kv, d_qk=d_qk, d_v=d_v, causal=causal)
    operands = Operands(workload, q, k, v, dout=q)
    return eager_attention(operands, None, operands.keep_matrix() if causal and s_q > 1 else None)


ATTENTION: dict[str, Attention] = {
    "eager": _eager_attention,
    "sdpa": _torch_attention,
    "fastattn": fastattn.attention,  # type: ignore[dict-item]
}


def run(args: argparse.Namespace) -> int:
    device = command_line.device(args)
    setting = Setting.of(args, device)
    compiling = args.compile or ("both" if device.type == "cuda" else "no")
    modes = {"no": (False,), "yes": (True,), "both": (False, True)}[compiling]
    record = command_line.record(args, device.type, device)
    dtypes = args.dtype or (("bf16",) if device.type == "cuda" else DTYPES)
    ceiling = ceilings.measure(device, set(dtypes), args.quick)
    shape = {
        "config": setting.config.to_dict(),
        "batch": setting.batch,
        "length": setting.length,
        "steps": setting.steps,
    }
    record.set(columns=COLUMNS, ceilings=ceiling, setting=shape)
    batches = setting.batches()
    for dtype, compiled in tqdm(list(itertools.product(dtypes, modes)), desc="model", disable=args.quiet):
        setting = dataclasses.replace(setting, dtype=dtype)
        variants = list(_built(setting, compiled, batches, record))
        for step in (_train,) if compiled or args.no_generation else (_train, _generate):
            for row in step(setting, variants, ceiling[f"matmul_{dtype}_tflops"]):
                record.add(row | {"dtype": dtype})
    record.finish(device)
    print(tables.table(record.data))
    return 0


def _built(setting: Setting, compiled: bool, batches: list[Tensor], record: Record) -> Iterator[Variant]:
    """The variants whose first step succeeds; a failure is recorded as a row."""
    for kind in ATTENTION:
        variant = Variant(setting, kind, compiled, batches)
        try:
            variant.train_step()
        except Exception as error:
            record.add(
                {
                    "variant": variant.name,
                    "dtype": setting.dtype,
                    "what": "training",
                    "agreement": f"failed: {str(error)[:150]}",
                }
            )
            continue
        yield variant


def _train(setting: Setting, variants: list[Variant], ceiling: float) -> Iterator[dict[str, str]]:
    calls = {variant.name: variant.train_step for variant in variants}
    watch = stopwatch(setting.device, wall=True)
    times = compare(calls, watch, rounds=setting.steps - 1, least_rounds=setting.steps - 1, round_s=0.0)
    per_step = setting.batch * setting.length
    peak = peak_flops(setting.device)
    for variant in variants:
        timing = times[variant.name]
        rate = per_step / timing.median
        flops = rate * variant.model.flops_per_token(setting.length)
        yield {
            "variant": variant.name,
            "what": "training step",
            "tokens/s": f"{rate:,.0f}",
            "step": f"{tables.seconds(timing.median)} ±{timing.spread:.0%}",
            "vs eager": _beside("eager", times, variant),
            "vs sdpa": _beside("sdpa", times, variant),
            "MFU": f"{flops / peak:.1%}" if peak else "–",
            "of matmul": f"{flops / 1e12 / ceiling:.0%}",
            "peak memory": _peak(variant, setting.device),
            "agreement": _agreement(variants[0], variant),
        }


def _generate(setting: Setting, variants: list[Variant], ceiling: float) -> Iterator[dict[str, str]]:
    for variant in variants[1:]:  # all get the same weights: after training these differ by rounding
        variant.model.load_state_dict(variants[0].model.state_dict())
    texts = {variant.name: variant.generate() for variant in variants}
    first = texts[variants[0].name]
    watch = stopwatch(setting.device, wall=True)
    times = compare({v.name: v.generate for v in variants}, watch, rounds=5, round_s=0.0, budget_s=30)
    for variant in variants:
        timing, text = times[variant.name], texts[variant.name]
        same = (torch.tensor(text) == torch.tensor(first)).double().mean().item()
        yield {
            "variant": variant.name,
            "what": f"generation, {len(text)} tokens",
            "tokens/s": f"{setting.batch * len(text) / timing.median:,.0f}",
            "step": f"{tables.seconds(timing.median / len(text))} ±{timing.spread:.0%}",
            "vs eager": _beside("eager", times, variant),
            "vs sdpa": _beside("sdpa", times, variant),
            "agreement": f"{same:.0%} of the tokens of {variants[0].name}",
        }


def _beside(kind: str, times: dict[str, Any], variant: Variant) -> str:
    other = times.get(variant.name.replace(variant.kind, kind))
    return f"{times[variant.name].times_faster_than(other):.2f}×" if other else "–"


def _peak(variant: Variant, device: torch.device) -> str:
    """Peak memory of one more step, above weights and optimizer."""
    if device.type == "cuda":
        return tables.size(memory.cuda_peak(variant.train_step))
    return "–" if memory.cannot_measure_process() else tables.size(memory.process_peak(variant.train_step)[0])


def _agreement(first: Variant, variant: Variant) -> str:
    steps = min(len(first.losses), len(variant.losses))
    apart = max(abs(float(a) - float(b)) for a, b in zip(first.losses[:steps], variant.losses[:steps], strict=True))
    return f"loss {float(variant.losses[steps - 1]):.3f}, at most {apart:.1e} from {first.name} in {steps} steps"
