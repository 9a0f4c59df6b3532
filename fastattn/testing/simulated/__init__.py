"""Two simulated GPUs for a CPU build of torch: tensors say ``cuda:0`` and ``cuda:1``, and everything around them runs.

``device.cpp`` registers the devices with torch, ``surface.py`` replaces the functions of ``torch.cuda``, and
``kernels.py`` runs Triton's kernels in Triton's interpreter, so results are real. The simulation refuses what a GPU
refuses: operands on several devices, host memory in a kernel, synchronisation during a capture. It counts what a GPU
does without a word: each wait of the host for the device, with the line that caused it. Fresh memory is filled with
NaN. Every call runs to its end before the next begins, so races between streams are not found.
"""

from fastattn.testing.simulated.build import load, startup_folder, unavailable_reason
from fastattn.testing.simulated.machine import Launch, Machine, Wait
from fastattn.testing.simulated.present import is_present, present

__all__ = ["Launch", "Machine", "Wait", "is_present", "load", "present", "startup_folder", "unavailable_reason"]
