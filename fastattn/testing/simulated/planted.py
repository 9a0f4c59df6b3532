"""Faults planted in the source of one function at a time, for tests that have to report them."""

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
    """A replacement in the source of one function, and the probe that passes without it and fails with it.

    Attributes:
        what: goes wrong.
        where: "module:function", or "module:Class.method".
        old: stands once in the source of that function,
        new: is put in its place.
        probe: is given what the test has prepared.
    """

    what: str
    where: str
    old: str
    new: str
    probe: Callable[[Any], None]

    @contextmanager
    def planted(self) -> Iterator[None]:
        """While inside, the function has the fault, compiled anew in its own module."""
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
        """The error that the probe ends with while the fault is planted.

        Raises:
            AssertionError: it passes.
            ValueError: the fault itself is wrong.
        """
        with self.planted():
            try:
                self.probe(given)
            except (SyntaxError, NameError) as error:
                raise ValueError(f"fault {self.what!r} is no Python") from error
            except (Exception, pytest.fail.Exception) as error:
                return error
        raise AssertionError(f"nobody reports {self.what!r}")
