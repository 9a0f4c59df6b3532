"""``python -m benchmarks speculative``: trees of guesses over a cache, guessed text, the same bits in every batch.

A tree of new tokens stands beside torch's attention with a mask over the gathered cache, and beside a call for each of
its paths; text by prompt lookup and by an assistant beside plain greedy decoding of the same model; batch-invariant
decoding beside the ordinary call. All calls of a row are timed in turns.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import fastattn
from benchmarks import command_line, tables
from benchmarks.decode import Case, Values, allowed_error
from fastattn.lm.generate import Acceptance, Sampling, generate
from fastattn.lm.models import Decoder, preset
from fastattn.measure.timing import Timing, compare, stopwatch
from fastattn.nn import tree_mask

COLUMNS = ["what", "dtype", "fastattn", "beside", "agreement"]
PARENTS = [-1, *((token - 1) // 2 for token in range(1, 15))]  # two guesses after each token: 15 tokens, 8 paths of 4
PERIOD = 32  # tokens after which the learned text repeats
VOCABULARY = 256
Calls = dict[str, Callable[[], Any]]
Row = dict[str, str]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    command_line.add_common(parser)
    parser.add_argument("--tokens", type=int, default=256, help="tokens of generated text (default: 256)")


def run(args: argparse.Namespace) -> int:
    device = command_line.device(args)
    record = command_line.record(args, device.type, device)
    record.set(columns=COLUMNS)
    for row in tqdm(_rows(args, device), desc="speculative", disable=args.quiet):
        record.add(row)
    record.finish(device)
    print(tables.table(record.data))
    return 0


def _rows(args: argparse.Namespace, device: torch.device) -> Iterator[Row]:
    lengths = (113,) if args.quick else (1024, 8192)
    shapes = [Case(batch, 8, 2, 128, keys, dtype, page_size=16) for dtype in ("fp32", "bf16")
              for batch in (1, 4) for keys in lengths]  # fmt: skip
    yield from (tree(case, device, args.quick) for case in shapes)
    for case in shapes:
        if case.batch > 1:
            yield from (
                batch_invariant(replace(case, lengths=spread), device, args.quick) for spread in ("equal", "ragged")
            )
    yield from texts(device, min(args.tokens, 24) if args.quick else args.tokens, args.quick)


def _timed(calls: Calls, device: torch.device, quick: bool, *, wall: bool = False) -> dict[str, Timing]:
    rounds: dict[str, Any] = {"rounds": 3, "round_s": 0.001} if quick else {"rounds": 11, "round_s": 0.03}
    return compare(calls, stopwatch(device, wall=wall), budget_s=8.0, **rounds)


def _beside(times: dict[str, Timing]) -> str:
    """How many times faster the first call is than each of the others."""
    (_, own), *others = times.items()
    return ", ".join(f"{own.times_faster_than(time):.2f}× {name}" for name, time in others)


def _time(time: Timing, tokens: int = 1) -> str:
    return f"{tables.seconds(time.median / tokens)} ±{time.spread:.0%}"


# A tree over a cache


class TreeValues(Values):
    """A cache whose last rows are those of a tree; each call appends them again."""

    def __init__(self, case: Case, device: torch.device) -> None:
        super().__init__(replace(case, length=case.length + len(PARENTS)), device)
        nodes, before = len(PARENTS), self.lengths - len(PARENTS)
        seen = torch.eye(nodes, dtype=torch.bool, device=device)
        for token, parent in enumerate(PARENTS[1:], 1):
            seen[token] |= seen[parent]
        old = torch.ones(nodes, case.length, dtype=torch.bool, device=device)
        self.mask, self.before, self.words = torch.cat((old, seen), 1), before, tree_mask(PARENTS).to(device)
        self.q = torch.randn(case.batch, nodes, case.heads_q, case.head_dim).to(self.q)
        self.new = [x[:, case.length :].clone() for x in (self.keys, self.values)]
        leaves = [row for row in range(nodes) if row not in PARENTS]
        self.paths = [seen[leaf].nonzero().flatten() for leaf in leaves]

    def tree(self) -> Tensor:
        return self._attend(self.q, *self.new, tree_mask=self.words)

    def each_path(self) -> Tensor:
        """A call for each path; nodes that paths share are computed in each."""
        out = torch.empty_like(self.q)
        for path in self.paths:
            out[:, path] = self._attend(self.q[:, path], *(x[:, path] for x in self.new))
        return out

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        caches = (self.k_cache, self.v_cache)
        out = fastattn.attention_with_kv_cache(q, *caches, self.before, k, v, block_table=self.block_table, **options)
        assert isinstance(out, Tensor)
        return out


@torch.no_grad()
def tree(case: Case, device: torch.device, quick: bool) -> Row:
    """A row: one call for a tree of 15 tokens, judged against fp64."""
    values = TreeValues(case, device)
    exact = values.on_gathered(*(x.double() for x in (values.q, values.keys, values.values)))()
    calls: Calls = {
        "tree": values.tree,
        "sdpa with a mask, gathered before": values.on_gathered(values.q, values.keys, values.values),
        "gather + sdpa with a mask": lambda: values.on_gathered(values.q, *values.gathered())(),
        f"a call for each of {len(values.paths)} paths": values.each_path,
    }
    errors = [float((call().double() - exact).abs().max()) for call in calls.values()]
    values.tree()  # the paths have left their own rows in the cache
    what = f"tree of {len(PARENTS)} tokens, batch {case.batch}, {case.length} keys, heads 8/2, D 128, {case.cache}"
    row = {"what": what, "dtype": case.dtype, "agreement": f"error {errors[0]:.1e}, sdpa {errors[1]:.1e}"}
    if not max(errors[0], errors[-1]) <= (allowed := allowed_error(errors[1], exact)):
        return row | {"fastattn": f"wrong: at most {allowed:.1e} is allowed"}
    times = _timed(calls, device, quick)
    return row | {"fastattn": _time(times["tree"]), "beside": _beside(times)}


# The same bits in every batch


@torch.no_grad()
def batch_invariant(case: Case, device: torch.device, quick: bool) -> Row:
    """A row: what it costs that a sequence gets the same bits alone, in a batch, and without pages."""
    values = Values(case, device)
    calls: Calls = {
        "invariant": partial(_step, values, slice(None), batch_invariant=True),
        "the ordinary call": partial(_step, values, slice(None)),
    }
    same = [_same_alone(values, batch_invariant=invariant) for invariant in (True, False)]
    times = _timed(calls, device, quick)
    return {
        "what": f"batch-invariant decoding, {case.what}, {case.cache}",
        "dtype": case.dtype,
        "fastattn": _time(times["invariant"]),
        "beside": _beside(times),
        "agreement": f"same bits alone: {same[0]} of {case.batch} sequences, by the ordinary call {same[1]}",
    }


def _step(values: Values, rows: slice, **options: Any) -> Tensor:
    assert values.block_table is not None
    out = fastattn.attention_with_kv_cache(
        values.q[rows], values.k_cache, values.v_cache, values.lengths[rows], block_table=values.block_table[rows],
        **options,
    )  # fmt: skip
    assert isinstance(out, Tensor)
    return out


def _same_alone(values: Values, **options: Any) -> int:
    """How many sequences get the same bits in a batch, alone, and alone in a cache without pages."""
    together, same = _step(values, slice(None), **options), 0
    for b in range(len(together)):
        row = slice(b, b + 1)
        cache = (values.keys[row].contiguous(), values.values[row].contiguous())
        contiguous = fastattn.attention_with_kv_cache(values.q[row], *cache, values.lengths[row], **options)
        assert isinstance(contiguous, Tensor)
        same += together[row].equal(_step(values, row, **options)) and together[row].equal(contiguous)
    return same


# Guessed text


def texts(device: torch.device, tokens: int, quick: bool) -> Iterator[Row]:
    """Rows: greedy text of a decoder that has learned a text which repeats, with guesses and without."""
    torch.manual_seed(0)
    text = torch.randperm(VOCABULARY)[:PERIOD].to(device).repeat(16)
    name = "tiny" if quick else "small"
    model, assistant = (_learned(Decoder(_config(size, tokens)).to(device), text) for size in (name, "tiny"))
    prompt = text[None, : 2 * PERIOD].tolist()

    def greedy(acceptance: Acceptance | None = None, **guesses: Any) -> list[int]:
        steps = generate(model, prompt, tokens, Sampling(temperature=0), acceptance=acceptance, **guesses)
        return [int(token) for token in steps]

    plain = greedy()
    ways: dict[str, dict[str, Any]] = {
        "prompt lookup of 8": {"prompt_lookup": 8},
        "an assistant of preset tiny": {"assistant": assistant},
        "prompt lookup of 8 and the assistant": {"prompt_lookup": 8, "assistant": assistant},
    }
    for way, guesses in ways.items():
        counts = Acceptance()
        same = sum(a == b for a, b in zip(greedy(counts, **guesses), plain, strict=True)) / tokens
        calls: Calls = {"guessed": partial(greedy, **guesses), "plain greedy decoding": greedy}
        times = _timed(calls, device, quick, wall=True)
        rate = tokens / times["guessed"].median
        yield {
            "what": f"{tokens} tokens of a text that repeats, preset {name}, {way}",
            "dtype": "fp32",
            "fastattn": f"{rate:,.0f} tokens/s ±{times['guessed'].spread:.0%}",
            "beside": _beside(times),
            "agreement": f"{same:.0%} the same tokens, {counts.calls} calls",
        }


def _config(name: str, tokens: int) -> Any:
    return replace(preset(name, VOCABULARY), max_length=2 * PERIOD + tokens + 16)


def _learned(model: Decoder, text: Tensor, steps: int = 40) -> Decoder:
    """The model after so many steps on pieces of the text, which it then continues with hardly an error."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    pieces = torch.stack([text[start : start + 2 * PERIOD + 1] for start in range(0, PERIOD, 8)])
    for _ in range(steps):
        logits = model(pieces[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), pieces[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()
