"""Decoding: from a model and prompts to tokens, one step at a time for all of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fastattn.errors import input_error
from fastattn.lm.generate.protocols import DecoderModel, Model, evaluating
from fastattn.lm.generate.sampling import Draws, Sampling
from fastattn.lm.generate.sequences import Cached, Sequences, Tokens, Uncached, checked, encoded
from fastattn.lm.generate.speculate import (
    ENDED,
    MOST_TOKENS,
    Acceptance,
    Speculation,
    checked_decoder,
    drafters,
)

StopTokens = int | Sequence[int] | None


def generate(
    model: Model,
    tokens: Tokens,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    *,
    source: Tokens | None = None,
    stop_token: StopTokens = None,
    use_cache: bool = True,
    page_size: int | None = None,
    assistant: DecoderModel | None = None,
    prompt_lookup: int | None = None,
    draft_tokens: int = 4,
    acceptance: Acceptance | None = None,
) -> Iterator[Tensor]:
    """Yield the tokens that follow ``tokens``, one step at a time.

    Args:
        model: used in evaluation mode.
        tokens: prompts, ``(B, S)`` or rows of different lengths; of an encoder-decoder, the beginnings of the targets.
        max_new_tokens: most steps. The model's ``max_length`` ends a row too.
        sampling: how to choose; None is ``Sampling()``.
        source: what an encoder-decoder reads, a row for each prompt; of a model of text about images ``(B, C, H, W)``.
        stop_token: one or several that end a row; it is the last thing that the row yields.
        use_cache: keep keys and values of earlier tokens instead of computing them again: the same tokens, faster.
        page_size: keep them in pages of so many tokens; None keeps each row in one piece.
        assistant: a smaller decoder with the same tokens guesses ``draft_tokens`` ahead, which the model checks in one
            call: the same tokens, in fewer calls of the model. Both this and the next need a decoder and its cache.
        prompt_lookup: guess up to so many tokens from what followed the last tokens earlier in the text.
        draft_tokens: guesses of the assistant for each call.
        acceptance: receives the counts of guesses, and of those that came true.

    Yields:
        ``(B,)`` tokens on the model's device, -1 for rows that have ended. Without ``stop_token`` no step waits for the
        device.

    Raises:
        InputError: an empty or too long prompt, no tokens asked for, a source where none belongs, or guesses for or
            from a model that cannot have them.

    Source:
        Leviathan et al., "Fast inference from transformers via speculative decoding", 2023; Saxena, "Prompt lookup
        decoding", 2023; Miao et al., "SpecInfer", 2024 (trees).

    Example:
        >>> import torch
        >>> from fastattn.lm.generate import Sampling, generate
        >>> from fastattn.lm.models import Decoder, preset
        >>> model = Decoder(preset("tiny", vocab_size=300))
        >>> steps = generate(model, [[1, 2, 3], [4]], 5, Sampling(temperature=0))
        >>> torch.stack(list(steps), dim=1).shape
        torch.Size([2, 5])
    """
    rows = checked("tokens", tokens)
    check_lengths(model, rows, max_new_tokens)
    with evaluating(model), torch.no_grad():
        read = encoded(model, source)
    if read is not None and len(read.states) != len(rows):
        raise input_error("source", f"{len(read.states)} rows", f"{len(rows)}, one for each of tokens", "Repeat them.")
    longest = min(max(len(row) for row in rows) + max_new_tokens - 1, model.config.longest)
    stops = as_set(stop_token)
    if assistant is not None or prompt_lookup is not None:
        if not use_cache:
            raise input_error("use_cache", False, "True with guesses", "They are checked against the cache.")
        decoder = checked_decoder(model)
        guessing = drafters(decoder, rows, max_new_tokens, assistant, prompt_lookup, draft_tokens, page_size)
        cached = Cached(decoder, len(rows), min(longest + MOST_TOKENS, model.config.longest), page_size=page_size)
        counts = Acceptance() if acceptance is None else acceptance
        return Speculation(decoder, cached, guessing, sampling or Sampling(), stops, counts).run(rows, max_new_tokens)
    sequences: Sequences = Uncached(model, read)
    if use_cache:
        sequences = Cached(model, len(rows), longest, page_size=page_size, source=read)
    return _steps(model, sequences, rows, max_new_tokens, sampling or Sampling(), stops)


def _steps(
    model: Model, sequences: Sequences, rows: list[list[int]], steps: int, sampling: Sampling, stops: frozenset[int]
) -> Iterator[Tensor]:
    draws, device = Draws(sampling), model.embedding.weight.device
    names = {row: sequences.add(row) for row in range(len(rows))}
    left = {row: model.config.longest - len(tokens) for row, tokens in enumerate(rows)}  # tokens it can still be fed
    seen = seen_tokens(rows, model.config.vocab_size, device) if sampling.repetition_penalty != 1 else None
    active: Tensor | None = None  # the rows that go on; None is all
    with evaluating(model), torch.no_grad():
        logits = sequences.feed(list(names.values()), rows)
    for step in range(steps):
        with torch.no_grad():
            chosen = sampling.choose(logits, draws(list(names), device), seen)
            if seen is not None:
                seen.scatter_(1, chosen[:, None], True)
        yield chosen if active is None else torch.full((len(rows),), ENDED, device=device).index_put((active,), chosen)
        ended = [row for row in names if left[row] == 0]
        left = {row: count - 1 for row, count in left.items()}
        if stops:
            ended += [row for row, token in zip(names, chosen.tolist(), strict=True) if token in stops]
        if ended:
            kept = torch.tensor([n for n, row in enumerate(names) if row not in ended], dtype=torch.int64)
            kept = kept.to(device, non_blocking=True)
            chosen, seen = chosen[kept], None if seen is None else seen[kept]
            for row in set(ended):
                sequences.free(names.pop(row))
            active = torch.tensor(list(names)).to(device, non_blocking=True)
        if not names or step == steps - 1:
            return
        with evaluating(model), torch.no_grad():
            logits = sequences.feed(list(names.values()), chosen)


def check_lengths(model: Model, rows: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    """Raise InputError unless the prompts fit into the model, and a token is asked for."""
    if max_new_tokens < 1:
        raise input_error("max_new_tokens", max_new_tokens, "a positive int", "Ask for at least one token.")
    length, longest = max(len(row) for row in rows), model.config.longest
    if length > longest:
        allowed = f"at most max_length = {longest}"
        raise input_error("tokens", f"a prompt of {length} tokens", allowed, "Shorten the prompt.")


def as_set(stop_token: StopTokens) -> frozenset[int]:
    """The tokens that end a text."""
    if stop_token is None:
        return frozenset()
    return frozenset([stop_token] if isinstance(stop_token, int) else stop_token)


def seen_tokens(rows: Sequence[Sequence[int]], vocabulary: int, device: torch.device) -> Tensor:
    """``(B, V)``: True for the tokens that stand in a row."""
    seen = torch.zeros(len(rows), vocabulary, dtype=torch.bool)
    for row, tokens in zip(seen, rows, strict=True):
        row[torch.tensor(tokens)] = True
    return seen.to(device)
