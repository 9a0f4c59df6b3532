"""Heads: shapes, gradients, pooling that sees no padding, FLOPs, and refusals."""

import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fastattn.errors import InputError
from fastattn.lm.models import (
    Decoder,
    Encoder,
    MaskedLM,
    SequenceClassifier,
    SpanExtractor,
    TokenClassifier,
    TransformerConfig,
    VisionEncoder,
)

CONFIG = TransformerConfig(61, 32, 2, 4, max_length=24)
ENCODER = dataclasses.replace(CONFIG, kind="encoder", bias=True)
VISION = TransformerConfig(0, 32, 2, 4, kind="vision", positions="learned", image_size=12, patch_size=4)
MASK = torch.arange(20) < torch.tensor([[20], [13]])
HEADS = {
    "masked": lambda: MaskedLM(Encoder(ENCODER)),
    "classes": lambda: SequenceClassifier(Encoder(ENCODER), 3),
    "classes-pooled": lambda: SequenceClassifier(Encoder(dataclasses.replace(ENCODER, pooler=True)), 3),
    "classes-mean": lambda: SequenceClassifier(Encoder(ENCODER), 3, pool="mean"),
    "classes-decoder": lambda: SequenceClassifier(Decoder(CONFIG), 3),
    "tokens": lambda: TokenClassifier(Encoder(ENCODER), 5),
    "tokens-decoder": lambda: TokenClassifier(Decoder(CONFIG), 5),
    "spans": lambda: SpanExtractor(Encoder(ENCODER)),
}
SHAPES = {"masked": (2, 20, 61), "classes": (2, 3), "tokens": (2, 20, 5), "spans": (2, 20)}


@pytest.fixture(params=HEADS)
def named(request):
    torch.manual_seed(0)
    model = HEADS[request.param]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return request.param.partition("-")[0], model


def random_tokens(length=20):
    return torch.randint(61, (2, length))


def test_shapes_and_gradients(named):
    name, model = named
    out = model(random_tokens(), mask=MASK)
    out = torch.stack(out)[:, MASK] if isinstance(out, tuple) else out
    assert out.shape == ((2, 33) if name == "spans" else SHAPES[name])
    (out * torch.randn_like(out)).sum().backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, parameter_name
    assert model.num_parameters() == sum(p.numel() for p in model.parameters())
    assert model.config is model.backbone.config


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(named, side):
    name, model = named
    model.eval()
    mask = MASK if side == "right" else MASK.flip(1)
    tokens = random_tokens()
    padded, alone = model(tokens, mask=mask), model(tokens[1:, mask[1]])
    if name == "spans":
        padded, alone = torch.stack(padded, -1), torch.stack(alone, -1)
    padded = padded[1] if name == "classes" else padded[1, mask[1]]
    torch.testing.assert_close(padded, alone[0], atol=1e-4, rtol=1e-4)


def test_spans_never_lie_in_padding():
    start, end = SpanExtractor(Encoder(ENCODER))(random_tokens(), mask=MASK)
    assert (start[~MASK] == -torch.inf).all() and (end[~MASK] == -torch.inf).all()
    assert start[MASK].isfinite().all() and end[MASK].isfinite().all()


def test_packed_rows_reach_the_backbone():
    model = TokenClassifier(Encoder(ENCODER), 5).eval()
    tokens = random_tokens()
    segments = (torch.arange(20) >= 8).int().expand(2, -1)
    positions = torch.arange(20) % 8
    positions[16:] += 8
    packed = model(tokens, segment_ids=segments, positions=positions)
    torch.testing.assert_close(packed[:, :8], model(tokens[:, :8]), atol=1e-5, rtol=1e-4)


def test_images():
    model = SequenceClassifier(VisionEncoder(VISION), 4, labels=("n", "e", "s", "w"))
    out = model(torch.randn(2, 3, 12, 12))
    assert out.shape == (2, 4) and model.labels == ("n", "e", "s", "w")
    out.square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_flops_per_token_agree_with_torchs_counter(named):
    _, model = named
    tokens = random_tokens()
    with FlopCounterMode(display=False) as counter:
        out = model(tokens)
        (sum(x.sum() for x in out) if isinstance(out, tuple) else out.sum()).backward()
    expected = counter.get_total_flops() / tokens.numel()
    pooler = getattr(model.backbone, "pooler", None)
    of_pooler = 0 if pooler is None else 6 * pooler.weight.numel() / 20
    assert model.flops_per_token(20) + of_pooler == pytest.approx(expected, rel=1e-6)


def test_a_pooler_rests_where_no_head_uses_it():
    backbone = Encoder(dataclasses.replace(ENCODER, pooler=True))
    assert backbone.pooler.weight.requires_grad
    model = TokenClassifier(backbone, 2)
    model(random_tokens()).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: MaskedLM(Decoder(CONFIG)), "backbone: got Decoder; allowed: an Encoder"),
        (lambda: SequenceClassifier(Encoder(ENCODER), 0), "num_labels: got 0"),
        (lambda: SequenceClassifier(Encoder(ENCODER), 2, labels=("a",)), "labels: got 1 names"),
        (lambda: TokenClassifier(Encoder(ENCODER), 2, labels=("a", "a")), "labels: got 2 names, 1 different"),
        (lambda: SequenceClassifier(Encoder(ENCODER), 2, pool="max"), "pool: got 'max'"),
        (
            lambda: SequenceClassifier(Decoder(CONFIG), 2)(random_tokens(), token_types=random_tokens()),
            "token_types: got a tensor",
        ),
        (
            lambda: SequenceClassifier(VisionEncoder(VISION), 2)(torch.randn(2, 3, 12, 12), mask=MASK),
            "mask: got a tensor; allowed: None, as the backbone reads images",
        ),
    ],
)
def test_refusals(make, words):
    with pytest.raises(InputError) as error:
        make()
    assert words in str(error.value)
