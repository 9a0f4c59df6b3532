"""Rotary position embedding: positions enter attention as rotations of the queries and keys.

Pairs are half a head apart, ``(x[i], x[i + D/2])``, the convention of GPT-NeoX and Llama. Tables are computed when they
are used, in fp32 at least, and not stored as buffers, which would be saved, cast to lower precision and limited in
length.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastattn.errors import input_error
from fastattn.rotary import apply_rotary

__all__ = ["Rotary", "apply_rotary", "rotary_tables"]


@dataclass(frozen=True)
class RotaryScaling:
    """Lower rotary frequencies for texts longer than those a model was first trained on, as in Llama 3.1.

    A frequency whose wavelength is longer than ``original_length / low_frequency`` is divided by ``factor``, one whose
    wavelength is shorter than ``original_length / high_frequency`` is kept, and those between are blended.

    Attributes:
        factor: the ratio of the new length to the original one.
        low_frequency: turns within ``original_length`` below which a frequency is divided.
        high_frequency: turns within ``original_length`` above which a frequency is kept.
        original_length: S of the first training.

    Raises:
        InputError: a number is not positive, or ``low_frequency`` is not below ``high_frequency``.

    Source:
        Grattafiori et al., "The Llama 3 herd of models", 2024.
    """

    factor: float
    low_frequency: float
    high_frequency: float
    original_length: int

    def __post_init__(self) -> None:
        for name in ("factor", "low_frequency", "high_frequency", "original_length"):
            if not 0 < getattr(self, name) < math.inf:
                raise input_error(name, getattr(self, name), "a positive number", "Llama 3.1 has 8, 1, 4 and 8192.")
        if self.low_frequency >= self.high_frequency:
            allowed = f"less than high_frequency {self.high_frequency}"
            raise input_error("low_frequency", self.low_frequency, allowed, "Swap them.")

    def apply(self, frequencies: Tensor) -> Tensor:
        """The scaled frequencies of ``frequencies`` in radians per token."""
        turns = self.original_length * frequencies / (2 * math.pi)
        kept = (turns - self.low_frequency) / (self.high_frequency - self.low_frequency)
        kept = kept.clamp(0, 1)
        return frequencies * (kept + (1 - kept) / self.factor)


def rotary_tables(
    positions: Tensor,
    head_dim: int,
    base: float = 10000.0,
    dtype: torch.dtype = torch.float32,
    scaling: RotaryScaling | None = None,
) -> tuple[Tensor, Tensor]:
    """``cos`` and ``sin`` of the angles ``positions * base ** (-2 i / head_dim)``, ``i = 0 .. head_dim / 2 - 1``.

    A model computes them once and applies them in every layer.

    Args:
        positions: ``(S,)`` or ``(B, S)``, any number for each token; packed documents restart at 0.
        head_dim: D, even.
        base: wavelengths lie between 2 pi and ``2 pi * base`` tokens; larger for longer contexts.
        dtype: of the tables; float64 for float64 inputs.
        scaling: of the frequencies; None leaves them.

    Returns:
        two tensors of shape ``(*positions.shape, D / 2)``.

    Raises:
        InputError: ``head_dim`` is odd, or ``base`` is not positive.

    Example:
        >>> import torch
        >>> from fastattn.nn.rotary import rotary_tables
        >>> cos, sin = rotary_tables(torch.tensor([0, 1, 2, 0, 1]), head_dim=64)
        >>> cos.shape
        torch.Size([5, 32])
    """
    check_rotary(head_dim, base)
    exponents = torch.arange(0, head_dim, 2, device=positions.device).to(dtype) / head_dim
    frequencies = base**-exponents
    if scaling is not None:
        frequencies = scaling.apply(frequencies)
    angles = positions.to(dtype)[..., None] * frequencies
    return angles.cos(), angles.sin()


class Rotary(nn.Module):
    """Rotary position embedding of queries or keys; apply the same module to both.

    Token ``s`` at position ``m`` has each pair ``(x[i], x[i + D/2])`` rotated by ``m * base ** (-2 i / D)``, so that
    the score of a query and a key depends on their distance alone. Has no parameters and no buffers.

    Args:
        head_dim: D, even.
        base: wavelengths lie between 2 pi and ``2 pi * base`` tokens.

    Raises:
        InputError: ``head_dim`` is odd, or ``base`` is not positive.

    Source:
        Su et al., "RoFormer: enhanced transformer with rotary position embedding", 2021.

    Example:
        >>> import torch
        >>> from fastattn.nn import Rotary
        >>> rotary = Rotary(head_dim=64)
        >>> q = torch.randn(2, 5, 8, 64)
        >>> rotary(q).shape
        torch.Size([2, 5, 8, 64])
        >>> bool((rotary(q[:, 3:], positions=3) == rotary(q)[:, 3:]).all())
        True
    """

    def __init__(self, head_dim: int, base: float = 10000.0) -> None:
        super().__init__()
        check_rotary(head_dim, base)
        self.head_dim = head_dim
        self.base = float(base)

    def forward(self, x: Tensor, positions: Tensor | int = 0) -> Tensor:
        """Rotate ``x``.

        Args:
            x: ``(B, S, H, D)``, or packed ``(T, H, D)``.
            positions: ``(S,)`` or ``(B, S)``, the position of each token (packed: ``(T,)``); or an int, the position
                of the first, the others following it.

        Returns:
            a tensor like ``x``.

        Raises:
            InputError: the shapes do not fit.
        """
        if x.dim() < 3 or x.shape[-1] != self.head_dim:
            allowed = f"(B, S, H, D) or (T, H, D) with D = {self.head_dim}"
            raise input_error("x", f"shape {tuple(x.shape)}", allowed, "Split the heads before rotating.")
        if not isinstance(positions, Tensor):
            positions = torch.arange(positions, positions + x.shape[-3], device=x.device)
        elif positions.shape not in (x.shape[-3:-2], x.shape[:-2]):
            allowed = f"{tuple(x.shape[-3:-2])} or {tuple(x.shape[:-2])}"
            raise input_error("positions", f"shape {tuple(positions.shape)}", allowed, "One number for each token.")
        dtype = torch.promote_types(x.dtype, torch.float32)
        return apply_rotary(x, *rotary_tables(positions, self.head_dim, self.base, dtype))

    def extra_repr(self) -> str:
        return f"head_dim={self.head_dim}, base={self.base:g}"


def check_rotary(head_dim: int, base: float) -> None:
    """Raise InputError unless ``head_dim`` dims can be turned with this base."""
    if head_dim < 2 or head_dim % 2:
        raise input_error("head_dim", head_dim, "an even number", "Rotary embedding turns pairs of head dims.")
    if not 0 < base < float("inf"):
        raise input_error("base", base, "a positive finite number", "10000 is the usual value.")
