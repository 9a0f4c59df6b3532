"""Continuous batching: many prompts through a few slots; a prompt enters as soon as another has ended."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from fastattn.errors import input_error
from fastattn.lm.generate.decode import StopTokens, as_set, check_lengths, seen_tokens
from fastattn.lm.generate.protocols import DecoderModel, evaluating, is_decoder
from fastattn.lm.generate.sampling import Draws, Sampling
from fastattn.lm.generate.sequences import Cached, Tokens, checked


@dataclass(frozen=True)
class Completion:
    """The continuation of a prompt.

    Attributes:
        index: of the prompt.
        tokens: the new ones, a stop token included.
        reason: "stop", or "length".
    """

    index: int
    tokens: list[int]
    reason: str


@dataclass
class _Running:
    index: int
    prompt: list[int]
    row: int  # whose draws it takes
    name: int = -1
    tokens: list[int] = field(default_factory=list)

    def next_tokens(self) -> list[int]:
        """Tokens that the model has not read yet."""
        return self.tokens[-1:] if self.name >= 0 else [*self.prompt, *self.tokens]


def complete(
    model: DecoderModel,
    prompts: Tokens,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    *,
    stop_token: StopTokens = None,
    should_stop: Callable[[int, Sequence[int]], bool] | None = None,
    rows: Sequence[int] | None = None,
    batch: int = 8,
    page_size: int = 16,
    num_pages: int | None = None,
) -> Iterator[Completion]:
    """Continue many prompts, each as it would be alone, and yield them as they end.

    Every step is one call of the model, in which prompts that enter are read while the others go on by a token. Keys
    and values lie in a ``PagedKVCache``. When its pages run out, the sequence that entered last gives its own back and
    is computed again later; its tokens stay the same.

    Args:
        model: a decoder; used in evaluation mode.
        prompts: tokens, rows of any length.
        max_new_tokens: most for each prompt. The model's ``max_length`` ends one too.
        sampling: how to choose. Prompt ``n`` draws with ``seed + n``, whatever runs beside it.
        stop_token: one or several that end a text.
        should_stop: called with the index of a prompt and its new tokens after each; True ends it.
        rows: the n of each prompt's ``seed + n``, so that some of the prompts go on as all of them would have; None
            numbers them.
        batch: most sequences at a time.
        page_size: tokens in a page.
        num_pages: None is what ``batch`` of the longest sequences take.

    Yields:
        completions, in the order in which they end.

    Raises:
        InputError: as ``generate``, or the pages do not hold the longest sequence.

    Example:
        >>> from fastattn.lm.generate import Sampling, complete
        >>> from fastattn.lm.models import Decoder, preset
        >>> model = Decoder(preset("tiny", vocab_size=300))
        >>> done = complete(model, [[1, 2, 3], [4], [5, 6]], 4, Sampling(temperature=0), batch=2)
        >>> sorted(completion.index for completion in done)
        [0, 1, 2]
    """
    if not is_decoder(model):
        raise input_error("model", type(model).__name__, "a Decoder", "Call generate for an encoder-decoder.")
    texts = checked("prompts", prompts)
    check_lengths(model, texts, max_new_tokens)
    rows = range(len(texts)) if rows is None else rows
    if len(rows) != len(texts):
        raise input_error("rows", f"{len(rows)} numbers", f"{len(texts)}, one for each prompt", "None numbers them.")
    if batch < 1:
        raise input_error("batch", batch, "a positive int", "It counts sequences.")
    longest = min(max(len(text) for text in texts) + max_new_tokens - 1, model.config.longest)
    pages = -(-longest // page_size)
    if num_pages is not None and num_pages < pages:
        todo = "Allow more, larger pages, or fewer new tokens."
        raise input_error("num_pages", num_pages, f"at least {pages}, for {longest} tokens", todo)
    num_pages = num_pages or pages * min(batch, len(texts))
    sequences = Cached(model, batch, longest, page_size=page_size, num_pages=num_pages)
    ends = _Ends(as_set(stop_token), should_stop, max_new_tokens, model.config.longest)
    return _Batch(model, sequences, sampling or Sampling(), ends, batch).run(texts, rows)


@dataclass(frozen=True)
class _Ends:
    """Conditions that end a text."""

    stops: frozenset[int]
    should_stop: Callable[[int, Sequence[int]], bool] | None
    max_new_tokens: int
    longest: int

    def reason(self, each: _Running) -> str | None:
        """The reason why a text ends here, or None."""
        if each.tokens[-1] in self.stops:
            return "stop"
        if self.should_stop is not None and self.should_stop(each.index, each.tokens):
            return "stop"
        is_full = len(each.prompt) + len(each.tokens) > self.longest
        return "length" if is_full or len(each.tokens) == self.max_new_tokens else None


class _Batch:
    """The slots and the sequences that run in them."""

    def __init__(self, model: DecoderModel, sequences: Cached, sampling: Sampling, ends: _Ends, slots: int) -> None:
        self.model, self.sequences, self.sampling, self.ends = model, sequences, sampling, ends
        self.draws, self.slots = Draws(sampling), slots
        self.running: list[_Running] = []

    def run(self, prompts: list[list[int]], rows: Sequence[int]) -> Iterator[Completion]:
        entries = enumerate(zip(prompts, rows, strict=True))
        waiting = deque(_Running(index, prompt, row) for index, (prompt, row) in entries)
        while waiting or self.running:
            waiting.extendleft(self._make_room())
            yield from self._step(self._admit(waiting))

    def _make_room(self) -> list[_Running]:
        """Those that give their pages back so that the others can go on, the last first."""
        evicted = []
        while self.running and self.sequences.cache.pages_needed([each.name for each in self.running], 1) > 0:
            last = self.running.pop()
            self.sequences.free(last.name)
            last.name = -1
            evicted.append(last)
        return evicted

    def _admit(self, waiting: deque[_Running]) -> list[list[int]]:
        """Let in who fits; the tokens of the step, a row for each that runs."""
        new = [each.next_tokens() for each in self.running]
        while waiting and len(self.running) < self.slots:
            row = waiting[0].next_tokens()
            name = self.sequences.add()
            names = [*(each.name for each in self.running), name]
            if self.sequences.cache.pages_needed(names, [*map(len, new), len(row)]) > 0:
                self.sequences.free(name)
                break
            entering = waiting.popleft()
            entering.name = name
            self.running.append(entering)
            new.append(row)
        return new

    def _step(self, new: list[list[int]]) -> list[Completion]:
        device = self.model.embedding.weight.device
        with evaluating(self.model), torch.no_grad():
            logits = self.sequences.feed([each.name for each in self.running], new)
            seen = None
            if self.sampling.repetition_penalty != 1:
                texts = [[*each.prompt, *each.tokens] for each in self.running]
                seen = seen_tokens(texts, self.model.config.vocab_size, device)
            draws = self.draws([each.row for each in self.running], device)
            chosen = self.sampling.choose(logits, draws, seen).tolist()
        done = []
        for each, token in zip(self.running, chosen, strict=True):
            each.tokens.append(token)
            reason = self.ends.reason(each)
            if reason is not None:
                self.sequences.free(each.name)
                done.append(Completion(each.index, each.tokens, reason))
        ended = {completion.index for completion in done}
        self.running = [each for each in self.running if each.index not in ended]
        return done
