"""Decoding: from a model and a prompt to tokens, one at a time, and to text that is valid UTF-8 at every moment."""

from __future__ import annotations

import codecs
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer
from torch import Tensor

from fastattn.errors import input_error
from fastattn.models import Decoder


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen: temperature, then top-k, then top-p.

    Attributes:
        temperature: divides the logits; 0 always takes the likeliest token (greedy).
        top_k: keep this many likeliest tokens; None is all.
        top_p: keep the fewest likeliest tokens whose probabilities reach this (nucleus); None is all.
        seed: of the draws; None draws from torch's generator.

    Raises:
        InputError: a value is out of range.

    Source:
        Holtzman et al., "The curious case of neural text degeneration", 2020 (top-p).
    """

    temperature: float = 0.8
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise input_error("temperature", self.temperature, "a number >= 0", "0 takes the likeliest token.")
        if self.top_k is not None and self.top_k < 1:
            raise input_error("top_k", self.top_k, "an int >= 1, or None", "None keeps every token.")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise input_error("top_p", self.top_p, "a probability in (0, 1], or None", "None keeps every token.")

    def probabilities(self, logits: Tensor) -> Tensor:
        """``(B, V)`` probabilities from ``(B, V)`` logits; for ``temperature`` > 0."""
        logits = logits.float() / self.temperature
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            least = logits.topk(self.top_k, dim=-1).values[..., -1:]
            logits = logits.masked_fill(logits < least, -torch.inf)
        p = logits.softmax(dim=-1)
        if self.top_p is not None:
            ordered, order = p.sort(dim=-1, descending=True)
            before = ordered.cumsum(dim=-1) - ordered  # the likeliest token has 0 before it and always stays
            p = p.scatter(-1, order, ordered.masked_fill(before >= self.top_p, 0.0))
        return p / p.sum(dim=-1, keepdim=True)

    def choose(self, logits: Tensor, generator: torch.Generator | None) -> Tensor:
        """``(B,)`` tokens from ``(B, V)`` logits."""
        if self.temperature == 0:
            return logits.argmax(dim=-1)
        return torch.multinomial(self.probabilities(logits), 1, generator=generator)[:, 0]


def generate(
    model: Decoder,
    tokens: Tensor,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    *,
    stop_token: int | None = None,
    use_cache: bool = True,
) -> Iterator[Tensor]:
    """Yield the tokens that follow ``tokens``, one step at a time.

    Args:
        model: on the device of ``tokens``; used in evaluation mode.
        tokens: ``(B, S)`` prompts of one length, ``S >= 1``.
        max_new_tokens: most steps. The model's ``max_length`` ends generation too.
        sampling: how to choose; None is ``Sampling()``.
        stop_token: ends generation when every row has produced it; it is the last thing a row yields that counts.
        use_cache: keep keys and values of earlier tokens instead of computing them again: the same tokens, faster.

    Yields:
        ``(B,)`` tokens.

    Raises:
        InputError: an empty or too long prompt, or no tokens asked for.

    Example:
        >>> import torch
        >>> from fastattn.generate import Sampling, generate
        >>> from fastattn.models import Decoder, preset
        >>> model = Decoder(preset("tiny", vocab_size=300))
        >>> prompt = torch.tensor([[1, 2, 3]])
        >>> len(list(generate(model, prompt, 5, Sampling(temperature=0))))
        5
    """
    if tokens.dim() != 2 or tokens.shape[1] < 1:
        raise input_error("tokens", f"shape {tuple(tokens.shape)}", "(B, S) with S >= 1", "Begin with the start token.")
    if max_new_tokens < 1:
        raise input_error("max_new_tokens", max_new_tokens, "a positive int", "Ask for at least one token.")
    longest = model.config.max_length
    if tokens.shape[1] > longest:
        given = f"a prompt of {tokens.shape[1]} tokens"
        raise input_error("tokens", given, f"at most max_length = {longest}", "Shorten the prompt.")
    return _steps(model, tokens, max_new_tokens, sampling or Sampling(), stop_token, use_cache)


def _steps(
    model: Decoder, tokens: Tensor, max_new_tokens: int, sampling: Sampling, stop_token: int | None, use_cache: bool
) -> Iterator[Tensor]:
    generator = None
    if sampling.seed is not None:
        generator = torch.Generator(tokens.device).manual_seed(sampling.seed)
    # The last token yielded is never an input, so max_length inputs give one more token than they are.
    steps = min(max_new_tokens, model.config.max_length - tokens.shape[1] + 1)
    caches = model.make_caches(tokens.shape[0], tokens.shape[1] + steps - 1) if use_cache else None
    done = torch.zeros(tokens.shape[0], dtype=torch.bool, device=tokens.device)
    was_training = model.training
    model.eval()
    try:
        for _ in range(steps):
            with torch.no_grad():
                unseen = tokens[:, caches[0].length :] if caches else tokens
                chosen = sampling.choose(model(unseen, caches=caches)[:, -1], generator)
            yield chosen
            tokens = torch.cat([tokens, chosen[:, None]], dim=1)
            if stop_token is not None:
                done |= chosen == stop_token
                if bool(done.all()):
                    return
    finally:
        model.train(was_training)


def stream_text(
    model: Decoder,
    tokenizer: Tokenizer,
    prompt: str,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    *,
    start: str = "<|start|>",
    end: str = "<|end|>",
    use_cache: bool = True,
) -> Iterator[str]:
    """Continue ``prompt``, piece by piece as the text is generated.

    Args:
        model: a trained decoder.
        tokenizer: the byte-level one it was trained with.
        prompt: the beginning of a document; "" lets the model begin.
        max_new_tokens: as in ``generate``.
        sampling: as in ``generate``.
        start: token that begins a document.
        end: token that ends one, and generation.
        use_cache: as in ``generate``.

    Yields:
        pieces of text, each whole characters. Bytes that are not UTF-8 become U+FFFD.

    Raises:
        InputError: as in ``generate``.
    """
    first, last = tokenizer.token_to_id(start), tokenizer.token_to_id(end)
    ids = [first, *tokenizer.encode(prompt, add_special_tokens=False).ids]
    tokens = torch.tensor([ids], device=model.embedding.weight.device)
    chosen = generate(model, tokens, max_new_tokens, sampling, stop_token=last, use_cache=use_cache)
    return decode_stream(tokenizer, (int(token) for token in chosen), special=(first, last))


def decode_stream(tokenizer: Tokenizer, tokens: Iterator[int], special: Sequence[int | None] = ()) -> Iterator[str]:
    """Text of byte-level tokens as they come. A character whose bytes are spread over tokens waits for the last.

    Args:
        tokenizer: byte-level.
        tokens: ids.
        special: ids without text.
    """
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    table = _bytes_of_characters()
    for token in tokens:
        if token in special:
            continue
        text = decoder.decode(bytes(table[character] for character in tokenizer.id_to_token(token) or ""))
        if text:
            yield text
    rest = decoder.decode(b"", final=True)
    if rest:
        yield rest


@functools.lru_cache(maxsize=1)
def _bytes_of_characters() -> dict[str, int]:
    """Byte-level BPE writes each byte as a printable character: itself where it is one, else from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + n): b for n, b in enumerate(others)}
