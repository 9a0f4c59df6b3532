"""``verify``: run every usable backend on the grid, judge it by the tolerance rule, and report."""

from __future__ import annotations

import math
import platform
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch

from fastattn import dispatch
from fastattn.backends import load
from fastattn.errors import unsupported_error
from fastattn.kv_cache import facts_of
from fastattn.problem import Problem
from fastattn.testing.caches import CacheCase, cache_grid, make_cache_sample, measure_cache, quick_cache_grid
from fastattn.testing.cases import Case, grid
from fastattn.testing.derivatives import DerivativeYardstick, measure_derivatives
from fastattn.testing.inputs import Sample, make
from fastattn.testing.statistics import measure_statistics
from fastattn.testing.tolerance import Row, Yardstick, measure
from fastattn.version import __version__

T = TypeVar("T")
PARTS = ("passes", "jvp", "statistics")  # what of a backend is judged; the names of features, but for the first


class Yardsticks:
    """What the parts of one sample are judged by, for several backends to share."""

    def __init__(self, sample: Sample) -> None:
        self.sample = sample
        self.passes, self.jvp = Yardstick(sample), DerivativeYardstick(sample)


@dataclass(frozen=True)
class Result:
    """The result of one backend on one case.

    Attributes:
        backend: its name.
        case: the case.
        rows: the judgements; empty if it did not run or raised.
        skipped: why the backend cannot serve the case; None if it can.
        broken: the exception that it raised, or None.
    """

    backend: str
    case: Case | CacheCase
    rows: tuple[Row, ...] = ()
    skipped: str | None = None
    broken: str | None = None

    @property
    def ok(self) -> bool:
        return self.broken is None and all(row.ok for row in self.rows)

    @property
    def worst(self) -> Row | None:
        """The row with the largest ratio of error to bound."""
        return max(self.rows, key=lambda row: row.strain, default=None)

    def to_dict(self) -> dict[str, Any]:
        rows = {row.name: {"error": row.error, "eager": row.eager_error, "bound": row.bound} for row in self.rows}
        finite = {name: {k: x if math.isfinite(x) else None for k, x in row.items()} for name, row in rows.items()}
        about = {"backend": self.backend, "case": self.case.id, "group": self.case.group, "ok": self.ok}
        return about | {"skipped": self.skipped, "broken": self.broken, "rows": finite}


@dataclass(frozen=True)
class Report:
    """The result of ``verify``.

    Attributes:
        device: description of the device.
        unavailable: backends that cannot run on this machine, with the reason.
        results: one for each backend and case.
    """

    device: str
    unavailable: dict[str, str]
    results: tuple[Result, ...]

    @property
    def ok(self) -> bool:
        """Whether at least one case ran and none failed."""
        return all(result.ok for result in self.results) and any(result.rows for result in self.results)

    def to_dict(self) -> dict[str, Any]:
        """The report for ``json.dumps``; numbers that are not finite are None."""
        versions = {"fastattn": __version__, "torch": torch.__version__, "python": platform.python_version()}
        found = [result.to_dict() for result in self.results]
        about = {"ok": self.ok, "device": self.device, "versions": versions, "unavailable": self.unavailable}
        return about | {"results": found}

    def table(self) -> str:
        """The worst row for each backend and group of cases, then every failure."""
        head = f"{'backend':<9} {'cases':<9} {'ran':>4} {'skipped':>7}  {'closest to its bound':<46} {'error':>9}"
        lines = [f"fastattn {__version__}, torch {torch.__version__}, {self.device}", ""]
        lines.append(f"{head} {'/ eager':>8} {'/ bound':>8}")
        by_group: dict[tuple[str, str], list[Result]] = {}
        for result in self.results:
            by_group.setdefault((result.backend, result.case.group), []).append(result)
        served = {key: results for key, results in by_group.items() if not all(result.skipped for result in results)}
        lines += [_group_line(backend, group, results) for (backend, group), results in served.items()]
        lines += _not_served([results for key, results in by_group.items() if key not in served])
        lines += [f"{name:<9} cannot run: {why}" for name, why in self.unavailable.items()]
        wrong = [result for result in self.results if not result.ok]
        lines += ["", *(_failure_line(result) for result in wrong)] if wrong else []
        ran = sum(bool(result.rows) for result in self.results)
        verdict = "all within the tolerance" if self.ok else f"{len(wrong)} wrong" if ran else "nothing ran"
        return "\n".join([*lines, "", f"{ran} runs, {verdict}"])


def verify(device: str = "cpu", quick: bool = False, backends: Sequence[str] | None = None) -> Report:
    """Run backends over the grids on a device, forward, backward and on caches, and judge all results against fp64.

    Args:
        device: a torch device.
        quick: about fifteen cases for each dtype.
        backends: names; None is every backend that can run on this machine.

    Returns:
        a ``Report`` with ``ok``, ``table()`` and ``to_dict()``.

    Raises:
        InputError: there is no backend of that name.
        UnsupportedError: a backend that was named cannot run on this machine.

    Example:
        >>> from fastattn.testing.verify import verify
        >>> verify(quick=True, backends=["eager"]).ok
        True
    """
    unavailable = _unavailable(backends)
    names = [name for name in backends or dispatch.backends() if name not in unavailable]
    progress = with_progress(cases(quick=quick), "verify", "case")
    results = [result for case in progress for result in _judge_each(names, case, device)]
    results.sort(key=lambda result: names.index(result.backend))
    return Report(_in_words(device), unavailable, tuple(results))


