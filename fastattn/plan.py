"""Plans: repeated calls run without being checked, dispatched and packed again.

Calls are of one kind if their options are equal and their tensors agree in shape, strides, dtype, device, alignment and
need of a gradient. From one step of a model to the next none of this changes. Recognising the kind takes a small part
of the time of checking and dispatching, in which a short sequence could be computed.

    call -> look_up -> run                               a kind seen before
    call -> arguments -> check -> dispatch -> operator   any other; then a plan for its kind is stored

A kind contains everything that the kernel was prepared for, so one plan serves all calls of its kind.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastattn import state
from fastattn.backends.base import Run
from fastattn.storage import extent, holds
from fastattn.torch_internals import is_watched

LIMIT = 1024  # plans that are kept
ALIGNMENT = 16  # bytes that kernels on an accelerator are compiled for
_known: dict[Hashable, tuple[Any, tuple[int, ...]]] = {}


@dataclass(frozen=True, slots=True)
class Plan:
    """Functions prepared for calls of one kind.

    Attributes:
        forward: ``(q, k, v, *more) -> (out, *kept)``, as ``Backend.prepared_forward`` says.
        backward: ``(dout, out, *kept, q, k, v, *more) -> (dq, dk, dv)``; None where nothing needs a gradient.
        scalars: the arguments of the operators that follow the tensors.
        deterministic: ``torch.are_deterministic_algorithms_enabled()`` of the calls; backward kernels depend on it.
        heads_first: q, k, v and out are ``(B, H, S, D)``. The runs are given them so, and return ``(B, S, H, D)``.
    """

    forward: Run
    backward: Run | None
    scalars: tuple[Any, ...]
    deterministic: bool
    heads_first: bool = False


def look_up(tensors: Sequence[Tensor | None], options: tuple[Any, ...]) -> tuple[Hashable | None, Any]:
    """The kind of a call, and its ``Plan`` (for a cache the run itself), or None if there is none.

    The kind is None for a call that must not take a plan: a tool of torch watches or transforms it, its tensors are not
    plain dense ones, or they hold the tokens of one rank. Every call passes here, so it is written for speed.
    """
    if is_watched() or state.whole_rows is not None:
        return None, None
    grad = torch.is_grad_enabled()
    kind: list[Any] = [options, torch.are_deterministic_algorithms_enabled()]
    try:
        for x in tensors:
            if x is None:
                kind.append(None)
                continue
            if type(x) is not Tensor:
                return None, None
            kind.append((x.shape, x.stride(), x.dtype, x.device, grad and x.requires_grad, x.is_neg()))
            if not x.is_cpu:
                kind.append((x.data_ptr() % ALIGNMENT, torch.backends.cuda.matmul.fp32_precision))
        found = tuple(kind)
        known, extents = _known.get(found, (None, ()))
        if known is not None:
            for x, size in zip(tensors, extents):  # noqa: B905  as many, and strict costs time
                if x is not None and not holds(x, size):
                    return None, None  # a storage was shrunk since; the general path raises
        return found, known
    except (RuntimeError, TypeError):  # a nested or sparse tensor has no strides; an option is a list
        return None, None


def is_plain(tensors: Sequence[Tensor | None]) -> bool:
    """Whether the memory of these tensors holds their values: no lazy negation, conjugation, or missing data."""
    return all(x is None or not (x.is_neg() or x.is_conj() or x.is_meta or x._is_zerotensor()) for x in tensors)


def is_known(kind: Hashable) -> bool:
    return kind in _known


def remember(kind: Hashable, plan: Plan | Run | None, tensors: Sequence[Tensor | None]) -> None:
    """Store the plan of ``kind``, the kind of a call with ``tensors``; None records that it has no plan."""
    if len(_known) >= LIMIT:
        _known.clear()
    _known[kind] = plan, tuple(0 if x is None else extent(x) for x in tensors)


state.on_forget(_known.clear)
