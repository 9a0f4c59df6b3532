"""Images from files: the pixels of transformers' processor, limits, and files that are no images."""

import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from fastattn.errors import DataError, InputError
from fastattn.lm.data.images import ImageReader, Pixels, check_image, find_images


def noise(size, mode="RGB", seed=0):
    shape = (size[1], size[0]) + ((len(mode),) if len(mode) > 1 else ())
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8), mode)


def test_pixels_are_those_of_vit_in_transformers(tmp_path):
    processors = pytest.importorskip("transformers.models.vit.image_processing_pil_vit")
    noise((40, 23)).save(tmp_path / "a.png")
    given = {
        "size": {"height": 16, "width": 16},
        "image_mean": [0.4, 0.5, 0.6],
        "image_std": [0.2, 0.3, 0.4],
        "resample": 3,
    }
    theirs = processors.ViTImageProcessorPil(**given)(Image.open(tmp_path / "a.png"), return_tensors="pt")
    pixels = Pixels.of_hugging_face(given)
    ours = pixels.normalised(ImageReader(16, resample=pixels.resample).read([str(tmp_path / "a.png")]))
    torch.testing.assert_close(ours, theirs["pixel_values"], atol=1e-5, rtol=0)
    again = pixels.to_hugging_face(16, 3)
    assert Pixels.of_hugging_face(again) == pixels and Pixels.from_dict(pixels.to_dict()) == pixels


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1"])
def test_every_mode_becomes_colour_or_grey(tmp_path, mode):
    noise((9, 9)).convert(mode).save(tmp_path / "a.tif")
    assert ImageReader(4, 3).read([str(tmp_path / "a.tif")]).shape == (1, 3, 4, 4)
    assert ImageReader(4, 1).read([str(tmp_path / "a.tif")]).shape == (1, 1, 4, 4)


def test_a_photograph_lying_on_its_side_is_put_upright(tmp_path):
    image, exif = Image.new("L", (8, 8)), Image.Exif()
    image.paste(255, (0, 0, 8, 4))  # the upper half
    exif[0x0112] = 6  # turned by 90 degrees
    image.save(tmp_path / "a.jpg", exif=exif)
    upright = ImageReader(8, 1).read([str(tmp_path / "a.jpg")])[0, 0]
    assert upright[:, 5:].min() > 200 and upright[:, :3].max() < 50


def bomb(path, width, height):
    """A PNG of some bytes that says it is as large as this."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(99))))


def test_hostile_files_end_in_a_sentence(tmp_path, recwarn):
    noise((64, 64)).save(tmp_path / "whole.png")
    whole = (tmp_path / "whole.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "program.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    bomb(tmp_path / "large.png", 10_000, 10_000)
    bomb(tmp_path / "larger.png", 60_000, 60_000)
    Image.fromarray(np.zeros((4, 4), np.uint16)).save(tmp_path / "deep.png")
    with (tmp_path / "long.png").open("wb") as file:
        file.truncate(1 << 27)
    reasons = {
        "cut": "is damaged", "text": "is not an image of the kinds", "empty": "is not an image of the kinds",
        "program": "is not an image of the kinds", "large": "10000 x 10000 pixels", "larger": "more pixels than",
        "deep": "not of 8 bits", "long": "has 128 MiB", "gone": "There is no image", "whole": "",
    }  # fmt: skip
    for name, reason in reasons.items():
        path = str(tmp_path / f"{name}.jpg" if name == "empty" else tmp_path / f"{name}.png")
        found = ""
        try:
            check_image(path)
            ImageReader(8).read([path])
        except DataError as error:
            found = str(error)
        assert (reason in found and path in found and "\n" not in found) if reason else not found, (name, found)
    assert not recwarn.list


def test_a_reader_keeps_what_it_has_decoded_and_says_what_it_cannot_read(tmp_path):
    noise((8, 8)).save(tmp_path / "a.png")
    reader = ImageReader(8)
    first = reader.read([str(tmp_path / "a.png")] * 2)
    (tmp_path / "a.png").unlink()
    assert torch.equal(reader.read([str(tmp_path / "a.png")]), first[:1])
    with pytest.raises(InputError, match="channels"):
        ImageReader(8, 4)
    with pytest.raises(DataError, match="crops"):
        Pixels.of_hugging_face({"do_center_crop": True})
    with pytest.raises(DataError, match="how to read"):
        Pixels.of_hugging_face({"image_std": [0.0]})


def test_hidden_files_are_passed_over(tmp_path):
    for name in ("b/2.PNG", "a.jpg", ".a.jpg", ".git/3.png", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert [path.name for path in find_images(tmp_path)] == ["a.jpg", "2.PNG"]
