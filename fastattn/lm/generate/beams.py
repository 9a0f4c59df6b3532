"""Beam search: the likeliest continuations, as far as a few kept at a time can find them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastattn.errors import input_error
from fastattn.lm.generate.decode import StopTokens, as_set, check_lengths, seen_tokens
from fastattn.lm.generate.protocols import Model, evaluating
from fastattn.lm.generate.sampling import Sampling
from fastattn.lm.generate.sequences import Cached, Sequences, Tokens, Uncached, checked, encoded


@dataclass(frozen=True)
class Beam:
    """A continuation of a prompt.

    Attributes:
        tokens: the new ones, the stop token included.
        score: sum of their log-probabilities, divided by their number to the power of the length penalty.
    """

    tokens: list[int]
    score: float


def beam_search(
    model: Model,
    tokens: Tokens,
    max_new_tokens: int,
    *,
    beams: int = 4,
    length_penalty: float = 1.0,
    repetition_penalty: float = 1.0,
    source: Tokens | None = None,
    stop_token: StopTokens = None,
    should_stop: Callable[[int, Sequence[int]], bool] | None = None,
    use_cache: bool = True,
    page_size: int | None = None,
) -> list[list[Beam]]:
    """The best ``beams`` continuations found for each prompt, the best first.

    At each step every kept continuation is extended by every token, and the ``beams`` likeliest go on. One that stops
    is set aside with its score; the search ends when as many are, and none that goes on could still beat them.

    Args:
        model: used in evaluation mode.
        tokens: this and the others as in ``fastattn.lm.generate.generate``.
        max_new_tokens: as there.
        beams: how many are kept at a time.
        length_penalty: scores are divided by ``length ** length_penalty``: 0 favours short texts, above 1 long ones.
        repetition_penalty: multiplies the log-probabilities of tokens that stand in the prompt or the text so far; 1
            is none. Scores are sums of what it leaves.
        source: as there.
        stop_token: as there.
        should_stop: called with the row of a prompt and a continuation of it; True ends the continuation there.
        use_cache: as there. Continuations share the keys and values of their common beginning.
        page_size: as there.

    Returns:
        for each prompt its continuations.

    Raises:
        InputError: as there, or ``beams`` is not positive.

    Source:
        Wu et al., "Google's neural machine translation system", 2016.

    Example:
        >>> from fastattn.lm.generate import beam_search
        >>> from fastattn.lm.models import Decoder, preset
        >>> model = Decoder(preset("tiny", vocab_size=300))
        >>> best = beam_search(model, [[1, 2, 3]], 5, beams=3)[0][0]
        >>> len(best.tokens)
        5
    """
    rows = checked("tokens", tokens)
    check_lengths(model, rows, max_new_tokens)
    if beams < 1:
        raise input_error("beams", beams, "a positive int", "1 is greedy.")
    with evaluating(model), torch.no_grad():
        read = encoded(model, source)
        longest = min(max(len(row) for row in rows) + max_new_tokens - 1, model.config.longest)
        sequences: Sequences = Uncached(model, read)
        if use_cache:  # a beam and the copy that it branches into exist at the same time
            sequences = Cached(model, 2 * beams * len(rows), longest, page_size=page_size, source=read)
        ends = _Ends(as_set(stop_token), should_stop)
        penalty = Sampling(temperature=0, repetition_penalty=repetition_penalty)
        searches = [
            _Search(n, row, beams, length_penalty, min(max_new_tokens, model.config.longest - len(row) + 1))
            for n, row in enumerate(rows)
        ]
        names = [sequences.add(row) for row in range(len(rows))]
        logits = sequences.feed(names, rows)
        for search, name in zip(searches, names, strict=True):
            search.running = [_Running(name, [], 0.0)]
        while any(search.running for search in searches):
            _extend(searches, _log_probabilities(searches, logits, penalty), sequences, ends)
            going = [beam for search in searches for beam in search.running]
            if going:
                last = torch.tensor([beam.tokens[-1] for beam in going]).to(logits.device, non_blocking=True)
                logits = sequences.feed([beam.name for beam in going], last)
    return [sorted(search.finished, key=lambda beam: -beam.score)[:beams] for search in searches]


@dataclass
class _Running:
    name: int
    tokens: list[int]
    total: float  # of log-probabilities


@dataclass(frozen=True)
class _Ends:
    """Conditions that end a continuation."""

    stops: frozenset[int]
    should_stop: Callable[[int, Sequence[int]], bool] | None

    def has_ended(self, row: int, tokens: Sequence[int]) -> bool:
        return tokens[-1] in self.stops or (self.should_stop is not None and self.should_stop(row, tokens))

    @property
    def candidates(self) -> int:
        """Candidates to rank for each beam, so that enough go on if the likeliest end."""
        return 1 + len(self.stops) + (self.should_stop is not None)


@dataclass
class _Search:
    """The search for one prompt."""

    row: int
    prompt: list[int]
    beams: int
    length_penalty: float
    steps: int  # most new tokens
    running: list[_Running] = field(default_factory=list)
    finished: list[Beam] = field(default_factory=list)

    def finish(self, tokens: list[int], total: float) -> None:
        self.finished.append(Beam(tokens, self.score(total, len(tokens))))
        self.finished = sorted(self.finished, key=lambda beam: -beam.score)[: self.beams]

    def score(self, total: float, length: int) -> float:
        return total / length**self.length_penalty

    def is_over(self) -> bool:
        """Whether nothing that goes on can still enter the finished: totals only fall, lengths may help."""
        if len(self.finished) < self.beams or not self.running:
            return not self.running
        best, length = max(beam.total for beam in self.running), len(self.running[0].tokens)
        reachable = max(self.score(best, length + 1), self.score(best, self.steps))
        return self.finished[-1].score >= reachable


def _log_probabilities(searches: list[_Search], logits: Tensor, penalty: Sampling) -> Tensor:
    """Log-probabilities of the next token, those of earlier tokens multiplied by the penalty, as transformers does."""
    log_p = torch.log_softmax(logits.float(), dim=-1)
    if penalty.repetition_penalty == 1:
        return log_p
    texts = [[*search.prompt, *beam.tokens] for search in searches for beam in search.running]
    return penalty.penalised(log_p, seen_tokens(texts, log_p.shape[-1], log_p.device))


def _extend(searches: list[_Search], log_p: Tensor, sequences: Sequences, ends: _Ends) -> None:
    """One step of all searches. ``log_p`` has a row for each of their running beams, in order."""
    begin = 0
    for search in searches:
        if not search.running:
            continue
        of_mine = log_p[begin : begin + len(search.running)]
        begin += len(search.running)
        totals = torch.tensor([beam.total for beam in search.running], dtype=torch.float64).to(log_p.device)
        candidates = (totals[:, None] + of_mine).flatten()
        count = min(search.beams * ends.candidates, candidates.numel())
        best = candidates.topk(count)
        vocabulary = log_p.shape[-1]
        ranked = [
            (total, *divmod(at, vocabulary))
            for total, at in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        ]
        _choose(search, ranked, sequences, ends)


def _choose(search: _Search, ranked: list[tuple[float, int, int]], sequences: Sequences, ends: _Ends) -> None:
    """Continue or finish beams, by the ranked (total, beam, token)."""
    going: list[tuple[_Running, list[int], float]] = []
    for rank, (total, parent, token) in enumerate(ranked):
        beam = search.running[parent]
        tokens = [*beam.tokens, token]
        if ends.has_ended(search.row, tokens):
            if rank < search.beams:
                search.finish(tokens, total)
        elif len(going) < search.beams:
            going.append((beam, tokens, total))
    used: set[int] = set()
    extended = []
    for parent_beam, tokens, total in going:
        name = sequences.fork(parent_beam.name) if parent_beam.name in used else parent_beam.name
        used.add(parent_beam.name)
        extended.append(_Running(name, tokens, total))
    for beam in search.running:
        if beam.name not in used:
            sequences.free(beam.name)
    search.running = extended
    at_the_end = bool(extended) and len(extended[0].tokens) == search.steps
    if at_the_end:
        for beam in extended:
            search.finish(beam.tokens, beam.total)
    if at_the_end or search.is_over():
        for beam in extended:
            sequences.free(beam.name)
        search.running = []
