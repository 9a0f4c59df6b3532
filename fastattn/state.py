"""The state that calls leave in the process: plans, choices of a backend, verdicts, warnings; ``forget()`` clears it.

A cache registers where it is created. Call ``forget()`` after the environment or the set of backends has changed, and
between tests. Loaded libraries and facts about the machine are cached where they are used and are not cleared.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

# While tensors hold the tokens of one rank: what serves ``fastattn.attention`` for whole rows. Not of one thread alone,
# as backward passes, which may compute forward passes again, run in threads of their own. Else None.
whole_rows: Callable[..., Any] | None = None

F = TypeVar("F", bound=Callable[..., Any])
_forget: list[Callable[[], object]] = []


def on_forget(clear: Callable[[], object]) -> None:
    """Have ``clear`` called by ``forget``."""
    _forget.append(clear)


def remembered(function: F) -> F:
    """``functools.lru_cache`` for the last 1024 arguments, emptied by ``forget``."""
    cached = functools.lru_cache(maxsize=1024)(function)
    on_forget(cached.cache_clear)
    return cached  # type: ignore[return-value]


def forget() -> None:
    """Empty every cache of the process."""
    for clear in _forget:
        clear()
