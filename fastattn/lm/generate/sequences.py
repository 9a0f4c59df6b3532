"""The sequences that a model is continuing: their keys and values in a cache, or their tokens to be computed again.

``Cached`` and ``Uncached`` do the same with the same calls: ``add`` a sequence, ``feed`` tokens to some and get the
logits of what follows, ``fork`` and ``free`` them. That both give the same tokens is a test.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastattn.errors import input_error
from fastattn.lm.generate.draft_tree import DraftTree
from fastattn.lm.generate.protocols import Model, is_decoder, is_encoder_decoder, is_image_text
from fastattn.nn import PagedKVCache

Tokens = Tensor | Sequence[Sequence[int]]


class Source(NamedTuple):
    """The encoder's states of all sources, and their padding mask, which images do not have."""

    states: Tensor  # [R, S_s, C]
    mask: Tensor | None = None  # [R, S_s]


class Uncached:
    """Sequences without a cache: every token is computed again each time."""

    def __init__(self, model: Model, source: Source | None = None) -> None:
        self.model, self.source = model, source
        self._tokens: dict[int, list[int]] = {}
        self._rows: dict[int, int] = {}
        self._next = 0

    def add(self, row: int = 0) -> int:
        """Begin a sequence, of source ``row`` if there are sources, and return its name."""
        name, self._next = self._next, self._next + 1
        self._tokens[name], self._rows[name] = [], row
        return name

    def fork(self, name: int) -> int:
        """Begin a sequence with the tokens of another."""
        new = self.add(self._rows[name])
        self._tokens[new] = list(self._tokens[name])
        return new

    def free(self, name: int) -> None:
        del self._tokens[name], self._rows[name]

    def feed(self, names: Sequence[int], tokens: Tokens) -> Tensor:
        """Logits ``(n, V)`` of what follows when each sequence goes on with its tokens: ``(n,)``, or rows."""
        for name, more in zip(names, _as_lists(tokens), strict=True):
            self._tokens[name] += more
        device = self.model.embedding.weight.device
        rows, mask = padded(
            [self._tokens[name] for name in names], device
        )  # causal: nothing sees the padding behind it
        last = mask.sum(1) - 1
        if is_decoder(self.model):
            hidden = self.model.hidden(rows)
        elif is_encoder_decoder(self.model):
            states, of_source = _given(self.source, [self._rows[name] for name in names])
            hidden = self.model.hidden(None, rows, memory=states, source_mask=of_source)
        elif is_image_text(self.model):
            images = None if self.source is None else self.source.states[[self._rows[name] for name in names]]
            hidden = self.model.hidden(rows, prefix=images)
        return self.model.logits(hidden[torch.arange(len(names), device=device), last])


