"""Folders of images: a subfolder for each class, or a file ``metadata.jsonl`` or ``metadata.csv`` that names them.

The first is the form of torchvision's ``ImageFolder``, the second that of Hugging Face's ``datasets``, which also has
training and held-out images in subfolders ``train`` and ``validation``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fastattn.lm.data.images import find_images, is_image

_METADATA = ("metadata.jsonl", "metadata.csv")


def metadata_of(folder: Path) -> Path | None:
    """The file that names the images of a folder, if it has one."""
    return next((folder / name for name in _METADATA if (folder / name).is_file()), None)


def has_images(folder: Path) -> bool:
    """Whether a folder holds images, in it or below it."""
    return next(find_images(folder), None) is not None


def is_image_set(folder: Path) -> bool:
    """Whether a folder is a set of labelled images: it has a metadata file, or subfolders with images."""
    if not folder.is_dir() or (folder / "state.json").is_file():
        return False
    return metadata_of(folder) is not None or any(map(has_images, _subfolders(folder)))


def images_in(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Place and record of each image: its path, and the subfolder that it lies in as its label.

    Images beside the subfolders, or in a folder without any, have no label.
    """
    for path in sorted(path for path in folder.iterdir() if path.is_file() and is_image(path)):
        yield str(path), {"image": str(path)}
    for subfolder in _subfolders(folder):
        for path in find_images(subfolder):
            yield str(path), {"image": str(path), "label": subfolder.name}


def _subfolders(folder: Path) -> Sequence[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
