"""The special tokens of a tokenizer by purpose, whether the tokenizer is ours or comes from elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tokenizers import AddedToken, Tokenizer

from fastattn.errors import DataError
from fastattn.lm.train.tokens import END, START

MASK = "<|mask|>"
SENTINEL = "<|hidden-{}|>"
# What begins a text, and what ends it: fastattn's, then BERT's, BART's, Gemma's, Llama's and GPT-2's.
_BEGINNINGS = (START, "[CLS]", "<s>", "<bos>", "<|begin_of_text|>", "<|endoftext|>")
_ENDINGS = (END, "[SEP]", "</s>", "<eos>", "<|end_of_text|>", "<|endoftext|>")
_MASKS = (MASK, "[MASK]", "<mask>")
_PADDING = ("<pad>", "[PAD]")


@dataclass(frozen=True)
class SpecialTokens:
    """Ids of special tokens.

    Attributes:
        begin: begins a text; None if nothing does, as for T5.
        end: ends a text, and stands between two.
        target: what a decoder with an encoder begins with: ``begin``, or for T5 its padding.
        separators: how many ``end`` stand between two texts; RoBERTa and BART have two.
    """

    begin: int | None
    end: int
    target: int
    separators: int = 1

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> SpecialTokens:
        """Find them by their usual names; raises DataError if there are none."""
        begin, end = _first(tokenizer, _BEGINNINGS), _first(tokenizer, _ENDINGS)
        target = _first(tokenizer, _PADDING) if begin is None else begin
        if end is None:
            raise DataError(f"The tokenizer has no token that ends a text: it should have {' or '.join(_ENDINGS)}.")
        between = tokenizer.num_special_tokens_to_add(True) - tokenizer.num_special_tokens_to_add(False)
        return cls(begin, end, end if target is None else target, max(between, 1))

    def opening(self) -> list[int]:
        return [] if self.begin is None else [self.begin]

    def names(self, tokenizer: Tokenizer) -> tuple[str | None, str, str]:
        """``begin``, ``end`` and ``target`` as the tokenizer spells them."""
        begin = None if self.begin is None else tokenizer.id_to_token(self.begin)
        return begin, str(tokenizer.id_to_token(self.end)), str(tokenizer.id_to_token(self.target))

    def around(self, ids: Sequence[int], room: int) -> list[int]:
        """``begin ids end``, the ids cut so that the whole is at most ``room`` tokens."""
        opening = self.opening()
        return [*opening, *ids[: room - len(opening) - 1], self.end]


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
