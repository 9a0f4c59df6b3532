"""``python -m benchmarks swap``: each thing that fastattn replaces, beside the thing itself, as people call it.

Ratios are times faster than what is replaced, taken inside each round of interleaved calls.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import statistics
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import fastattn
from benchmarks import command_line, tables
from fastattn.integrations import flash_attn
from fastattn.measure.timing import Timing, compare, stopwatch

COLUMNS = ["what", "size", "dtype", "pass", "times faster", "spread", "fastattn", "replaced"]
Pair = tuple[Callable[[], Any], Callable[[], Any]]  # (what is replaced, fastattn), each giving a tensor


@dataclass(frozen=True)
class Size:
    """``B`` batch entries of ``S_q`` queries and ``S_kv`` keys, ``E`` wide in ``H`` heads."""

    batch: int
    s_q: int
    s_kv: int
    width: int
    heads: int

    def __str__(self) -> str:
        lengths = f"S{self.s_q}" if self.s_q == self.s_kv else f"Sq{self.s_q} Sk{self.s_kv}"
        return f"B{self.batch} {lengths} E{self.width} H{self.heads}"

    def tokens(self, like: torch.device, dtype: torch.dtype, keys: bool = False) -> Tensor:
        length = self.s_kv if keys else self.s_q
        return torch.randn(self.batch, length, self.width, device=like, dtype=dtype)

    def heads_of(self, like: torch.device, dtype: torch.dtype, keys: bool = False) -> Tensor:
        return self.tokens(like, dtype, keys).unflatten(-1, (self.heads, -1))


SIZES = (Size(1, 32, 32, 256, 8), Size(4, 20, 60, 64, 4), Size(8, 128, 128, 768, 12), Size(2, 1024, 1024, 512, 8))
QUICK = (Size(1, 8, 8, 16, 2), Size(2, 4, 6, 16, 2))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    command_line.add_common(parser)
    parser.add_argument("--only", default="", help="a part of the name of what is measured")
    parser.add_argument("--seconds", type=float, default=1.0, help="for each line (default: 1)")
    parser.add_argument(
        "--compiled", action="store_true", help="both sides by torch.compile, in fp32 at the first size"
    )


def run(args: argparse.Namespace) -> int:
    device = command_line.device(args)
    record = command_line.record(args, device.type, device)
    record.set(columns=COLUMNS)
    ratios = []
    cases = [case for case in _cases(args.quick, args.compiled) if args.only in case[0]]
    for what, size, dtype, trains, make in tqdm(cases, desc="swap", disable=args.quiet):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.manual_seed(0)
            try:
                pair = make(size, device, dtype)
            except ImportError as error:
                row, ratio = {"times faster": "not measured", "replaced": str(error)[:80]}, None
            else:
                row, ratio = _measure(pair, trains, device, 0.02 if args.quick else args.seconds)
        of = {"what": what, "size": str(size), "dtype": str(dtype).removeprefix("torch.")}
        record.add(of | {"pass": "training" if trains else "inference"} | row)
        ratios += [] if ratio is None else [ratio]
    if ratios:
        summary = f"{statistics.geometric_mean(ratios):.2f}×; least {min(ratios):.2f}×"
        of = "compiled lines" if args.compiled else "lines that are not compiled"
        record.add({"what": f"geometric mean of all {of}", "times faster": summary})
    record.finish(device)
    print(tables.table(record.data))
    return 0


def _cases(quick: bool, compiled: bool) -> Iterator[tuple[str, Size, torch.dtype, bool, Callable[..., Pair]]]:
    """Compiled ones at one size alone, as compiling takes longer than measuring."""
    sizes = QUICK if quick else SIZES
    for size in sizes[:1] if compiled else sizes:
        for dtype in (torch.float32,) if compiled else (torch.float32, torch.bfloat16):
            for what, make in MAKES.items():
                if size.s_q != size.s_kv and what not in CROSS:
                    continue
                for trains in (False, True):
                    if compiled:
                        yield f"{what}, compiled", size, dtype, trains, functools.partial(_compiled, make)
                    else:
                        yield what, size, dtype, trains, make


def _measure(pair: Pair, trains: bool, device: torch.device, seconds: float) -> tuple[dict[str, str], float]:
    calls = {name: _call(function, trains) for name, function in zip(("replaced", "fastattn"), pair, strict=True)}
    for call in calls.values():
        call()
    found = compare(calls, stopwatch(device), rounds=31, least_rounds=5, round_s=0.004, budget_s=seconds)
    ratio = found["fastattn"].times_faster_than(found["replaced"])
    spread = _spread(found["fastattn"], found["replaced"])
    times = {name: tables.seconds(timing.median) for name, timing in found.items()}
    return {"times faster": f"{ratio:.2f}×", "spread": f"±{spread:.0%}"} | times, ratio


def _compiled(make: Callable[..., Pair], size: Size, device: torch.device, dtype: torch.dtype) -> Pair:
    torch.compiler.reset()
    return tuple(map(torch.compile, make(size, device, dtype)))  # type: ignore[return-value]


def _spread(ours: Timing, theirs: Timing) -> float:
    """Half the interquartile range of the ratios of the rounds, over their median."""
    ratios = [b / a for a, b in zip(ours.rounds, theirs.rounds, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return (high - low) / 2 / middle


def _call(function: Callable[[], Tensor], trains: bool) -> Callable[[], object]:
    def inference() -> object:
        with torch.no_grad():
            return function()

    def training() -> object:
        return function().float().sum().backward()

    return training if trains else inference


# --- nn.MultiheadAttention and what is built of it --------------------------------------------------------------


def _attention(size: Size, device: torch.device, dtype: torch.dtype, look: Callable[..., Tensor]) -> Pair:
    theirs = nn.MultiheadAttention(size.width, size.heads, batch_first=True, device=device, dtype=dtype)
    ours = fastattn.MultiHeadAttention(size.width, size.heads, batch_first=True, device=device, dtype=dtype)
    ours.load_state_dict(theirs.state_dict())
    theirs, ours = theirs.eval(), ours.eval()  # torch's shortcut of inference included; there is no dropout
    q = size.tokens(device, dtype).requires_grad_()
    k = q if size.s_q == size.s_kv else size.tokens(device, dtype, keys=True).requires_grad_()
    padding = torch.arange(size.s_kv, device=device) >= torch.linspace(size.s_kv // 2, size.s_kv, size.batch)[:, None]
    return tuple(functools.partial(look, module, q, k, padding) for module in (theirs, ours))  # type: ignore[return-value]


def _default(m: nn.Module, q: Tensor, k: Tensor, padding: Tensor) -> Tensor:
    return m(q, k, k)[0]


def _without_weights(m: nn.Module, q: Tensor, k: Tensor, padding: Tensor) -> Tensor:
    return m(q, k, k, need_weights=False)[0]


def _padded(m: nn.Module, q: Tensor, k: Tensor, padding: Tensor) -> Tensor:
    return m(q, k, k, key_padding_mask=padding, need_weights=False)[0]


def _weights_read(m: nn.Module, q: Tensor, k: Tensor, padding: Tensor) -> Tensor:
    out, weights = m(q, k, k)
    return out.sum() + weights.sum()


def _stack(kind: str, size: Size, device: torch.device, dtype: torch.dtype, padded: bool = False) -> Pair:
    options = {"dropout": 0.0, "batch_first": True, "device": device, "dtype": dtype}
    sizes = (size.width, size.heads, 2 * size.width)
    if kind == "transformer":
        theirs: nn.Module = nn.Transformer(size.width, size.heads, 1, 1, 2 * size.width, **options)
    elif kind == "decoder":
        theirs = nn.TransformerDecoder(nn.TransformerDecoderLayer(*sizes, **options), 2)
    else:
        theirs = nn.TransformerEncoder(nn.TransformerEncoderLayer(*sizes, **options), 2)
    theirs.eval()
    ours = copy.deepcopy(theirs)
    fastattn.replace_attention(ours)
    q, k = size.tokens(device, dtype), size.tokens(device, dtype, keys=True)
    if kind == "encoder" and padded:
        padding = torch.arange(size.s_q, device=device) >= torch.linspace(size.s_q // 3, size.s_q, size.batch)[:, None]
        return lambda: theirs(q, src_key_padding_mask=padding), lambda: ours(q, src_key_padding_mask=padding)
    inputs = (q,) if kind == "encoder" else (q, k) if kind == "decoder" else (k, q)
    return lambda: theirs(*inputs), lambda: ours(*inputs)


class _Block(nn.Module):
    """A ViT block as torchvision writes it, and with ``positions`` one of DETR's encoder."""

    def __init__(self, size: Size, positions: Tensor | None, **options: Any) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(size.width, **options)
        self.attention = nn.MultiheadAttention(size.width, size.heads, batch_first=True, **options)
        self.mlp = nn.Sequential(nn.Linear(size.width, size.width, **options), nn.GELU())
        self.positions = positions

    def forward(self, x: Tensor) -> Tensor:
        if self.positions is not None:  # DETR: the weights, which are the default, are thrown away
            q = x + self.positions
            x = self.norm(x + self.attention(q, q, value=x)[0])
            return x + self.mlp(x)
        y = self.norm(x)
        y, _ = self.attention(y, y, y, need_weights=False)
        return x + self.mlp(x + y)


