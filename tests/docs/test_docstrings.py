"""The examples in docstrings run and print the output shown, and every public function has one."""

from __future__ import annotations

import doctest
import importlib
import importlib.util
import inspect
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import fastattn

PACKAGE = Path(fastattn.__file__).parent
OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def modules_with_examples() -> list[object]:
    """Every module of the package with a prompt in a docstring."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        if ">>> " in path.read_text(encoding="utf-8"):
            name = ".".join(("fastattn", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")
            package = name.rpartition(".")[2]
            lacks = package in ("transformers", "opacus") and importlib.util.find_spec(package) is None
            marks = [pytest.mark.skip(reason=f"{package} is not installed")] if lacks else []
            found.append(pytest.param(name, marks=marks))
    return found


@pytest.mark.parametrize("name", modules_with_examples())
def test_examples_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = doctest.testmod(importlib.import_module(name), optionflags=OPTIONS)
    assert result.attempted > 0 and result.failed == 0


def public_functions() -> list[object]:
    """The functions that users import: those of the package, of its modules and of the bundled models."""
    names = ("fastattn", "fastattn.nn", "fastattn.lm.models", "fastattn.inspection")
    modules = [importlib.import_module(name) for name in names]
    listed = {id(f): f for module in modules for f in functions_of(module)}
    return list(listed.values())


def functions_of(module: ModuleType) -> Iterator[object]:
    """The functions that a module lists, or without a list, those that it defines."""
    own = [name for name, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__]
    for name in getattr(module, "__all__", own):
        if inspect.isfunction(getattr(module, name)) and not name.startswith("_"):
            yield getattr(module, name)


@pytest.mark.parametrize("function", public_functions(), ids=lambda function: function.__name__)
def test_every_public_function_has_an_example(function: object) -> None:
    tests = doctest.DocTestFinder(recurse=False).find(function, name="function", globs={})
    assert any(test.examples for test in tests)
