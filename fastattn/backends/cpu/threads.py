"""Threads for the kernels: those of torch, but one in a forked process.

GNU's OpenMP runtime, which starts them, hangs in a child of a process that has used it; so do torch's own operations.
One thread needs no runtime, so attention works there.
"""

from __future__ import annotations

import logging
import os

from torch import get_num_threads

log = logging.getLogger("fastattn")
_is_forked = _has_warned = False


def count() -> int:
    """The number of threads that a call may use."""
    return _one() if _is_forked else get_num_threads()


def _one() -> int:
    global _has_warned
    if not _has_warned and get_num_threads() > 1:
        log.warning(
            "fastattn: in a forked process attention on CPUs takes one thread, and torch's operations may hang; "
            "start processes by spawn, or call torch.set_num_threads(1) in them"
        )
        _has_warned = True
    return 1


def _after_fork() -> None:
    global _is_forked, _has_warned
    _is_forked, _has_warned = True, False


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