def _block(size: Size, device: torch.device, dtype: torch.dtype, is_detr: bool) -> Pair:
    positions = size.tokens(device, dtype)[:1] if is_detr else None
    theirs = nn.Sequential(*(_Block(size, positions, device=device, dtype=dtype) for _ in range(2))).eval()
    ours = copy.deepcopy(theirs)
    fastattn.replace_attention(ours)
    x = size.tokens(device, dtype)
    return lambda: theirs(x), lambda: ours(x)


# --- functions --------------------------------------------------------------------------------------------------


def _sdpa(size: Size, device: torch.device, dtype: torch.dtype, is_causal: bool) -> Pair:
    heads = (size.heads_of(device, dtype, keys).transpose(1, 2).requires_grad_() for keys in (False, True, True))
    q, k, v = heads
    return (
        lambda: F.scaled_dot_product_attention(q, k, v, is_causal=is_causal),
        lambda: fastattn.scaled_dot_product_attention(q, k, v, is_causal=is_causal),
    )


def _flash(size: Size, device: torch.device, dtype: torch.dtype) -> Pair:
    q, k, v = (size.heads_of(device, dtype, keys).requires_grad_() for keys in (False, True, True))
    return (
        lambda: F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2),
        lambda: flash_attn.flash_attn_func(q, k, v),
    )


