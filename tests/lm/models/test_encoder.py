"""The encoders: who sees whom, gradients, packing and padding, images, and the two backends."""

import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fastattn.errors import InputError
from fastattn.lm.models import Encoder, TransformerConfig, VisionEncoder, make_model, preset

BASE = TransformerConfig(61, 32, 2, 4, max_length=24, kind="encoder")
FORMS = {
    "modern": {"kv_heads": 2, "qk_norm": True},
    "bert": {
        "norm": "layer", "norm_place": "after", "activation": "gelu-exact", "positions": "learned", "bias": True,
        "embedding_norm": True, "token_types": 2,
    },
    "alibi": {"positions": "alibi", "activation": "relu"},
    "relative": {"positions": "relative", "activation": "geglu", "attention_scale": 1.0, "relative_distance": 40},
    "sines": {"positions": "sinusoidal", "embedding_scale": 32**0.5, "window": 4, "softcap": 5.0},
}  # fmt: skip


@pytest.fixture(params=FORMS)
def config(request):
    return dataclasses.replace(BASE, **FORMS[request.param])


def randomised(config, seed=0):
    """A model whose every parameter differs from its first value, so that each of them matters."""
    torch.manual_seed(seed)
    model = make_model(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model


def random_tokens(batch=2, length=20):
    return torch.randint(BASE.vocab_size, (batch, length))


def types_of(config, tokens):
    return (tokens % 2) if config.token_types else None


def test_shapes_and_gradients(config):
    model = randomised(config)
    tokens = random_tokens()
    out = model(tokens, token_types=types_of(config, tokens))
    assert out.shape == (2, 20, 32)
    (out * torch.randn_like(out)).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_every_token_sees_every_other():
    model = randomised(BASE).eval()
    tokens = random_tokens()
    changed = tokens.clone()
    changed[:, 12] = (changed[:, 12] + 1) % BASE.vocab_size
    assert (model(tokens) != model(changed)).any(-1).all()


def test_the_window_ends_on_both_sides():
    model = randomised(dataclasses.replace(BASE, layers=1, window=3)).eval()
    tokens = random_tokens()
    changed = tokens.clone()
    changed[:, 10] = (changed[:, 10] + 1) % BASE.vocab_size
    assert (model(tokens) != model(changed)).any(-1).all(0).nonzero()[:, 0].tolist() == list(range(7, 14))


def test_packed_documents_are_computed_as_if_alone(config):
    model = randomised(config).eval()
    tokens = random_tokens(batch=1)
    positions = torch.cat([torch.arange(7), torch.arange(13)])[None]
    segments = torch.tensor([[0] * 7 + [1] * 13], dtype=torch.int32)
    packed = model(tokens, positions=positions, segment_ids=segments)
    alone = torch.cat([model(tokens[:, :7]), model(tokens[:, 7:])], dim=1)
    torch.testing.assert_close(packed, alone, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(config, side):
    model = randomised(config).eval()
    tokens = random_tokens()
    mask = torch.arange(20) < torch.tensor([[20], [13]])
    mask = mask if side == "right" else mask.flip(1)
    padded = model(tokens, mask=mask)
    torch.testing.assert_close(padded[1, mask[1]], model(tokens[1:, mask[1]])[0], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(padded[0], model(tokens)[0], atol=1e-5, rtol=1e-4)
    segments = (torch.arange(20) >= 8).int().expand(2, -1)
    both = model(tokens, segment_ids=segments, mask=mask, positions=torch.arange(20))
    cut = (segments == 1) & mask
    alone = model(tokens[1:, cut[1]], positions=torch.arange(20)[cut[1]])[0]
    torch.testing.assert_close(both[1, cut[1]], alone, atol=1e-5, rtol=1e-4)


def test_eager_and_fastattn_agree(config):
    model = randomised(config).eval()
    eager = make_model(dataclasses.replace(config, attention="eager"))
    eager.load_state_dict(model.state_dict())
    tokens = random_tokens()
    mask = torch.arange(20) < torch.tensor([[20], [13]])
    outs = []
    for one in (model, eager.eval()):
        out = one(tokens, mask=mask)[mask]
        out.square().sum().backward()
        outs.append([out, *(p.grad for p in one.parameters())])
    for mine, other in zip(*outs, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-4, rtol=1e-3)


def test_token_types_matter():
    config = dataclasses.replace(BASE, **FORMS["bert"])
    model = randomised(config).eval()
    tokens = random_tokens()
    zeros = torch.zeros_like(tokens)
    torch.testing.assert_close(model(tokens), model(tokens, token_types=zeros))
    assert not torch.equal(model(tokens), model(tokens, token_types=zeros + 1))


def test_flops_per_token_agree_with_torchs_counter(config):
    model = randomised(config)
    tokens = random_tokens(length=24)
    with FlopCounterMode(display=False) as counter:
        model(tokens).sum().backward()
    assert model.flops_per_token(24) == pytest.approx(counter.get_total_flops() / tokens.numel(), rel=1e-6)


VISION = TransformerConfig(
    0, 32, 2, 4, kind="vision", positions="learned", norm="layer", bias=True, image_size=12, patch_size=4
)


def test_images():
    model = randomised(VISION)
    images = torch.randn(2, 3, 12, 12)
    out = model(images)
    assert out.shape == (2, 10, 32)
    (out * torch.randn_like(out)).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
    with FlopCounterMode(display=False) as counter:
        model(images.requires_grad_()).sum().backward()
    assert model.flops_per_token(10) == pytest.approx(counter.get_total_flops() / 20, rel=1e-6)
    assert model.flops_per_token() == model.flops_per_token(10)


def test_patches_are_the_squares_of_the_image_row_by_row():
    """With no blocks a patch's state is its own square's, so a change shows in one place alone."""
    model = randomised(dataclasses.replace(VISION, layers=1)).eval()
    model.blocks = torch.nn.ModuleList()
    images = torch.randn(1, 3, 12, 12)
    changed = images.clone()
    changed[0, 1, 5, 10] += 1  # second row of patches, third column
    assert (model(images) != model(changed)).any(-1).nonzero()[:, 1].tolist() == [1 + 3 + 2]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: Encoder(BASE)(torch.zeros(5, dtype=torch.long)), "tokens: got shape (5,)"),
        (lambda: Encoder(BASE)(torch.zeros(1, 5)), "torch.float32; allowed: (B, S), int64"),
        (lambda: Encoder(BASE)(torch.zeros(1, 25, dtype=torch.long)), "at most max_length = 24"),
        (lambda: Encoder(BASE)(random_tokens(), mask=torch.ones(2, 20)), "mask: got shape (2, 20), torch.float32"),
        (lambda: Encoder(BASE)(random_tokens(), mask=torch.ones(20).bool()), "torch.bool of shape (B, S) = (2, 20)"),
        (lambda: Encoder(BASE)(random_tokens(), token_types=random_tokens()), "the config has no token_types"),
        (lambda: Encoder(preset("tiny", 50)), "config: got kind 'decoder'; allowed: kind 'encoder' for Encoder"),
        (lambda: VisionEncoder(VISION)(torch.ones(1, 3, 12, 8)), "allowed: (B, 3, 12, 12)"),
    ],
)
def test_refusals(call, words):
    with pytest.raises(InputError) as error:
        call()
    assert words in str(error.value)
