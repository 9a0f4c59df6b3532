"""Text around decoding: prompts to tokens, tokens to text that is valid UTF-8 at every moment, strings that end it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from fastattn.errors import DataError, input_error
from fastattn.lm.generate.batching import complete
from fastattn.lm.generate.beams import beam_search
from fastattn.lm.generate.decode import ENDED, generate
from fastattn.lm.generate.protocols import DecoderModel, Model, is_decoder, is_encoder_decoder
from fastattn.lm.generate.sampling import Sampling
from fastattn.lm.generate.speculate import Acceptance


class Texts:
    """A model that continues texts, or of an encoder-decoder answers them.

    Args:
        model: trained.
        tokenizer: what it was trained with, any of the ``tokenizers`` library.
        start: token that begins a text; None if nothing does, as for T5.
        end: token that ends one, and generation.
        target: token that an encoder-decoder's answers begin with; None is ``start``.
        stop: strings that end a text; they and what follows them are left out.
        ends: ids of further tokens that end generation.

    Raises:
        InputError: a stop string is empty, or the tokenizer lacks the special tokens.
    """

    def __init__(
        self,
        model: Model,
        tokenizer: Tokenizer,
        *,
        start: str | None = "<|start|>",
        end: str = "<|end|>",
        target: str | None = None,
        stop: Sequence[str] = (),
        ends: Sequence[int] = (),
    ) -> None:
        if not all(stop):
            raise input_error("stop", list(stop), "strings of at least one character", "Leave the empty one out.")
        self.model, self.tokenizer, self.stop = model, tokenizer, tuple(stop)
        self.opening = [] if start is None else [self._mark("start", start)]
        self.last = self._mark("end", end)
        self.ends = tuple(dict.fromkeys((self.last, *ends)))
        self.target = [self._mark("target", target)] if target is not None else self.opening or [self.last]

    def _mark(self, name: str, token: str) -> int:
        found = self.tokenizer.token_to_id(token)
        if found is None:
            raise input_error(name, repr(token), "a token of the tokenizer", "It marks where texts begin and end.")
        return found

    def encode(self, text: str) -> list[int]:
        """The tokens of a text's beginning, at least one."""
        return [*self.opening, *self.tokenizer.encode(text, add_special_tokens=False).ids] or [self.last]

    def decode(self, tokens: Iterable[int], after: Sequence[int] = ()) -> str:
        """The text of new tokens that stand ``after`` others, up to a stop string."""
        return "".join(self._pieces(tokens, after))

    @property
    def _special(self) -> tuple[int, ...]:
        return (*self.opening, *self.target, *self.ends)

    def _pieces(self, tokens: Iterable[int], after: Sequence[int]) -> Iterator[str]:
        return until(decode_stream(self.tokenizer, tokens, self._special, after=after), self.stop)

    def length(self, prompt: str) -> int:
        """Tokens that the model reads of a prompt, special tokens included."""
        begin, source = self._inputs(prompt)
        return len(source["source"][0]) if source else len(begin)

    def _inputs(self, prompt: str | Sequence[int], image: Tensor | None = None) -> tuple[list[int], dict[str, Any]]:
        """Tokens that the decoder continues, and the source of an encoder-decoder, or the image before the text."""
        if not isinstance(prompt, str):
            return list(prompt), {}
        if not is_encoder_decoder(self.model):
            return self.encode(prompt), {} if image is None else {"source": image}
        ids = self.tokenizer.encode(prompt, add_special_tokens=False).ids
        return self.target, {"source": [[*self.opening, *ids, self.last]]}

    def stream(
        self,
        prompt: str | Sequence[int],
        max_new_tokens: int,
        sampling: Sampling | None = None,
        *,
        use_cache: bool = True,
        page_size: int | None = None,
        assistant: DecoderModel | None = None,
        prompt_lookup: int | None = None,
        acceptance: Acceptance | None = None,
        image: Tensor | None = None,
    ) -> Iterator[str]:
        """Yield the continuation of ``prompt``, a text or a decoder's tokens, piece by piece; see ``stream_text``.

        A model of text about images reads ``image`` first, ``(1, C, H, W)``.
        """
        begin, source = self._inputs(prompt, image)
        chosen = generate(
            self.model,
            [begin],
            max_new_tokens,
            sampling,
            **source,
            stop_token=self.ends,
            use_cache=use_cache,
            page_size=page_size,
            assistant=assistant,
            prompt_lookup=prompt_lookup,
            acceptance=acceptance,
        )
        return self._pieces((int(token) for token in chosen), after=begin)

    def best(
        self,
        prompt: str,
        max_new_tokens: int,
        *,
        beams: int,
        length_penalty: float = 1.0,
        repetition_penalty: float = 1.0,
        use_cache: bool = True,
        page_size: int | None = None,
        image: Tensor | None = None,
    ) -> str:
        """The best continuation that ``beam_search`` finds; a stop string ends a beam. For ``image`` see ``stream``."""
        begin, source = self._inputs(prompt, image)

        def has_stopped(_: int, tokens: Sequence[int]) -> bool:
            return self._has_stopped(tokens, begin)

        found = beam_search(
            self.model,
            [begin],
            max_new_tokens,
            beams=beams,
            length_penalty=length_penalty,
            repetition_penalty=repetition_penalty,
            should_stop=has_stopped if self.stop else None,
            **source,
            stop_token=self.ends,
            use_cache=use_cache,
            page_size=page_size,
        )
        return self.decode(found[0][0].tokens, after=begin)

    def complete(
        self,
        prompts: Sequence[str],
        max_new_tokens: int,
        sampling: Sampling | None = None,
        *,
        rows: Sequence[int] | None = None,
        batch: int = 8,
        page_size: int = 16,
        num_pages: int | None = None,
    ) -> Iterator[TextCompletion]:
        """Continue many prompts by continuous batching, and yield them as they end; see ``generate.complete``.

        An encoder-decoder answers them one batch after the other.
        """
        if not is_decoder(self.model):
            yield from self._answer(prompts, max_new_tokens, sampling or Sampling(), rows, batch, page_size)
            return
        begins = [self.encode(prompt) for prompt in prompts]

        def has_stopped(index: int, tokens: Sequence[int]) -> bool:
            return self._has_stopped(tokens, begins[index])

        found = complete(
            self.model,
            begins,
            max_new_tokens,
            sampling,
            rows=rows,
            stop_token=self.ends,
            should_stop=has_stopped if self.stop else None,
            batch=batch,
            page_size=page_size,
            num_pages=num_pages,
        )
        for done in found:
            text = self.decode(done.tokens, after=begins[done.index])
            yield TextCompletion(done.index, text, len(done.tokens), done.reason)

    def _answer(
        self,
        prompts: Sequence[str],
        max_new_tokens: int,
        sampling: Sampling,
        rows: Sequence[int] | None,
        batch: int,
        page_size: int,
    ) -> Iterator[TextCompletion]:
        if batch < 1:
            raise input_error("batch", batch, "a positive int", "It counts prompts.")
        rows = range(len(prompts)) if rows is None else rows
        for some in consecutive(rows, batch):
            inputs = [self._inputs(prompt) for prompt in prompts[some]]
            seed = None if sampling.seed is None else sampling.seed + rows[some.start]
            steps = generate(
                self.model,
                [begin for begin, _ in inputs],
                max_new_tokens,
                dataclasses.replace(sampling, seed=seed),
                source=[row for _, more in inputs for row in more["source"]],
                stop_token=self.ends,
                page_size=page_size,
            )
            for n, tokens in enumerate(torch.stack(list(steps), dim=1).tolist()):
                kept = [token for token in tokens if token != ENDED]
                has_ended = kept[-1] in self.ends or bool(self.stop and self._has_stopped(kept, self.target))
                text = self.decode(kept, after=self.target)
                yield TextCompletion(some.start + n, text, len(kept), "stop" if has_ended else "length")

    def _has_stopped(self, tokens: Sequence[int], after: Sequence[int]) -> bool:
        """Whether a stop string stands in the text so far. A character whose bytes are still to come is none yet."""
        text = "".join(decode_stream(self.tokenizer, tokens, self._special, after=after, is_whole=False))
        return any(stop in text for stop in self.stop)


