"""Triton's interpreter with its checks, for the tests that ask for them."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")


@pytest.fixture
def overflow_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter's checks of every int operation, for tests of positions and addresses."""
    from triton.runtime.interpreter import InterpreterOptions, interpreter_builder

    monkeypatch.setattr(interpreter_builder, "options", InterpreterOptions(debug=True))
