"""Turns Triton's interpreter off, which other tests use: benchmarks measure what users run."""

import pytest


@pytest.fixture(autouse=True)
def measured(without_interpreter: None) -> None:
    """Every test of this folder runs without Triton's interpreter."""
