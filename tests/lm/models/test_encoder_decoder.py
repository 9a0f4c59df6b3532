"""The encoder-decoder: who sees whom, padding on both sides, caches, gradients, and that it learns to copy."""

import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fastattn.errors import InputError
from fastattn.lm.models import EncoderDecoder, TransformerConfig, blocks
from fastattn.lm.models.positions import sinusoidal

BASE = TransformerConfig(61, 32, 2, 4, max_length=24, kind="encoder-decoder", decoder_layers=3)
FORMS = {
    "modern": {"kv_heads": 2, "qk_norm": True},
    "original": {
        "norm": "layer", "norm_place": "after", "activation": "relu", "positions": "sinusoidal", "bias": True,
        "embedding_scale": 32**0.5,
    },
    "t5": {
        "positions": "relative", "activation": "geglu", "attention_scale": 1.0, "logit_scale": 32**-0.5, "head_dim": 12,
        "relative_distance": 40,
    },
    "learned": {"positions": "learned", "tie_embeddings": False, "window": 5, "sinks": True},
    "alibi": {"positions": "alibi"},
}  # fmt: skip
SOURCE_MASK = torch.arange(9) < torch.tensor([[9], [5]])
TARGET_MASK = torch.arange(12) >= torch.tensor([[0], [3]])


@pytest.fixture(params=FORMS)
def config(request):
    return dataclasses.replace(BASE, **FORMS[request.param])


