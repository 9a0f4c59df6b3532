"""Attention weights of our own models: those of transformers, for every kind; and nothing is left behind."""

import dataclasses

import pytest
import torch

from fastattn.lm.models import Encoder, SequenceClassifier, from_pretrained, make_model, preset, recorded_weights


@torch.no_grad()
def test_the_weights_are_those_of_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    theirs = transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes)).eval()
    for parameter in theirs.parameters():
        parameter.add_(torch.randn_like(parameter), alpha=0.3)
    theirs.set_attn_implementation("eager")
    theirs.save_pretrained(tmp_path / "t5")
    ours = from_pretrained(tmp_path / "t5")
    source, target = torch.randint(40, (2, 7)), torch.randint(40, (2, 5))
    logits, weights = ours(source, target, return_weights=True)
    found = theirs(input_ids=source, decoder_input_ids=target, output_attentions=True)
    for kind, expected in (
        ("encoder", found.encoder_attentions),
        ("decoder", found.decoder_attentions),
        ("cross", found.cross_attentions),
    ):
        for mine, other in zip(weights[kind], expected, strict=True):
            torch.testing.assert_close(mine, other, atol=1e-5, rtol=0)
    assert torch.equal(logits, ours(source, target)) or torch.allclose(logits, ours(source, target), atol=1e-5)


@pytest.mark.parametrize("name", ["tiny", "bert-tiny", "vit-tiny"])
def test_every_kind_of_model_returns_them(name):
    config = dataclasses.replace(preset(name, 50 if name != "vit-tiny" else 0), width=32, layers=2, heads=2)
    if name == "tiny":
        config = dataclasses.replace(config, window=2, global_layers=(1,), kv_heads=1)
    model = make_model(dataclasses.replace(config, image_size=32)).eval()
    inputs = torch.randn(1, 3, 32, 32) if name == "vit-tiny" else torch.randint(50, (1, 6))
    out, weights = model(inputs, return_weights=True)
    assert [x.shape for x in weights["self"]] == [(1, 2, out.shape[1], out.shape[1])] * 2
    torch.testing.assert_close(weights["self"][0].sum(-1), torch.ones(1, 2, out.shape[1]))
    if name == "tiny":
        assert not weights["self"][0][..., -1, 0].any() and weights["self"][1][..., -1, 0].all()  # the window
    torch.testing.assert_close(out, model(inputs))  # and nothing is recorded any more
    assert len(weights["self"]) == 2


def test_a_head_is_looked_through():
    model = SequenceClassifier(Encoder(dataclasses.replace(preset("bert-tiny", 50), layers=1)), 2)
    with recorded_weights(model) as weights:
        model(torch.randint(50, (1, 4)))
    assert list(weights) == ["self"] and len(weights["self"]) == 1
