"""Random problems beyond the grid. A problem that fails is minimised."""

from __future__ import annotations

import dataclasses
import functools
import math
import multiprocessing
import random
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch

from fastattn import dispatch
from fastattn.errors import UnsupportedError
from fastattn.testing.caches import CacheCase
from fastattn.testing.cases import Case
from fastattn.testing.inputs import Sample, make
from fastattn.testing.random_caches import random_cache_case, simpler_cache_cases
from fastattn.testing.spoiled import SPOILED, measure_spoiled, spoiled_ways_of
from fastattn.testing.verify import PARTS, Result, Yardsticks, judge, with_progress
from fastattn.testing.ways import WAYS, measure_way, ways_of

_DTYPES = (torch.float32, torch.float32, torch.float16, torch.bfloat16, torch.float64)
# Lengths and head dims, with how often they are drawn: small ones show most faults and cost least.
_LENGTHS = {(0, 1, 2, 3, 7, 8, 15, 16, 17): 0.74, (31, 33, 48, 63, 64, 65): 0.24, (100, 128): 0.02}
_HEAD_DIMS = {(1, 8, 16, 24, 32, 40): 0.8, (64, 80, 128): 0.19, (192, 256, 257, 512): 0.01}
_LONG_LENGTHS, _IS_LONG = (257, 700, 1024, 2048), 0.001
_IN_PACKS = (0, 1, 2, 3, 7, 8, 15, 16, 17, 31)
# The share of problems that a slow way judges, where it can; the others are judged in one of the remaining ways.
_SLOW = {
    "compiled": 0.002, "jvp": 0.03, "statistics": 0.03, "forward mode": 0.015, "double backward": 0.015,
    "return_stats": 0.02,
}  # fmt: skip
# Further problems judged beside, drawn last, so that a problem of a number stays what it was.
_BESIDE = {"any cache": 0.1} | dict.fromkeys(SPOILED, 0.04) | {"batch-invariant cache": 0.02}
# A result off by less than _NEAR bounds is no failure if that happens to at most one of _AGAIN samples of other values.
_NEAR, _AGAIN = 10.0, 12
_OF_EAGER = 0.25  # the share of problems that eager computes too: its formula is that of what all are compared with
# Fields of Case that are reset to their defaults one by one before the sizes are reduced.
_FEATURES = (
    "dtype", "scale", "softcap", "left", "right", "anchor", "dropout_p", "bias", "mask", "alibi", "sinks",
    "per_sequence", "segments", "intervals", "memory", "bias_values", "magnitude", "nan_rows", "dlse",
)  # fmt: skip


