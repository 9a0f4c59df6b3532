"""Calls like one before: what was checked and chosen for tensors of the same kind is not checked and chosen again.

Of the tensors of a model nothing but values changes from one step to the next. Finding that out takes Python a small
part of the time that checking and choosing do, in which a short sequence could have been computed.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastattn.backends.base import Run

LIMIT = 1024  # kinds of calls that are remembered
_known: dict[Hashable, Run | None] = {}


def signature(tensors: Sequence[Tensor | None], options: tuple[Any, ...]) -> Hashable | None:
    """What a call has in common with those like it; None for one that has to go the long way.

    That is one which somebody watches or transforms (a compiler, a tracer, a profiler, a mode, vmap, forward-mode
    derivatives, autocast) or whose tensors are no plain dense ones, require grad, or lie on an accelerator, for which
    no backend prepares anything yet.
    """
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active() or torch._C._is_tracing():
        return None
    if torch._C._len_torch_dispatch_stack() or torch._C._is_any_autocast_enabled():
        return None
    if torch.autograd.profiler._is_profiler_enabled or torch.autograd.forward_ad._current_level >= 0:
        return None
    kinds: list[tuple[Any, ...] | None] = []
    for x in tensors:
        if x is None:
            kinds.append(None)
            continue
        if type(x) is not Tensor or not x.is_cpu or x.layout != torch.strided or x.is_nested:
            return None
        if x.requires_grad and torch.is_grad_enabled():
            return None
        kinds.append((x.shape, x.stride(), x.dtype))
    found = (*kinds, *options, *map(type, options), torch.are_deterministic_algorithms_enabled())
    try:
        hash(found)
    except TypeError:  # lists
        return None
    return found


def known(signature: Hashable) -> Run | None:
    """What serves calls of this kind; None if that was not looked for yet, or there is nothing."""
    return _known.get(signature)


def is_known(signature: Hashable) -> bool:
    return signature in _known


def remember(signature: Hashable, run: Run | None) -> None:
    if len(_known) >= LIMIT:
        _known.clear()
    _known[signature] = run


def forget() -> None:
    """Look again for what serves a call: after backends have come or gone."""
    _known.clear()
