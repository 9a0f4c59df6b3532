"""Reference values for a loss, and the peak throughput of devices."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

# Dense bf16 peak of the makers' data sheets, FLOP/s, by a part of the device's name.
_PEAK_FLOPS = {"H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12}


def unigram_entropy(counts: NDArray[Any]) -> float:
    """``-sum p log p`` in nats, of tokens that occur ``counts`` times: the best loss that ignores all context.

    Example:
        >>> import numpy as np
        >>> from fastattn.lm.train.metrics import unigram_entropy
        >>> round(unigram_entropy(np.array([5, 5, 0])), 4)
        0.6931
    """
    p = counts[counts > 0] / counts.sum()
    return float(-(p * np.log(p)).sum())


def perplexity(loss: float) -> float:
    """``exp(loss)``: among how many equally likely tokens the model is in doubt."""
    return math.exp(min(loss, 700.0))


def bits_per_byte(loss: float, tokens: int, text_bytes: float) -> float:
    """The loss in bits for each byte of text, comparable between tokenizers.

    Args:
        loss: nats per token.
        tokens: predicted tokens of a text.
        text_bytes: its length in UTF-8.
    """
    return loss * tokens / text_bytes / math.log(2)


def peak_flops(device: torch.device) -> float | None:
    """The bf16 peak of the device, or None where fastattn does not know it."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in _PEAK_FLOPS.items() if part in name), None)
