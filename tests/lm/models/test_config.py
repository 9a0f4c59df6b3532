"""TransformerConfig: defaults filled in, presets, and every refusal in words."""

import dataclasses
import json

import pytest
import torch

from fastattn.errors import InputError
from fastattn.lm.models import (
    PRESETS,
    Decoder,
    Encoder,
    EncoderDecoder,
    TransformerConfig,
    VisionEncoder,
    make_model,
    preset,
)
from fastattn.nn.rotary import RotaryScaling


def make(**fields):
    return TransformerConfig(**({"vocab_size": 50, "width": 32, "layers": 2, "heads": 4} | fields))


def test_defaults_are_derived_and_follow_a_change_of_size():
    config = make()
    assert config.head_shape == (4, 4, 8)
    assert config.hidden == 96  # two thirds of 128, rounded up to a multiple of 32
    assert make(activation="gelu").hidden == 128
    assert dataclasses.replace(config, width=64).head_shape == (4, 4, 16)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_valid(name):
    config = preset(name, vocab_size=50257)
    assert config.width % config.heads == 0
    assert TransformerConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with torch.device("meta"):
        model = make_model(config)
    assert model.config == config and model.num_parameters() > 0


@pytest.mark.parametrize(
    ("name", "vocab_size", "published"),
    [
        ("gpt2-124m", 50257, 124_439_808),
        ("bert-base", 30522, 108_891_648),  # 109,482,240 with the pooler
        ("transformer-base", 37000, 63_082_496),
        ("t5-small", 32128, 60_506_624),
        ("vit-base", 0, 85_798_656),
    ],
)
def test_presets_have_the_published_number_of_parameters(name, vocab_size, published):
    with torch.device("meta"):
        assert make_model(preset(name, vocab_size)).num_parameters() == published


def test_every_kind_is_made_and_scaled_rotations_survive_json():
    kinds = {"decoder": Decoder, "encoder": Encoder, "encoder-decoder": EncoderDecoder, "vision": VisionEncoder}
    for kind, cls in kinds.items():
        assert type(make_model(make(kind=kind, image_size=8, patch_size=4))) is cls
    config = make(rope_scaling=RotaryScaling(8.0, 1.0, 4.0, 8192))
    assert TransformerConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize("kind", ["decoder", "encoder", "encoder-decoder", "vision"])
def test_models_compile_in_one_piece(kind):
    torch.manual_seed(0)
    model = make_model(make(kind=kind, layers=1, image_size=8, patch_size=4, max_length=16))
    tokens = torch.randint(50, (2, 8))
    inputs = {"vision": (torch.randn(2, 3, 8, 8),), "encoder-decoder": (tokens, tokens)}.get(kind, (tokens,))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    found = []
    for call in (compiled, model):
        out = call(*inputs)
        model.zero_grad()
        out.square().sum().backward()
        found.append([out, *(p.grad.clone() for p in model.parameters())])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"width": 0}, "width: got 0; allowed: a positive int"),
        ({"layers": 1.5}, "layers: got 1.5"),
        ({"heads": True}, "heads: got True"),
        ({"heads": 5}, "heads: got 5; allowed: a divisor of width 32"),
        ({"kv_heads": 3}, "kv_heads: got 3; allowed: a divisor of heads 4"),
        ({"kv_heads": 0}, "kv_heads: got 0"),
        ({"head_dim": 7}, "head_dim: got 7; allowed: an even number"),
        ({"mlp_width": -1}, "mlp_width: got -1"),
        ({"norm": "batch"}, "norm: got 'batch'; allowed: 'rms' or 'rms-zero'"),
        ({"activation": "tanh"}, "'swiglu' or 'geglu' or 'geglu-exact' or 'gelu' or 'gelu-exact' or 'relu'"),
        ({"positions": "sine"}, "'rope' or 'learned' or 'sinusoidal' or 'alibi' or 'relative' or 'none'"),
        ({"attention": "flash"}, "attention: got 'flash'; allowed: 'fastattn' or 'eager'"),
        ({"window": -1}, "window: got -1"),
        ({"softcap": 0.0}, "softcap: got 0.0"),
        ({"rope_base": 0.0}, "rope_base: got 0.0"),
        ({"dropout": 1.0}, "dropout: got 1.0"),
        ({"kind": "mixer"}, "kind: got 'mixer'; allowed: 'decoder' or 'encoder' or 'encoder-decoder' or 'vision'"),
        ({"norm_eps": 0.0}, "norm_eps: got 0.0"),
        ({"embedding_scale": 0.0}, "embedding_scale: got 0.0"),
        ({"attention_scale": -1.0}, "attention_scale: got -1.0"),
        ({"decoder_layers": 2}, "decoder_layers: got 2; allowed: its default, as kind is 'decoder'"),
        ({"token_types": 2}, "It belongs to kind encoder."),
        ({"pooler": True}, "It belongs to kind encoder or vision."),
        ({"positions": "relative", "relative_buckets": 30}, "relative_buckets: got 30; allowed: a multiple of 4"),
        ({"positions": "relative", "relative_distance": 16}, "with relative_distance more than half of it"),
        ({"positions": "sinusoidal", "width": 33, "heads": 3}, "width: got 33; allowed: an even number"),
        ({"kind": "vision", "patch_size": 15}, "patch_size: got 15; allowed: a divisor of image_size 224"),
        ({"kind": "vision", "channels": 0}, "channels: got 0"),
    ],
)
def test_refusals_say_what_is_allowed(fields, words):
    with pytest.raises(InputError) as error:
        make(**fields)
    assert words in str(error.value)


def test_unknown_names_are_refused():
    with pytest.raises(InputError, match="tiny, small"):
        preset("huge", 100)
    with pytest.raises(InputError, match="unknown fields \\['colour'\\]"):
        TransformerConfig.from_dict(make().to_dict() | {"colour": "red"})
    with pytest.raises(InputError, match="no \\['width'\\]"):
        TransformerConfig.from_dict({"vocab_size": 5, "layers": 1, "heads": 1})
