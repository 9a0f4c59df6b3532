"""``python -m benchmarks layers``: the layers of newer models beside the formulas of their papers.

Each layer's parameters go through its formula in plain torch, too: with weights computed as a matrix (eager), and with
``scaled_dot_product_attention``, as models use it today. All ways of one row are timed in turns.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks import command_line, tables
from fastattn.measure.timing import Timing, compare, stopwatch
from fastattn.nn import DifferentialAttention, GatedAttention, LatentAttention, SelfAttention
from fastattn.nn.rotary import rotary_tables
from fastattn.nn.self_attention import AttentionLayer

COLUMNS = ["what", "dtype", "pass", "fastattn", "vs eager", "vs sdpa", "error"]
WIDTH = 512
Attend = Callable[[Tensor, Tensor, Tensor, float], Tensor]
Row = dict[str, str]
LAYERS: dict[str, Callable[[], AttentionLayer]] = {
    "QK-normed, 8/2 heads of 64": lambda: SelfAttention(WIDTH, 8, num_kv_heads=2, qk_norm=True, **_CAUSAL),
    "gated, 8/2 heads of 64": lambda: GatedAttention(WIDTH, 8, num_kv_heads=2, qk_norm=True, **_CAUSAL),
    "differential, 4 heads of 128": lambda: DifferentialAttention(WIDTH, 4, depth=3, **_CAUSAL),
    "latent of 128, 8 heads of 64 + 32": lambda: LatentAttention(
        WIDTH, 8, kv_lora_rank=128, qk_nope_head_dim=64, qk_rope_head_dim=32, v_head_dim=64, window=(None, 0),
        rope_interleaved=False,
    ),
}  # fmt: skip
_CAUSAL: dict[str, Any] = {"window": (None, 0), "rope": True}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    command_line.add_common(parser)
    parser.add_argument("--length", type=int, default=1024, help="tokens (default: 1024)")


def run(args: argparse.Namespace) -> int:
    device = command_line.device(args)
    record = command_line.record(args, device.type, device)
    record.set(columns=COLUMNS)
    length = 64 if args.quick else args.length
    cases = [(name, dtype) for dtype in ("fp32", "bf16") for name in LAYERS]
    for name, dtype in tqdm(cases, desc="layers", disable=args.quiet):
        for row in _passes(name, dtype, length, device, args.quick):
            record.add(row)
    record.add(_latent_token(length, device, args.quick))
    record.finish(device)
    print(tables.table(record.data))
    return 0


def _passes(name: str, dtype: str, length: int, device: torch.device, quick: bool) -> Iterator[Row]:
    """A row without gradients and one for a forward and backward pass."""
    torch.manual_seed(0)
    layer = LAYERS[name]().to(device)
    exact, x = LAYERS[name]().to(device).double(), torch.randn(1, length, WIDTH, device=device)
    exact.load_state_dict(layer.state_dict())
    if dtype == "bf16":
        layer, x = layer.bfloat16(), x.bfloat16()
    ways = {"fastattn": partial(layer, x), **{n: partial(formula, layer, x, attend) for n, attend in ATTEND.items()}}
    with torch.no_grad():
        right = formula(exact, x.double(), eager)
        errors = {way: float((call().double() - right).abs().max()) for way, call in ways.items()}
        times = _timed(ways, device, quick)
    what, said = f"{name}, {length} tokens", f"{errors['fastattn']:.1e}, eager {errors['eager']:.1e}"
    if not errors["fastattn"] <= (allowed := 2 * errors["eager"] + _rounding(exact, x, right)):
        yield {"what": what, "dtype": dtype, "fastattn": f"wrong: at most {allowed:.1e} is allowed", "error": said}
        return
    yield _row(what, dtype, "forward", times) | {"error": said}
    both = {way: partial(_gradients, call, layer) for way, call in ways.items()}
    yield _row(what, dtype, "forward and backward", _timed(both, device, quick))


@torch.no_grad()
def _latent_token(length: int, device: torch.device, quick: bool) -> Row:
    """A row: one token after so many, over cached latents; the formula expands them, as a model without absorption."""
    torch.manual_seed(0)
    layer = cast(LatentAttention, list(LAYERS.values())[-1]()).to(device)
    x = torch.randn(1, length + 1, WIDTH, device=device)
    cache = layer.make_cache(1, length + 1)
    layer(x[:, :-1], cache=cache, absorb=False)
    latents = cache.keys[:, :length].squeeze(2).clone()

    def step() -> Tensor:
        cache.truncate(length)
        return layer(x[:, -1:], cache=cache)

    ways = {"fastattn": step}
    ways |= {n: partial(latent, layer, x[:, -1:], attend, latents) for n, attend in ATTEND.items()}
    exact = copy.deepcopy(layer).double()
    right = formula(exact, x.double(), eager)
    errors = {way: float((call() - right[:, -1:]).abs().max()) for way, call in ways.items()}
    said = {"error": f"{errors['fastattn']:.1e}, eager {errors['eager']:.1e}"}
    what = f"{list(LAYERS)[-1]}, a token after {length}, absorbed"
    if not errors["fastattn"] <= (allowed := 2 * errors["eager"] + _rounding(exact, x, right)):
        return {"what": what, "fastattn": f"wrong: at most {allowed:.1e} is allowed"} | said
    return _row(what, "fp32", "forward", _timed(ways, device, quick)) | said


def _rounding(exact: AttentionLayer, x: Tensor, right: Tensor) -> float:
    """How far the layer's output moves where attention has the roundings of fp32 that ``testing/tolerance.py`` allows.

    A difference of two maps of nearly equal weights, divided by its norm, makes them larger.
    """
    signs = torch.Generator(x.device).manual_seed(0)

    def rounded(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        out, most = eager(q, k, v, scale), 4 * torch.finfo(torch.float32).eps * eager(q, k, v.abs(), scale)
        return out + most * torch.randint(0, 2, out.shape, generator=signs, device=x.device).mul(2).sub(1)

    return float((formula(exact, x.double(), rounded) - right).abs().max())


def _gradients(call: Callable[[], Tensor], layer: nn.Module) -> object:
    return torch.autograd.grad(call().float().square().mean(), list(layer.parameters()))


def _timed(calls: dict[str, Callable[[], Any]], device: torch.device, quick: bool) -> dict[str, Timing]:
    for call in calls.values():
        call()
    rounds: dict[str, Any] = {"rounds": 3, "round_s": 0.001} if quick else {"rounds": 9, "round_s": 0.03}
    return compare(calls, stopwatch(device), budget_s=6.0, **rounds)


def _row(what: str, dtype: str, passes: str, times: dict[str, Timing]) -> Row:
    own = times["fastattn"]
    row = {"what": what, "dtype": dtype, "pass": passes, "fastattn": f"{tables.seconds(own.median)} ±{own.spread:.0%}"}
    return row | {f"vs {way}": f"{own.times_faster_than(times[way]):.2f}×" for way in ATTEND}


# Attention of (B, H, S, D) to no later key; the last row of q is the last of k


def eager(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    scores = scale * q @ k.mT
    later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1 + k.shape[-2] - q.shape[-2])
    return scores.masked_fill(later, -torch.inf).softmax(-1, torch.promote_types(q.dtype, torch.float32)).to(q) @ v


def sdpa(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=q.shape[-2] > 1, scale=scale)


ATTEND: dict[str, Attend] = {"eager": eager, "sdpa": sdpa}


# The formulas


def formula(layer: AttentionLayer, x: Tensor, attend: Attend) -> Tensor:
    if isinstance(layer, LatentAttention):
        return latent(layer, x, attend)
    assert isinstance(layer, SelfAttention)
    out = (differential if isinstance(layer, DifferentialAttention) else grouped)(layer, x, attend)
    return cast(Tensor, layer.o_proj(out.flatten(2)))


def grouped(layer: SelfAttention, x: Tensor, attend: Attend) -> Tensor:
    """Qwen 3's attention; with a gate that of Qiu et al. (2025)."""
    q, k, v = (p(x).unflatten(-1, (-1, layer.head_dim)) for p in (layer.q_proj, layer.k_proj, layer.v_proj))
    assert layer.q_norm is not None and layer.k_norm is not None
    q, k = (_turned(y.transpose(1, 2), layer) for y in (layer.q_norm(q), layer.k_norm(k)))
    k, v = (y.repeat_interleave(layer.num_heads // layer.num_kv_heads, 1) for y in (k, v.transpose(1, 2)))
    out = attend(q, k, v, layer.scale).transpose(1, 2)
    return out * layer.gate_proj(x).sigmoid().view_as(out) if isinstance(layer, GatedAttention) else out


def differential(layer: DifferentialAttention, x: Tensor, attend: Attend) -> Tensor:
    """Ye et al. (2024), equations 1 to 3, for as many heads of keys as of queries."""
    halves = (p(x).unflatten(-1, (-1, 2, layer.scored_dim)).unbind(3) for p in (layer.q_proj, layer.k_proj))
    (q1, q2), (k1, k2) = ([_turned(y.transpose(1, 2), layer) for y in pair] for pair in halves)
    v = layer.v_proj(x).unflatten(-1, (-1, layer.head_dim)).transpose(1, 2)
    first, second = (attend(q, k, v, layer.scale).transpose(1, 2) for q, k in ((q1, k1), (q2, k2)))
    pairs = ((layer.lambda_q1, layer.lambda_k1), (layer.lambda_q2, layer.lambda_k2))
    plus, minus = ((a.float() * b.float()).sum().exp() for a, b in pairs)
    factor = (plus - minus + layer.lambda_init).to(first)
    return cast(Tensor, (1 - layer.lambda_init) * layer.subln(first - factor * second))


def latent(layer: LatentAttention, x: Tensor, attend: Attend, before: Tensor | None = None) -> Tensor:
    """DeepSeek-V2, equations 37 to 47; ``before`` are the latents and turned keys of earlier tokens."""
    assert layer.q_proj is not None
    past, dims = 0 if before is None else before.shape[1], (layer.kv_lora_rank, layer.rotary_dim)
    q_nope, q_rope = layer.q_proj(x).unflatten(-1, (layer.num_heads, -1)).transpose(1, 2).split(
        (layer.nope_dim, layer.rotary_dim), -1
    )  # fmt: skip
    c, k_rope = layer.kv_a_proj_with_mqa(x).split(dims, -1)
    c, k_rope = layer.kv_a_layernorm(c), _turned(k_rope, layer, past)
    if before is not None:
        c, k_rope = (torch.cat(pair, 1) for pair in zip(before.split(dims, -1), (c, k_rope), strict=True))
    up = layer.kv_b_proj(c).unflatten(-1, (layer.num_heads, -1)).transpose(1, 2)
    k_nope, v = up.split((layer.nope_dim, layer.v_head_dim), -1)
    q = torch.cat((q_nope, _turned(q_rope, layer, past)), -1)
    k = torch.cat((k_nope, k_rope[:, None].expand(-1, layer.num_heads, -1, -1)), -1)
    return cast(Tensor, layer.o_proj(attend(q, k, v, layer.scale).transpose(1, 2).flatten(2)))


def _turned(x: Tensor, layer: AttentionLayer, past: int = 0) -> Tensor:
    """RoFormer's rotation of ``(..., S, D)`` as models have it, of pairs that lie half of D apart."""
    assert layer.rope_base is not None
    positions = torch.arange(past, past + x.shape[-2], device=x.device)
    cos, sin = (
        t.repeat(1, 2).to(x) for t in rotary_tables(positions, layer.rotary_dim, layer.rope_base, torch.float64)
    )
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin
