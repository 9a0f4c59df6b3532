"""TransformerConfig: defaults filled in, presets, and every refusal in words."""

import dataclasses

import pytest

from fastattn.errors import InputError
from fastattn.models import PRESETS, TransformerConfig, preset


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
    assert TransformerConfig.from_dict(config.to_dict()) == config


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
        ({"norm": "batch"}, "norm: got 'batch'; allowed: 'rms' or 'layer'"),
        ({"activation": "tanh"}, "'swiglu' or 'geglu' or 'gelu' or 'gelu-exact' or 'relu'"),
        ({"positions": "sine"}, "'rope' or 'learned' or 'sinusoidal' or 'alibi' or 'relative' or 'none'"),
        ({"attention": "flash"}, "attention: got 'flash'; allowed: 'fastattn' or 'eager'"),
        ({"window": -1}, "window: got -1"),
        ({"softcap": 0.0}, "softcap: got 0.0"),
        ({"rope_base": 0.0}, "rope_base: got 0.0"),
        ({"dropout": 1.0}, "dropout: got 1.0"),
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