def cases(quick: bool = False) -> list[Case | CacheCase]:
    """The cases of both grids."""
    return [*grid(quick=quick), *(quick_cache_grid() if quick else cache_grid())]


def _judge_each(names: Sequence[str], case: Case | CacheCase, device: str) -> list[Result]:
    yardsticks = Yardsticks(make(case, device)) if isinstance(case, Case) else None
    return [judge(name, case, device, yardsticks=yardsticks) for name in names]


def judge(
    backend: str,
    case: Case | CacheCase,
    device: str = "cpu",
    seed: int = 0,
    *,
    yardsticks: Yardsticks | None = None,
    parts: Sequence[str] = PARTS,
) -> Result:
    """Run and judge one backend on one case. An exception is part of the result.

    Args:
        backend: its name.
        case: the case.
        device: a torch device.
        seed: of its values.
        yardsticks: of the sample that the case, device and seed make.
        parts: those of PARTS to judge; a case of a cache has no parts.
    """
    run: Callable[[], list[Row]]
    if isinstance(case, CacheCase):
        of_cache = make_cache_sample(case, device, seed)
        problem = facts_of(of_cache.inputs, of_cache.spec)
        run = partial(measure_cache, backend, of_cache)
    else:
        yardsticks = yardsticks or Yardsticks(make(case, device, seed))
        sample = yardsticks.sample
        problem = Problem.of(sample.inputs, sample.spec, needs_grad=True)
        run = partial(measure_all, backend, sample, yardsticks=yardsticks, parts=parts)
    if reasons := load(backend).unsupported_reasons(problem):
        return Result(backend, case, skipped="; ".join(reasons))
    try:
        return Result(backend, case, tuple(run()))
    except Exception as error:
        return Result(backend, case, broken=f"{type(error).__name__}: {error}")


def measure_all(
    backend: str, sample: Sample, *, yardsticks: Yardsticks | None = None, parts: Sequence[str] = PARTS
) -> list[Row]:
    """Judge both passes, and Jacobian-vector products and statistics if the backend has them."""
    given = yardsticks or Yardsticks(sample)
    judges: dict[str, Callable[[], list[Row]]] = {
        "passes": lambda: measure(backend, sample, yardstick=given.passes),
        "jvp": lambda: measure_derivatives(backend, sample, yardstick=given.jvp),
        "statistics": lambda: measure_statistics(backend, sample),
    }
    able = {"passes", *load(backend).capabilities.features}
    return [row for part in parts if part in able for row in judges[part]()]


def _unavailable(asked: Sequence[str] | None) -> dict[str, str]:
    for name in asked or ():
        dispatch.check_name(name)
    reasons = {name: why for name, why in dispatch.backends().items() if why is not None}
    if refused := {name: [reasons[name]] for name in asked or () if name in reasons}:
        raise unsupported_error("cannot verify on this machine:", refused)
    return reasons if asked is None else {}


def with_progress(items: Iterable[T], name: str, unit: str, total: int | None = None) -> Iterable[T]:
    """The items, with a progress bar if tqdm is installed and stderr is a terminal."""
    try:
        from tqdm import tqdm
    except ImportError:
        return items
    return tqdm(items, desc=name, unit=unit, total=total, leave=False, disable=None)


def _in_words(device: str) -> str:
    is_cuda = torch.device(device).type == "cuda"
    return torch.cuda.get_device_name(device) if is_cuda else f"{device} ({platform.machine()})"


def _not_served(groups: Sequence[list[Result]]) -> list[str]:
    """A line for each backend and its reason to serve none of the cases of some groups."""
    by_reason: dict[tuple[str, str], list[Result]] = {}
    for results in groups:
        by_reason.setdefault((results[0].backend, results[0].skipped or ""), []).extend(results)
    lines = []
    for (backend, reason), results in by_reason.items():
        groups_named = ", ".join(dict.fromkeys(result.case.group for result in results))
        lines.append(f"{backend:<9} serves none of {len(results)} cases ({groups_named}): {reason}")
    return lines


def _group_line(backend: str, group: str, results: list[Result]) -> str:
    ran = [result for result in results if result.rows]
    line = f"{backend:<9} {group:<9} {len(ran):>4} {sum(r.skipped is not None for r in results):>7}"
    if not ran:
        return line
    result = max(ran, key=lambda r: r.worst.strain if r.worst else 0.0)
    row = result.worst
    assert row is not None
    beside_eager = f"{row.error / row.eager_error:.2f}" if row.eager_error else "-"
    where = f"{row.name} of {result.case.id}"
    return f"{line}  {where:<46} {row.error:>9.2g} {beside_eager:>8} {row.strain:>8.2f}"


def _failure_line(result: Result) -> str:
    if result.broken:
        return f"WRONG  {result.backend}, {result.case.id}: {result.broken}"
    wrong = (f"{row.name} {row.error:.3g} > {row.bound:.3g}" for row in result.rows if not row.ok)
    return f"WRONG  {result.backend}, {result.case.id}: {', '.join(wrong)}"
