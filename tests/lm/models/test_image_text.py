"""The decoder of text about an image: its mask, caches, generation, FLOPs, and refusals."""

import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fastattn.errors import InputError
from fastattn.lm.generate import Sampling, beam_search
from fastattn.lm.models import ImageTextDecoder, TransformerConfig, make_model, recorded_weights, save_pretrained

CONFIG = TransformerConfig(
    61, 32, 2, 4, max_length=24, kind="image-text", vision_layers=1, image_size=12, patch_size=4
)  # 10 tokens of an image
GREEDY = Sampling(temperature=0)


@pytest.fixture(params=["rope", "learned"])
def model(request):
    torch.manual_seed(0)
    return make_model(dataclasses.replace(CONFIG, positions=request.param)).eval()


def inputs(rows=2, length=7):
    torch.manual_seed(1)
    return torch.randint(61, (rows, length)), torch.randn(rows, 3, 12, 12)


def test_the_image_sees_itself_and_text_sees_the_image_and_what_precedes_it(model):
    tokens, images = inputs()
    logits, weights = model(tokens, images=images, return_weights=True)
    torch.testing.assert_close(logits, model(tokens, images=images))
    place = torch.arange(17)
    seen = (place[None, :] < 10) | (place[None, :] <= place[:, None])
    for layer in weights["self"]:
        assert torch.equal(layer[0, 0] > 0, seen)
    assert len(weights["vision"]) == 1 and weights["vision"][0].shape[-1] == 10


def test_every_part_of_the_image_matters_and_later_text_does_not(model):
    tokens, images = inputs(1)
    with torch.enable_grad():
        images.requires_grad_()
        model(tokens, images=images)[:, 3].sum().backward()
    assert (images.grad.abs().amax(1) > 0).all()
    later = tokens.clone()
    later[:, 5:] = 0  # as padding is
    images = images.detach()
    torch.testing.assert_close(model(later, images=images)[:, :5], model(tokens, images=images)[:, :5])


@pytest.mark.parametrize("page_size", [None, 4])
def test_caches_change_nothing(model, page_size):
    _, images = inputs()
    prompts = [[1, 2, 3], [4]]
    sought = model.generate(prompts, 6, GREEDY, source=images, use_cache=False)
    assert model.generate(prompts, 6, GREEDY, source=images, page_size=page_size) == sought
    found = [beam_search(model, prompts, 5, beams=3, source=images, use_cache=x, page_size=page_size) for x in (0, 1)]
    assert [[beam.tokens for beam in row] for row in found[0]] == [[beam.tokens for beam in row] for row in found[1]]


@torch.no_grad()
def test_contiguous_caches_and_read_images_give_the_same(model):
    tokens, images = inputs()
    whole = model(tokens, images=images)
    caches = model.make_caches(2)
    parts = [model(tokens[:, :3], images=images, caches=caches), model(tokens[:, 3:], caches=caches)]
    torch.testing.assert_close(torch.cat(parts, 1), whole)
    torch.testing.assert_close(model(tokens, prefix=model.read(images)), whole)


def test_without_an_image_it_is_a_language_model(model):
    tokens, images = inputs()
    assert (model(tokens) - model(tokens, images=images)).abs().max() > 1e-3
    assert len(model.generate([[1], [2, 3]], 4, GREEDY)[1]) == 4


def test_a_row_may_be_as_long_as_the_config_says_beside_the_image():
    model = ImageTextDecoder(CONFIG)
    tokens, images = inputs(1, 24)
    assert model(tokens, images=images).shape == (1, 24, 61)
    assert len(model.generate(tokens[:, :20].tolist(), 99, GREEDY, source=images)[0]) == 5


def test_flops_are_those_of_torch():
    model = make_model(dataclasses.replace(CONFIG, attention="eager"))
    tokens, images = inputs(1, 8)
    with FlopCounterMode(display=False) as counter:
        model(tokens, images=images).sum().backward()
    ours = 18 * model.flops_per_token(18)
    assert abs(ours / counter.get_total_flops() - 1) < 0.1  # torch counts what the mask leaves out


def test_what_does_not_fit_is_refused(tmp_path):
    model = ImageTextDecoder(CONFIG)
    tokens, images = inputs()
    with pytest.raises(InputError, match="images: got 1 of them"):
        model(tokens, images=images[:1])
    with pytest.raises(InputError, match="images: got shape"):
        model(tokens, images=images[..., :8])
    with pytest.raises(InputError, match="tensor of images"):
        model.generate([[1]], 2, source=[[1]])
    with pytest.raises(InputError, match="source: got 2 rows"):
        model.generate([[1]], 2, source=images)
    for fields in ({"vision_layers": None}, {"window": 3}, {"positions": "relative"}, {"patch_size": 5}):
        with pytest.raises(InputError):
            dataclasses.replace(CONFIG, **fields)
    with pytest.raises(InputError, match="vision_layers"):
        dataclasses.replace(CONFIG, kind="decoder")
    with pytest.raises(InputError, match="kind 'image-text'"):
        save_pretrained(model, tmp_path / "model")
    with recorded_weights(model) as weights:
        model(tokens)
    assert weights["vision"] == []
