"""The exceptions of the package and the one way their messages are built."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


class InputError(ValueError, RuntimeError):
    """An argument is wrong for every backend: its type, shape, device or value.

    It is both a ValueError and a RuntimeError, because torch raises either for such arguments.
    """


class UnsupportedError(NotImplementedError):
    """The input is valid, but the backend asked for (or every backend) lacks something it needs."""


class DataError(Exception):
    """A file or folder is missing, empty, damaged or not of the expected kind; the CLI exits with 2."""


def input_error(argument: str, given: object, allowed: str, todo: str) -> InputError:
    """An InputError that names the argument, what was given, what is allowed and what to do."""
    return InputError(f"{argument}: got {given}; allowed: {allowed}. {todo}")


def unsupported_error(asked: str, reasons: Mapping[str, Sequence[str]]) -> UnsupportedError:
    """An UnsupportedError that lists, for each backend asked, why it cannot serve the problem."""
    lines = [f"  {name}: {'; '.join(why)}" for name, why in reasons.items()]
    return UnsupportedError(
        f"{asked}\n" + "\n".join(lines) + "\nUse backend=None to let fastattn choose, or see fastattn.explain(...)."
    )
