"""The decoder: what it computes, that gradients reach everything, documents and caches, and its FLOP count."""

import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fastattn.errors import InputError
from fastattn.lm.models import Decoder, TransformerConfig, preset
from fastattn.lm.train.data import Batch
from fastattn.lm.train.tasks import next_token_loss

BASE = TransformerConfig(vocab_size=61, width=32, layers=2, heads=4, max_length=24)
FORMS = {
    "plain": {},
    "grouped": {"kv_heads": 2, "qk_norm": True, "head_dim": 16},
    "gpt2": {"norm": "layer", "activation": "gelu", "positions": "learned", "bias": True},
    "window": {"window": 3, "sinks": True, "softcap": 5.0, "tie_embeddings": False},
    "alibi": {"positions": "alibi", "norm_place": "after"},
    "relative": {"positions": "relative", "activation": "geglu", "relative_distance": 40},
    "sines": {"positions": "sinusoidal", "activation": "relu", "norm": "layer", "embedding_scale": 5.0},
}


@pytest.fixture(params=FORMS)
def config(request):
    return dataclasses.replace(BASE, **FORMS[request.param])


def make_model(config, seed=0):
    """A decoder whose every parameter differs from its first value, so that each of them matters."""
    torch.manual_seed(seed)
    model = Decoder(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model


def random_tokens(batch=2, length=20):
    return torch.randint(BASE.vocab_size, (batch, length))


def test_shapes_and_gradients(config):
    model = make_model(config)
    logits = model(random_tokens())
    assert logits.shape == (2, 20, 61)
    logits.square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_a_token_sees_no_later_one(config):
    model = make_model(config).eval()
    tokens = random_tokens()
    changed = tokens.clone()
    changed[:, 12:] = (changed[:, 12:] + 1) % BASE.vocab_size
    before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[:, :12], after[:, :12])
    assert (before[:, 12:] != after[:, 12:]).any()


def test_the_window_ends_what_a_token_sees():
    config = dataclasses.replace(BASE, layers=1, window=3)
    model = make_model(config).eval()
    tokens = random_tokens()
    changed = tokens.clone()
    changed[:, 5] = (changed[:, 5] + 1) % BASE.vocab_size
    differs = (model(tokens) != model(changed)).any(-1).all(0)
    assert differs.nonzero()[:, 0].tolist() == [5, 6, 7, 8]


def test_packed_documents_are_computed_as_if_alone(config):
    model = make_model(config).eval()
    tokens = random_tokens(batch=1)
    positions = torch.cat([torch.arange(7), torch.arange(13)])[None]
    segments = torch.tensor([[0] * 7 + [1] * 13], dtype=torch.int32)
    packed = model(tokens, positions=positions, segment_ids=segments)
    alone = torch.cat([model(tokens[:, :7]), model(tokens[:, 7:])], dim=1)
    torch.testing.assert_close(packed, alone, atol=1e-5, rtol=1e-4)


