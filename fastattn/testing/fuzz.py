"""Random problems beyond the grid. A problem that fails is minimised."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fastattn import dispatch
from fastattn.testing.cases import Case
from fastattn.testing.verify import Result, judge

_DTYPES = (torch.float32, torch.float32, torch.float16, torch.bfloat16, torch.float64)
_LENGTHS = (0, 1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 48, 63, 64, 65, 100, 128)
_HEAD_DIMS = (1, 8, 16, 24, 32, 40, 64, 80, 128)
# Fields of Case that turn something on, to be turned off one by one; the sizes are brought down after them.
_FEATURES = (
    "dtype", "scale", "softcap", "left", "right", "anchor", "dropout_p", "bias", "mask", "alibi", "sinks",
    "per_sequence", "segments", "memory", "magnitude", "dlse",
)  # fmt: skip


@dataclass(frozen=True)
class Failure:
    """A problem that a backend computes wrongly. Prints as a program that reproduces it.

    Attributes:
        result: of the smallest problem that still fails.
        device: of the run.
        seed: of its values.
    """

    result: Result
    device: str
    seed: int

    def __str__(self) -> str:
        case = self.result.case
        defaults = Case(id="")
        fields = {f.name: getattr(case, f.name) for f in dataclasses.fields(Case)}
        changed = {name: value for name, value in fields.items() if value != getattr(defaults, name)}
        arguments = ", ".join(f"{name}={value!r}" for name, value in changed.items())
        return (
            "import torch\n"
            "from fastattn.testing import Case, assert_within, make, measure\n\n"
            f"case = Case({arguments})\n"
            f"sample = make(case, device={self.device!r}, seed={self.seed})\n"
            f"assert_within(measure({self.result.backend!r}, sample))\n"
        )


def fuzz(n: int = 100, seed: int = 0, device: str = "cpu", backends: Sequence[str] | None = None) -> Failure | None:
    """Judge ``n`` random problems on every usable backend, and stop at the first that fails.

    Args:
        n: how many problems.
        seed: of the problems and of their values.
        device: a torch device.
        backends: names; None is every backend that can run on this machine.

    Returns:
        the failure, minimised, or None.

    Example:
        >>> from fastattn.testing.fuzz import fuzz
        >>> fuzz(3, backends=["eager"]) is None
        True
    """
    names = backends or [name for name, why in dispatch.backends().items() if why is None]
    draw = random.Random(seed)
    for number in range(n):
        case = random_case(draw)
        for name in names:
            result = judge(name, case, device, seed + number)
            if not result.ok:
                return Failure(_minimised(result, device, seed + number), device, seed + number)
    return None


def random_case(draw: random.Random) -> Case:
    """Any problem that the spec allows, small, with few of its features at once."""

    def sometimes(value: Any, otherwise: Any = None, chance: float = 0.25) -> Any:
        return value if draw.random() < chance else otherwise

    group, heads_kv = draw.choice((1, 1, 2, 3)), draw.choice((1, 2, 3))
    s_q, s_kv = draw.choice(_LENGTHS), draw.choice(_LENGTHS)
    s_kv = sometimes(s_q, s_kv, 0.5)
    d_qk = draw.choice(_HEAD_DIMS)
    case = Case(
        id="fuzz",
        B=draw.choice((1, 2, 3)),
        S_q=s_q,
        S_kv=s_kv,
        H_q=group * heads_kv,
        H_kv=heads_kv,
        D_qk=d_qk,
        D_v=sometimes(draw.choice(_HEAD_DIMS), d_qk),
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
        memory=draw.choice(("contiguous", "contiguous", "BHSD", "strided", "strided head dim")),
        magnitude=draw.choice((1.0, 1.0, 1.0, 4.0, 1e-3)),
        dlse=draw.random() < 0.4,
    )
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


def _minimised(result: Result, device: str, seed: int) -> Result:
    """Simplify the case step by step while the backend still fails."""
    assert isinstance(result.case, Case)
    smaller = next(
        (found for case in _simpler(result.case) if not (found := judge(result.backend, case, device, seed)).ok), None
    )
    return result if smaller is None else _minimised(smaller, device, seed)


def _simpler(case: Case) -> Iterator[Case]:
    """Cases one step simpler: a feature turned off, or a size brought down."""
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
