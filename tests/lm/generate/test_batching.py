"""Continuous batching: each prompt as it would be alone, whatever enters, leaves or is put off beside it."""

import functools

import pytest
import torch

from fastattn.errors import InputError
from fastattn.lm.generate import Sampling, complete, generate
from fastattn.nn import PagedKVCache

PROMPTS = [[5, 9, 200], [17], [3, 3, 8, 77, 130, 6, 6, 41], [100], [40, 41], [7] * 12, [255, 1]]


@functools.cache
def alone(model, count, sampling, n, stop=None):
    seeded = Sampling(**{**vars(sampling), "seed": None if sampling.seed is None else sampling.seed + n})
    tokens = [int(step) for step in generate(model, [PROMPTS[n]], count, seeded, stop_token=stop)]
    return tokens


@pytest.mark.parametrize(
    ("sampling", "places"),
    [(Sampling(0), {"batch": 8, "page_size": 2}), (Sampling(1.0, seed=3, repetition_penalty=1.2), {"batch": 3})],
    ids=["greedy, pages of 2", "drawn, three places"],
)
def test_prompts_are_continued_as_alone(decoder, sampling, places):
    done = {each.index: each for each in complete(decoder, PROMPTS, 6, sampling, **places)}
    for n in range(len(PROMPTS)):
        assert done[n].tokens == alone(decoder, 6, sampling, n) and done[n].reason == "length"


def test_a_place_is_taken_as_soon_as_it_is_free(model, monkeypatch):
    sizes, step = [], PagedKVCache.step
    monkeypatch.setattr(
        PagedKVCache, "step", lambda self, names, new, **o: sizes.append(new) or step(self, names, new, **o)
    )
    stop = alone(model, 9, Sampling(0), 1)[2]
    done = list(complete(model, PROMPTS, 9, Sampling(0), batch=2, stop_token=stop))
    assert {each.index for each in done} == set(range(len(PROMPTS)))
    assert all(len(new) <= 2 for new in sizes)
    assert any(1 in new and max(new) > 1 for new in sizes), "a prompt is read while another goes on"
    assert sum(len(new) == 2 for new in sizes) > len(sizes) / 2
    for each in done:
        assert each.tokens == alone(model, 9, Sampling(0), each.index, stop)
        assert each.reason == ("stop" if each.tokens[-1] == stop else "length")


@pytest.mark.parametrize("sampling", [Sampling(0), Sampling(1.0, seed=3)], ids=["greedy", "drawn"])
def test_when_pages_run_out_the_last_waits_and_loses_nothing(model, monkeypatch, sampling):
    freed, free = [], PagedKVCache.free
    monkeypatch.setattr(PagedKVCache, "free", lambda self, name: freed.append(name) or free(self, name))
    done = list(complete(model, PROMPTS, 12, sampling, batch=4, page_size=2, num_pages=14))
    assert len(freed) > len(PROMPTS), "something must have been put off"
    for each in done:
        assert each.tokens == alone(model, 12, sampling, each.index)
    assert len(done) == len(PROMPTS)


def test_a_callback_ends_a_text(model):
    done = list(complete(model, PROMPTS[:3], 9, Sampling(0), should_stop=lambda n, tokens: len(tokens) == n + 2))
    assert {each.index: (len(each.tokens), each.reason) for each in done} == {n: (n + 2, "stop") for n in range(3)}


def test_the_context_ends_a_text(model):
    done = list(complete(model, [[1] * 38, [1]], 100, Sampling(0)))
    assert {each.index: len(each.tokens) for each in done} == {0: 3, 1: 40}


def test_rows_go_on_as_all_of_them_would_have(model):
    sampling = Sampling(1.0, seed=3)
    some = {each.index: each.tokens for each in complete(model, PROMPTS[4:], 5, sampling, rows=[4, 5, 6])}
    assert some == {n - 4: alone(model, 5, sampling, n) for n in (4, 5, 6)}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"batch": 0}, "batch: got 0"),
        ({"num_pages": 1}, "num_pages: got 1; allowed: at least 2, for 20 tokens"),
        ({"rows": [1]}, "rows: got 1 numbers; allowed: 7"),
    ],
)
def test_refusals(model, options, words):
    with pytest.raises(InputError, match=words):
        complete(model, PROMPTS, 9, **options)


def test_refusal_of_an_encoder_decoder(encoder_decoder):
    with pytest.raises(InputError, match="model: got EncoderDecoder"):
        complete(encoder_decoder, PROMPTS, 9)


def test_it_computes_without_gradients(model):
    done = next(complete(model, PROMPTS[:1], 2, Sampling(0)))
    assert torch.is_grad_enabled() and len(done.tokens) == 2
