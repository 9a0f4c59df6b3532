"""Plants faults in the source of one function at a time; a test must report each of them."""

from __future__ import annotations

import functools
import importlib
import inspect
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import pytest


@dataclass(frozen=True)
class Fault:
    """A replacement in the source of one function, and a probe that passes without it and must fail with it.

    Attributes:
        what: a description of the fault.
        where: the function, as "module:function" or "module:Class.method".
        old: the text to replace, which occurs once in the source of that function.
        new: the text that replaces it.
        probe: a function of what the test has prepared; it raises if something is wrong.
    """

    what: str
    where: str
    old: str
    new: str
    probe: Callable[[Any], None]

    @contextmanager
    def planted(self) -> Iterator[None]:
        """Replace the function by its faulty version, compiled in its own module, while inside."""
        name, _, path = self.where.partition(":")
        module = importlib.import_module(name)
        *owners, attribute = path.split(".")
        owner: Any = functools.reduce(getattr, owners, module)
        function = inspect.unwrap(inspect.getattr_static(owner, attribute))
        function = function.__func__ if isinstance(function, (classmethod, staticmethod)) else function
        source = textwrap.dedent(inspect.getsource(function))
        if source.count(self.old) != 1:
            raise ValueError(f"fault {self.what!r}: the source has it {source.count(self.old)} times, not once")
        found: dict[str, Any] = {}
        text = "from __future__ import annotations\n" + source.replace(self.old, self.new)
        exec(compile(text, name, "exec"), vars(module), found)
        with mock.patch.object(owner, attribute, found[attribute]):
            yield

    def is_reported(self, given: Any) -> BaseException:
        """The error that the probe raises while the fault is planted.

        Raises:
            AssertionError: the probe passes although the fault is planted.
            ValueError: the faulty source is not valid Python.
        """
        with self.planted():
            try:
                self.probe(given)
            except (SyntaxError, NameError) as error:
                raise ValueError(f"fault {self.what!r} is no Python") from error
            except (Exception, pytest.fail.Exception) as error:
                return error
        raise AssertionError(f"no check reports {self.what!r}")
