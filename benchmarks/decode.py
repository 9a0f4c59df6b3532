"""``python -m benchmarks decode``: attention to a key/value cache, and generation with and without one."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import fastattn
from benchmarks import ceilings, command_line, tables
from fastattn.errors import InputError
from fastattn.lm.generate import Sampling
from fastattn.lm.models import Decoder, preset
from fastattn.measure.timing import compare, stopwatch

COLUMNS = [
    "what",
    "cache",
    "dtype",
    "fastattn",
    "read",
    "of copy",
    "of a streaming read",
    "vs sdpa, gathered before",
    "vs gather + sdpa",
    "error",
]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclasses.dataclass(frozen=True)
class Case:
    """One step of decoding: a token for each of ``batch`` sequences.

    Attributes:
        lengths: "equal", or "ragged", evenly spread from ``length / 8`` to ``length``.
        page_size: None is a contiguous cache. Pages lie in random order.
    """

    batch: int
    heads_q: int
    heads_kv: int
    head_dim: int
    length: int
    dtype: str
    page_size: int | None = None
    lengths: str = "equal"

    @property
    def what(self) -> str:
        size = f"batch {self.batch}, {self.length} keys"
        return f"{size}, heads {self.heads_q}/{self.heads_kv}, D {self.head_dim}, {self.lengths}"

    @property
    def cache(self) -> str:
        return "contiguous" if self.page_size is None else f"pages of {self.page_size}"


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    on_gpu = device.type == "cuda"
    dtypes = ("bf16",) if on_gpu else ("fp32", "bf16")
    shapes = [(1, 32, 8, 128), (8, 32, 8, 128)] if on_gpu else [(1, 8, 8, 128), (4, 8, 2, 128)]
    for dtype in dtypes:
        for batch, heads_q, heads_kv, head_dim in shapes:
            for length in (128,) if quick else (8192, 131072) if on_gpu else (1024, 8192):
                for page_size in (None, 1, 8, 16, 128, 256) if on_gpu else (None, 1, 16, 256):
                    yield Case(batch, heads_q, heads_kv, head_dim, length, dtype, page_size)
                if batch > 1:
                    for page_size in (None, 16):
                        yield Case(batch, heads_q, heads_kv, head_dim, length, dtype, page_size, "ragged")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    command_line.add_common(parser)
    parser.add_argument("--case", metavar="TEXT", default="", help="only lines that contain TEXT")
    parser.add_argument(
        "--tokens", type=int, default=512, help="generated with and without cache (default 512; 0: none)"
    )


def run(args: argparse.Namespace) -> int:
    device = command_line.device(args)
    if args.tokens < 0:
        raise InputError(f"--tokens: got {args.tokens}; allowed: 0 or more.")
    record = command_line.record(args, device.type, device)
    ceiling = ceilings.measure(device, {"fp32"}, args.quick)
    record.set(columns=COLUMNS, ceilings=ceiling)
    chosen = [case for case in cases(device, args.quick) if args.case in f"{case.what}, {case.cache}, {case.dtype}"]
    for case in tqdm(chosen, desc="decode", disable=args.quiet):
        record.add(measured(case, device, ceiling["copy_gbps"], args.quick))
    if args.tokens and not args.case:
        record.add(_generation(device, min(args.tokens, 16) if args.quick else args.tokens))
    record.finish(device)
    print(tables.table(record.data))
    return 0


@torch.no_grad()
def measured(case: Case, device: torch.device, copy_gbps: float, quick: bool) -> dict[str, str]:
    """One row of the table: the contenders are checked against fp64, then timed in turn."""
    values = Values(case, device)
    row = {"what": case.what, "cache": case.cache, "dtype": case.dtype}
    exact = values.on_gathered(*(x.double() for x in (values.q, values.keys, values.values)))()
    calls: dict[str, Callable[[], Tensor]] = {
        "fastattn": values.decode,
        "sdpa": values.on_gathered(values.q, values.keys, values.values),
        "gather": lambda: values.on_gathered(values.q, *values.gathered())(),
    }
    errors = {name: float((call().double() - exact).abs().max()) for name, call in calls.items()}
    calls["stream"] = values.stream
    allowed = allowed_error(errors["sdpa"], exact)
    row["error"] = f"{errors['fastattn']:.1e}, sdpa {errors['sdpa']:.1e}"
    if not errors["fastattn"] <= allowed:
        return row | {"fastattn": f"wrong: at most {allowed:.1e} is allowed"}
    rounds = {"rounds": 3, "round_s": 0.001} if quick else {"rounds": 15, "round_s": 0.05, "budget_s": 6.0}
    times = compare(calls, stopwatch(device), **rounds)  # type: ignore[arg-type]
    own = times["fastattn"]
    rate = values.bytes_read / own.median / 1e9
    return row | {
        "fastattn": f"{tables.seconds(own.median)} ±{own.spread:.0%}",
        "read": f"{rate:.1f} GB/s",
        "of copy": f"{rate / copy_gbps:.0%}",
        "of a streaming read": f"{own.times_faster_than(times['stream']):.0%}",
        "vs sdpa, gathered before": f"{own.times_faster_than(times['sdpa']):.2f}×",
        "vs gather + sdpa": f"{own.times_faster_than(times['gather']):.2f}×",
    }


def allowed_error(of_sdpa: float, exact: Tensor) -> float:
    """Twice sdpa's error, plus some roundings of the arithmetic, as sdpa's error may happen to be small."""
    return 2 * of_sdpa + 8 * torch.finfo(torch.float32).eps * float(exact.abs().max())


class Values:
    """The tensors of a case."""

    def __init__(self, case: Case, device: torch.device) -> None:
        draw = torch.Generator().manual_seed(0)
        dtype, heads = DTYPES[case.dtype], (case.heads_kv, case.head_dim)
        spread = torch.linspace(1 / 8 if case.lengths == "ragged" else 1, 1, case.batch)
        self.lengths = (spread * case.length).int().to(device)
        per_sequence = 1 if case.page_size is None else -(-case.length // case.page_size)
        pages = case.batch * per_sequence
        shape = (pages, case.page_size or case.length, *heads)
        self.q = torch.randn(case.batch, 1, case.heads_q, case.head_dim, generator=draw).to(device, dtype)
        self.k_cache, self.v_cache = (torch.randn(shape, generator=draw).to(device, dtype) for _ in range(2))
        order = torch.randperm(pages, generator=draw).int().view(case.batch, per_sequence).to(device)
        self.block_table = None if case.page_size is None else order
        self.case = case
        self.keys, self.values = self.gathered()
        is_kept = torch.arange(case.length, device=device) < self.lengths[:, None]
        self.mask = None if case.lengths == "equal" else is_kept[:, None, None]
        self.bytes_read = 2 * int(self.lengths.sum()) * case.heads_kv * case.head_dim * dtype.itemsize

    def decode(self) -> Tensor:
        out = fastattn.attention_with_kv_cache(
            self.q, self.k_cache, self.v_cache, self.lengths, block_table=self.block_table
        )
        assert isinstance(out, Tensor)
        return out

    def stream(self) -> Tensor:
        """Reads as many bytes as a step does, one after the other."""
        k, v = (x.flatten().view(torch.float32)[: self.bytes_read // 8] for x in (self.k_cache, self.v_cache))
        return k.sum() + v.sum()

    def gathered(self) -> tuple[Tensor, Tensor]:
        """The content of the cache as ``(B, S, H, D)``: the cache itself if it is contiguous."""
        if self.block_table is None:
            return self.k_cache, self.v_cache
        keys, values = (x[self.block_table.long()].flatten(1, 2) for x in (self.k_cache, self.v_cache))
        return keys[:, : self.case.length], values[:, : self.case.length]

    def on_gathered(self, q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        is_grouped = self.case.heads_q != self.case.heads_kv
        attention = F.scaled_dot_product_attention
        return lambda: attention(q, k, v, attn_mask=self.mask, enable_gqa=is_grouped).transpose(1, 2)


def _generation(device: torch.device, tokens: int) -> dict[str, Any]:
    """One row of the table: generation of the same greedy text with and without a cache."""
    torch.manual_seed(0)
    name = "tiny" if tokens <= 16 else "small"  # tiny measures the host, not the model
    config = dataclasses.replace(preset(name, 256), max_length=tokens + 16)
    model = Decoder(config).to(device).eval()
    prompt = torch.randint(256, (1, 16))

    def text(**options: Any) -> list[list[int]]:
        return model.generate(prompt, tokens, Sampling(temperature=0), **options)

    calls = {"fastattn": text, "without": lambda: text(use_cache=False), "paged": lambda: text(page_size=16)}
    same = [sum(a == b for a, b in zip(text()[0], calls[name]()[0], strict=True)) for name in ("without", "paged")]
    times = compare(calls, stopwatch(device, wall=True), rounds=3, round_s=0.0)
    own = times["fastattn"]
    return {
        "what": f"generation, {tokens} new tokens, preset {name}",
        "cache": "contiguous",
        "dtype": "fp32",
        "fastattn": f"{tables.seconds(own.median / tokens)} a token ±{own.spread:.0%}",
        "error": f"{own.times_faster_than(times['without']):.1f}× without a cache ({same[0] / tokens:.0%} the same "
        f"tokens), {own.times_faster_than(times['paged']):.2f}× pages of 16 ({same[1] / tokens:.0%})",
    }
