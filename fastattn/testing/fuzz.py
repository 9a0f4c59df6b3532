"""Random problems beyond the grid. A problem that fails is minimised."""

from __future__ import annotations

import dataclasses
import functools
import multiprocessing
import random
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch

from fastattn import dispatch
from fastattn.errors import UnsupportedError
from fastattn.testing.cases import Case
from fastattn.testing.inputs import make
from fastattn.testing.tolerance import Yardstick
from fastattn.testing.verify import Result, judge, with_progress
from fastattn.testing.ways import measure_way, ways_of

_DTYPES = (torch.float32, torch.float32, torch.float16, torch.bfloat16, torch.float64)
_LENGTHS = (0, 1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 48, 63, 64, 65, 100, 128)
_HEAD_DIMS = (1, 8, 16, 24, 32, 40, 64, 80, 128)
_RARELY = 0.01  # the share of problems with lengths or head dims of the next line
_LONG_LENGTHS, _WIDE_HEAD_DIMS = (257, 700, 1024, 2048), (192, 256, 257, 512)
# Fields of Case that are reset to their defaults one by one before the sizes are reduced.
_FEATURES = (
    "dtype", "scale", "softcap", "left", "right", "anchor", "dropout_p", "bias", "mask", "alibi", "sinks",
    "per_sequence", "segments", "intervals", "memory", "bias_values", "magnitude", "nan_rows", "dlse",
)  # fmt: skip


@dataclass(frozen=True)
class Failure:
    """A problem that a backend computes wrongly. Prints as a program that reproduces it.

    Attributes:
        result: of the smallest problem that still fails.
        device: of the run.
        seed: of its values.
        way: how the backend was called, a name in ``ways.WAYS``; None: directly.
    """

    result: Result
    device: str
    seed: int
    way: str | None = None

    def __str__(self) -> str:
        case = self.result.case
        defaults = Case(id="")
        fields = {f.name: getattr(case, f.name) for f in dataclasses.fields(Case)}
        changed = {name: value for name, value in fields.items() if value != getattr(defaults, name)}
        arguments = ", ".join(f"{name}={value!r}" for name, value in changed.items())
        backend = repr(self.result.backend)
        call = (
            f"measure_all({backend}, sample)" if self.way is None else f"measure_way({self.way!r}, sample, {backend})"
        )
        return (
            "import torch\n"
            "from fastattn.testing import Case, assert_within, make\n"
            "from fastattn.testing.verify import measure_all\n"
            "from fastattn.testing.ways import measure_way\n\n"
            f"case = Case({arguments})\n"
            f"sample = make(case, device={self.device!r}, seed={self.seed})\n"
            f"assert_within({call})\n"
        )


def fuzz(
    n: int = 100, seed: int = 0, device: str = "cpu", backends: Sequence[str] | None = None, *, jobs: int = 1
) -> Failure | None:
    """Judge ``n`` random problems on every usable backend, and stop at the first that fails.

    Each is run forward and backward by calling the backend directly, and once more through a public function in one of
    the ways of ``fastattn.testing.ways``: by a plan, from threads, compiled, by the module, from a cache, and so on.

    Args:
        n: how many problems.
        seed: of the problems and of their values.
        device: a torch device.
        backends: names; None is every backend that can run on this machine.
        jobs: processes, each of one thread if there are several. The problems do not depend on it.

    Returns:
        the first failure, minimised, or None.

    Example:
        >>> from fastattn.testing.fuzz import fuzz
        >>> fuzz(3, backends=["eager"]) is None
        True
    """
    names = tuple(backends or [name for name, why in dispatch.backends().items() if why is None])
    judged = functools.partial(_failure, seed=seed, device=device, backends=names)
    with ExitStack() as stack:
        found: Iterable[Failure | None] = map(judged, range(n))
        if jobs > 1:
            pool = multiprocessing.get_context("spawn").Pool(jobs, torch.set_num_threads, (1,))
            found = stack.enter_context(pool).imap(judged, range(n), chunksize=4)
        return next((failure for failure in with_progress(found, "fuzz", "problem", n) if failure is not None), None)


def _failure(number: int, seed: int, device: str, backends: Sequence[str]) -> Failure | None:
    """The failure of the first backend that computes the problem of this number wrongly."""
    draw, values = random.Random(f"{seed} {number}"), seed + number
    case = random_case(draw)
    yardstick = Yardstick(make(case, device, values))
    ways = ways_of(yardstick.sample) if device == "cpu" else []
    if "compiled" in ways and draw.random() < 0.8:  # takes ten times as long as others
        ways.remove("compiled")
    for way in (None, *([draw.choice(ways)] if ways else [])):
        for name in backends:
            result = _judged(way, name, case, device, values, yardstick)
            if not result.ok:
                return Failure(_minimised(result, device, values, way), device, values, way)
    return None


def _judged(
    way: str | None, backend: str, case: Case, device: str, seed: int, yardstick: Yardstick | None = None
) -> Result:
    yardstick = yardstick or Yardstick(make(case, device, seed))
    if way is None:
        return judge(backend, case, device, seed, yardstick=yardstick)
    if way not in ways_of(yardstick.sample):
        return Result(backend, case, skipped=f"cannot be asked for in the way {way!r}")
    try:
        return Result(backend, case, tuple(measure_way(way, yardstick.sample, backend, yardstick=yardstick)))
    except UnsupportedError as error:
        return Result(backend, case, skipped=str(error))
    except Exception as error:
        return Result(backend, case, broken=f"{type(error).__name__}: {error}")


