"""A fault to plant in a kernel: what faults.py and faults_backward.py list."""

from __future__ import annotations

from dataclasses import dataclass

BAND_128 = ("FORWARD", 128, 128, 1, 0)


@dataclass(frozen=True)
class Fault:
    """A piece of source that occurs once, and what takes its place.

    Attributes:
        what: in words.
        file: under ``csrc/``.
        old, new: the source, and what is planted instead.
        kernel: the line of ``instances.inc`` on which it is tried: the beginning of it, macro and numbers.
        seed: of the first random problem, where few problems show the fault.
        options: of the compiler: a variant of the kernel.
    """

    what: str
    file: str
    old: str
    new: str
    kernel: tuple[str | int, ...] = BAND_128
    seed: int = 0
    options: tuple[str, ...] = ()
