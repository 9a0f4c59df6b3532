"""Plans: repeated calls run without being checked, dispatched and packed again.

Calls are of one kind if their options are equal and their tensors agree in shape, strides, dtype, device, alignment and
need of a gradient. From one step of a model to the next none of this changes. Recognising the kind takes a small part
of the time of checking and dispatching, in which a short sequence could be computed.

    call -> look_up -> run                               a kind seen before
    call -> arguments -> check -> dispatch -> operator   any other; then a plan for its kind is stored

A kind contains everything that the kernel was prepared for, so one plan serves all calls of its kind.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastattn import state
from fastattn.backends.base import Run
from fastattn.storage import extent, holds
from fastattn.torch_internals import is_deterministic, is_observed, is_watched, tensor_check

LIMIT = 1024  # plans that are kept
MOST_CHECKS = 16  # of the kinds with equal options that are recognised at once; others are looked up by their kind
ALIGNMENT = 16  # bytes that kernels on an accelerator are compiled for
_known: dict[Hashable, tuple[Any, tuple[int, ...]]] = {}
_recent: dict[Hashable, list[_Recognised]] = {}


class _Recognised(NamedTuple):
    """A kind with a plan, for which torch has a check of all tensors at once.

    Attributes:
        settings: what its calls have in common besides: which tensors are None or one and the same, and modes of torch.
        agrees: whether tensors have the types, shapes, strides, dtypes, devices and dispatch keys of the kind, and ask
            for gradients alike; whether these are enabled is among the settings. Autocast, tracers, dispatch modes and
            transforms change the dispatch keys of the thread.
        plan: the plan.
        held: of each tensor, the bytes from its first element to the end of its last, and those of an element.
        offsets: of each address from a multiple of ``ALIGNMENT``; None in host memory, where it makes no difference.
    """

    settings: tuple[Any, ...]
    agrees: Callable[..., bool]
    plan: Any
    held: tuple[tuple[int, int], ...]
    offsets: list[int] | None


@dataclass(frozen=True, slots=True)
class Plan:
    """Functions prepared for calls of one kind.

    Attributes:
        forward: ``(q, k, v, *more) -> (out, *kept)``, as ``Backend.prepared_forward`` says.
        backward: ``(dout, out, *kept, q, k, v, *more) -> (dq, dk, dv, ...)``; None where nothing needs a gradient.
        scalars: the arguments of the operators that follow the tensors.
        deterministic: ``torch.are_deterministic_algorithms_enabled()`` of the calls; backward kernels depend on it.
        heads_first: q, k, v, out and their gradients are ``(B, H, S, D)``.
        places: of the gradient of each of ``MORE`` among the results of ``backward``, None where there is none; () for
            calls on q, k and v alone.
    """

    forward: Run
    backward: Run | None
    scalars: tuple[Any, ...]
    deterministic: bool
    heads_first: bool = False
    places: tuple[int | None, ...] = ()


def look_up(tensors: Sequence[Tensor | None], options: tuple[Any, ...]) -> tuple[Hashable | None, Any]:
    """The kind of a call, and its ``Plan`` (for a cache the run itself), or None if there is none.

    The kind is None for a call that must not take a plan: a tool of torch watches or transforms it, its tensors are not
    plain dense ones, or they hold the tokens of one rank. It is None, too, beside a plan that was found without it.
    Every call that no compiler records passes here. It is written for speed, also for a processor that has just done
    other work: then each function that is entered costs microseconds.
    """
    if state.whole_rows is not None or type(tensors[0]) is not Tensor or is_observed():  # torch.fx passes proxies
        return None, None
    given, places = _different(tensors)
    try:
        precision = None if given[0].is_cpu else _precision(given[0])
        settings = places, is_deterministic(), torch.is_grad_enabled(), precision
        for seen in _recent.get(options, ()):
            if seen.settings != settings or not seen.agrees(*given):
                continue
            if seen.offsets is not None and seen.offsets != _offsets(given):
                continue
            for x, (size, item) in zip(given, seen.held):  # noqa: B905  equally many, and strict costs time
                if x.storage_offset() * item + size > x.untyped_storage().nbytes():
                    return None, None  # a storage was shrunk since; the general path raises
            return None, seen.plan
        return (None, None) if is_watched() else _look_up_kind(tensors, options, settings)
    except (AttributeError, RuntimeError, TypeError):  # a nested or sparse tensor has no strides; an option is a list
        return None, None


def _different(tensors: Sequence[Any]) -> tuple[Sequence[Tensor], tuple[int, ...] | None]:
    """The tensors without None and repetitions, since torch's check agrees with no tensor that comes twice.

    And for each argument its place among them, -1 for None; None for three different tensors, the commonest call.
    """
    if len(tensors) == 3 and tensors[0] is not tensors[1] is not tensors[2] is not tensors[0]:
        return tensors, None
    given: dict[int, Tensor] = {}
    ids = [id(x) for x in tensors]
    for number, x in zip(ids, tensors):  # noqa: B905  equally many, and strict costs time
        if x is not None:
            given.setdefault(number, x)
    order = {number: n for n, number in enumerate(given)}
    return list(given.values()), tuple([order.get(number, -1) for number in ids])


def _look_up_kind(
    tensors: Sequence[Tensor | None], options: tuple[Any, ...], settings: tuple[Any, ...]
) -> tuple[Hashable | None, Any]:
    """``look_up`` by the kind itself, which takes longer; a kind with a plan is recognised at once from then on."""
    kind: list[Any] = [options, settings]
    for x in tensors:
        if x is None:
            kind.append(None)
            continue
        if type(x) is not Tensor:
            return None, None
        kind.append((x.shape, x.stride(), x.dtype, x.device, x.requires_grad, x.is_neg()))
        if not x.is_cpu:
            kind.append(x.data_ptr() % ALIGNMENT)
    found = tuple(kind)
    known, extents = _known.get(found, (None, ()))
    if known is None:
        return found, None
    if not all(x is None or holds(x, size) for x, size in zip(tensors, extents, strict=False)):
        return None, None
    recent = _recent.setdefault(options, [])
    if tensor_check is not None and len(recent) < MOST_CHECKS:
        given, _ = _different(tensors)
        sizes = {id(x): size for x, size in zip(tensors, extents, strict=False)}
        held = tuple((sizes[id(x)], x.element_size()) for x in given)
        offsets = None if given[0].is_cpu else _offsets(given)
        recent.append(_Recognised(settings, tensor_check(given), known, held, offsets))
    return found, known


def _precision(q: Tensor) -> str | None:
    """torch's switch for products of fp32 on an accelerator, on which kernels depend."""
    return torch.backends.cuda.matmul.fp32_precision if q.dtype is torch.float32 else None


def _offsets(given: Sequence[Tensor]) -> list[int]:
    return [x.data_ptr() % ALIGNMENT for x in given]


def is_plain(tensors: Sequence[Tensor | None]) -> bool:
    """Whether the memory of these tensors holds their values: no lazy negation, conjugation, or missing data."""
    return all(x is None or not (x.is_neg() or x.is_conj() or x.is_meta or x._is_zerotensor()) for x in tensors)


def is_known(kind: Hashable) -> bool:
    return kind in _known


def remember(kind: Hashable, plan: Any, tensors: Sequence[Tensor | None]) -> None:
    """Store the plan of ``kind``, the kind of a call with ``tensors``; None records that it has no plan."""
    if len(_known) >= LIMIT:
        _forget()
    _known[kind] = plan, tuple(0 if x is None else extent(x) for x in tensors)


def _forget() -> None:
    _known.clear()
    _recent.clear()


state.on_forget(_forget)
