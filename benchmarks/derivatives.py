"""``python -m benchmarks derivatives``: derivatives, statistics and masks as data, beside plain passes and torch's.

Forward mode, double backward and statistics stand beside the passes that they derive or describe; intervals beside
attention to all keys, per kept pair; gradients of each sample beside those of the batch. Torch's ways are its attention
by the formula (``SDPBackend.MATH``), FlexAttention for masks, and the padded batch for per-sample gradients. All calls
of one shape are timed in turns.
"""

from __future__ import annotations

import argparse
import copy
import functools
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import grad, jvp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

import fastattn
from benchmarks import command_line, tables
from fastattn.inspection import attention_statistics
from fastattn.measure.memory import cannot_measure_process, cuda_peak, process_peak
from fastattn.measure.timing import Timing, compare, stopwatch

COLUMNS = ["what", "fastattn", "beside", "target", "memory", "torch math", "FlexAttention"]
WINDOW = 256
OURS, MATH, FLEX = "fastattn", "torch math", "FlexAttention"
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
Calls = dict[str, Callable[[], object]]
Row = dict[str, str]


@dataclass(frozen=True)
class Derived:
    """A call, the one that it stands beside, and what time and memory the project aims at, as multiples of it."""

    name: str
    base: str
    time: float | None = None
    memory: float | None = None


DERIVED = (
    Derived("jvp", "forward", 2.5, 2),
    Derived("statistics", "forward"),
    Derived("double backward", "backward", 4, 2),
    Derived("gradients of statistics", "backward"),
    Derived("vmap(grad)", "gradients of the batch", 1.5),
    Derived("Opacus' hooks", "training step", 1.5),
    Derived("Opacus' hooks, its linear layers alone", "training step, its linear layers alone"),
)
KEPT_PAIR = 0.8  # of the speed of a pair where all are kept: the aim for masks of whole tiles of 64


def add_arguments(parser: argparse.ArgumentParser) -> None:
    command_line.add_common(parser)
    parser.add_argument("--length", type=int, default=2048, help="tokens (default: 2048); masks have 4096")
    parser.add_argument("--heads", type=int, default=8, help="heads, of 64 dims (default: 8)")
    parser.add_argument("--no-flex", action="store_true", help="leave out FlexAttention, which compiles first")


def run(args: argparse.Namespace) -> int:
    device = command_line.device(args)
    record = command_line.record(args, device.type, device)
    record.set(columns=COLUMNS)
    for rows in tqdm(_parts(args, device), desc="derivatives", disable=args.quiet, total=8):
        for row in rows:
            record.add(row)
    record.finish(device)
    print(tables.table(record.data))
    return 0