def test_caches_change_nothing(config):
    model = make_model(config).eval()
    tokens = random_tokens()
    with torch.no_grad():
        whole = model(tokens)
        caches = model.make_caches(2)
        pieces = [model(part, caches=caches) for part in tokens.split([9, 1, 1, 4, 5], dim=1)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(config, side):
    model = make_model(config).eval()
    tokens = random_tokens()
    mask = torch.arange(20) < torch.tensor([[20], [13]])
    mask = mask if side == "right" else mask.flip(1)
    padded = model(tokens, mask=mask)
    torch.testing.assert_close(padded[1, mask[1]], model(tokens[1:, mask[1]])[0], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(padded[0], model(tokens)[0], atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_prompts_of_different_lengths_share_a_cache(config):
    """Padded on the left, as prompts are in a batch, each row is computed as if alone."""
    model = make_model(config).eval()
    tokens = random_tokens()
    mask = torch.arange(20) >= torch.tensor([[0], [6]])
    caches = model.make_caches(2, 20)
    pieces, end = [], 0
    for part in tokens.split([11, 1, 1, 4, 3], dim=1):
        end += part.shape[1]
        pieces.append(model(part, mask=mask[:, :end], caches=caches))
    found = torch.cat(pieces, dim=1)
    torch.testing.assert_close(found[0], model(tokens[:1])[0], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found[1, 6:], model(tokens[1:, 6:])[0], atol=1e-5, rtol=1e-4)


def test_hidden_states_make_the_logits(config):
    model = make_model(config).eval()
    tokens = random_tokens()
    hidden = model.hidden(tokens)
    assert hidden.shape == (2, 20, 32)
    assert torch.equal(model.logits(hidden), model(tokens))


def test_checkpoints_of_the_first_version_fit():
    """The names of tensors and fields that fastattn train has stored since its first version."""
    first = {
        "vocab_size": 61, "width": 32, "layers": 1, "heads": 4, "kv_heads": None, "head_dim": None, "mlp_width": None,
        "max_length": 24, "norm": "rms", "activation": "swiglu", "positions": "rope", "rope_base": 10000.0,
        "window": None, "softcap": None, "sinks": True, "qk_norm": True, "bias": False, "tie_embeddings": False,
        "dropout": 0.0, "attention": "fastattn",
    }  # fmt: skip
    block = ["attention_norm", "attention.qkv", "attention.out", "attention.q_norm", "attention.k_norm"]
    block += ["mlp_norm", "mlp.up", "mlp.down"]
    names = ["embedding", *(f"blocks.0.{name}" for name in block), "norm", "head"]
    expected = {f"{name}.weight" for name in names} | {"blocks.0.attention.sinks"}
    assert Decoder(TransformerConfig.from_dict(first)).state_dict().keys() == expected
    gpt2 = dataclasses.replace(BASE, **FORMS["gpt2"])
    assert "position_embedding.weight" in Decoder(gpt2).state_dict()


def losses(config, steps):
    """Losses of some steps of training on packed rows with two documents each."""
    model = make_model(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    random = torch.Generator().manual_seed(1)
    found = []
    for _ in range(steps):
        tokens = torch.randint(BASE.vocab_size, (4, 21), generator=random)
        tokens[:, 1::2] = tokens[:, ::2][:, :10]  # something to learn
        segments = (torch.arange(20) >= 8).int().expand(4, -1)
        batch = Batch(tokens[:, :-1], tokens[:, 1:], torch.arange(20) % 12, segments)
        loss = next_token_loss(model, batch) / 80
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


def test_training_is_the_same_with_eager_attention(config):
    ours, eager = losses(config, 30), losses(dataclasses.replace(config, attention="eager"), 30)
    assert ours[-1] < ours[0] - 0.3
    torch.testing.assert_close(ours, eager, atol=2e-4, rtol=2e-4)


def test_eager_really_is_eager(monkeypatch):
    asked = []
    from fastattn.lm.models import blocks

    real = blocks.fastattn.attention
    monkeypatch.setattr(blocks.fastattn, "attention", lambda *a, **k: asked.append(k["backend"]) or real(*a, **k))
    for kind in ("eager", "fastattn"):
        Decoder(dataclasses.replace(BASE, attention=kind, layers=1))(random_tokens())
    assert asked == ["eager", None]


def test_dropout_works_in_training_only():
    model = make_model(dataclasses.replace(BASE, dropout=0.5))
    tokens = random_tokens()
    assert not torch.equal(model(tokens), model(tokens))
    model.eval()
    assert torch.equal(model(tokens), model(tokens))


def test_seeds_decide_the_weights():
    torch.manual_seed(5)
    one = Decoder(BASE).state_dict()
    torch.manual_seed(5)
    two = Decoder(BASE).state_dict()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_the_first_loss_is_that_of_guessing():
    model = Decoder(preset("tiny", vocab_size=500))
    tokens = torch.randint(500, (2, 33))
    loss = torch.nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
    assert abs(loss.item() - torch.tensor(500.0).log().item()) < 0.15


def test_flops_per_token_agree_with_torchs_counter(config):
    model = make_model(config)
    tokens = random_tokens(length=24)
    with FlopCounterMode(display=False) as counter:
        model(tokens).sum().backward()
    assert model.flops_per_token(24) == pytest.approx(counter.get_total_flops() / tokens.numel(), rel=1e-6)


def test_bfloat16_autocast_stays_close():
    model = make_model(dataclasses.replace(BASE, **FORMS["grouped"])).eval()
    tokens = random_tokens()
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model(tokens)
    assert rounded.dtype == torch.bfloat16
    exact = model(tokens)
    assert (rounded - exact).norm() < 0.03 * exact.norm()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda model: model(torch.zeros(5, dtype=torch.long)), "tokens: got shape (5,)"),
        (lambda model: model(torch.zeros(1, 25, dtype=torch.long)), "25 in a row; allowed: at most max_length = 24"),
        (
            lambda model: model(random_tokens(), segment_ids=torch.zeros(2, 20).int(), caches=model.make_caches(2)),
            "segment_ids: got a tensor together with caches",
        ),
    ],
)
def test_refusals(call, words):
    with pytest.raises(InputError) as error:
        call(Decoder(BASE))
    assert words in str(error.value)