def random_case(draw: random.Random) -> Case:
    """A random problem with few features at once; rarely one with long sequences or large head dims."""

    def sometimes(value: Any, otherwise: Any = None, chance: float = 0.25) -> Any:
        return value if draw.random() < chance else otherwise

    is_long, is_wide = (draw.random() < _RARELY for _ in range(2))
    group, heads_kv = (2, 1) if is_long else (draw.choice((1, 1, 2, 3)), draw.choice((1, 2, 3)))
    lengths, head_dims = (_LONG_LENGTHS if is_long else _LENGTHS), (_WIDE_HEAD_DIMS if is_wide else _HEAD_DIMS)
    s_q, s_kv = draw.choice(lengths), draw.choice(lengths)
    s_kv = sometimes(s_q, s_kv, 0.5)
    d_qk = draw.choice(head_dims)
    case = Case(
        id="fuzz",
        B=1 if is_long else draw.choice((0, 1, 1, 2, 2, 3, 3)),
        S_q=s_q,
        S_kv=s_kv,
        H_q=group * heads_kv,
        H_kv=heads_kv,
        D_qk=d_qk,
        D_v=sometimes(draw.choice(head_dims), d_qk),
        dtype=draw.choice(_DTYPES),
        scale=sometimes(draw.uniform(-1, 1), chance=0.1),
        softcap=sometimes(draw.uniform(0.5, 30), chance=0.2),
        left=sometimes(draw.randrange(70)),
        right=sometimes(draw.choice((0, 0, 0, draw.randrange(70))), chance=0.5),
        anchor=sometimes("upper_left", "lower_right"),
        dropout_p=sometimes(draw.random(), 0.0, 0.2),
        alibi=draw.random() < 0.15,
        sinks=draw.random() < 0.2,
        per_sequence=draw.random() < 0.5,
        memory=draw.choice(("contiguous", "contiguous", "BHSD", "strided", "strided head dim", "expanded")),
        bias_values=sometimes(draw.choice(("padding", "offset", "infinity")), "normal", 0.5),
        magnitude=draw.choice((1.0, 1.0, 1.0, 4.0, 1e-3, 0.0, 300.0)),
        nan_rows=draw.random() < 0.2,
        dlse=draw.random() < 0.4,
    )
    if case.D_qk == case.D_v and draw.random() < 0.1:
        case = dataclasses.replace(case, memory="shared")
    case = dataclasses.replace(case, intervals=sometimes(draw.choice(("random", "one", "blocks")), chance=0.15))
    if draw.random() < 0.3:
        pairs = [(draw.choice(_LENGTHS[:10]), draw.choice(_LENGTHS[:10])) for _ in range(draw.randrange(1, 5))]
        return dataclasses.replace(case, lengths=tuple(pairs))
    full = (case.B, case.H_q, case.S_q, case.S_kv)
    return dataclasses.replace(
        case,
        bias=sometimes(tuple(min(size, draw.choice((1, size))) for size in full)),
        mask=sometimes(draw.choice(("random", "empty rows", "all false", "padding"))),
        segments=sometimes(draw.randrange(1, 5), 0),
    )


def _minimised(result: Result, device: str, seed: int, way: str | None = None) -> Result:
    """Simplify the case step by step while the backend still fails on it."""
    assert isinstance(result.case, Case)
    smaller = next(
        (found for case in _simpler(result.case) if not (found := _judged(way, result.backend, case, device, seed)).ok),
        None,
    )
    return result if smaller is None else _minimised(smaller, device, seed, way)


def _simpler(case: Case) -> Iterator[Case]:
    """Cases that are one step simpler: a feature turned off, or a size reduced."""
    plain = Case(id="fuzz")
    for name in _FEATURES:
        if getattr(case, name) != getattr(plain, name):
            yield dataclasses.replace(case, **{name: getattr(plain, name)})
    if case.lengths is not None:
        for n, (s_q, s_kv) in enumerate(case.lengths):
            rest = case.lengths[:n] + case.lengths[n + 1 :]
            shorter = [rest] if rest else []
            shorter += [((s_q // 2, s_kv), *rest)] if s_q else []
            shorter += [((s_q, s_kv // 2), *rest)] if s_kv else []
            yield from (dataclasses.replace(case, lengths=lengths) for lengths in shorter)
    for name in ("left", "right"):
        if getattr(case, name):
            yield dataclasses.replace(case, **{name: getattr(case, name) // 2})
    yield from _with_smaller_sizes(case)


def _with_smaller_sizes(case: Case) -> Iterator[Case]:
    changes: list[dict[str, Any]] = [{name: getattr(case, name) // 2} for name in ("S_q", "S_kv", "B", "D_qk", "D_v")]
    changes += [{"S_q": case.S_q - 1}, {"S_kv": case.S_kv - 1}, {"H_q": 1, "H_kv": 1}, {"H_q": case.H_kv}]
    for change in changes:
        found = dataclasses.replace(case, **change)
        if found == case or min(found.S_q, found.S_kv) < 0 or min(found.B, found.D_qk, found.D_v) < 1:
            continue
        if case.bias is not None:
            full = (found.B, found.H_q, found.S_q, found.S_kv)
            b, h, s_q, s_kv = (min(size, whole) for size, whole in zip(case.bias, full, strict=True))
            found = dataclasses.replace(found, bias=(b, h, s_q, s_kv))
        yield found
