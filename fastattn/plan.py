"""Plans: for calls of one kind, what was checked, chosen and packed before, so that it is not done again.

Calls are of one kind if their tensors agree in shape, strides, dtype, device, alignment and need of a gradient, and
everything else in their values. From one step of a model to the next nothing of this changes, and finding that out
takes Python a small part of the time that checking and choosing do, in which a short sequence could have been computed.

    call -> kind_of -> known -> run                      a kind seen before
    call -> arguments -> check -> dispatch -> operator   any other; then its plan is made and remembered

What a kind must hold is what a kernel was prepared for: two tensors that differ in anything else are served alike.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastattn import state
from fastattn.backends.base import Run
from fastattn.torch_internals import is_watched

LIMIT = 1024  # kinds that are remembered
ALIGNMENT = 16  # bytes: what kernels on an accelerator are compiled for
_known: dict[Hashable, Any] = {}


@dataclass(frozen=True, slots=True)
class Plan:
    """How calls on q, k and v alone are served.

    Attributes:
        forward: ``(q, k, v) -> (out, lse, lse_low)``.
        backward: ``(dout, out, lse, lse_low, q, k, v) -> (dq, dk, dv)``; None where nothing needs a gradient.
        scalars: what follows the tensors among the arguments of the operators.
        heads_first: q, k, v and out are ``(B, H, S, D)``; the runs take and give ``(B, S, H, D)``, and read addresses.
    """

    forward: Run
    backward: Run | None
    scalars: tuple[Any, ...]
    heads_first: bool = False


def kind_of(tensors: Sequence[Tensor | None], options: tuple[Any, ...]) -> Hashable | None:
    """What a call has in common with those of its kind; None if it has to go the long way.

    That is a call which somebody watches or transforms, or whose tensors are no plain dense ones.
    """
    if is_watched():
        return None
    grad = torch.is_grad_enabled()
    kind: list[Any] = [options, tuple(map(type, options)), torch.are_deterministic_algorithms_enabled()]
    for x in tensors:
        if x is None:
            kind.append(None)
            continue
        if type(x) is not Tensor or x.layout is not torch.strided or x.is_nested or x.is_neg():
            return None
        device = x.device
        if device.type != "cpu":
            kind.append(x.data_ptr() % ALIGNMENT)
        kind += (x.shape, x.stride(), x.dtype, device, grad and x.requires_grad)
    found = tuple(kind)
    try:
        hash(found)
    except TypeError:  # an option is a list
        return None
    return found


def known(kind: Hashable) -> Any:
    """The ``Plan`` of a kind, or the run of a cache's; None if that was not looked for yet, or there is nothing."""
    return _known.get(kind)


def is_known(kind: Hashable) -> bool:
    return kind in _known


def remember(kind: Hashable, plan: Plan | Run | None) -> None:
    if len(_known) >= LIMIT:
        _known.clear()
    _known[kind] = plan


state.on_forget(_known.clear)
