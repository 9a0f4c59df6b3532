"""Plans: calls of a kind seen before are served without being checked, dispatched and packed again.

Calls are of one kind if their tensors agree in shape, strides, dtype, device, alignment and need of a gradient, and
and the options in everything. From one step of a model to the next none of this changes. Recognising the kind takes
Python a small part of the time that checking and choosing take, in which a short sequence could have been computed.

    call -> look_up -> run                               a kind seen before
    call -> arguments -> check -> dispatch -> operator   any other; then its plan is made and remembered

A kind holds everything that a kernel was prepared for; tensors that differ in nothing else are served alike.
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

LIMIT = 1024  # kinds that are remembered
ALIGNMENT = 16  # bytes: what kernels on an accelerator are compiled for
_known: dict[Hashable, tuple[Any, tuple[int, ...]]] = {}


@dataclass(frozen=True, slots=True)
class Plan:
    """The way to serve calls on q, k and v alone.

    Attributes:
        forward: ``(q, k, v) -> (out, *kept)``, as ``Backend.prepared_forward`` says.
        backward: ``(dout, out, *kept, q, k, v) -> (dq, dk, dv)``; None where nothing needs a gradient.
        scalars: what follows the tensors among the arguments of the operators.
        deterministic: ``torch.are_deterministic_algorithms_enabled()`` of the calls; backward kernels depend on it.
        heads_first: q, k, v and out are ``(B, H, S, D)``; the runs take and give ``(B, S, H, D)``, and read addresses.
    """

    forward: Run
    backward: Run | None
    scalars: tuple[Any, ...]
    deterministic: bool
    heads_first: bool = False


def look_up(tensors: Sequence[Tensor | None], options: tuple[Any, ...]) -> tuple[Hashable | None, Any]:
    """The kind of a call, and its ``Plan`` (for a cache the run itself), or None if there is none.

    The kind is None for a call that has to go the long way: somebody watches or transforms it, or its tensors are no
    plain dense ones. On the way of every call, so it is written to be fast.
    """
    if is_watched():
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
            kind.append((x.shape, x.stride(), x.dtype, device := x.device, grad and x.requires_grad, x.is_neg()))
            if device.type != "cpu":
                kind.append((x.data_ptr() % ALIGNMENT, torch.backends.cuda.matmul.fp32_precision))
        found = tuple(kind)
        known, extents = _known.get(found, (None, ()))
        if known is not None:
            for x, size in zip(tensors, extents, strict=True):
                if x is not None and not holds(x, size):
                    return None, None  # memory was taken from a tensor: the long way says so
        return found, known
    except (RuntimeError, TypeError):  # a nested or sparse tensor has no strides; an option is a list
        return None, None


def is_plain(tensors: Sequence[Tensor | None]) -> bool:
    """Whether a plan may read the memory of these tensors as it lies."""
    return all(x is None or not (x.is_neg() or x.is_conj() or x.is_meta or x._is_zerotensor()) for x in tensors)


def is_known(kind: Hashable) -> bool:
    return kind in _known


def remember(kind: Hashable, plan: Plan | Run | None, tensors: Sequence[Tensor | None]) -> None:
    """Keep the plan of ``kind``, which is that of a call with ``tensors``; None: there is no shorter way."""
    if len(_known) >= LIMIT:
        _known.clear()
    _known[kind] = plan, tuple(0 if x is None else extent(x) for x in tensors)


state.on_forget(_known.clear)
