"""Host time of compiled calls and what it is made of: part of ``python -m benchmarks overhead``.

Beside a compiled call of SDPA: ours; ours without Dynamo's guards; and an empty operator of the same schema, which is
what torch's dispatcher takes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import fastattn
from fastattn.measure.timing import compare, stopwatch

ROWS, HEADS, HEAD_DIM = 32, 8, 32
Row = dict[str, float | str]


def rows(rounds: int = 31, round_s: float = 0.02) -> list[Row]:
    """For each call its name, median seconds, spread, and ratio to SDPA's time."""
    calls = compiled_calls()
    times = compare(calls, stopwatch(torch.device("cpu"), wall=True), rounds=rounds, round_s=round_s)
    return [
        {"what": name, "seconds": x.median, "spread": x.spread, "ratio": 1 / x.times_faster_than(times["sdpa"])}
        for name, x in times.items()
    ]


def compiled_calls() -> dict[str, Callable[[], object]]:
    """The calls by name; compiled, and called once, in eval mode."""
    q, k, v = (torch.randn(1, ROWS, HEADS, HEAD_DIM) for _ in range(3))
    operator = empty_operator()

    def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        heads_first = (x.transpose(1, 2) for x in (q, k, v))
        return torch.nn.functional.scaled_dot_product_attention(*heads_first).transpose(1, 2) * 2

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = fastattn.attention(q, k, v)
        assert isinstance(out, Tensor)
        return out * 2

    def unguarded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ours(q, k, v)

    guards = {"guard_filter_fn": torch.compiler.skip_all_guards_unsafe}
    compiled = {
        "sdpa": torch.compile(sdpa, fullgraph=True),
        "fastattn": torch.compile(ours, fullgraph=True),
        "fastattn without guards": torch.compile(unguarded, fullgraph=True, options=guards),  # type: ignore[dict-item]
    }
    found: dict[str, Callable[[], object]] = {}
    for name, function in compiled.items():
        found[name] = _without_gradients(function, q, k, v)
        found[name]()
    # the arguments of fastattn::forward behind its tensors
    arguments = (q, k, v, *[None] * 9, ROWS, ROWS, HEAD_DIM**-0.5, None, None, None, "lower_right", 0.0, None, False)
    found["an empty operator with our schema, not compiled"] = lambda: operator(*arguments)
    return found


def _without_gradients(function: Callable[..., Tensor], *tensors: Tensor) -> Callable[[], object]:
    def call() -> Tensor:
        with torch.no_grad():
            return function(*tensors)

    return call


_library = torch.library.Library("fastattn_benchmarks", "FRAGMENT")


def empty_operator() -> Callable[..., object]:
    """An operator that takes what ``fastattn::forward`` takes and allocates its results."""
    if not hasattr(torch.ops.fastattn_benchmarks, "empty"):
        schema = str(torch.ops.fastattn.forward.default._schema)
        _library.define(schema.replace("fastattn::forward", "empty"))
        _library.impl("empty", lambda q, *_: tuple(torch.empty_like(q) for _ in range(3)), "CompositeExplicitAutograd")
    return torch.ops.fastattn_benchmarks.empty.default  # type: ignore[no-any-return]
