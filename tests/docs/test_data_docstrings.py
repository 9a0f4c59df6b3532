"""The examples in the docstrings run."""

import doctest
import importlib

import pytest


@pytest.mark.parametrize(
    "name", ["clean", "duplicates", "formats", "personal", "pipeline", "quality", "report", "sources"]
)
def test_examples_run(name):
    assert not doctest.testmod(importlib.import_module(f"fastattn.lm.data.{name}")).failed
