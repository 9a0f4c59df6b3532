"""Beam search: against trying every continuation, and the same with and without cache."""

import functools
import itertools

import pytest
import torch

from fastattn.lm.generate import Sampling, beam_search, generate
from fastattn.lm.models import Decoder, TransformerConfig, from_pretrained


@pytest.fixture(scope="module")
def small():
    """A vocabulary that can be tried out."""
    torch.manual_seed(5)
    model = Decoder(TransformerConfig(vocab_size=5, width=16, layers=1, heads=2, max_length=12)).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.5)
    return model


@functools.cache
@torch.no_grad()
def every_text(model, prompt, length, stop):
    """All continuations up to ``length`` that stop or are full, with their log-probabilities."""
    found = []
    for n in range(1, length + 1):
        texts = [
            new
            for new in itertools.product(range(5), repeat=n)
            if stop not in new[:-1] and (n == length or new[-1] == stop)
        ]
        log_p = model(torch.tensor([[*prompt, *new] for new in texts]))[:, len(prompt) - 1 : -1].log_softmax(-1)
        totals = log_p.gather(-1, torch.tensor(texts)[..., None]).sum((1, 2)).tolist()
        found += zip(totals, map(list, texts), strict=True)
    return found


@pytest.mark.parametrize("penalty", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("options", [{}, {"page_size": 2}, {"use_cache": False}], ids=str)
def test_wide_enough_beams_find_the_best(small, options, penalty):
    prompts, stop = [(1, 2), (4, 0, 3)], 3
    found = beam_search(small, prompts, 4, beams=64, length_penalty=penalty, stop_token=stop, **options)
    for prompt, beams in zip(prompts, found, strict=True):
        every = every_text(small, prompt, 4, stop)
        best = sorted(((total / len(new) ** penalty, new) for total, new in every), reverse=True)[:5]
        assert [beam.tokens for beam in beams[:5]] == [new for _, new in best]
        assert [beam.score for beam in beams[:5]] == pytest.approx([score for score, _ in best], abs=1e-5)


@pytest.mark.parametrize("options", [{}, {"page_size": 1}, {"page_size": 4}], ids=str)
def test_the_cache_changes_no_beam(decoder, options):
    prompts = [[5, 9, 200], [17]]
    with_cache = beam_search(decoder, prompts, 12, beams=3, stop_token=[50, 60, 70], **options)
    without = beam_search(decoder, prompts, 12, beams=3, stop_token=[50, 60, 70], use_cache=False)
    assert [[beam.tokens for beam in beams] for beams in with_cache] == [
        [beam.tokens for beam in beams] for beams in without
    ]
    assert all(len(beams) == 3 for beams in with_cache)


def test_the_cache_changes_no_beam_of_an_encoder_decoder(encoder_decoder):
    options = {"beams": 3, "stop_token": 50, "source": [[4, 99, 30], [250]]}
    with_cache = beam_search(encoder_decoder, [[0], [0]], 8, page_size=4, **options)
    without = beam_search(encoder_decoder, [[0], [0]], 8, use_cache=False, **options)
    assert [[b.tokens for b in beams] for beams in with_cache] == [[b.tokens for b in beams] for beams in without]


def test_one_beam_is_greedy(decoder):
    prompts = [[5, 9, 200], [17]]
    greedy = torch.stack(list(generate(decoder, prompts, 10, Sampling(0))), 1).tolist()
    assert [beams[0].tokens for beams in beam_search(decoder, prompts, 10, beams=1)] == greedy


def test_more_beams_find_nothing_worse(model):
    scores = [beam_search(model, [[5, 9]], 8, beams=n)[0][0].score for n in (1, 4, 16)]
    assert scores == sorted(scores)


def test_texts_end_at_the_context(model):
    assert len(beam_search(model, [[1] * 38], 500, beams=2)[0][0].tokens) == 3


def test_the_repetition_penalty_is_that_of_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "n_positions": 32, "n_embd": 16, "n_layer": 1, "n_head": 2}
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, bos_token_id=None, eos_token_id=None)).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    theirs.save_pretrained(tmp_path / "gpt2")
    prompt, found = torch.tensor([[3, 4, 5, 3]]), {}
    for penalty in (1.0, 1.7):
        options = {"max_new_tokens": 9, "num_beams": 3, "repetition_penalty": penalty, "do_sample": False}
        expected = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), pad_token_id=0, **options)
        sampling = Sampling(temperature=0, repetition_penalty=penalty)
        found[penalty] = from_pretrained(tmp_path / "gpt2").generate(prompt, 9, sampling, beams=3)[0]
        assert found[penalty] == expected[0, 4:].tolist()
    assert found[1.0] != found[1.7]


def test_a_caller_may_end_beams(small):
    stops = beam_search(small, [(1, 2)], 6, beams=8, should_stop=lambda row, tokens: row == 0 and tokens[-1] == 3)
    expected = beam_search(small, [(1, 2)], 6, beams=8, stop_token=3)
    assert [beam.tokens for beam in stops[0]] == [beam.tokens for beam in expected[0]]
