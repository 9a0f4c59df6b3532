"""Makes Triton's interpreter fast enough to walk the grid of cases."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("triton")


@pytest.fixture(scope="session", autouse=True)
def patched_once() -> Iterator[None]:
    """Let each device function patch ``triton.language`` for the interpreter on its first call only.

    The interpreter does it again on every call, which takes longer than the function; the kernel around it has
    already done it.
    """
    from triton.runtime.interpreter import InterpretedFunction

    before, called = InterpretedFunction.__call__, set()

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.fn in called:
            return self.rewrite()(*args, **kwargs)
        called.add(self.fn)
        return before(self, *args, **kwargs)

    InterpretedFunction.__call__ = call
    yield
    InterpretedFunction.__call__ = before


@pytest.fixture(scope="session", autouse=True)
def without_overflow_checks() -> Iterator[None]:
    """Skip the interpreter's check of every int operation, half of its time; see ``overflow_is_an_error``."""
    from triton.runtime.interpreter import interpreter_builder

    before = interpreter_builder.options
    interpreter_builder.options = dataclasses.replace(before, sanitize_overflow=False)
    yield
    interpreter_builder.options = before


@pytest.fixture
def overflow_is_an_error(without_overflow_checks: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter's checks again, for tests of positions and addresses."""
    from triton.runtime.interpreter import InterpreterOptions, interpreter_builder

    monkeypatch.setattr(interpreter_builder, "options", InterpreterOptions(debug=True))
