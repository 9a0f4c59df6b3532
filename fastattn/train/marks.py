"""The special tokens of a tokenizer, by what they are for: ours, or those of a tokenizer from elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tokenizers import AddedToken, Tokenizer

from fastattn.errors import DataError
from fastattn.train.tokens import END, START

MASK = "<|mask|>"
SENTINEL = "<|hidden-{}|>"
# What begins a text, what ends it: fastattn's, then BERT's, T5's, Llama's, GPT-2's and other usual names.
_BEGINNINGS = (START, "[CLS]", "<s>", "<bos>", "<|begin_of_text|>", "<|endoftext|>")
_ENDINGS = (END, "[SEP]", "</s>", "<eos>", "<|end_of_text|>", "<|endoftext|>")
_MASKS = (MASK, "[MASK]", "<mask>")


@dataclass(frozen=True)
class Marks:
    """Ids of special tokens.

    Attributes:
        begin: begins a text.
        end: ends a text, and stands between two.
    """

    begin: int
    end: int

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> Marks:
        """Find them by their usual names; raises DataError if there are none."""
        end = _first(tokenizer, _ENDINGS)
        begin = _first(tokenizer, _BEGINNINGS)
        if end is None:
            names = ", ".join(_ENDINGS)
            raise DataError(f"The tokenizer has no token that ends a text: it should have one of {names}.")
        return cls(end if begin is None else begin, end)  # T5 begins with nothing, and has only </s>

    def around(self, ids: Sequence[int], room: int) -> list[int]:
        """``begin ids end``, the ids cut so that the whole is at most ``room`` tokens."""
        return [self.begin, *ids[: room - 2], self.end]


def mask_token(tokenizer: Tokenizer) -> int:
    """The id of the token that hides another, added to the tokenizer if it has none."""
    known = _first(tokenizer, _MASKS)
    return _added(tokenizer, [MASK])[0] if known is None else known


def sentinel_tokens(tokenizer: Tokenizer, count: int) -> list[int]:
    """The ids of the first ``count`` tokens that stand for hidden spans, added to the tokenizer if it has none."""
    return _added(tokenizer, [SENTINEL.format(number) for number in range(count)])


def _first(tokenizer: Tokenizer, names: Sequence[str]) -> int | None:
    return next((token for name in names if (token := tokenizer.token_to_id(name)) is not None), None)


def _added(tokenizer: Tokenizer, names: list[str]) -> list[int]:
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    known = tokenizer.get_vocab(with_added_tokens=True)
    return [known[name] for name in names]