def consecutive(rows: Sequence[int], batch: int) -> Iterator[slice]:
    """Slices of consecutive ``rows``, at most ``batch`` long: a batch draws with the ``seed + n`` of its first.

    Example:
        >>> from fastattn.lm.generate.text import consecutive
        >>> list(consecutive([0, 1, 2, 5], 2))
        [slice(0, 2, None), slice(2, 3, None), slice(3, 4, None)]
    """
    begin = 0
    for end in range(1, len(rows) + 1):
        if end == len(rows) or end - begin == batch or rows[end] != rows[end - 1] + 1:
            yield slice(begin, end)
            begin = end


@dataclass(frozen=True)
class TextCompletion:
    """The text that a prompt was continued with: see ``Completion``; ``tokens`` is their number."""

    index: int
    text: str
    tokens: int
    reason: str


def stream_text(
    model: Model,
    tokenizer: Tokenizer,
    prompt: str,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    *,
    start: str | None = "<|start|>",
    end: str = "<|end|>",
    target: str | None = None,
    stop: Sequence[str] = (),
    use_cache: bool = True,
    page_size: int | None = None,
    assistant: DecoderModel | None = None,
    prompt_lookup: int | None = None,
    acceptance: Acceptance | None = None,
) -> Iterator[str]:
    """Continue ``prompt``, piece by piece as the text is generated.

    Args:
        model: trained; an encoder-decoder reads the prompt and writes an answer.
        tokenizer: as in ``Texts``.
        prompt: the beginning of a document; "" lets the model begin.
        max_new_tokens: as in ``generate``.
        sampling: as in ``generate``.
        start: as in ``Texts``.
        end: as in ``Texts``.
        target: as in ``Texts``.
        stop: as in ``Texts``.
        use_cache: as in ``generate``.
        page_size: as in ``generate``.
        assistant: as in ``generate``.
        prompt_lookup: as in ``generate``.
        acceptance: as in ``generate``.

    Yields:
        pieces of text, each whole characters. Bytes that are not UTF-8 become U+FFFD.

    Raises:
        InputError: as in ``generate``, or a stop string is empty.
    """
    texts = Texts(model, tokenizer, start=start, end=end, target=target, stop=stop)
    return texts.stream(
        prompt, max_new_tokens, sampling, use_cache=use_cache, page_size=page_size, assistant=assistant,
        prompt_lookup=prompt_lookup, acceptance=acceptance,
    )  # fmt: skip


