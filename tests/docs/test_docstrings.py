"""The examples in public docstrings run, and print what they say."""

import doctest
import importlib
import inspect

import pytest

MODULES = ("fastattn", "fastattn.lm.models", "fastattn.nn", "fastattn.testing.verify", "fastattn.testing.fuzz")


def documented():
    """Public functions and classes, each once, under the name that users see."""
    seen = set()
    for module_name in MODULES:
        module = importlib.import_module(module_name)
        for name in getattr(module, "__all__", ("verify", "fuzz")):
            value = getattr(module, name, None)
            if callable(value) and value not in seen:
                seen.add(value)
                yield pytest.param(value, id=f"{module_name}.{name}")


def examples(value):
    return doctest.DocTestFinder(recurse=False).find(value, name=getattr(value, "__name__", "value"), globs={})


@pytest.mark.parametrize("value", list(documented()))
def test_examples_run(value):
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    report = []
    for test in examples(value):
        runner.run(test, out=report.append)
    assert runner.failures == 0, "".join(report)


@pytest.mark.parametrize("value", [p for p in documented() if inspect.isfunction(p.values[0])])
def test_every_public_function_has_an_example(value):
    assert any(test.examples for test in examples(value))
