"""Decoding: the same tokens with and without cache, for every form of model and kind of cache."""

import functools

import pytest
import torch

from fastattn.errors import InputError
from fastattn.lm.generate import Sampling, beam_search, generate
from fastattn.lm.generate.decode import ENDED
from fastattn.lm.models import Decoder, TransformerConfig

PROMPTS = [[5, 9, 200], [17], [3, 3, 8, 77, 130, 6, 6, 41]]
SOURCES = [[4, 99, 30, 7], [250], [8, 9]]
BASE = TransformerConfig(vocab_size=258, width=32, layers=2, heads=4, kv_heads=2, max_length=40)
CACHES = [{"page_size": None}, {"page_size": 1}, {"page_size": 4}]
SAMPLINGS = [
    Sampling(0),
    Sampling(1.0, seed=7),
    Sampling(0.9, top_k=20, top_p=0.9, seed=1, min_p=0.01, repetition_penalty=1.3),
]


def tokens_of(model, sampling, prompt=((5, 9, 200),), count=20, **options):
    return torch.stack(list(generate(model, prompt, count, sampling, **options)), dim=1).tolist()


@functools.cache
def recomputed(model, sampling, count, targets=None):
    """Without a cache, which is the slow half of a comparison."""
    if targets is None:
        return tokens_of(model, sampling, PROMPTS, count, use_cache=False)
    return tokens_of(model, sampling, targets, count, source=SOURCES, use_cache=False)


@pytest.mark.parametrize("cache", CACHES, ids=str)
@pytest.mark.parametrize("sampling", SAMPLINGS, ids=["greedy", "drawn", "everything"])
def test_the_cache_changes_no_token(decoder, cache, sampling):
    with_cache = tokens_of(decoder, sampling, PROMPTS, 10, **cache)
    assert with_cache == recomputed(decoder, sampling, 10)
    assert len({tuple(row) for row in with_cache}) == 3


@pytest.mark.parametrize("cache", CACHES, ids=str)
@pytest.mark.parametrize("targets", [((0,),) * 3, ((0,), (0, 5, 6), (0, 7))], ids=["one start", "beginnings"])
def test_the_cache_changes_no_token_of_an_encoder_decoder(encoder_decoder, cache, targets):
    for sampling in SAMPLINGS[:2]:
        with_cache = tokens_of(encoder_decoder, sampling, targets, 6, source=SOURCES, **cache)
        assert with_cache == recomputed(encoder_decoder, sampling, 6, targets)
        assert len({tuple(row) for row in with_cache}) == 3


def test_rows_are_what_they_would_be_alone(decoder):
    for sampling in SAMPLINGS[1:]:
        together = tokens_of(decoder, sampling, PROMPTS, 6)
        for n, prompt in enumerate(PROMPTS):
            seed = None if sampling.seed is None else sampling.seed + n
            alone = Sampling(**{**vars(sampling), "seed": seed})
            assert tokens_of(decoder, alone, [prompt], 6) == [together[n]]


def test_sources_are_read_with_their_own_lengths(encoder_decoder):
    together = tokens_of(encoder_decoder, Sampling(0), [[0]] * 3, 8, source=SOURCES)
    for n, source in enumerate(SOURCES):
        assert tokens_of(encoder_decoder, Sampling(0), [[0]], 8, source=[source]) == [together[n]]


def test_the_cache_computes_only_new_tokens(model, monkeypatch):
    shapes, hidden = [], Decoder.hidden
    monkeypatch.setattr(
        model, "hidden", lambda x, caches: shapes.append(tuple(x.shape)) or hidden(model, x, caches=caches)
    )
    tokens_of(model, Sampling(0), count=4)
    assert shapes == [(1, 3), (1, 1), (1, 1), (1, 1)]
    shapes.clear()
    tokens_of(model, Sampling(0), PROMPTS, count=3)
    assert shapes == [(1, 12), (3, 1), (3, 1)]


def test_seeds(model):
    assert tokens_of(model, Sampling(1.0, seed=1)) == tokens_of(model, Sampling(1.0, seed=1))
    assert tokens_of(model, Sampling(1.0, seed=1)) != tokens_of(model, Sampling(1.0, seed=2))
    torch.manual_seed(0)
    drawn = tokens_of(model, Sampling(1.0))
    torch.manual_seed(0)
    assert tokens_of(model, Sampling(1.0)) == drawn


def test_greedy_takes_the_likeliest(model):
    logits = model(torch.tensor([[5, 9, 200]]))[0, -1]
    assert tokens_of(model, Sampling(0), count=1) == [[int(logits.argmax())]]


