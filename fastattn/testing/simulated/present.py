"""``present``, the context manager that gives this process the simulated GPUs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from fastattn import state
from fastattn.backends import triton
from fastattn.testing.simulated import build, kernels, surface
from fastattn.testing.simulated.machine import Machine

_count = 0


def is_present() -> bool:
    """Whether this process has the simulated GPUs now."""
    return _count > 0


@contextlib.contextmanager
def present(name: str = "Simulated H200", capability: tuple[int, int] = (9, 0)) -> Iterator[Machine]:
    """Give this process two simulated GPUs while inside.

    Triton's kernels run in its interpreter, so ``TRITON_INTERPRET=1`` must be in the environment before the first of
    them is imported. The package treats them as compiled.

    Args:
        name: the name of the GPUs.
        capability: the compute capability, (major, minor).

    Yields:
        the ``Machine``, with its record of launches and waits.
    """
    global _count
    machine = Machine(build.load(), name, capability)
    machine.turn(on=True)
    replaced = [*surface.patches(machine), *kernels.patches(machine), (triton, "is_interpreting", lambda: False)]
    with contextlib.ExitStack() as undo:
        undo.callback(state.forget)
        undo.callback(machine.turn, on=False)
        for owner, attribute, value in replaced:
            if hasattr(owner, attribute):
                undo.callback(setattr, owner, attribute, getattr(owner, attribute))
            else:
                undo.callback(delattr, owner, attribute)
            setattr(owner, attribute, value)
        state.forget()
        _count += 1
        undo.callback(_leave)
        yield machine


def _leave() -> None:
    global _count
    _count -= 1
