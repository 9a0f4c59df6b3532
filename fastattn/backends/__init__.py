"""The backends, in order of preference. The tuple is the whole registry; a backend is imported on its first use."""

from __future__ import annotations

import functools
import importlib

from fastattn.backends.base import Backend

BACKENDS: tuple[str, ...] = ("cuda", "triton", "cpu", "portable", "eager")


@functools.cache
def load(name: str) -> Backend:
    """The backend of this name; KeyError if BACKENDS does not list it."""
    if name not in BACKENDS:
        raise KeyError(name)
    return importlib.import_module(f"fastattn.backends.{name}").BACKEND