def test_a_repetition_penalty_ends_repetition(model):
    plain = tokens_of(model, Sampling(0), count=30)[0]
    assert len(set(plain)) < 30
    new = tokens_of(model, Sampling(0, repetition_penalty=1e6), count=30)[0]
    assert len({5, 9, 200, *new}) == 33


@pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"page_size": 2}], ids=str)
def test_rows_end_at_a_stop_token_or_the_context(model, options):
    greedy = tokens_of(model, Sampling(0), PROMPTS, 20, **options)
    stop = greedy[0][4]
    ended = tokens_of(model, Sampling(0), PROMPTS, 20, stop_token=stop, **options)
    for row, all_of_it in zip(ended, greedy, strict=True):
        kept = all_of_it[: all_of_it.index(stop) + 1] if stop in all_of_it else all_of_it
        padding = [ENDED] * (max(len(r) - r.count(ENDED) for r in ended) - len(kept))
        assert row == kept + padding
    several = tokens_of(model, Sampling(0), PROMPTS[:1], 20, stop_token=[stop, greedy[0][1]], **options)
    assert len(several[0]) == 2
    full = tokens_of(model, Sampling(0), PROMPTS, 500, **options)
    assert [len(row) - row.count(ENDED) for row in full] == [40 - len(prompt) + 1 for prompt in PROMPTS]


def test_generation_leaves_the_model_as_it_was(model):
    model.train()
    stream = generate(model, [[1]], 5)
    next(stream)
    assert model.training  # while the caller has the token, too
    stream.close()
    assert model.training
    model.eval()


def test_a_window_keeps_a_cache_of_its_own_length(model):
    from fastattn.lm.generate.sequences import Cached

    sequences = Cached(model, 1, 40, page_size=4, num_pages=5)
    name = sequences.add()
    with torch.no_grad():
        sequences.feed([name], [[7]])
        for token in range(39):
            sequences.feed([name], torch.tensor([token]))
    assert sequences.cache.length(name) == 40 and sequences.cache.pages(name)[0] is None


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda m: generate(m, torch.zeros(1, 0, dtype=torch.long), 5), "S >= 1"),
        (lambda m: generate(m, torch.zeros(3), 5), r"tokens: got shape \(3,\)"),
        (lambda m: generate(m, [[1], []], 5), r"tokens: got rows of \[1, 0\] tokens"),
        (lambda m: generate(m, "text", 5), "tokens: got text; allowed: rows of tokens"),
        (lambda m: generate(m, ["a", "b"], 5), "tokens: got text; allowed: rows of tokens"),
        (lambda m: generate(m, [[0] * 41], 5), "a prompt of 41 tokens; allowed: at most"),
        (lambda m: generate(m, [[1]], 0), "max_new_tokens: got 0"),
        (lambda m: generate(m, [[1]], 5, source=[[1]]), "source: got tokens; allowed: None for a decoder"),
        (lambda m: beam_search(m, [[1]], 5, beams=0), "beams: got 0"),
    ],
)
def test_refusals(model, call, words):
    with pytest.raises(InputError, match=words):
        call(model)


def test_refusals_of_sources(encoder_decoder):
    with pytest.raises(InputError, match="source: got None"):
        generate(encoder_decoder, [[0]], 5)
    with pytest.raises(InputError, match="source: got 1 rows; allowed: 2"):
        generate(encoder_decoder, [[0], [0]], 5, source=[[1, 2]])


def test_models_generate(model, encoder_decoder):
    stepped = tokens_of(model, Sampling(0), PROMPTS, 9, stop_token=77)
    rows = model.generate(PROMPTS, 9, Sampling(0), stop_token=77)
    assert rows == [[token for token in row if token != ENDED] for row in stepped]
    best = model.generate(PROMPTS, 9, beams=3, page_size=4)
    assert best == [beams[0].tokens for beams in beam_search(model, PROMPTS, 9, beams=3)]
    answers = encoder_decoder.generate([[0]] * 3, 5, Sampling(0), source=SOURCES, use_cache=False)
    assert answers == tokens_of(encoder_decoder, Sampling(0), [[0]] * 3, 5, source=SOURCES)
    with pytest.raises(InputError, match="beams: got 3 together with sampling"):
        model.generate(PROMPTS, 9, Sampling(0.5), beams=3)


def test_under_autocast_the_cache_has_its_dtype():
    model = Decoder(BASE).eval()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with_cache = model.generate(PROMPTS, 6, Sampling(0))
        assert [len(row) for row in with_cache] == [6, 6, 6]
