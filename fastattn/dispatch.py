"""The choice of a backend for a problem, and its reasons: select(), Explanation, use_backend(), backends()."""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field

import torch

from fastattn.backends import BACKENDS, load
from fastattn.backends.base import Backend
from fastattn.errors import input_error, unsupported_error
from fastattn.problem import DERIVATIVE_FEATURES, STATISTICS_FEATURES, Problem
from fastattn.state import remembered

# What not every backend computes: then the first that does computes it for the one that was chosen.
_DELEGATED = {
    **dict.fromkeys(DERIVATIVE_FEATURES, "Jacobian-vector products and second derivatives"),
    **dict.fromkeys(STATISTICS_FEATURES, "statistics of the weights"),
}
_forced: ContextVar[str | None] = ContextVar("fastattn_backend", default=None)
_invariant: ContextVar[bool] = ContextVar("fastattn_batch_invariance", default=False)


def check_name(backend: str | None) -> None:
    if backend is not None and backend not in BACKENDS:
        names = ", ".join(repr(name) for name in BACKENDS)
        raise input_error("backend", repr(backend), f"None, {names}", "None lets fastattn choose.")


@contextlib.contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Make every fastattn call inside the block use one backend, or raise where it cannot.

    It applies to the current thread or asyncio task only. A thread that is started inside the block does not inherit
    it, unless it runs in a copy of the context (``contextvars.copy_context``). The backward pass of a call made inside
    the block uses the same backend, wherever it runs.

    Args:
        name: a name from ``fastattn.backends()``; None lets fastattn choose again.

    Raises:
        InputError: there is no backend of this name.

    Example:
        >>> import torch, fastattn
        >>> q = torch.randn(1, 8, 2, 16)
        >>> with fastattn.use_backend("eager"):
        ...     out = fastattn.attention(q, q, q)
    """
    check_name(name)
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


def requested(backend: str | None) -> str | None:
    """The backend that a call asks for: its own argument, else that of the surrounding ``use_backend``.

    While compiling it is the argument alone; the operators of a compiled graph ask for the context when they run.
    """
    return backend if torch.compiler.is_compiling() else requested_now(backend)


def requested_now(backend: str | None) -> str | None:
    """``requested`` of a call that no compiler records."""
    return backend if backend is not None else _forced.get()


@contextlib.contextmanager
def use_batch_invariance(wanted: bool = True) -> Iterator[None]:
    """Give every call of ``attention_with_kv_cache`` inside the block ``batch_invariant=True``, those of caches too.

    It applies like ``use_backend``, to the current thread or asyncio task. Prefill and decoding then give a sequence
    the same bits whatever is served beside it; the other layers of a model have to as well.

    Args:
        wanted: False leaves it to the calls again.

    Source:
        He et al., "Defeating nondeterminism in LLM inference", Thinking Machines Lab, 2025.

    Example:
        >>> import torch, fastattn
        >>> from fastattn.nn import KVCache
        >>> cache, x = KVCache(1, 8, 2, 16), torch.randn(1, 1, 2, 16)
        >>> with fastattn.use_batch_invariance():
        ...     out = cache.attend(x, x, x)
    """
    token = _invariant.set(wanted)
    try:
        yield
    finally:
        _invariant.reset(token)


def wants_batch_invariance(asked: bool) -> bool:
    """Whether a call that asks for it or not is batch-invariant. While compiling its argument alone decides, as in
    ``requested``."""
    return asked or (not torch.compiler.is_compiling() and _invariant.get())


def backends() -> dict[str, str | None]:
    """Every backend in order of preference, with the reason why it cannot run on this machine, or None.

    Example:
        >>> import fastattn
        >>> fastattn.backends()["eager"] is None
        True
    """
    return {name: load(name).unavailable_reason() for name in BACKENDS}


@remembered
def reasons(problem: Problem) -> dict[str, list[str]]:
    """For every backend, why it cannot serve ``problem``; [] means it can."""
    return {name: load(name).unsupported_reasons(problem) for name in BACKENDS}


def choose(problem: Problem) -> tuple[str | None, dict[str, list[str]]]:
    """The backend that is selected automatically, and for those before it that could serve the reasons against them.

    The first is the first backend without reasons against ``problem``, neither ``unsupported_reasons`` nor
    ``automatic_reasons``; None if there is none.
    """
    passed_over: dict[str, list[str]] = {}
    for name, why_not in reasons(problem).items():
        if why_not:
            continue
        passed_over[name] = load(name).automatic_reasons(problem)
        if not passed_over[name]:
            return name, passed_over
    return None, passed_over


def select(problem: Problem, backend: str | None = None) -> Backend:
    """The backend that serves ``problem``: the one asked for by name, or the one selected automatically.

    Raises:
        InputError: ``backend`` is not a known name.
        UnsupportedError: the backend asked for cannot serve it; the message gives the reasons of each.
    """
    check_name(backend)
    why_not = reasons(problem)
    if backend is not None:
        if why_not[backend]:
            raise unsupported_error(f"backend={backend!r} cannot serve this call:", {backend: why_not[backend]})
        return load(backend)
    chosen, passed_over = choose(problem)
    if chosen is None:
        raise unsupported_error("no backend can serve this call:", why_not | passed_over)
    if problem.device != "cpu" and not load(chosen).capabilities.devices:  # made of torch operators, for any device
        why = {name: tuple(said) for name, said in (why_not | passed_over).items() if said}
        _warn_slow(chosen, problem.device, tuple(why.items()))
    return load(chosen)


@remembered
def _warn_slow(chosen: str, device: str, why_not: tuple[tuple[str, tuple[str, ...]], ...]) -> None:
    """Warn, once for the same reasons, that no kernel serves tensors of an accelerator, with reasons and advice."""
    how = "quadratic in memory" if chosen == "eager" else "in torch operators"
    others = "; ".join(f"{name}: {', '.join(why)}" for name, why in why_not)
    todo = "fastattn.explain() shows it for a call, and backend='...' asks for one by name"
    warnings.warn(
        f"fastattn: the slow '{chosen}' backend, {how}, serves {device} tensors ({others}); {todo}", stacklevel=2
    )


@dataclass(frozen=True)
class Explanation:
    """The answer of ``fastattn.explain``. Prints as a table.

    Attributes:
        chosen: the backend that would serve the call; None if none can.
        reasons: for every backend, why it cannot; an empty list means it can.
        problem: the facts that the reasons are based on.
        passed_over: for backends that can, why they are selected by name only.
        delegates: for "jvp" (with second derivatives) and "statistics", the backend that computes them for this call,
            which is another one if ``chosen`` lacks them; None if no backend can. Empty for calls on caches.
    """

    chosen: str | None
    reasons: dict[str, list[str]]
    problem: Problem
    passed_over: dict[str, list[str]] = field(default_factory=dict)
    delegates: dict[str, str | None] = field(default_factory=dict)

    @classmethod
    def of(cls, problem: Problem) -> Explanation:
        chosen, passed_over = choose(problem)
        delegates = {} if "cache" in problem.features else {name: _able(problem, name) for name in _DELEGATED}
        return cls(chosen, reasons(problem), problem, passed_over, delegates)

    def __str__(self) -> str:
        p = self.problem
        uses = ", ".join(sorted(p.features)) or "nothing special"
        lines = [f"{p.device} {p.dtype}, head dims {p.head_dim_qk}/{p.head_dim_v}, uses: {uses}"]
        for name, why in self.reasons.items():
            verdict = "; ".join(why) or ("chosen" if name == self.chosen else "can serve it too")
            if self.passed_over.get(name):
                verdict = f"only when asked by name: {'; '.join(self.passed_over[name])}"
            lines.append(f"  {'->' if name == self.chosen else '  '} {name:<10} {verdict}")
        for feature, delegate in self.delegates.items():
            if delegate != self.chosen:
                lines.append(f"     {delegate or 'no backend'} computes {_DELEGATED[feature]}; {self.chosen} has none")
        return "\n".join(lines)


def _able(problem: Problem, feature: str) -> str | None:
    """The backend that computes what not all do for calls that ask for none by name."""
    asked = dataclasses.replace(problem, features=problem.features | {feature}, needs_grad=True)
    return choose(asked)[0]