def randomised(config, seed=0):
    torch.manual_seed(seed)
    model = EncoderDecoder(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model


def random_pair(batch=2):
    return torch.randint(BASE.vocab_size, (batch, 9)), torch.randint(BASE.vocab_size, (batch, 12))


def test_shapes_and_gradients(config):
    model = randomised(config)
    logits = model(*random_pair(), source_mask=SOURCE_MASK, target_mask=TARGET_MASK)
    assert logits.shape == (2, 12, 61)
    assert len(model.encoder.blocks) == 2 and len(model.decoder.blocks) == 3
    (logits * torch.randn_like(logits)).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_the_target_sees_the_whole_source_and_nothing_later():
    model = randomised(BASE).eval()
    source, target = random_pair()
    other_source, other_target = source.clone(), target.clone()
    other_source[:, -1] = (other_source[:, -1] + 1) % BASE.vocab_size
    other_target[:, 7] = (other_target[:, 7] + 1) % BASE.vocab_size
    before = model(source, target)
    assert (model(other_source, target) != before).any(-1).all()
    assert (model(source, other_target) != before).any(-1).all(0).nonzero()[:, 0].tolist() == [7, 8, 9, 10, 11]


def test_padding_changes_nothing(config):
    model = randomised(config).eval()
    source, target = random_pair()
    padded = model(source, target, source_mask=SOURCE_MASK, target_mask=TARGET_MASK)
    torch.testing.assert_close(padded[1, 3:], model(source[1:, :5], target[1:, 3:])[0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(padded[0], model(source[:1], target[:1])[0], atol=1e-4, rtol=1e-4)


def test_memory_stands_for_the_source(config):
    model = randomised(config).eval()
    source, target = random_pair()
    memory = model.encode(source, SOURCE_MASK)
    assert memory.shape == (2, 9, 32)
    expected = model(source, target, source_mask=SOURCE_MASK)
    assert torch.equal(model(None, target, source_mask=SOURCE_MASK, memory=memory), expected)


@torch.no_grad()
def test_caches_change_nothing(config, monkeypatch):
    model = randomised(config).eval()
    source, target = random_pair()
    whole = model(source, target, source_mask=SOURCE_MASK, target_mask=TARGET_MASK)
    computed = []
    real = blocks.CrossAttention._keys_and_values
    monkeypatch.setattr(
        blocks.CrossAttention, "_keys_and_values", lambda self, memory: computed.append(self) or real(self, memory)
    )
    caches = model.make_caches(2, 12)
    for _ in range(2):  # again after a reset
        pieces, end = [], 0
        for part in target.split([5, 1, 1, 3, 2], dim=1):
            end += part.shape[1]
            first = {"source_mask": SOURCE_MASK} if end == 5 else {}
            read = source if end == 5 else None
            pieces.append(model(read, part, target_mask=TARGET_MASK[:, :end], caches=caches, **first))
        found = torch.cat(pieces, dim=1)
        torch.testing.assert_close(found[TARGET_MASK], whole[TARGET_MASK], atol=1e-4, rtol=1e-4)
        assert len(computed) == 3  # once a layer
        for cache in caches:
            cache.reset()
        computed.clear()


@torch.no_grad()
def test_caches_whose_rows_change_places(config):
    """As beams do: the keys and values of the source go with the row."""
    model = randomised(config).eval()
    source, target = random_pair()
    whole = model(source, target, source_mask=SOURCE_MASK)
    caches = model.make_caches(2, 12)
    model(source, target[:, :7], source_mask=SOURCE_MASK, caches=caches)
    for cache in caches:
        cache.select([1, 0])
    found = model(None, target.flip(0)[:, 7:], caches=caches)
    torch.testing.assert_close(found, whole.flip(0)[:, 7:], atol=1e-4, rtol=1e-4)


def test_eager_and_fastattn_agree(config):
    model = randomised(config)
    eager = EncoderDecoder(dataclasses.replace(config, attention="eager"))
    eager.load_state_dict(model.state_dict())
    source, target = random_pair()
    found = []
    for one in (model, eager):
        logits = one(source, target, source_mask=SOURCE_MASK)
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten()).backward()
        found.append([logits, *(p.grad for p in one.parameters())])
    for mine, other in zip(*found, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-4, rtol=1e-3)


def test_it_learns_to_reverse():
    """The answer is in the source alone, so a loss near 0 needs cross-attention and positions that work."""
    torch.manual_seed(0)
    config = TransformerConfig(12, 64, 1, 4, max_length=8, kind="encoder-decoder", positions="learned")
    model = EncoderDecoder(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(250):
        source = torch.randint(2, 12, (32, 6))
        answer = source.flip(1)
        target = torch.cat([torch.ones_like(answer[:, :1]), answer[:, :-1]], dim=1)
        loss = torch.nn.functional.cross_entropy(model(source, target).flatten(0, 1), answer.flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() < 0.2  # guessing is 2.3


def test_flops_per_token_agree_with_torchs_counter(config):
    model = randomised(config)
    source, target = random_pair()
    with FlopCounterMode(display=False) as counter:
        model(source, target).sum().backward()
    assert model.flops_per_token(12, 9) == pytest.approx(counter.get_total_flops() / target.numel(), rel=1e-6)


def test_the_first_loss_is_that_of_guessing(config):
    model = EncoderDecoder(config)
    source, target = random_pair()
    labels = torch.randint(61, target.shape)
    loss = torch.nn.functional.cross_entropy(model(source, target).flatten(0, 1), labels.flatten())
    assert abs(loss.item() - torch.tensor(61.0).log().item()) < 0.2


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda m, s, t: m(None, t), "source: got None; allowed: tokens, unless memory or filled caches"),
        (lambda m, s, t: m(None, t, caches=m.make_caches(2)), "source: got None"),
        (lambda m, s, t: m(s[0], t), "source: got shape (9,)"),
        (lambda m, s, t: m(s, t[0]), "target: got shape (12,)"),
        (lambda m, s, t: m(s[:1], t), "memory: got shape (1, 9, 32); allowed: (B, S_s, C) with B = 2"),
        (lambda m, s, t: m(s, t, source_mask=SOURCE_MASK.int()), "mask: got shape (2, 9), torch.int32"),
        (
            lambda m, s, t: m(None, t, memory=m.encode(s), source_mask=SOURCE_MASK[:, :4]),
            "source_mask: got shape (2, 4), torch.bool; allowed: torch.bool of shape (B, S_s) = (2, 9)",
        ),
        (lambda m, s, t: m(None, t, memory=m.encode(s), source_mask=SOURCE_MASK.int()), "(2, 9), torch.int32; allowed"),
        (lambda m, s, t: m(s, t.repeat(1, 3)), "36 in a row; allowed: at most max_length = 24"),
    ],
)
def test_refusals(call, words):
    with pytest.raises(InputError) as error:
        call(EncoderDecoder(BASE), *random_pair())
    assert words in str(error.value)


def torchs_layer(cls, **sizes):
    return cls(32, 4, 128, dropout=0.0, activation="relu", batch_first=True, **sizes)


def copy_attention(mine, other, is_cross=False):
    q, k, v = other.in_proj_weight.chunk(3)
    b_q, b_k, b_v = other.in_proj_bias.chunk(3)
    if is_cross:
        parts = {"q.weight": q, "q.bias": b_q, "kv.weight": torch.cat([k, v]), "kv.bias": torch.cat([b_k, b_v])}
    else:
        parts = {"qkv.weight": other.in_proj_weight, "qkv.bias": other.in_proj_bias}
    mine.load_state_dict(parts | {f"out.{name}": x for name, x in other.out_proj.state_dict().items()})


def copy_layer(block, layer):
    copy_attention(block.attention, layer.self_attn)
    pairs = [(block.attention_norm, layer.norm1), (block.mlp.up, layer.linear1), (block.mlp.down, layer.linear2)]
    if block.cross_attention is not None:
        copy_attention(block.cross_attention, layer.multihead_attn, is_cross=True)
        pairs += [(block.cross_norm, layer.norm2), (block.mlp_norm, layer.norm3)]
    else:
        pairs += [(block.mlp_norm, layer.norm2)]
    for mine, other in pairs:
        mine.load_state_dict(other.state_dict())


@torch.no_grad()
def test_the_original_form_agrees_with_torchs_layers():
    torch.manual_seed(0)
    model = randomised(dataclasses.replace(BASE, **FORMS["original"])).eval()
    layers = [torchs_layer(torch.nn.TransformerEncoderLayer).eval() for _ in range(2)]
    more = [torchs_layer(torch.nn.TransformerDecoderLayer).eval() for _ in range(3)]
    for layer in (*layers, *more):
        for parameter in layer.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    for block, layer in zip((*model.encoder.blocks, *model.decoder.blocks), (*layers, *more), strict=True):
        copy_layer(block, layer)
    source, target = random_pair()
    embed = model.embedding
    x = embed(source) * 32**0.5 + sinusoidal(torch.arange(9), 32)
    for layer in layers:
        x = layer(x, src_key_padding_mask=~SOURCE_MASK)
    y = embed(target) * 32**0.5 + sinusoidal(torch.arange(12), 32)
    later = torch.nn.Transformer.generate_square_subsequent_mask(12)
    for layer in more:
        y = layer(y, x, tgt_mask=later, memory_key_padding_mask=~SOURCE_MASK)
    found = model(source, target, source_mask=SOURCE_MASK)
    torch.testing.assert_close(found, y @ embed.weight.T, atol=1e-4, rtol=1e-4)
