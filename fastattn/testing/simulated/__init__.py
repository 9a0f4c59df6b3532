"""Two simulated GPUs for a CPU build of torch: tensors say ``cuda:0`` and ``cuda:1``, and everything around them runs.

``device.cpp`` gives torch the devices, ``surface.py`` the functions of ``torch.cuda``, ``kernels.py`` launches Triton's
kernels there, in its interpreter. Results are real. What a GPU refuses is refused: operands of several devices, host
memory in a kernel, waiting during a capture. What it leaves unsaid is counted: each wait of the host for it, with the
line that caused it. Memory that nothing was written to holds NaN. Work is done at once, in the order of its calls,
so nothing here finds a race.
"""

from fastattn.testing.simulated.build import load, startup_folder, unavailable_reason
from fastattn.testing.simulated.machine import Launch, Machine, Wait
from fastattn.testing.simulated.present import is_present, present

__all__ = ["Launch", "Machine", "Wait", "is_present", "load", "present", "startup_folder", "unavailable_reason"]