class Cached:
    """Sequences whose keys and values are kept, in pages or each in one contiguous piece.

    Args:
        model: whose they are.
        sequences: the most there are at a time.
        max_length: the most tokens that one is fed.
        page_size: of the pages; None is a page for each sequence.
        num_pages: None is what ``sequences`` of ``max_length`` take.
        source: of an encoder-decoder.
        keeps_all: tokens before the model's window are kept, too.
    """

    def __init__(
        self,
        model: Model,
        sequences: int,
        max_length: int,
        *,
        page_size: int | None = None,
        num_pages: int | None = None,
        source: Source | None = None,
        keeps_all: bool = False,
    ) -> None:
        self.model, self.source = model, source
        self._images = source.states if source is not None and is_image_text(model) else None
        if self._images is not None:
            max_length += self._images.shape[1]
        size = max_length if page_size is None else page_size
        _, kv_heads, head_dim = model.config.head_shape
        weight = model.embedding.weight
        self.cache = PagedKVCache(
            -(-max_length // size) * sequences if num_pages is None else num_pages,
            size,
            kv_heads,
            head_dim,
            layers=model.cached_layers,
            max_length=max_length,
            window=None if keeps_all else model.config.cache_window,
            device=weight.device,
            dtype=_dtype_of_keys(weight),
        )
        self._rows: dict[int, int] = {}
        self._begun: set[int] = set()  # the sequences that hold their image
        self._rows_of_step: list[int] = []

    def add(self, row: int = 0) -> int:
        """Begin a sequence, of source ``row`` if there are sources, and return its name."""
        name = self.cache.add()
        self._rows[name] = row
        return name

    def fork(self, name: int) -> int:
        """Begin a sequence with the tokens of another."""
        new = self.cache.fork(name)
        self._rows[new] = self._rows[name]
        if name in self._begun:
            self._begun.add(new)
        return new

    def free(self, name: int) -> None:
        self.cache.free(name)
        del self._rows[name]
        self._begun.discard(name)

    def feed(self, names: Sequence[int], tokens: Tokens) -> Tensor:
        """As ``Uncached.feed``; only the new tokens are computed."""
        self._begin(names)
        new = [1] * len(names) if isinstance(tokens, Tensor) else [len(row) for row in tokens]
        if len(set(new)) > 1 and self._has_one_length:
            return torch.cat([self.feed([name], [row]) for name, row in zip(names, _as_lists(tokens), strict=True)])
        step = self.cache.step(names, new)
        if isinstance(tokens, Tensor):
            tokens = tokens[:, None]
        else:
            flat = torch.tensor([token for row in tokens for token in row])
            tokens = flat.view(step.positions.shape).to(step.positions.device, non_blocking=True)
        hidden = self._hidden(names, tokens, step.layers)
        last = hidden[:, -1] if step.cu_seqlens_q is None else hidden[0, step.cu_seqlens_q[1:].long() - 1]
        return self.model.logits(last)

    def _begin(self, names: Sequence[int]) -> None:
        """Put the images of new sequences before their tokens."""
        new = [name for name in names if name not in self._begun]
        if self._images is None or not new:
            return
        assert is_image_text(self.model)
        images = self._images[[self._rows[name] for name in new]]
        self.model.begin(images, self.cache.step(new, [images.shape[1]] * len(new)).layers)
        self._begun.update(new)

    @property
    def _has_one_length(self) -> bool:
        """A bias and a memory go with rows, not with packed tokens."""
        has_memory = self.source is not None and self._images is None
        return self.model.config.positions == "relative" or has_memory

    @property
    def can_branch(self) -> bool:
        """Whether trees may be more than chains: a bias counts the tokens of a row one after the other."""
        return not self._has_one_length

    def feed_trees(self, names: Sequence[int], trees: Sequence[DraftTree]) -> Tensor:
        """Logits ``(T, V)`` of what follows each token of the trees that the sequences go on with, one after the other.

        ``cache.keep`` then keeps a path of each.
        """
        new = [len(tree.tokens) for tree in trees]
        if len(set(new)) > 1 and self._has_one_length:
            return torch.cat([self.feed_trees([name], [tree]) for name, tree in zip(names, trees, strict=True)])
        are_chains = all(tree.is_chain for tree in trees)
        step = self.cache.step(names, new, parents=None if are_chains else [tree.parents for tree in trees])
        flat = torch.tensor([token for tree in trees for token in tree.tokens])
        tokens = flat.view(step.positions.shape).to(step.positions.device, non_blocking=True)
        return self.model.logits(self._hidden(names, tokens, step.layers).flatten(0, 1))

    def _hidden(self, names: Sequence[int], tokens: Tensor, layers: Any) -> Tensor:
        if is_decoder(self.model) or is_image_text(self.model):
            return self.model.hidden(tokens, caches=layers)
        assert is_encoder_decoder(self.model)
        rows = [self._rows[name] for name in names]
        if rows != self._rows_of_step:  # the model computes the keys and values of these sources, and keeps them
            self.cache.sources, self._rows_of_step = [None] * len(self.cache.sources), rows
        states, of_source = _given(self.source, rows)
        return self.model.hidden(None, tokens, memory=states, source_mask=of_source, caches=layers)


Sequences = Cached | Uncached


def padded(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """``(n, S)`` tokens filled up with 0 on the right, and True where they are tokens."""
    lengths = torch.tensor([len(row) for row in rows])
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    tokens = torch.zeros(mask.shape, dtype=torch.int64)
    tokens[mask] = torch.tensor([token for row in rows for token in row])
    return tokens.to(device), mask.to(device)


def encoded(model: Model, source: Tokens | None) -> Source | None:
    """The sources, read by the encoder; of a model of text about images those, or None for text alone.

    Raises:
        InputError: an encoder-decoder without sources, sources for a decoder, or an empty one.
    """
    if is_image_text(model):
        if source is not None and not isinstance(source, Tensor):
            raise input_error("source", type(source).__name__, "a tensor of images (B, C, H, W)", "Read the files.")
        return None if source is None else Source(model.read(source.to(model.embedding.weight.device)))
    if not is_encoder_decoder(model):
        if source is not None:
            raise input_error("source", "tokens", "None for a decoder", "Put them before the prompt.")
        return None
    if source is None:
        raise input_error("source", None, "tokens for the encoder", "An encoder-decoder reads one and writes another.")
    tokens, mask = padded(checked("source", source), model.embedding.weight.device)
    return Source(model.encode(tokens, mask), mask)


def checked(name: str, tokens: Tokens) -> list[list[int]]:
    """Rows of tokens as lists.

    Raises:
        InputError: they are no rows of integers, or one is empty.
    """
    if isinstance(tokens, Tensor) and (tokens.dim() != 2 or tokens.is_floating_point()):
        given = f"shape {tuple(tokens.shape)}, {tokens.dtype}"
        raise input_error(name, given, "(B, S) with S >= 1, integers", "Begin with the start token.")
    found = tokens.tolist() if isinstance(tokens, Tensor) else list(tokens)
    if any(isinstance(row, str) for row in found):
        raise input_error(name, "text", "rows of tokens", "Encode it, or let fastattn.lm.generate.Texts do that.")
    rows = [list(map(int, row)) for row in found]
    if not rows or not all(rows):
        given = f"rows of {[len(row) for row in rows]} tokens"
        raise input_error(
            name, given, "(B, S) with S >= 1: at least one token in each row", "Begin with the start token."
        )
    return rows


def _dtype_of_keys(weight: Tensor) -> torch.dtype:
    """The dtype of the model's keys: that of autocast if it is on."""
    device = weight.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype


def _as_lists(tokens: Tokens) -> list[list[int]]:
    return [[token] for token in tokens.tolist()] if isinstance(tokens, Tensor) else [list(row) for row in tokens]


def _given(source: Source | None, rows: list[int]) -> tuple[Tensor, Tensor]:
    """States and masks of these sources of an encoder-decoder."""
    assert source is not None and source.mask is not None  # ``encoded`` sees to it
    return source.states[rows], source.mask[rows]
