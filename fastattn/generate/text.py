"""Text around decoding: prompts to tokens, tokens to text that is valid UTF-8 at every moment, strings that end it."""

from __future__ import annotations

import codecs
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tokenizers import Tokenizer

from fastattn.errors import input_error
from fastattn.generate.batching import complete
from fastattn.generate.beams import beam_search
from fastattn.generate.decode import generate
from fastattn.generate.sampling import Sampling
from fastattn.generate.sequences import Model
from fastattn.models import Decoder


class Texts:
    """A model that continues texts, or of an encoder-decoder answers them.

    Args:
        model: trained.
        tokenizer: the byte-level one it was trained with.
        start: token that begins a text.
        end: token that ends one, and generation.
        stop: strings that end a text; they and what follows them are left out.

    Raises:
        InputError: a stop string is empty, or the tokenizer does not know the marks.
    """

    def __init__(
        self,
        model: Model,
        tokenizer: Tokenizer,
        *,
        start: str = "<|start|>",
        end: str = "<|end|>",
        stop: Sequence[str] = (),
    ) -> None:
        if not all(stop):
            raise input_error("stop", list(stop), "strings of at least one character", "Leave the empty one out.")
        self.model, self.tokenizer, self.stop = model, tokenizer, tuple(stop)
        self.first, self.last = self._mark("start", start), self._mark("end", end)

    def _mark(self, name: str, token: str) -> int:
        found = self.tokenizer.token_to_id(token)
        if found is None:
            raise input_error(name, repr(token), "a token of the tokenizer", "It marks where texts begin and end.")
        return found

    def encode(self, text: str) -> list[int]:
        """The tokens of a text's beginning."""
        return [self.first, *self.tokenizer.encode(text, add_special_tokens=False).ids]

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of new tokens, up to a stop string."""
        pieces = decode_stream(self.tokenizer, iter(tokens), (self.first, self.last))
        return "".join(until(pieces, self.stop))

    def stream(
        self,
        prompt: str,
        max_new_tokens: int,
        sampling: Sampling | None = None,
        *,
        use_cache: bool = True,
        page_size: int | None = None,
    ) -> Iterator[str]:
        """Yield the continuation of ``prompt`` piece by piece; the arguments are those of ``stream_text``."""
        is_decoder = isinstance(self.model, Decoder)
        chosen = generate(
            self.model,
            [self.encode(prompt) if is_decoder else [self.first]],
            max_new_tokens,
            sampling,
            source=None if is_decoder else [self.encode(prompt)],
            stop_token=self.last,
            use_cache=use_cache,
            page_size=page_size,
        )
        pieces = decode_stream(self.tokenizer, (int(token) for token in chosen), (self.first, self.last))
        return until(pieces, self.stop)

    def best(
        self,
        prompt: str,
        max_new_tokens: int,
        *,
        beams: int,
        length_penalty: float = 1.0,
        use_cache: bool = True,
        page_size: int | None = None,
    ) -> str:
        """The best continuation that ``beam_search`` finds."""
        is_decoder = isinstance(self.model, Decoder)
        found = beam_search(
            self.model,
            [self.encode(prompt) if is_decoder else [self.first]],
            max_new_tokens,
            beams=beams,
            length_penalty=length_penalty,
            source=None if is_decoder else [self.encode(prompt)],
            stop_token=self.last,
            use_cache=use_cache,
            page_size=page_size,
        )
        return self.decode(found[0][0].tokens)

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
        """Continue many prompts by continuous batching, and yield them as they end; see ``generate.complete``."""
        found = complete(
            self.model,  # type: ignore[arg-type]
            [self.encode(prompt) for prompt in prompts],
            max_new_tokens,
            sampling,
            rows=rows,
            stop_token=self.last,
            should_stop=(lambda _, tokens: self._has_stopped(tokens)) if self.stop else None,
            batch=batch,
            page_size=page_size,
            num_pages=num_pages,
        )
        for done in found:
            yield TextCompletion(done.index, self.decode(done.tokens), len(done.tokens), done.reason)

    def _has_stopped(self, tokens: Sequence[int]) -> bool:
        """Whether a stop string stands in the text so far. A character whose bytes are still to come is none yet."""
        text = "".join(decode_stream(self.tokenizer, iter(tokens), (self.first, self.last), is_whole=False))
        return any(stop in text for stop in self.stop)


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
    start: str = "<|start|>",
    end: str = "<|end|>",
    stop: Sequence[str] = (),
    use_cache: bool = True,
    page_size: int | None = None,
) -> Iterator[str]:
    """Continue ``prompt``, piece by piece as the text is generated.

    Args:
        model: trained; an encoder-decoder reads the prompt and writes an answer.
        tokenizer: the byte-level one it was trained with.
        prompt: the beginning of a document; "" lets the model begin.
        max_new_tokens: as in ``generate``.
        sampling: as in ``generate``.
        start: token that begins a document.
        end: token that ends one, and generation.
        stop: strings that end the text; they are left out.
        use_cache: as in ``generate``.
        page_size: as in ``generate``.

    Yields:
        pieces of text, each whole characters. Bytes that are not UTF-8 become U+FFFD.

    Raises:
        InputError: as in ``generate``, or a stop string is empty.
    """
    texts = Texts(model, tokenizer, start=start, end=end, stop=stop)
    return texts.stream(prompt, max_new_tokens, sampling, use_cache=use_cache, page_size=page_size)


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
    tokenizer: Tokenizer, tokens: Iterator[int], special: Sequence[int | None] = (), is_whole: bool = True
) -> Iterator[str]:
    """Text of byte-level tokens as they come. A character whose bytes are spread over tokens waits for the last.

    Args:
        tokenizer: byte-level.
        tokens: ids.
        special: ids without text.
        is_whole: nothing follows, so bytes left over are no character.
    """
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    table = _bytes_of_characters()
    for token in tokens:
        if token in special:
            continue
        text = decoder.decode(bytes(table[character] for character in tokenizer.id_to_token(token) or ""))
        if text:
            yield text
    rest = decoder.decode(b"", final=True) if is_whole else ""
    if rest:
        yield rest


@functools.lru_cache(maxsize=1)
def _bytes_of_characters() -> dict[str, int]:
    """Byte-level BPE writes each byte as a printable character: itself where it is one, else from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + n): b for n, b in enumerate(others)}
