"""The paged key/value cache: sequences that are added, share prefixes, fork and are freed, in one store of pages.

``PagedKVCache`` assigns pages to sequences on the host; ``CacheStep`` holds the assignment as the small tensors that
kernels read; ``PagedLayer`` is the cache that one layer of a model is given for a step.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastattn.errors import input_error
from fastattn.nn.cache import check_sizes
from fastattn.nn.layer_cache import LayerCache, kept_moves, make_stores, scales_of_stores
from fastattn.spec import page_and_row
from fastattn.trees import ancestors, words_of_trees

EVICTED = -1  # in place of a page before the window


@dataclass
class _Sequence:
    pages: list[int]
    length: int = 0

    def copy(self) -> _Sequence:
        return _Sequence(list(self.pages), self.length)

    def place(self, position: int, page_size: int) -> tuple[int, int]:
        """The page of a position, and its row there."""
        entry, row = page_and_row(position, page_size)
        return self.pages[entry], row


@dataclass(frozen=True)
class CacheStep:
    """One call of a model for some sequences: where their new tokens go, and what they attend to.

    Attributes:
        layers: the cache of each layer of the model.
        sequences: the names of the sequences, in order.
        new_tokens: the number of new tokens of each.
        positions: ``(n, S)`` of the new tokens if all have ``S``, else packed ``(1, T)``: the shape of the tokens that
            the model is called with.
        lengths: ``(n,)`` int32, positions filled before the step.
        block_table: ``(n, max_pages)`` int32.
        cu_seqlens_q: ``(n + 1,)`` int32 if packed, else None.
        max_seqlen_q: most new tokens of a sequence.
        max_length: length of the longest sequence after the step, when the step was made.
        tree_mask: of the new tokens, if they were given parents; else None.
    """

    layers: tuple[PagedLayer, ...]
    sequences: tuple[int, ...]
    new_tokens: tuple[int, ...]
    positions: Tensor
    lengths: Tensor
    block_table: Tensor
    cu_seqlens_q: Tensor | None
    max_seqlen_q: int
    max_length: int
    tree_mask: Tensor | None = None


class PagedLayer(LayerCache):
    """A layer's pages during a step. Models call ``attend``."""

    def __init__(self, cache: PagedKVCache, index: int) -> None:
        self.cache, self.index = cache, index
        self.keys, self.values = cache.keys[index], cache.values[index]
        self.k_scale, self.v_scale = (x if x is None else x[index] for x in (cache.k_scale, cache.v_scale))
        self.step: CacheStep | None = None

    @property
    def positions(self) -> Tensor:
        """Of the new tokens."""
        return self._step().positions

    @property
    def longest(self) -> int:
        """Length of the longest sequence after the step."""
        return self._step().max_length

    @property
    def source(self) -> Any:
        """Keys and values of cross-attention, which later steps use again; see ``PagedKVCache.sources``."""
        return self.cache.sources[self.index]

    @source.setter
    def source(self, source: Any) -> None:
        self.cache.sources[self.index] = source

    def new_positions(self, tokens: int) -> Tensor:
        """``positions``: a step was made for its tokens."""
        positions = self.positions
        if positions.shape[1] != tokens:
            todo = "Call the layer with the tokens that the step was made for."
            raise input_error("tokens", tokens, f"{positions.shape[1]}, those of the step", todo)
        return positions

    def _append_and_attend(self, q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> Tensor:
        step = self._step()
        options |= {
            "block_table": step.block_table, "cu_seqlens_q": step.cu_seqlens_q, "max_seqlen_q": step.max_seqlen_q
        }  # fmt: skip
        if step.tree_mask is not None:
            options["tree_mask"] = step.tree_mask
        if step.cu_seqlens_q is None:
            return self._attend(q, step.lengths, k, v, options)
        return self._attend(q[0], step.lengths, k[0], v[0], options)[None]

    def _step(self) -> CacheStep:
        assert self.step is not None  # CacheStep sets it
        return self.step


class PagedKVCache:
    """Keys and values of many sequences, for all layers of a model, in pages of ``page_size`` tokens.

    A sequence begins with ``add``, grows by ``step`` and ends with ``free``. ``fork`` begins one that shares all pages
    of another; a shared page is copied when one of them writes to it. With a ``window``, pages that no later token can
    see are freed. Pages are assigned on the host, before anything runs: a step that does not fit raises and changes
    nothing, and nothing waits for the device.

    ``keys`` ``(layers, num_pages, page_size, H_kv, D_qk)`` and ``values`` are allocated at once and never move.

    Args:
        num_pages: pages in the store, for all sequences together.
        page_size: tokens in a page; 16 wastes little memory.
        num_kv_heads: H_kv.
        head_dim: D_qk.
        layers: of the model.
        max_length: most tokens of a sequence; None is the capacity of all pages.
        head_dim_v: D_v; None is ``head_dim``.
        values_in_keys: the value of a token is the first D_v numbers of its key, as in multi-head latent attention,
            and is not stored again. What is appended must be so, and ``v_scale`` is None. Not for torch.compile.
        window: number of keys before a token that it sees, in every layer; None is all.
        device: where the tensors lie; None is torch's default.
        dtype: of keys and values; None is torch's default. ``torch.float8_e4m3fn`` halves the memory.
        k_scale: fp32 ``(H_kv,)`` or ``(layers, H_kv)`` of an e4m3 cache: keys are stored divided by it. None is 1.
        v_scale: likewise for the values.

    Raises:
        InputError: a size is not positive, or ``values_in_keys`` meets wider values or a ``v_scale``.

    Source:
        Kwon et al., "Efficient memory management for large language model serving with PagedAttention", 2023.

    Example:
        >>> import torch
        >>> from fastattn.nn import PagedKVCache
        >>> cache = PagedKVCache(num_pages=8, page_size=4, num_kv_heads=2, head_dim=16)
        >>> one = cache.add()
        >>> q, k = torch.randn(1, 6, 4, 16), torch.randn(1, 6, 2, 16)
        >>> out = cache.step([one], 6).layers[0].attend(q, k, k)            # a prompt of 6 tokens: 2 pages
        >>> two = cache.fork(one)                                           # shares both
        >>> q, k = torch.randn(2, 1, 4, 16), torch.randn(2, 1, 2, 16)
        >>> out = cache.step([one, two], 1).layers[0].attend(q, k, k)       # two continuations: one page is copied
        >>> cache.length(two), cache.free_pages
        (7, 5)
    """

    def __init__(
        self,
        num_pages: int,
        page_size: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        layers: int = 1,
        max_length: int | None = None,
        head_dim_v: int | None = None,
        values_in_keys: bool = False,
        window: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        k_scale: Tensor | None = None,
        v_scale: Tensor | None = None,
    ) -> None:
        head_dim_v = head_dim if head_dim_v is None else head_dim_v
        max_length = num_pages * page_size if max_length is None else max_length
        check_sizes({"num_pages": num_pages, "page_size": page_size, "num_kv_heads": num_kv_heads, "layers": layers,
                     "head_dim": head_dim, "head_dim_v": head_dim_v, "max_length": max_length})  # fmt: skip
        if window is not None and window < 0:
            raise input_error("window", window, "an int >= 0, or None", "It counts the neighbours before a token.")
        shape = (layers, num_pages, page_size, num_kv_heads)
        self.keys, self.values = make_stores(shape, (head_dim, head_dim_v), values_in_keys, device=device, dtype=dtype)
        self._stores = (self.keys,) if values_in_keys else (self.keys, self.values)
        k_scale, v_scale = scales_of_stores(k_scale, v_scale, values_in_keys)
        self.k_scale, self.v_scale = (x if x is None else x.expand(layers, -1) for x in (k_scale, v_scale))
        self.max_length, self.window = max_length, window
        self._free = list(range(num_pages))[::-1]
        self._users = [0] * num_pages
        self._sequences: dict[int, _Sequence] = {}
        self._next = 0
        # For each layer of a decoder with an encoder, the keys and values of its states, a row for each sequence of
        # the steps that follow; None until the model has computed them. Emptied by whoever changes the rows.
        self.sources: list[Any] = [None] * layers

    @property
    def num_pages(self) -> int:
        return self.keys.shape[1]

    @property
    def page_size(self) -> int:
        return self.keys.shape[2]

    @property
    def free_pages(self) -> int:
        """Pages that no sequence uses."""
        return len(self._free)

    @property
    def sequences(self) -> tuple[int, ...]:
        """The names of sequences that have not been freed, oldest first."""
        return tuple(self._sequences)

    def length(self, sequence: int) -> int:
        """The number of tokens of a sequence."""
        return self._get(sequence).length

    def pages(self, sequence: int) -> tuple[int | None, ...]:
        """The pages of a sequence in order; None for those before the window."""
        return tuple(None if page == EVICTED else page for page in self._get(sequence).pages)

    def add(self) -> int:
        """Begin an empty sequence, and return its name."""
        return self._begin(_Sequence([]))

    def fork(self, sequence: int) -> int:
        """Begin a sequence that has the tokens of ``sequence`` so far, without copying them, and return its name."""
        shared = self._get(sequence).copy()
        for page in shared.pages:
            if page != EVICTED:
                self._users[page] += 1
        return self._begin(shared)

    def free(self, sequence: int) -> None:
        """End a sequence. Pages that no other shares can be used again."""
        for page in self._get(sequence).pages:
            self._release(page)
        del self._sequences[sequence]

    def truncate(self, sequence: int, length: int) -> None:
        """Forget the tokens of a sequence from ``length`` on, such as rejected guesses of speculative decoding.

        Raises:
            InputError: it has fewer, or pages were freed by the window that would be needed again.
        """
        state = self._get(sequence)
        seen = max(0, length - self.window) if self.window is not None else 0
        first = seen // self.page_size
        kept = -(-length // self.page_size)
        if not 0 <= length <= state.length or EVICTED in state.pages[first:kept]:
            todo = "It can be shortened to what it still holds."
            raise input_error("length", length, f"0 to {state.length}, and no page gone that is seen from there", todo)
        for page in state.pages[kept:]:
            self._release(page)
        del state.pages[kept:]
        state.length = length

    def keep(self, sequences: Sequence[int], tokens: int | Sequence[int], kept: Sequence[Sequence[int]]) -> None:
        """Of the last tokens of some sequences keep some, which move together, and forget the others.

        After a step with ``parents`` this leaves the accepted path of each tree, in every layer.

        Args:
            sequences: names, each once.
            tokens: how many last tokens the choice is from, for each, or one number for all.
            kept: for each sequence indices among them, ascending.

        Raises:
            InputError: a sequence has fewer tokens, its indices are not among them in ascending order, or it shares
                pages that would have to be copied where no page is free. The cache stays as it was.
        """
        last = self._numbers(sequences, tokens)
        if len(kept) != len(last):
            raise input_error("kept", f"{len(kept)} rows", f"{len(last)}, one for each sequence", "[] keeps none.")
        states = [self._get(name) for name in sequences]
        moves = [kept_moves(n, row, state.length) for n, row, state in zip(last, kept, states, strict=True)]
        self._own([(state, to // self.page_size) for state, row in zip(states, moves, strict=True) for _, to in row])
        places = [(*state.place(source, self.page_size), *state.place(to, self.page_size))
                  for state, row in zip(states, moves, strict=True) for source, to in row]  # fmt: skip
        if places:
            from_page, from_row, page, row = torch.tensor(places).T.to(self.keys.device, non_blocking=True)
            for store in self._stores:
                store[:, page, row] = store[:, from_page, from_row]
        for name, state, n, of_path in zip(sequences, states, last, kept, strict=True):
            self.truncate(name, state.length - n + len(of_path))

    def pages_needed(self, sequences: Sequence[int], new_tokens: int | Sequence[int]) -> int:
        """The number of pages that a step would need beyond the free ones; negative if some would remain free."""
        return self._plan(sequences, self._new_tokens(sequences, new_tokens)) - self.free_pages

    def step(
        self,
        sequences: Sequence[int],
        new_tokens: int | Sequence[int],
        *,
        max_pages: int | None = None,
        reuse: CacheStep | None = None,
        parents: Sequence[Sequence[int]] | None = None,
    ) -> CacheStep:
        """Reserve pages for new tokens of some sequences, and add these tokens to their lengths.

        Args:
            sequences: names, each once.
            new_tokens: the number of new tokens of each, or one number for all.
            max_pages: width of the block table; None is the next power of two, so that shapes seldom change. If it
                covers ``max_length``, the step can be reused until the sequences reach that length.
            reuse: an earlier step for as many sequences with the same numbers of tokens. Its tensors are overwritten
                and it is returned, so that a CUDA graph that has captured it can be replayed.
            parents: the new tokens of each sequence are a tree, as in ``fastattn.nn.tree_mask``: for each the index of
                the one that it follows, -1 for the tokens before the step. Their ``positions`` count depths. ``keep``
                then keeps the accepted path.

        Returns:
            the step: call the model with its ``layers`` and ``positions``.

        Raises:
            InputError: there are too few pages, a sequence would become too long, is unknown or named twice, or
                ``max_pages``, ``reuse`` or ``parents`` does not fit. The cache stays as it was.
        """
        trees = None if parents is None else [ancestors(row) for row in parents]
        new = self._new_tokens(sequences, new_tokens)
        needed = self._plan(sequences, new)
        if needed > self.free_pages:
            given = f"{sum(new)} for {len(new)} sequences, which takes {needed} pages"
            todo = "Free sequences, take fewer into the step, or make the cache with more pages."
            raise input_error("new_tokens", given, f"what fits into the {self.free_pages} free pages", todo)
        before = [self._sequences[name].length for name in sequences]
        longest = max(-(-(have + tokens) // self.page_size) for have, tokens in zip(before, new, strict=True))
        width = max_pages or 1 << (longest - 1).bit_length()
        if reuse is not None:
            width = reuse.block_table.shape[1]
        if trees is not None and [len(tree) for tree in trees] != new:
            given = f"for {[len(tree) for tree in trees]} tokens"
            raise input_error("parents", given, f"one for each of {new} new tokens", "-1 follows the cache.")
        if reuse is not None and (reuse.tree_mask is None) != (trees is None):
            todo = "A step of trees is reused for trees."
            raise input_error("reuse", "a step with, or without, parents", "one like this step", todo)
        if longest > width or (reuse is not None and reuse.new_tokens != tuple(new)):
            given = f"{width} pages" + (f", for {reuse.new_tokens} tokens" if reuse else "")
            allowed = f"at least {longest} pages" + (f", for {tuple(new)} tokens" if reuse else "")
            raise input_error("reuse" if reuse else "max_pages", given, allowed, "Make a new step, a wider one.")
        for name in sequences:
            self._evict(self._sequences[name])
        copies: list[tuple[int, int]] = []
        for name, tokens in zip(sequences, new, strict=True):
            self._grow(self._sequences[name], tokens, copies)
        self._copy(copies)
        return self._as_step((tuple(sequences), tuple(new), before), width, reuse, trees)

    # --- on the host --------------------------------------------------------------------------------------------------

    def _get(self, sequence: int) -> _Sequence:
        if sequence not in self._sequences:
            raise input_error("sequence", sequence, f"one of {list(self._sequences)}", "add() and fork() name them.")
        return self._sequences[sequence]

    def _begin(self, sequence: _Sequence) -> int:
        name, self._next = self._next, self._next + 1
        self._sequences[name] = sequence
        return name

    def _release(self, page: int) -> None:
        if page == EVICTED:
            return
        self._users[page] -= 1
        if self._users[page] == 0:
            self._free.append(page)

    def _numbers(self, sequences: Sequence[int], tokens: int | Sequence[int]) -> list[int]:
        """A number of tokens for each sequence."""
        numbers = [tokens] * len(sequences) if isinstance(tokens, int) else list(tokens)
        if not sequences or len(numbers) != len(sequences) or len(set(sequences)) != len(sequences):
            given = f"{list(sequences)} with {numbers}"
            raise input_error("sequences", given, "names, each once, and a number for each", "See the docstring.")
        return numbers

    def _new_tokens(self, sequences: Sequence[int], new_tokens: int | Sequence[int]) -> list[int]:
        """A number of new tokens for each sequence that leaves it below ``max_length``."""
        new = self._numbers(sequences, new_tokens)
        for name, tokens in zip(sequences, new, strict=True):
            length = self._get(name).length
            if tokens < 1 or length + tokens > self.max_length:
                given = f"{tokens} after the {length} of sequence {name}"
                allowed = f"at least 1, and at most {self.max_length} in all, the max_length"
                raise input_error("new_tokens", given, allowed, "Make the cache with a larger max_length.")
        return new

    def _left_behind(self, sequence: _Sequence) -> int:
        """Number of its first pages that no later token can see."""
        return 0 if self.window is None else max(0, sequence.length - self.window) // self.page_size

    def _plan(self, sequences: Sequence[int], new: Sequence[int]) -> int:
        """The number of pages that a step takes, minus those that it frees first."""
        taken, users, dropped = 0, dict[int, int](), Counter[int]()
        for name, tokens in zip(sequences, new, strict=True):
            state = self._sequences[name]
            dropped.update(page for page in state.pages[: self._left_behind(state)] if page != EVICTED)
            taken += -(-(state.length + tokens) // self.page_size) - len(state.pages)
            if state.length % self.page_size:
                page = state.pages[-1]
                others = users.get(page, self._users[page]) - 1
                taken += others > 0
                users[page] = max(1, others)
        return taken - sum(count == self._users[page] for page, count in dropped.items())

    def _evict(self, state: _Sequence) -> None:
        """Free the pages that no later token can see."""
        for entry in range(self._left_behind(state)):
            self._release(state.pages[entry])
            state.pages[entry] = EVICTED

    def _grow(self, state: _Sequence, tokens: int, copies: list[tuple[int, int]]) -> None:
        """Take pages for ``tokens`` more; ``copies`` collects (from, to) of shared pages that will be written to."""
        if state.length % self.page_size and self._users[state.pages[-1]] > 1:
            copies.append((state.pages[-1], self._take()))
            self._release(state.pages[-1])
            state.pages[-1] = copies[-1][1]
        state.length += tokens
        while len(state.pages) * self.page_size < state.length:
            state.pages.append(self._take())

    def _own(self, entries: Sequence[tuple[_Sequence, int]]) -> None:
        """Copy the pages of these entries that other sequences use too, before they are written to."""
        shared = {(id(state), entry): (state, entry) for state, entry in entries if self._users[state.pages[entry]] > 1}
        if len(shared) > self.free_pages:
            todo = "Free sequences, or keep the paths before forking."
            raise input_error("kept", f"{len(shared)} shared pages to copy", f"{self.free_pages}, the free ones", todo)
        copies = []
        for state, entry in shared.values():
            copies.append((state.pages[entry], self._take()))
            self._release(state.pages[entry])
            state.pages[entry] = copies[-1][1]
        self._copy(copies)

    def _copy(self, copies: Sequence[tuple[int, int]]) -> None:
        """Copy pages, (from, to)."""
        if not copies:
            return
        source, target = torch.tensor(copies).T.to(self.keys.device, non_blocking=True)
        for store in self._stores:
            store[:, target] = store[:, source]

    def _take(self) -> int:
        page = self._free.pop()
        self._users[page] = 1
        return page

    def _as_step(
        self,
        what: tuple[tuple[int, ...], tuple[int, ...], list[int]],
        width: int,
        reuse: CacheStep | None,
        trees: Sequence[np.ndarray] | None,
    ) -> CacheStep:
        """The tensors of a step: sequences, their new tokens, and their lengths before."""
        sequences, new, before = what
        rows = [self._sequences[name].pages for name in sequences]
        table = np.full((len(rows), width), EVICTED, dtype=np.int32)
        for row, pages in zip(table, rows, strict=True):
            row[: len(pages)] = pages
        places = [np.arange(tokens) for tokens in new] if trees is None else [tree.sum(1) - 1 for tree in trees]
        positions = [have + of_tokens for have, of_tokens in zip(before, places, strict=True)]
        is_packed = len(set(new)) > 1
        ends = np.cumsum([0, *new], dtype=np.int32) if is_packed else None
        on_host = (
            np.concatenate(positions)[None] if is_packed else np.stack(positions),
            np.asarray(before, dtype=np.int32),
            table,
            ends,
            None if trees is None else words_of_trees(trees, is_packed),
        )
        tensors = [x if x is None else torch.from_numpy(x) for x in on_host]
        if reuse is not None:
            held = (reuse.positions, reuse.lengths, reuse.block_table, reuse.cu_seqlens_q, reuse.tree_mask)
            for old, x in zip(held, tensors, strict=True):
                if old is not None and x is not None:
                    old.copy_(x, non_blocking=True)
            return reuse
        at, lengths, block_table, cu, words = (
            x if x is None else x.to(self.keys.device, non_blocking=True) for x in tensors
        )
        assert at is not None and lengths is not None and block_table is not None
        layers = tuple(PagedLayer(self, index) for index in range(self.keys.shape[0]))
        longest = max(have + tokens for have, tokens in zip(before, new, strict=True))
        step = CacheStep(layers, sequences, new, at, lengths, block_table, cu, max(new), longest, words)
        for layer in layers:
            layer.step = step
        return step