def until(pieces: Iterator[str], stop: Sequence[str]) -> Iterator[str]:
    """The pieces up to the first of the ``stop`` strings, which may be spread over several of them.

    What could be the beginning of one is held back until it is known.
    """
    held = ""
    for piece in pieces:
        held += piece
        found = min((at for at in (held.find(string) for string in stop) if at >= 0), default=-1)
        if found >= 0:
            if held[:found]:
                yield held[:found]
            return
        longest = max((_overlap(held, string) for string in stop), default=0)
        ready, held = held[: len(held) - longest], held[len(held) - longest :]
        if ready:
            yield ready
    if held:
        yield held


def _overlap(text: str, string: str) -> int:
    """The most characters at the end of ``text`` that begin ``string``."""
    return next((n for n in range(min(len(text), len(string) - 1), 0, -1) if text.endswith(string[:n])), 0)


def decode_stream(
    tokenizer: Tokenizer,
    tokens: Iterable[int],
    special: Sequence[int] = (),
    *,
    after: Sequence[int] = (),
    is_whole: bool = True,
) -> Iterator[str]:
    """Text of tokens as they come, as the tokenizer's own decoder gives it. A character whose bytes are spread over
    tokens waits for the last.

    Args:
        tokenizer: any of the ``tokenizers`` library.
        tokens: ids.
        special: ids without text.
        after: ids of the text before, which decides whether the first word begins with a space.
        is_whole: nothing follows, so bytes left over are no character.

    Yields:
        pieces that make up the text.

    Raises:
        DataError: the decoder changes what it has given already, when more tokens come.
    """
    before = [token for token in after if token not in special]
    new: list[int] = []
    context = tokenizer.decode(before)

    def more() -> str:
        text = tokenizer.decode([*before, *new])
        # with bytes that are no character, a decoder may give up those before, too: they have been told already
        if not text.startswith(context) and "\ufffd" not in text:
            raise DataError(
                f"The tokenizer's decoder turned {context!r} into {text!r} as more tokens came, so its text cannot be "
                "streamed: take a tokenizer whose decoder works from left to right."
            )
        return text[len(context) :]

    for token in tokens:
        if token in special:
            continue
        new.append(token)
        text = more()
        if text and not text.endswith("\ufffd"):  # which may be the first bytes of a character
            yield text
            before, new = new, []
            context = tokenizer.decode(before)
    if is_whole and new and (rest := more()):
        yield rest
