"""Sampling: each rule by hand, and draws that follow the probabilities."""

import pytest
import torch

from fastattn.errors import InputError
from fastattn.lm.generate import Sampling
from fastattn.lm.generate.sampling import Draws

LOGITS = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
P = LOGITS.softmax(-1)


def keeping(*tokens):
    kept = torch.zeros(1, 4)
    kept[0, list(tokens)] = P[0, list(tokens)]
    return kept / kept.sum()


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(1.0), P),
        (Sampling(0.5), (2 * LOGITS).softmax(-1)),
        (Sampling(1.0, top_k=2), keeping(0, 1)),
        (Sampling(1.0, top_p=0.7), keeping(0, 1)),  # the likeliest alone has 0.64
        (Sampling(1.0, top_p=0.1), keeping(0)),
        (Sampling(1.0, top_k=9, top_p=1.0), P),
        (Sampling(1.0, min_p=0.1), keeping(0, 1, 2)),  # e^-2 is 0.135, e^-3 is 0.05
        (Sampling(1.0, min_p=0.2), keeping(0, 1)),
        (Sampling(1.0, min_p=1.0), keeping(0)),
        (Sampling(1.0, min_p=0.0), P),
    ],
)
def test_probabilities_by_hand(sampling, expected):
    torch.testing.assert_close(sampling.probabilities(LOGITS), expected)


def test_draws_follow_the_probabilities():
    draws = torch.rand(20000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    drawn = Sampling(1.0).choose(LOGITS.expand(20000, -1), draws).bincount(minlength=4) / 20000
    torch.testing.assert_close(drawn, P[0], atol=0.015, rtol=0)


def test_the_largest_draw_takes_a_token_that_is_kept():
    almost_one = torch.tensor([1 - 2**-53], dtype=torch.float64)
    assert Sampling(1.0, top_k=2).choose(LOGITS, almost_one).tolist() == [1]
    assert Sampling(1.0, top_k=2).choose(LOGITS.flip(-1), torch.zeros(1)).tolist() == [2]


def test_repetition_penalty_pushes_seen_tokens_down():
    sampling = Sampling(0, repetition_penalty=2.5)
    seen = torch.tensor([[True, False, False, True]])
    torch.testing.assert_close(sampling.penalised(LOGITS, seen), torch.tensor([[0.8, 1.0, 0.0, -2.5]]))
    assert sampling.choose(LOGITS, torch.zeros(1), seen).tolist() == [1]
    assert sampling.choose(LOGITS, torch.zeros(1), ~seen).tolist() == [0]


def test_the_draws_of_a_row_do_not_depend_on_the_others():
    cpu = torch.device("cpu")
    together, alone = Draws(Sampling(seed=5)), Draws(Sampling(seed=5))
    first, second = together([0, 1], cpu), together([1], cpu)
    assert alone([1], cpu) == first[1] and alone([1], cpu) == second[0]
    assert Draws(Sampling(seed=6))([0], cpu) == first[1]  # row 1 of seed 5
    torch.manual_seed(0)
    assert Draws(Sampling(0, seed=5))([0], cpu) is None
    without_seed = Draws(Sampling(seed=None))([0, 1, 2], cpu)
    torch.manual_seed(0)
    assert torch.equal(Draws(Sampling(seed=None))([0, 1, 2], cpu), without_seed)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"temperature": -1.0}, "temperature: got -1.0"),
        ({"temperature": float("inf")}, "temperature: got inf"),
        ({"top_k": 0}, "top_k: got 0"),
        ({"top_p": 0.0}, "top_p: got 0.0"),
        ({"min_p": 1.5}, "min_p: got 1.5"),
        ({"repetition_penalty": 0.0}, "repetition_penalty: got 0.0"),
    ],
)
def test_refusals(fields, words):
    with pytest.raises(InputError, match=words):
        Sampling(**fields)