@dataclass(frozen=True)
class Trial:
    """One judged call of a random problem. Prints as a program that repeats it.

    Attributes:
        result: of the backend on the problem.
        device: of the call.
        seed: of the values.
        way: a name in ``ways.WAYS``, ``ways.DERIVATIVES`` or ``spoiled.SPOILED``, "return_stats", or, called directly,
            a part in ``verify.PARTS``, "any cache" or "batch-invariant cache".
    """

    result: Result
    device: str
    seed: int
    way: str

    def __str__(self) -> str:
        case = self.result.case
        defaults = type(case)(id="")
        fields = {f.name: getattr(case, f.name) for f in dataclasses.fields(case)}
        changed = {name: value for name, value in fields.items() if value != getattr(defaults, name)}
        arguments = ", ".join(f"{name}={value!r}" for name, value in changed.items())
        backend = repr(self.result.backend)
        if isinstance(case, CacheCase):
            kind, maker, call = "CacheCase", "make_cache_sample", f"measure_cache({backend}, sample)"
            imports = "from fastattn.testing import CacheCase, assert_within, make_cache_sample, measure_cache\n"
        else:
            kind, maker, module = "Case", "make", "fastattn.testing.ways"
            call = f"measure_way({self.way!r}, sample, {backend})"
            if self.way in PARTS:
                module, call = "fastattn.testing.verify", f"measure_all({backend}, sample, parts=({self.way!r},))"
            elif self.way in SPOILED:
                module, call = "fastattn.testing.spoiled", f"measure_spoiled({self.way!r}, sample, {backend})"
            imports = "from fastattn.testing import Case, assert_within, make\n"
            imports += f"from {module} import {call.split('(')[0]}\n"
        return (
            f"import torch\n{imports}\n"
            f"case = {kind}({arguments})\n"
            f"sample = {maker}(case, device={self.device!r}, seed={self.seed})\n"
            f"assert_within({call})\n"
        )

    @functools.cached_property
    def is_by_chance(self) -> bool:
        """Whether the result misses its bound by little, for these values alone, since eager errs unusually little.

        The bound is relative to eager's error, which is small by chance in a result of few elements: one query row and
        one column of v in bf16 miss it for 2 % of all values, by up to seven times. Two things tell that from a fault
        that few values show: other values are within their bounds, and the result is within that of eager's error on
        other values, in the root mean square over them.
        """
        result = self.result
        if result.ok or result.broken or result.worst is None or result.worst.strain > _NEAR:
            return False
        seeds = (self.seed + n * 1_000_003 for n in range(1, _AGAIN + 1))  # 32 bits of a seed count
        others = [_judged(self.way, result.backend, result.case, self.device, seed) for seed in seeds]
        if sum(not other.ok for other in others) > 1:
            return False
        errors: dict[str, list[float]] = {}
        for row in (row for other in others for row in other.rows):
            errors.setdefault(row.name, []).append(row.eager_error)
        usual = {name: math.hypot(*found) / len(found) ** 0.5 for name, found in errors.items()}
        return all(row.ok or row.is_within(usual.get(row.name, 0.0)) for row in result.rows)

    @property
    def failed(self) -> bool:
        return not self.result.ok and not self.is_by_chance

    def smallest(self) -> Trial:
        """A failed trial of a problem that was simplified step by step for as long as the backend still fails on it."""
        case = self.result.case
        steps = simpler_cache_cases(case) if isinstance(case, CacheCase) else _simpler(case)
        tried = (_judged(self.way, self.result.backend, step, self.device, self.seed) for step in steps)
        smaller = next((result for result in tried if not result.ok), None)
        return self if smaller is None else dataclasses.replace(self, result=smaller).smallest()


