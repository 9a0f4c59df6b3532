"""What is measured is what users run, so the interpreter that the other tests use is off here."""

import pytest


@pytest.fixture(autouse=True)
def measured(without_interpreter: None) -> None:
    """Every test of this folder runs without Triton's interpreter."""