def _flash_packed(size: Size, device: torch.device, dtype: torch.dtype) -> Pair:
    """Sequences of a half to the whole length, beside SDPA on a padded batch with its mask."""
    lengths = torch.linspace(size.s_q // 2, size.s_q, size.batch).int()
    cu = F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32).to(device)
    rows = torch.randn(3, int(cu[-1]), size.heads, size.width // size.heads, device=device, dtype=dtype)
    q, k, v = (x.requires_grad_() for x in rows.unbind())
    padded = [size.heads_of(device, dtype).transpose(1, 2).requires_grad_() for _ in range(3)]
    keep = (torch.arange(size.s_q) < lengths[:, None])[:, None, None].to(device)
    return (
        lambda: F.scaled_dot_product_attention(*padded, attn_mask=keep),
        lambda: flash_attn.flash_attn_varlen_func(q, k, v, cu, cu, size.s_q, size.s_q),
    )


# --- transformers -----------------------------------------------------------------------------------------------


def _hugging_face(name: str, size: Size, device: torch.device, dtype: torch.dtype) -> Pair:
    import transformers as T  # optional: the line says so where it is missing

    from fastattn.integrations.transformers import register

    register()
    e, h = size.width, size.heads
    decoder = {"vocab_size": 64, "num_hidden_layers": 2, "hidden_size": e, "num_attention_heads": h}
    sizes = {
        "BertModel": T.BertConfig(**decoder, intermediate_size=2 * e, max_position_embeddings=2048),
        "LlamaModel": T.LlamaConfig(**decoder, intermediate_size=2 * e, max_position_embeddings=2048),
        "GPT2Model": T.GPT2Config(vocab_size=64, n_embd=e, n_layer=2, n_head=h, n_positions=2048),
        "T5EncoderModel": T.T5Config(vocab_size=64, d_model=e, d_kv=e // h, d_ff=2 * e, num_layers=2, num_heads=h),
    }
    kind, models = getattr(T, name), []
    for implementation in ("sdpa", "fastattn"):
        with contextlib.suppress(AttributeError):
            T.logging.set_verbosity_error()
        models.append(kind._from_config(copy.deepcopy(sizes[name]), attn_implementation=implementation))
    models[1].load_state_dict(models[0].state_dict())
    ids = torch.randint(0, 64, (size.batch, size.s_q), device=device)
    theirs, ours = (model.to(device, dtype).eval() for model in models)
    return (
        lambda: theirs(input_ids=ids).last_hidden_state,
        lambda: ours(input_ids=ids).last_hidden_state,
    )


MAKES: dict[str, Callable[..., Pair]] = {
    "MultiheadAttention, default call": functools.partial(_attention, look=_default),
    "MultiheadAttention, need_weights=False": functools.partial(_attention, look=_without_weights),
    "MultiheadAttention, padding": functools.partial(_attention, look=_padded),
    "MultiheadAttention, weights read": functools.partial(_attention, look=_weights_read),
    "TransformerEncoder": functools.partial(_stack, "encoder"),
    "TransformerEncoder, padding": functools.partial(_stack, "encoder", padded=True),
    "TransformerDecoder": functools.partial(_stack, "decoder"),
    "nn.Transformer": functools.partial(_stack, "transformer"),
    "ViT blocks": functools.partial(_block, is_detr=False),
    "DETR blocks": functools.partial(_block, is_detr=True),
    "scaled_dot_product_attention": functools.partial(_sdpa, is_causal=False),
    "scaled_dot_product_attention, causal": functools.partial(_sdpa, is_causal=True),
    "flash_attn_func beside SDPA": _flash,
    "flash_attn_varlen_func beside padded SDPA": _flash_packed,
    "transformers BERT beside sdpa": functools.partial(_hugging_face, "BertModel"),
    "transformers GPT-2 beside sdpa": functools.partial(_hugging_face, "GPT2Model"),
    "transformers Llama beside sdpa": functools.partial(_hugging_face, "LlamaModel"),
    "transformers T5 beside sdpa": functools.partial(_hugging_face, "T5EncoderModel"),
}
CROSS = {
    "MultiheadAttention, default call", "MultiheadAttention, need_weights=False", "MultiheadAttention, padding",
    "MultiheadAttention, weights read", "TransformerDecoder", "nn.Transformer",
    "scaled_dot_product_attention", "flash_attn_func beside SDPA",
}  # fmt: skip
