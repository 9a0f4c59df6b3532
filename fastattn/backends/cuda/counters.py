"""Counters in device memory from which the blocks of a forward kernel draw their tiles, where tiles differ in length.

A kernel finds its counter at 0 and leaves it at 0 (``csrc/sm90/schedule.h``). Kernels of one stream run in turn, so
they share a counter. A captured graph has one of its own, cleared by the graph, since it may be replayed on any stream.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn.problem import Inputs
from fastattn.spec import AttentionSpec

_counters: dict[tuple[torch.device, int], Tensor] = {}


def draws(inputs: Inputs, spec: AttentionSpec) -> bool:
    """Whether the tiles of a problem differ in length."""
    return spec.has_band or inputs.is_packed or inputs.segment_ids_q is not None


def of_stream(device: torch.device, stream: int) -> Tensor:
    """The counter for a kernel that is launched now on ``stream``, the current one of ``device``."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return torch.zeros(1, dtype=torch.int32, device=device)
    key = (device, stream)
    if key not in _counters:
        _counters[key] = torch.zeros(1, dtype=torch.int32, device=device)
    return _counters[key]
