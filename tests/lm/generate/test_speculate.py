"""Speculative decoding: the tokens of plain decoding, in fewer calls of the model."""

import dataclasses

import pytest
import torch

from fastattn import InputError
from fastattn.lm.generate import Acceptance, Sampling, generate
from fastattn.lm.generate.draft_tree import DraftTree
from fastattn.lm.generate.drafts import Lookup
from fastattn.lm.models import Decoder

PROMPTS = [[5, 9, 200, 5, 9], [17], [3, 3, 8, 77, 130, 6, 6, 41, 3, 8]]
SAMPLINGS = [
    Sampling(0),
    Sampling(0.9, top_k=20, top_p=0.9, seed=1, min_p=0.01, repetition_penalty=1.3),
]


def tokens_of(model, sampling=SAMPLINGS[0], prompts=PROMPTS, count=16, **options):
    return torch.stack(list(generate(model, prompts, count, sampling, **options)), dim=1).tolist()


class Oracle:
    """Guesses that hold the right continuation among wrong ones, or are wrong from some token on."""

    def __init__(self, texts, right, vocabulary=258):
        self.texts, self.right, self.vocabulary = texts, right, vocabulary

    def propose(self, texts):
        found = {}
        for row, text in texts.items():
            after = self.texts[row][len(text) : len(text) + 6]
            wrong = [[*after[:n], (token + 1) % self.vocabulary, 7, 9] for n, token in enumerate(after[:3])]
            found[row] = [*wrong, after[: self.right]]
        return found


@pytest.mark.parametrize(
    ("sampling", "page_size"),
    [(SAMPLINGS[0], None), (SAMPLINGS[0], 4), (SAMPLINGS[1], 1)],
    ids=["greedy", "pages of 4", "drawn"],
)
def test_guesses_change_no_token(decoder, sampling, page_size):
    """By lookup, by the model itself as its assistant, whose every greedy guess is right, and by both."""
    plain = tokens_of(decoder, sampling)
    for guesses in ({"prompt_lookup": 5}, {"assistant": decoder}, {"assistant": decoder, "prompt_lookup": 3}):
        counts = Acceptance()
        assert tokens_of(decoder, sampling, page_size=page_size, acceptance=counts, **guesses) == plain, guesses
        assert counts.tokens == 3 * 16 and 0 <= counts.accepted <= counts.drafted
        if sampling.temperature == 0 and "assistant" in guesses:
            assert counts.calls == 3 * 3, "5 tokens with each call, after that of the prompt"


@pytest.mark.parametrize("right", [0, 2, 6])
def test_trees_change_no_token(decoder, right, monkeypatch):
    """Branches that leave the right path at every level; the paths are of each sequence's own length."""
    plain = tokens_of(decoder)
    texts = [[*prompt, *new] for prompt, new in zip(PROMPTS, plain, strict=True)]
    module = __import__("fastattn.lm.generate.decode", fromlist=["decode"])
    monkeypatch.setattr(module, "drafters", lambda *_, **__: [Oracle(texts, right)])
    counts = Acceptance()
    assert tokens_of(decoder, prompt_lookup=1, acceptance=counts) == plain
    branches = decoder.config.positions != "relative"  # whose trees are chains, here of a wrong guess
    assert not branches or counts.calls < 3 * 15 / (1 + min(right, 2) / 2)


def test_ends_are_those_of_plain_decoding(model):
    """Stop tokens in the middle of a path, the model's max_length, and rows that end before others."""
    plain = tokens_of(model, count=60)  # up to max_length = 40, each row to its own end
    assert tokens_of(model, count=60, assistant=model) == plain and tokens_of(model, count=60, prompt_lookup=9) == plain
    stops = [plain[0][6], plain[2][2]]
    stopped = tokens_of(model, stop_token=stops)
    assert tokens_of(model, stop_token=stops, assistant=model, prompt_lookup=4) == stopped
    for count in (1, 2, 3):
        assert tokens_of(model, count=count, assistant=model) == [row[:count] for row in plain]
    smaller = Decoder(dataclasses.replace(model.config, max_length=12)).double()
    assert tokens_of(model, assistant=smaller.train()) == tokens_of(model) and smaller.training


def test_guesses_of_lookup():
    lookup = Lookup(longest=3)
    assert lookup.propose({0: [1, 2, 3, 4], 1: [6]}) == {0: [], 1: []}
    assert lookup.propose({0: [1, 2, 3, 4, 1, 2], 1: [6, 6]}) == {0: [[3, 4, 1]], 1: [[6, 6, 6]]}
    assert lookup.propose({0: [1, 2, 3, 4, 1, 2, 5, 1, 2]}) == {0: [[5, 1, 2], [3, 4, 1]]}, "the latest first"


def test_guesses_with_a_common_beginning_are_merged():
    tree = DraftTree.of(9, [[1, 2, 3], [1, 2, 4], [5], [1, 6]], most=5, depth=3)
    assert tree.tokens == [9, 1, 2, 3, 4, 5] and tree.parents == [-1, 0, 1, 2, 2, 0] and tree.path(4) == [1, 2, 4]
    assert not tree.is_chain and DraftTree.of(9, [[1, 2, 3]], most=9, depth=2).tokens == [9, 1, 2]


def test_refusals(model, encoder_decoder):
    other = Decoder(type(model.config)(vocab_size=99, width=32, layers=1, heads=4))
    for options, message in (
        ({"prompt_lookup": 0}, "prompt_lookup: got 0; allowed: a positive int"),
        ({"assistant": model, "draft_tokens": 0}, "draft_tokens: got 0"),
        ({"assistant": other}, "assistant: got a Decoder with 99 tokens; allowed: a Decoder with 258"),
        ({"assistant": model, "use_cache": False}, "use_cache: got False; allowed: True with guesses"),
    ):
        with pytest.raises(InputError, match=message):
            tokens_of(model, **options)
    with pytest.raises(InputError, match="got guesses for EncoderDecoder; allowed: a Decoder"):
        tokens_of(encoder_decoder, prompts=[[1]], source=[[4, 5]], prompt_lookup=3)
    with pytest.raises(InputError, match="beams: got 2 together with guesses"):
        model.generate([[1]], 3, beams=2, prompt_lookup=2)