def _parts(args: argparse.Namespace, device: torch.device) -> Iterator[Iterator[Row]]:
    length, heads = (128, 2) if args.quick else (args.length, args.heads)
    masked = 1024 if args.quick else 4096
    window = {"causal": True, "window": (WINDOW, 0)}
    measure = Measure(device, args.quick)
    for dtype, name in ((torch.float32, "fp32"), (torch.bfloat16, "bf16")):
        tensors = torch.randn(7, 1, length, heads, 64, device=device).to(dtype)
        yield measure.derived(f"{name} {length} tokens", _passes(tensors, {}))
        yield measure.derived(f"{name} {length} tokens, window of {WINDOW}", _passes(tensors, window))
        qkvg = torch.randn(4, 1, masked, 2, 64, device=device).to(dtype)
        yield measure.kept(f"{name} {masked} tokens", _masks(masked, device), qkvg, flex=not args.no_flex)
    samples = max(16, length // 16)
    yield measure.derived(f"fp32 16 samples of {samples} tokens", _samples(samples, heads, device))
    layer = f"fp32 16 samples of {samples} tokens, a layer"
    if importlib.util.find_spec("opacus") is None:
        yield iter([{"what": f"{layer}: Opacus' hooks", OURS: "opacus is not installed"}])
    else:
        yield measure.derived(layer, _layers(samples, device))


# Calls by peer and name


def _passes(tensors: Tensor, options: dict[str, Any]) -> dict[str, Calls]:
    """Both passes and their derivatives; by the formula, too, where there is no window."""
    q, k, v, *along, dout = (x.clone() for x in tensors)  # torch makes tangents of views as large as what they view
    qkv, along = (q, k, v), tuple(along)
    attend = partial(_attention, **options)
    found = {OURS: _derivatives(attend, qkv, along, dout) | _statistics(qkv[:2], options)}
    if not options and tensors.dtype == torch.float32:  # its time in 16 bits says little: most of it is rounding
        found[MATH] = _derivatives(_torch_math, qkv, along, dout)
    return found


def _attention(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    out: Tensor = cast(Any, fastattn.attention)(q, k, v, **options)
    return out


def _torch_math(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    x, y, z = (tensor.transpose(1, 2) for tensor in (q, k, v))
    with sdpa_kernel(SDPBackend.MATH):
        return nn.functional.scaled_dot_product_attention(x, y, z).transpose(1, 2)


def _derivatives(attend: Attend, qkv: tuple[Tensor, ...], along: tuple[Tensor, ...], dout: Tensor) -> Calls:
    leaves = [x.detach().clone().requires_grad_() for x in qkv]
    out = attend(*leaves)
    gradients = torch.autograd.grad(out, leaves, dout, create_graph=True)
    return {
        "forward": lambda: attend(*qkv),
        "jvp": lambda: jvp(attend, qkv, along),
        "backward": lambda: torch.autograd.grad(out, leaves, dout, retain_graph=True),
        "double backward": lambda: torch.autograd.grad(gradients, leaves, along, retain_graph=True),
    }


def _statistics(qk: tuple[Tensor, ...], options: dict[str, Any]) -> Calls:
    leaves = [x.detach().clone().requires_grad_() for x in qk]
    found = attention_statistics(*leaves, **options)
    total = found.entropy.sum() + found.largest_logit.sum() + found.key_sum.square().sum()
    return {
        "statistics": lambda: attention_statistics(*qk, **options),
        "gradients of statistics": lambda: torch.autograd.grad(total, leaves, retain_graph=True),
    }


def _samples(length: int, heads: int, device: torch.device) -> dict[str, Calls]:
    samples = torch.randn(3, 16, 1, length, heads, 64, device=device).unbind()
    batch = tuple(x.flatten(0, 1) for x in samples)

    def calls(attend: Attend) -> Calls:
        def loss(*qkv: Tensor) -> Tensor:
            return attend(*qkv).square().sum()

        return {
            "gradients of the batch": lambda: grad(loss, (0, 1, 2))(*batch),
            "vmap(grad)": lambda: vmap(grad(loss, (0, 1, 2)))(*samples),
        }

    return {OURS: calls(_attention), MATH: calls(_torch_math)}


def _layers(length: int, device: torch.device) -> dict[str, Calls]:
    """A training step of a layer of self-attention, and one that leaves the gradients of each sample."""
    from opacus import GradSampleModule

    from fastattn.integrations.opacus import prepare

    x = torch.randn(16, length, 512, device=device)

    def step(model: nn.Module) -> None:
        for parameter in model.parameters():
            parameter.grad = parameter.grad_sample = None  # type: ignore[attr-defined]
        model(x).square().sum().backward()

    plain, prepared = _SelfAttention().to(device), _SelfAttention().to(device)
    prepare(prepared)
    linear = _LinearLayers().to(device)
    hooked, hooked_linear = (
        GradSampleModule(layer, loss_reduction="sum") for layer in (prepared, copy.deepcopy(linear))
    )
    return {
        OURS: {
            "training step": lambda: step(plain),
            "Opacus' hooks": lambda: step(hooked),
            "training step, its linear layers alone": lambda: step(linear),
            "Opacus' hooks, its linear layers alone": lambda: step(hooked_linear),
        }
    }


class _SelfAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = fastattn.MultiHeadAttention(512, 8, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x, x, x, need_weights=False)[0]
        return out


class _LinearLayers(nn.Module):
    """The linear layers of ``_SelfAttention`` without attention between them: what Opacus does by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(512, 3 * 512), nn.Linear(512, 512)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.second(self.first(x)[..., :512])
        return out


# Masks as intervals, by name; with a star those of whole tiles of 64, for which the aim holds


def _masks(length: int, device: torch.device) -> dict[str, Tensor | None]:
    blocks, side = length // 64, 1 << length.bit_length() // 2  # `length` is a power of two
    grid, cube = (length // side, side), (length // (side // 4) // 16, side // 4, 16)
    chosen = torch.rand(blocks, blocks, device=device).argsort(-1)[:, : blocks // 4].sort(-1).values
    return {
        "all pairs": None,
        "8 documents": fastattn.intervals.documents([length // 8] * 8, device=device),
        f"{WINDOW} keys before each": fastattn.intervals.sliding_window(length, WINDOW, device=device),
        "a quarter of all blocks of 64*": fastattn.intervals.selected_blocks(chosen, 64, length, rows=64),
        "3 x 3 tiles of 8 x 8*": fastattn.intervals.sliding_tiles(grid, (8, 8), (3, 3), device=device),
        _named("neighbourhood of 7", grid): fastattn.intervals.neighbourhood(grid, 7, device=device),
        _named("neighbourhood of 13", grid): fastattn.intervals.neighbourhood(grid, 13, device=device),
        _named("neighbourhood of 5", cube): fastattn.intervals.neighbourhood(cube, 5, device=device),
    }


def _named(what: str, grid: tuple[int, ...]) -> str:
    return f"{what} in {' x '.join(map(str, grid))}"


def _flex(ranges: Tensor | None, q: Tensor, k: Tensor, v: Tensor) -> Callable[[], object]:
    """FlexAttention, which looks each pair of a block that is not whole up in a table."""
    from torch.nn.attention.flex_attention import create_block_mask

    length = q.shape[1]
    kept = (
        torch.ones(length, length, dtype=torch.bool) if ranges is None else fastattn.intervals.to_mask(ranges, length)
    )
    kept = kept.to(q.device)

    def keeps(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return kept[i, j]

    mask = None if ranges is None else create_block_mask(keeps, None, None, length, length, device=str(q.device))
    x, y, z = (t.transpose(1, 2) for t in (q, k, v))
    return lambda: _compiled_flex()(x, y, z, block_mask=mask)


@functools.cache
def _compiled_flex() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


# Measuring


class Measure:
    """Times calls in turns and makes rows of them."""

    def __init__(self, device: torch.device, quick: bool) -> None:
        self.device, self.watch = device, stopwatch(device, wall=False)
        self.rounds, self.round_s = (3, 0.01) if quick else (7, 0.1)

    def times(self, calls: Calls) -> dict[str, Timing]:
        for call in calls.values():
            call()
        return compare(calls, self.watch, rounds=self.rounds, round_s=self.round_s)

    def derived(self, problem: str, peers: dict[str, Calls]) -> Iterator[Row]:
        """A row for each derivative, and for what it stands beside."""
        times = _split(self.times(_joined(peers)))
        peaks = {peer: {name: self._peak(call) for name, call in calls.items()} for peer, calls in peers.items()}
        for name, ours in times.get(OURS, {}).items():
            of = next((x for x in DERIVED if x.name == name), None)
            row = {"what": f"{problem}: {name}", OURS: _time(ours), "memory": _size(peaks[OURS][name])}
            if of is not None:
                base = times[OURS][of.base]
                row["beside"] = f"{_ratio(ours, base):.2f}× {of.base}"
                row["target"] = f"{of.time:g}×" if of.time else ""
                row["memory"] += _share(peaks[OURS][name], peaks[OURS][of.base], of.memory)
            if (math := times.get(MATH, {}).get(name)) is not None:
                row[MATH] = f"{_time(math)}, {_ratio(math, ours):.1f}× ours, {_size(peaks[MATH][name])}"
            yield row

    def kept(self, problem: str, masks: dict[str, Tensor | None], qkvg: Tensor, *, flex: bool) -> Iterator[Row]:
        """A row for each mask and pass: the speed of a kept pair beside one where all are kept."""
        *qkv, dout = qkvg.unbind()
        peers: dict[str, Calls] = {OURS: {}, FLEX: {}}
        for name, ranges in masks.items():
            for pass_name, call in _both_passes(ranges, qkv, dout).items():
                peers[OURS][f"{name}: {pass_name}"] = call
            if flex:
                peers[FLEX][f"{name}: forward"] = _flex(ranges, *qkv)
        times = _split(self.times(_joined(peers)))
        length = qkv[0].shape[1]
        pairs = {
            n: length**2 if r is None else int(fastattn.intervals.to_mask(r, length).sum()) for n, r in masks.items()
        }
        for name, ours in times[OURS].items():
            mask, pass_name = name.rsplit(": ", 1)
            row = {"what": f"{problem}, {name}", OURS: _time(ours), "memory": _size(self._peak(peers[OURS][name]))}
            if masks[mask] is not None:
                share = pairs[mask] / length**2
                speed = share / _ratio(ours, times[OURS][f"all pairs: {pass_name}"])
                row["beside"] = f"{speed:.0%} of all pairs' speed, {share:.1%} kept"
                row["target"] = f"{KEPT_PAIR:.0%}" if mask.endswith("*") else ""
            if (other := times.get(FLEX, {}).get(name)) is not None:
                row[FLEX] = f"{_time(other)}, {_ratio(other, ours):.1f}× ours"
            yield row

    def _peak(self, call: Callable[[], object]) -> int | None:
        """Peak memory of a call above what was held before."""
        if self.device.type == "cuda":
            return cuda_peak(call)
        return None if cannot_measure_process() else process_peak(call)[0]


def _both_passes(ranges: Tensor | None, qkv: list[Tensor], dout: Tensor) -> Calls:
    options = {} if ranges is None else {"intervals": ranges}
    leaves = [x.detach().clone().requires_grad_() for x in qkv]
    out = _attention(*leaves, **options)
    return {
        "forward": lambda: _attention(*qkv, **options),
        "backward": lambda: torch.autograd.grad(out, leaves, dout, retain_graph=True),
    }


def _joined(peers: dict[str, Calls]) -> Calls:
    return {f"{peer}|{name}": call for peer, calls in peers.items() for name, call in calls.items()}


def _split(times: dict[str, Timing]) -> dict[str, dict[str, Timing]]:
    found: dict[str, dict[str, Timing]] = {}
    for key, time in times.items():
        peer, name = key.split("|")
        found.setdefault(peer, {})[name] = time
    return found


def _ratio(time: Timing, base: Timing) -> float:
    return base.times_faster_than(time)


def _time(time: Timing) -> str:
    return f"{tables.seconds(time.median)} ±{time.spread:.0%}"


def _size(peak: int | None) -> str:
    return "" if peak is None else tables.size(peak)


def _share(peak: int | None, base: int | None, target: float | None) -> str:
    if not peak or not base:
        return ""
    return f", {peak / base:.2f}×" + (f" (target {target:g}×)" if target else "")