def fuzz(
    n: int = 100, seed: int = 0, device: str = "cpu", backends: Sequence[str] | None = None, *, jobs: int = 1
) -> Trial | None:
    """Judge ``n`` random problems on every usable backend, as ``examine`` does, and stop at the first that fails.

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
    judged = functools.partial(_failure, seed=seed, device=device, backends=backends)
    with ExitStack() as stack:
        found: Iterable[Trial | None] = map(judged, range(n))
        if jobs > 1:
            pool = multiprocessing.get_context("spawn").Pool(jobs, torch.set_num_threads, (1,))
            found = stack.enter_context(pool).imap(judged, range(n), chunksize=4)
        return next((failure for failure in with_progress(found, "fuzz", "problem", n) if failure is not None), None)


def examine(number: int, seed: int = 0, device: str = "cpu", backends: Sequence[str] | None = None) -> Iterator[Trial]:
    """Judge the random problem of a number: both passes of every backend, and one call of one backend in another way.

    The ways are those of ``fastattn.testing.ways`` through public functions (by a plan, from threads, compiled, by the
    module, from a cache and so on), Jacobian-vector products and statistics. All share what they are judged by. Where
    there are other backends, eager computes a quarter of the problems. With some of the problems one backend attends to
    a random cache, or to rows that hold NaN.

    Args:
        number: of the problem.
        seed, device, backends: as in ``fuzz``.
    """
    draw, values = random.Random(f"{seed} {number}"), seed + number
    names = backends or usable()
    case = random_case(draw)
    yardsticks = Yardsticks(make(case, device, values))
    has_eager = draw.random() < _OF_EAGER
    for name in names:
        if name == "eager" and len(names) > 1 and not has_eager:
            continue
        yield Trial(_judged("passes", name, case, device, values, yardsticks), device, values, "passes")
    way = _random_way(draw, yardsticks.sample) if device == "cpu" else None
    if way is not None:
        name = _one_of(names, draw)
        yield Trial(_judged(way, name, case, device, values, yardsticks), device, values, way)
    for beside, share in _BESIDE.items() if device == "cpu" else ():
        if draw.random() < share:
            given = random_cache_case(draw) if beside.endswith("cache") else case
            if beside == "batch-invariant cache" and isinstance(given, CacheCase):
                given = dataclasses.replace(given, batch_invariant=True)
            name = _one_of(names, draw)
            yield Trial(_judged(beside, name, given, device, values), device, values, beside)


def _one_of(names: Sequence[str], draw: random.Random) -> str:
    return draw.choice([names[0], *names])  # the one that is preferred serves most calls of users


def usable() -> tuple[str, ...]:
    """The backends that can run on this machine, the one that is preferred first."""
    return tuple(name for name, why in dispatch.backends().items() if why is None)


def _random_way(draw: random.Random, sample: Sample) -> str | None:
    possible = {*ways_of(sample), *PARTS}
    number = draw.random()
    for way, share in _SLOW.items():
        number -= share
        if number < 0 and way in possible:
            return way
    others = [way for way in WAYS if way in possible and way not in _SLOW]
    return draw.choice(others) if others else None


def _failure(number: int, seed: int, device: str, backends: Sequence[str] | None) -> Trial | None:
    """The first failure in the problem of this number, minimised."""
    trials = examine(number, seed, device, backends)
    return next((trial.smallest() for trial in trials if trial.failed), None)


def _judged(
    way: str, backend: str, case: Case | CacheCase, device: str, seed: int, yardsticks: Yardsticks | None = None
) -> Result:
    if isinstance(case, CacheCase):
        return judge(backend, case, device, seed)
    yardsticks = yardsticks or Yardsticks(make(case, device, seed))
    sample = yardsticks.sample
    if way in PARTS:
        return judge(backend, case, device, seed, yardsticks=yardsticks, parts=(way,))
    if way not in (*ways_of(sample), *spoiled_ways_of(sample)):
        return Result(backend, case, skipped=f"cannot be asked for in the way {way!r}")
    measured = measure_spoiled if way in SPOILED else measure_way
    try:
        return Result(backend, case, tuple(measured(way, sample, backend, yardstick=yardsticks.passes)))
    except UnsupportedError as error:
        return Result(backend, case, skipped=str(error))
    except Exception as error:
        return Result(backend, case, broken=f"{type(error).__name__}: {error}")


def random_case(draw: random.Random) -> Case:
    """A random problem with few features at once; rarely one with long sequences or large head dims."""

    def sometimes(value: Any, otherwise: Any = None, chance: float = 0.25) -> Any:
        return value if draw.random() < chance else otherwise

    def size(groups: dict[tuple[int, ...], float]) -> int:
        return draw.choice(draw.choices(list(groups), list(groups.values()))[0])

    is_long = draw.random() < _IS_LONG
    group, heads_kv = (2, 1) if is_long else (draw.choice((1, 1, 2, 3)), draw.choice((1, 1, 2, 3)))
    s_q, s_kv = (draw.choice(_LONG_LENGTHS) if is_long else size(_LENGTHS) for _ in range(2))
    s_kv = sometimes(s_q, s_kv, 0.5)
    d_qk = size(_HEAD_DIMS)
    case = Case(
        id="fuzz",
        B=1 if is_long else draw.choice((0, 1, 1, 1, 2, 2, 2, 3)),
        S_q=s_q,
        S_kv=s_kv,
        H_q=group * heads_kv,
        H_kv=heads_kv,
        D_qk=d_qk,
        D_v=sometimes(size(_HEAD_DIMS), d_qk),
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
        pairs = [(draw.choice(_IN_PACKS), draw.choice(_IN_PACKS)) for _ in range(draw.randrange(1, 5))]
        return dataclasses.replace(case, lengths=tuple(pairs))
    full = (case.B, case.H_q, case.S_q, case.S_kv)
    return dataclasses.replace(
        case,
        bias=sometimes(tuple(min(size, draw.choice((1, size))) for size in full)),
        mask=sometimes(draw.choice(("random", "empty rows", "all false", "padding"))),
        segments=sometimes(draw.randrange(1, 5), 0),
    )


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
