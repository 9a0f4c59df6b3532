"""Speculative decoding: the model checks guesses of several tokens in one call, and keeps those it would have made.

Each step feeds the last token of every text and a tree of guesses, and chooses a token after each of them, as plain
decoding would there. Where that is one of the guesses, the choice after it counts too. So the tokens are those of plain
decoding, apart from the rounding of products of another shape; draws and repetition penalties are included.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastattn.errors import input_error
from fastattn.lm.generate.draft_tree import DraftTree
from fastattn.lm.generate.drafts import Assistant, Drafter, Lookup
from fastattn.lm.generate.protocols import DecoderModel, Model, evaluating, is_decoder
from fastattn.lm.generate.sampling import Draws, Sampling
from fastattn.lm.generate.sequences import Cached

ENDED = -1  # yielded for rows that have ended
MOST_TOKENS = 16  # of a tree, besides the last token of the text


@dataclass
class Acceptance:
    """Counts of speculative decoding, added up over the rows of a call of ``generate`` while it runs.

    Attributes:
        calls: of the model for a row, the reading of the prompt left out.
        drafted: tokens that were guessed.
        accepted: guessed tokens that the model chose itself.
        tokens: tokens generated.

    Example:
        >>> from fastattn.lm.generate import Acceptance, Sampling, generate
        >>> from fastattn.lm.models import Decoder, preset
        >>> model, counts = Decoder(preset("tiny", vocab_size=300)), Acceptance()
        >>> steps = generate(model, [[1, 2, 3]], 9, Sampling(temperature=0), prompt_lookup=4, acceptance=counts)
        >>> len(list(steps)), counts.tokens
        (9, 9)
    """

    calls: int = 0
    drafted: int = 0
    accepted: int = 0
    tokens: int = 0

    def __str__(self) -> str:
        return f"{self.tokens} tokens in {self.calls} calls, {self.accepted} of {self.drafted} guesses accepted"


@dataclass
class _Row:
    """A text that is being continued."""

    name: int
    text: list[int]
    most: int  # tokens that it may still be continued by
    new: list[int] = field(default_factory=list)
    has_ended: bool = False

    def add(self, token: int, stops: frozenset[int]) -> None:
        self.text.append(token)
        self.new.append(token)
        self.most -= 1
        self.has_ended = token in stops or self.most == 0


def checked_decoder(model: Model) -> DecoderModel:
    """The model, which is to check guesses.

    Raises:
        InputError: it is no decoder.
    """
    if not is_decoder(model):
        todo = "An encoder-decoder generates without guesses."
        raise input_error("assistant, prompt_lookup", f"guesses for {type(model).__name__}", "a Decoder", todo)
    return model


def drafters(
    model: DecoderModel,
    rows: Sequence[Sequence[int]],
    max_new_tokens: int,
    assistant: DecoderModel | None,
    prompt_lookup: int | None,
    draft_tokens: int,
    page_size: int | None,
) -> list[Drafter]:
    """The sources of guesses that are asked for.

    Raises:
        InputError: a number is not positive, or the assistant is no decoder of the same tokens.
    """
    for name, value in (("prompt_lookup", prompt_lookup), ("draft_tokens", draft_tokens)):
        if value is not None and value < 1:
            raise input_error(name, value, "a positive int", "It counts the tokens of a guess.")
    found: list[Drafter] = []
    if assistant is not None:
        if not is_decoder(assistant) or assistant.config.vocab_size != model.config.vocab_size:
            given = f"a {type(assistant).__name__} with {assistant.config.vocab_size} tokens"
            allowed = f"a Decoder with {model.config.vocab_size}, those of the model"
            raise input_error("assistant", given, allowed, "Its tokenizer has to be that of the model.")
        longest = max(map(len, rows)) + max_new_tokens
        found.append(Assistant(assistant, len(rows), longest, draft_tokens, page_size))
    if prompt_lookup is not None:
        found.append(Lookup(prompt_lookup))
    return found


class Speculation:
    """The continuation of some rows."""

    def __init__(
        self,
        model: DecoderModel,
        sequences: Cached,
        drafters: Sequence[Drafter],
        sampling: Sampling,
        stops: frozenset[int],
        acceptance: Acceptance,
    ) -> None:
        self.model, self.sequences, self.drafters = model, sequences, drafters
        self.sampling, self.stops, self.acceptance = sampling, stops, acceptance
        self._draws = Draws(sampling)
        self._drawn: dict[int, list[float]] = {}  # numbers of each row that no token was chosen with yet
        self.rows: list[_Row] = []

    def run(self, prompts: Sequence[Sequence[int]], steps: int) -> Iterator[Tensor]:
        """Yield what ``generate`` does."""
        longest, device = self.model.config.longest, self.model.embedding.weight.device
        for prompt in prompts:
            most = min(steps, longest - len(prompt) + 1)
            self.rows.append(_Row(self.sequences.add(), list(prompt), most))
        with evaluating(self.model), torch.no_grad():
            logits = self.sequences.feed([row.name for row in self.rows], prompts)
            self._accept({n: DraftTree([row.text[-1]]) for n, row in enumerate(self.rows)}, logits)
        given = 0
        while True:
            while given < steps and all(row.has_ended or len(row.new) > given for row in self.rows):
                if all(len(row.new) <= given for row in self.rows):
                    return
                yield torch.tensor([row.new[given] if given < len(row.new) else ENDED for row in self.rows]).to(device)
                given += 1
            if given == steps:
                return
            with evaluating(self.model), torch.no_grad():
                self._step()

    def _step(self) -> None:
        """One call of the model for all rows that go on."""
        going = {n: row for n, row in enumerate(self.rows) if not row.has_ended}
        guesses: dict[int, list[list[int]]] = {n: [] for n in going}
        for drafter in self.drafters:
            for n, made in drafter.propose({n: row.text for n, row in going.items()}).items():
                guesses[n] += made
        trees = {n: self._tree(row, guesses[n]) for n, row in going.items()}
        names = [row.name for row in going.values()]
        logits = self.sequences.feed_trees(names, list(trees.values()))
        self.acceptance.calls += len(going)
        self.acceptance.drafted += sum(len(tree.tokens) - 1 for tree in trees.values())
        kept = {n: path for n, path in self._accept(trees, logits).items() if not self.rows[n].has_ended}
        if kept:
            counts = [len(trees[n].tokens) for n in kept]
            self.sequences.cache.keep([self.rows[n].name for n in kept], counts, list(kept.values()))

    def _tree(self, row: _Row, guesses: Sequence[Sequence[int]]) -> DraftTree:
        room = self.sequences.cache.max_length - len(row.text)
        guesses = guesses if self.sequences.can_branch else guesses[:1]
        return DraftTree.of(row.text[-1], guesses, min(MOST_TOKENS, room), row.most - 1)

    def _accept(self, trees: Mapping[int, DraftTree], logits: Tensor) -> dict[int, list[int]]:
        """Add the tokens that the model chooses to the rows; the path of each tree that leads there."""
        chosen = self._chosen(trees, logits)
        paths, begin = {}, 0
        for n, tree in trees.items():
            row, path = self.rows[n], [0]
            while True:
                token = chosen[begin + path[-1]]
                row.add(token, self.stops)
                child = tree.children.get((path[-1], token))
                self.acceptance.accepted += child is not None
                if row.has_ended or child is None:
                    break
                path.append(child)
            begin += len(tree.tokens)
            paths[n] = path
            self.acceptance.tokens += len(path)
            self._drawn[n] = self._drawn.get(n, [])[len(path) :]
            if row.has_ended:
                self.sequences.free(row.name)
        return paths

    def _chosen(self, trees: Mapping[int, DraftTree], logits: Tensor) -> list[int]:
        """The token that plain decoding chooses after each token of the trees."""
        before = [(n, tree.path(token)) for n, tree in trees.items() for token in range(len(tree.tokens))]
        draws = seen = None
        if self.sampling.temperature > 0:
            draws = torch.tensor([self._draw(n, len(path)) for n, path in before], dtype=torch.float64)
        if self.sampling.repetition_penalty != 1:
            seen = torch.zeros(logits.shape, dtype=torch.bool)
            for of_token, (n, path) in zip(seen, before, strict=True):
                of_token[torch.tensor([*self.rows[n].text, *path])] = True
            seen = seen.to(logits.device)
        chosen: list[int] = self.sampling.choose(logits, draws, seen).tolist()
        return chosen

    def _draw(self, row: int, ahead: int) -> float:
        """The number that plain decoding draws for the token of a row that is so many ahead."""
        drawn = self._drawn.setdefault(row, [])
        while len(drawn) <= ahead:
            number = self._draws([row], torch.device("cpu"))
            assert number is not None  # nothing is drawn at temperature 0
            drawn.append(float(number))
        return drawn[ahead]
