"""Gives the simulated GPUs to every Python process whose PYTHONPATH names this folder: for whole programs."""

import os

os.environ["TRITON_INTERPRET"] = "1"  # before any kernel is imported

from fastattn.testing.simulated import present
from fastattn.testing.simulated.kernels import fast_interpreter

_held = (present(), fast_interpreter())
for _manager in _held:
    _manager.__enter__()
