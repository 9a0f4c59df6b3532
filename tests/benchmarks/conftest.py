"""Benchmarks measure what users run, so the interpreter that the other tests use is off here."""

import pytest

from fastattn import dispatch


@pytest.fixture(autouse=True)
def without_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    dispatch.reasons.cache_clear()
    yield
    dispatch.reasons.cache_clear()
