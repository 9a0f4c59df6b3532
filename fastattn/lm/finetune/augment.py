"""Random changes of images in training. They draw from torch's generator, which a run seeds anew for each step."""

from __future__ import annotations

import torch
from torch import Tensor

AUGMENTATIONS = ("none", "shift", "flip")
_SHIFT = 8  # the part of the height and width by which images move at most is 1 / _SHIFT


def augmented(images: Tensor, kind: str) -> Tensor:
    """Images ``(B, C, H, W)``, each shifted by a random part of up to 1/8, and for "flip" half of them mirrored.

    What a shift leaves open is filled by the nearest pixels. Mirroring keeps the labels of things, not of letters.

    Source:
        Krizhevsky et al., "ImageNet classification with deep convolutional neural networks", 2012, section 4.1.
    """
    if kind == "none":
        return images
    batch, height, width = len(images), *images.shape[-2:]
    rows, columns = (_moved(batch, size, images.device) for size in (height, width))
    if kind == "flip":
        mirrored = torch.rand(batch, 1, device=images.device) < 0.5
        columns = torch.where(mirrored, columns.flip(-1), columns)
    number = torch.arange(batch, device=images.device)[:, None, None]
    return images.movedim(1, -1)[number, rows[:, :, None], columns[:, None, :]].movedim(-1, 1).contiguous()


def _moved(batch: int, size: int, device: torch.device) -> Tensor:
    """``(batch, size)``: for each place the one that its pixel is taken from."""
    most = size // _SHIFT
    offset = torch.randint(-most, most + 1, (batch, 1), device=device)
    return (torch.arange(size, device=device) + offset).clamp(0, size - 1)
