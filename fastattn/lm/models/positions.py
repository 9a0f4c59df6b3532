"""Position encodings: tables of sines, slopes of ALiBi, and T5's learned bias. Rotary is in ``nn``."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from fastattn.lm.models.config import TransformerConfig


def sinusoidal(positions: Tensor, width: int) -> Tensor:
    """The original sines: dims ``2 i`` and ``2 i + 1`` are sine and cosine of ``position / 10000 ** (2 i / width)``.

    Args:
        positions: ``(S,)`` or ``(B, S)``.
        width: C, even.

    Returns:
        ``(*positions.shape, C)``, fp32.

    Source:
        Vaswani et al., "Attention is all you need", 2017, section 3.5.
    """
    wavelengths = 10000.0 ** (torch.arange(0, width, 2, device=positions.device) / width)
    angles = positions[..., None] / wavelengths
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(-2)


def alibi_slopes(heads: int, device: torch.device) -> Tensor:
    """``2 ** (-8 h / heads)`` for ``h = 1 .. heads``; between powers of two, those of the next one fill up.

    Returns:
        ``(H_q,)``, fp32.

    Source:
        Press et al., "Train short, test long: attention with linear biases", 2022.
    """
    whole = 2 ** int(math.log2(heads))
    exponents = torch.arange(1, whole + 1, device=device) * (8 / whole)
    between = (2 * torch.arange(heads - whole, device=device) + 1) * (4 / whole)
    return 2.0 ** -torch.cat([exponents, between])


def relative_buckets(distance: Tensor, buckets: int, longest: int, causal: bool) -> Tensor:
    """T5's class of each ``distance``, the key's position minus the query's.

    Half of the classes are one distance each, the other half grow with its logarithm up to ``longest``, beyond which
    all are one. Keys before and behind a query have classes of their own, unless ``causal``.

    Args:
        distance: integers of any shape.
        buckets: number of classes.
        longest: distance from which on there is one class.
        causal: there are no keys behind.

    Returns:
        int64 like ``distance``, in ``[0, buckets)``.

    Source:
        Raffel et al., "Exploring the limits of transfer learning with a unified text-to-text transformer", 2020.
    """
    if causal:
        first, away = torch.zeros_like(distance), -distance.clamp(max=0)
    else:
        buckets //= 2
        first, away = (distance > 0).to(distance.dtype) * buckets, distance.abs()
    exact = buckets // 2
    growth = (away.clamp(min=1).float() / exact).log() / math.log(longest / exact) * (buckets - exact)
    return first + torch.where(away < exact, away, (exact + growth.to(distance.dtype)).clamp(max=buckets - 1))


class RelativeBias(nn.Module):
    """A learned bias on the scores for each head and class of distances, the same in every layer."""

    def __init__(self, config: TransformerConfig, causal: bool) -> None:
        super().__init__()
        self.buckets, self.longest, self.causal = config.relative_buckets, config.relative_distance, causal
        self.embedding = nn.Embedding(self.buckets, config.heads)

    def forward(self, positions: Tensor, s_kv: int) -> Tensor:
        """The bias ``(1|B, H_q, S_q, S_kv)`` of queries at ``positions``, ``(S_q,)`` or ``(B, S_q)``."""
        j = torch.arange(s_kv, device=positions.device)
        distance = j - torch.atleast_2d(positions)[..., None]  # [1|B, S_q, S_kv]
        classes = relative_buckets(distance, self.buckets, self.longest, self.causal)
        return self.embedding(classes).permute(0, 3, 1, 2)
