"""Images from files to tensors: which files are images, limits, decoding, and the pixels that a model reads.

Needs ``pip install 'fastattn[vision]'`` (Pillow). A file that is missing, damaged, too large or no image raises a
``DataError`` that names it.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastattn.errors import DataError, InputError, input_error
from fastattn.files import check_regular

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
MOST_BYTES = 1 << 26  # of a file
MOST_PIXELS = 1 << 26  # of a decoded image, 192 MiB in colour
_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # the others of Pillow run programs, or are rare
_FILTERS = ("nearest", "lanczos", "bilinear", "bicubic")  # in the order of Pillow's numbers, which Hugging Face stores
_MODES = {1: "L", 3: "RGB"}
_KEPT_BYTES = 1 << 29  # of decoded images that a reader keeps


def is_image(path: Path) -> bool:
    """Whether a file is an image by its name."""
    return path.suffix.lower() in SUFFIXES


def find_images(folder: Path) -> Iterator[Path]:
    """The images in a folder and below it, sorted; hidden files and folders are passed over."""
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if path.is_dir():
            yield from find_images(path)
        elif is_image(path):
            yield path


@dataclass(frozen=True)
class Pixels:
    """The way from an image to what a model reads: ``(resized / 255 - mean) / std``, as ViT's was trained.

    Attributes:
        mean: of each channel, in [0, 1]; one number is that of all.
        std: likewise.
        resample: filter of the resizing to the model's square: "nearest", "lanczos", "bilinear" or "bicubic".

    Raises:
        InputError: a number or the filter is out of range.
    """

    mean: tuple[float, ...] = (0.5,)
    std: tuple[float, ...] = (0.5,)
    resample: str = "bilinear"

    def __post_init__(self) -> None:
        if self.resample not in _FILTERS:
            raise input_error("resample", repr(self.resample), ", ".join(_FILTERS), "bilinear is that of ViT.")
        for name, values in (("mean", self.mean), ("std", self.std)):
            if not values or not all(0 <= x < 1000 and (x > 0 or name == "mean") for x in values):
                raise input_error(name, values, "numbers in [0, 1], those of std above 0", "0.5 is that of ViT.")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Pixels:
        """The inverse of ``to_dict``; raises KeyError or TypeError for other fields."""
        return cls(tuple(fields["mean"]), tuple(fields["std"]), fields["resample"])

    @classmethod
    def of_hugging_face(cls, fields: Mapping[str, Any]) -> Pixels:
        """As ``preprocessor_config.json`` says it.

        Raises:
            DataError: it asks for something else than resizing the whole image to a square.
        """
        if fields.get("do_center_crop") or "shortest_edge" in dict(fields.get("size") or {}):
            raise DataError("preprocessor_config.json crops images; fastattn resizes the whole image to a square.")
        scaled = fields.get("do_normalize", True)
        try:
            mean = tuple(fields.get("image_mean") or (0.5,)) if scaled else (0.0,)
            std = tuple(fields.get("image_std") or (0.5,)) if scaled else (1.0,)
            return cls(mean, std, _FILTERS[int(fields.get("resample", 2))])
        except (TypeError, ValueError, IndexError, InputError) as error:
            raise DataError(f"preprocessor_config.json does not say how to read images ({error}).") from error

    def to_hugging_face(self, size: int, channels: int) -> dict[str, Any]:
        """The fields of ``preprocessor_config.json``."""
        mean, std = (list(x) * channels if len(x) == 1 else list(x) for x in (self.mean, self.std))
        return {
            "image_processor_type": "ViTImageProcessor", "do_resize": True, "size": {"height": size, "width": size},
            "resample": _FILTERS.index(self.resample), "do_rescale": True, "rescale_factor": 1 / 255,
            "do_normalize": True, "image_mean": mean, "image_std": std,
        }  # fmt: skip

    def normalised(self, images: Tensor) -> Tensor:
        """``(B, C, H, W)`` in fp32, of uint8."""
        mean, std = (torch.tensor(x, device=images.device)[:, None, None] for x in (self.mean, self.std))
        return (images.float() / 255 - mean) / std


class ImageReader:
    """Reads images as squares of one size; decoded ones are kept, up to 512 MiB of them.

    Args:
        size: height and width of the square.
        channels: 3 for colour, 1 for grey.
        resample: as in ``Pixels``.

    Raises:
        InputError: another number of channels.
    """

    def __init__(self, size: int, channels: int = 3, resample: str = "bilinear") -> None:
        if channels not in _MODES:
            raise input_error("channels", channels, "1 (grey) or 3 (colour)", "Files of images have no others.")
        self.size, self.channels, self.resample = size, channels, resample
        self._kept: dict[str, np.ndarray] = {}

    def read(self, paths: Sequence[str]) -> Tensor:
        """``(B, channels, size, size)``, uint8.

        Raises:
            DataError: a file is missing, damaged, too large or no image.
        """
        missing = [path for path in dict.fromkeys(paths) if path not in self._kept]
        with ThreadPoolExecutor(min(len(missing), os.cpu_count() or 1) or 1) as threads:
            read = dict(zip(missing, threads.map(self._decoded, missing), strict=True))
        images = torch.from_numpy(np.stack([self._kept[path] if path in self._kept else read[path] for path in paths]))
        room = _KEPT_BYTES // (self.channels * self.size**2)
        for path, image in read.items():
            if len(self._kept) < room:
                self._kept[path] = image
        return images

    def _decoded(self, path: str) -> np.ndarray:
        from PIL import Image, ImageOps

        with _telling(path), _opened(path) as image:
            upright = ImageOps.exif_transpose(image)  # decodes all of it
            if "transparency" in upright.info:
                upright = upright.convert("RGBA")
            plain = upright.convert(_MODES[self.channels])
            square = plain.resize((self.size, self.size), Image.Resampling(_FILTERS.index(self.resample)))
            array = np.array(square)
        return array.reshape(self.size, self.size, self.channels).transpose(2, 0, 1)


def check_image(path: str) -> None:
    """Read the header of an image; raises DataError if it is missing, too large or no image."""
    from PIL import Image

    with warnings.catch_warnings(), _telling(path):
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our limit is lower
        _opened(path).close()


def _opened(path: str) -> Any:
    from PIL import Image

    check_regular(Path(path))
    size = os.path.getsize(path)
    if size > MOST_BYTES:
        raise DataError(f"{path} has {size >> 20} MiB; an image may have {MOST_BYTES >> 20}.")
    image = Image.open(path, formats=_FORMATS)
    if image.width * image.height > MOST_PIXELS:
        found = f"{image.width} x {image.height} pixels"
        image.close()
        raise DataError(f"{path} has {found}; an image may have {MOST_PIXELS >> 20} Mi of them: make it smaller.")
    if image.mode[0] in "IF":
        image.close()
        raise DataError(f"{path} has pixels of mode {image.mode}, not of 8 bits: convert it.")
    return image


@contextlib.contextmanager
def _telling(path: str) -> Iterator[None]:
    """Turn the errors of the block into DataErrors."""
    from PIL import Image, UnidentifiedImageError

    try:
        yield
    except (DataError, MemoryError):
        raise
    except FileNotFoundError as error:
        raise DataError(f"There is no image {path}.") from error
    except UnidentifiedImageError as error:
        raise DataError(f"{path} is not an image of the kinds {', '.join(_FORMATS)}.") from error
    except Image.DecompressionBombError as error:
        raise DataError(f"{path} has more pixels than an image may have ({MOST_PIXELS >> 20} Mi).") from error
    except Exception as error:  # the decoders raise any kind for damaged files
        raise DataError(f"{path} is damaged ({' '.join(str(error).split())}).") from error
