"""Decoding: the same tokens with and without cache, sampling as defined, whole characters while streaming."""

import dataclasses

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from fastattn.errors import InputError
from fastattn.generate import Sampling, decode_stream, generate, stream_text
from fastattn.models import Decoder, TransformerConfig

CONFIG = TransformerConfig(vocab_size=258, width=32, layers=2, heads=4, kv_heads=2, max_length=40, window=12)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(3)
    model = Decoder(CONFIG)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model


@pytest.fixture(scope="module")
def tokenizer():
    """Every byte a token of its own, with the ids of fastattn's two marks before them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<|start|>": 0, "<|end|>": 1} | {character: 2 + n for n, character in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def tokens_of(model, sampling, prompt=((5, 9, 200),), count=20, **options):
    return torch.stack(list(generate(model, torch.tensor(prompt), count, sampling, **options)), dim=1).tolist()


@pytest.mark.parametrize("sampling", [Sampling(0), Sampling(1.0, seed=7), Sampling(0.9, top_k=20, top_p=0.9, seed=1)])
def test_the_cache_changes_no_token(model, sampling):
    prompts = ((5, 9, 200), (17, 3, 3))
    with_cache = tokens_of(model, sampling, prompts, 30)
    assert with_cache == tokens_of(model, sampling, prompts, 30, use_cache=False)
    assert len({tuple(row) for row in with_cache}) == 2


def test_the_cache_computes_only_new_tokens(model, monkeypatch):
    lengths = []
    monkeypatch.setattr(
        model, "forward", lambda x, caches: lengths.append(x.shape[1]) or Decoder.forward(model, x, caches=caches)
    )
    tokens_of(model, Sampling(0), count=4)
    assert lengths == [3, 1, 1, 1]


def test_seeds(model):
    assert tokens_of(model, Sampling(1.0, seed=1)) == tokens_of(model, Sampling(1.0, seed=1))
    assert tokens_of(model, Sampling(1.0, seed=1)) != tokens_of(model, Sampling(1.0, seed=2))
    torch.manual_seed(0)
    drawn = tokens_of(model, Sampling(1.0))
    torch.manual_seed(0)
    assert tokens_of(model, Sampling(1.0)) == drawn


def test_greedy_takes_the_likeliest(model):
    logits = model.eval()(torch.tensor([[5, 9, 200]]))[0, -1]
    assert tokens_of(model, Sampling(0), count=1) == [[int(logits.argmax())]]


def test_sampling_by_hand():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    p = logits.softmax(-1)
    torch.testing.assert_close(Sampling(1.0).probabilities(logits), p)
    torch.testing.assert_close(Sampling(0.5).probabilities(logits), (2 * logits).softmax(-1))
    two = torch.tensor([[p[0, 0], p[0, 1], 0.0, 0.0]]) / (p[0, 0] + p[0, 1])
    torch.testing.assert_close(Sampling(1.0, top_k=2).probabilities(logits), two)
    assert p[0, 0] < 0.7 < p[0, 0] + p[0, 1]  # so the nucleus of 0.7 has two tokens
    torch.testing.assert_close(Sampling(1.0, top_p=0.7).probabilities(logits), two)
    one = torch.tensor([[1.0, 0.0, 0.0, 0.0]])
    torch.testing.assert_close(Sampling(1.0, top_p=0.1).probabilities(logits), one)
    torch.testing.assert_close(Sampling(1.0, top_k=9, top_p=1.0).probabilities(logits), p)


def test_draws_follow_the_probabilities():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]]).expand(20000, -1)
    drawn = Sampling(1.0).choose(logits, torch.Generator().manual_seed(0)).bincount(minlength=4) / 20000
    torch.testing.assert_close(drawn, logits[0].softmax(-1), atol=0.015, rtol=0)


def test_generation_ends_at_the_stop_token_or_the_context(model):
    greedy = tokens_of(model, Sampling(0), count=10)[0]
    stop = greedy[4]
    assert tokens_of(model, Sampling(0), count=10, stop_token=stop)[0] == greedy[: greedy.index(stop) + 1]
    assert len(tokens_of(model, Sampling(0), count=500)[0]) == 40 - 3 + 1
    assert len(tokens_of(model, Sampling(0), count=500, use_cache=False)[0]) == 40 - 3 + 1


def test_generation_leaves_the_model_as_it_was(model):
    model.train()
    stream = generate(model, torch.tensor([[1]]), 5)
    next(stream)
    stream.close()
    assert model.training
    model.eval()


@pytest.mark.parametrize("text", ["plain", "naïve café", "日本語 🎉🧵 ok", "a\n\tb\u00a0c"])
def test_streaming_gives_whole_characters(tokenizer, text):
    ids = tokenizer.encode(text).ids
    pieces = list(decode_stream(tokenizer, iter([0, *ids, 1]), special=(0, 1)))
    assert "".join(pieces) == text
    assert len(pieces) == len(text)  # one piece for each character, though bytes are tokens here
    assert "\ufffd" not in "".join(pieces)


def test_bytes_that_are_no_text_do_not_stop_the_stream(tokenizer):
    emoji = tokenizer.encode("🎉").ids
    ids = [*emoji[:2], *tokenizer.encode("x").ids, *emoji[:3]]
    assert "".join(decode_stream(tokenizer, iter(ids))) == "\ufffdx\ufffd"


def test_every_byte_has_its_character(tokenizer):
    data = bytes(range(256)).decode("latin-1")
    assert "".join(decode_stream(tokenizer, iter(tokenizer.encode(data).ids))) == data


def test_stream_text_continues_a_prompt(model, tokenizer):
    pieces = list(stream_text(model, tokenizer, "ab", 12, Sampling(0)))
    ids = [0, *tokenizer.encode("ab").ids]
    chosen = [int(t) for t in generate(model, torch.tensor([ids]), 12, Sampling(0), stop_token=1)]
    assert "".join(pieces) == tokenizer.decode([token for token in chosen if token > 1])
    assert list(stream_text(model, tokenizer, "", 3, Sampling(0))) != []


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda model: Sampling(-1.0), "temperature: got -1.0"),
        (lambda model: Sampling(top_k=0), "top_k: got 0"),
        (lambda model: Sampling(top_p=0.0), "top_p: got 0.0"),
        (lambda model: generate(model, torch.zeros(1, 0, dtype=torch.long), 5), "S >= 1"),
        (
            lambda model: generate(model, torch.zeros(1, 41, dtype=torch.long), 5),
            "a prompt of 41 tokens; allowed: at most",
        ),
        (lambda model: generate(model, torch.zeros(1, 4, dtype=torch.long), 0), "max_new_tokens: got 0"),
    ],
)
def test_refusals(model, call, words):
    with pytest.raises(InputError) as error:
        call(model)
    assert words in str(error.value)


def test_learned_positions_work_with_the_cache():
    torch.manual_seed(1)
    model = Decoder(dataclasses.replace(CONFIG, positions="learned"))
    assert tokens_of(model, Sampling(0)) == tokens_of(model, Sampling(0), use_cache=False)
