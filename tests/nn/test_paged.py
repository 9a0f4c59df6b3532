"""The paged cache against a naive one: lists of tokens. Pages are accounted for after every operation."""

import random

import pytest
import torch

import fastattn
from fastattn import InputError
from fastattn.nn import KVCache, PagedKVCache

HEADS, DIM = 2, 4


class Naive:
    """The same sequences as plain tensors, and the checks of the paged cache against them."""

    def __init__(self, cache):
        self.cache, self.tokens = cache, {}

    def step(self, names, new):
        rows = [torch.randn(n, HEADS, DIM) for n in new]
        step = self.cache.step(names, new)
        is_packed = step.cu_seqlens_q is not None
        k = torch.cat(rows)[None] if is_packed else torch.stack(rows)
        q = torch.randn(*k.shape[:2], 2 * HEADS, DIM)
        assert step.positions.shape == k.shape[:2]
        window = None if self.cache.window is None else (self.cache.window, 0)
        found = [layer.attend(q, k, k + 1 + n, window=window) for n, layer in enumerate(step.layers)]
        begin = 0
        for n, (name, row) in enumerate(zip(names, rows, strict=True)):
            self.tokens[name] = torch.cat([self.tokens[name], row])
            mine = slice(begin, begin + len(row)) if is_packed else n
            begin += len(row)
            whole = self.tokens[name][None]
            for layer, out in enumerate(found):
                part = (out[0, mine] if is_packed else out[mine])[None]
                queries = (q[0, mine] if is_packed else q[mine])[None]
                expected = fastattn.attention(queries, whole, whole + 1 + layer, causal=True, window=window)
                torch.testing.assert_close(part, expected)
            at = (step.positions[0, mine] if is_packed else step.positions[mine]).tolist()
            assert at == list(range(len(self.tokens[name]) - len(row), len(self.tokens[name])))
        self.check()

    def check(self):
        cache = self.cache
        users = [0] * cache.num_pages
        for name, tokens in self.tokens.items():
            assert cache.length(name) == len(tokens)
            pages = cache.pages(name)
            assert len(pages) == -(-len(tokens) // cache.page_size)
            for entry, page in enumerate(pages):
                if page is None:
                    continue
                users[page] += 1
                rows = tokens[entry * cache.page_size : (entry + 1) * cache.page_size]
                for layer in range(cache.keys.shape[0]):
                    assert torch.equal(cache.keys[layer, page, : len(rows)], rows)
                    assert torch.equal(cache.values[layer, page, : len(rows)], rows + 1 + layer)
        assert cache.sequences == tuple(self.tokens)
        assert cache._users == users
        assert sorted(cache._free) == [page for page, count in enumerate(users) if count == 0]


@pytest.mark.parametrize("window", [None, 0, 5])
@pytest.mark.parametrize("seed", range(4))
def test_any_sequence_of_operations(seed, window):
    torch.manual_seed(seed)
    choose = random.Random(seed)
    page_size = choose.choice([1, 2, 3, 8])
    cache = PagedKVCache(40 // page_size, page_size, HEADS, DIM, layers=2, max_length=30, window=window)
    cache.keys.fill_(float("nan"))
    cache.values.fill_(float("nan"))
    naive, refused = Naive(cache), 0
    for _ in range(120):
        names = list(naive.tokens)
        action = choose.choice(["add", "fork", "free", "step", "step", "step", "truncate"])
        if action == "add" and len(names) < 6:
            naive.tokens[cache.add()] = torch.zeros(0, HEADS, DIM)
        elif action == "fork" and names and len(names) < 6:
            parent = choose.choice(names)
            naive.tokens[cache.fork(parent)] = naive.tokens[parent]
        elif action == "free" and len(names) > 2:
            name = choose.choice(names)
            cache.free(name)
            del naive.tokens[name]
        elif action == "truncate" and names:
            name = choose.choice(names)
            length = choose.randint(0, len(naive.tokens[name]))
            try:
                cache.truncate(name, length)
                naive.tokens[name] = naive.tokens[name][:length]
            except InputError:
                assert window is not None
        elif action == "step" and names:
            some = choose.sample(names, choose.randint(1, len(names)))
            new = [choose.randint(1, choose.choice([1, 4, 9])) for _ in some]
            fits = all(cache.length(n) + more <= 30 for n, more in zip(some, new, strict=True))
            fits = fits and cache.pages_needed(some, new) <= 0
            state = repr((cache._sequences, cache._free, cache._users))
            try:
                naive.step(some, new)
                assert fits
            except InputError:
                refused += 1
                assert not fits and repr((cache._sequences, cache._free, cache._users)) == state
        naive.check()
    assert refused or window == 0


def test_a_fork_shares_pages_and_copies_the_one_that_is_written_to():
    cache = PagedKVCache(6, 4, HEADS, DIM)
    naive = Naive(cache)
    one = cache.add()
    naive.tokens[one] = torch.zeros(0, HEADS, DIM)
    naive.step([one], [6])
    two = cache.fork(one)
    naive.tokens[two] = naive.tokens[one]
    assert cache.pages(two) == cache.pages(one) and cache.free_pages == 4
    assert cache.pages_needed([one, two], 1) == 1 - 4  # only the first to write needs a page of its own
    naive.step([one, two], [1, 1])
    assert cache.pages(one)[0] == cache.pages(two)[0] and cache.pages(one)[1] != cache.pages(two)[1]
    cache.free(one)
    del naive.tokens[one]
    naive.check()
    assert cache.free_pages == 4


def test_a_fork_at_the_end_of_a_page_copies_nothing():
    cache = PagedKVCache(4, 4, HEADS, DIM)
    one = cache.add()
    cache.step([one], 4)
    two = cache.fork(one)
    cache.step([one, two], 1)
    assert cache.free_pages == 1 and cache.pages(one)[0] == cache.pages(two)[0]


def test_a_window_needs_no_more_pages_than_it_spans():
    cache = PagedKVCache(4, 4, HEADS, DIM, window=6, max_length=1000)
    naive, name = Naive(cache), cache.add()
    naive.tokens[name] = torch.zeros(0, HEADS, DIM)
    for _ in range(60):
        naive.step([name], [1])
    assert cache.length(name) == 60 and cache.pages(name)[:12] == (None,) * 12


def test_pages_that_one_sequence_leaves_serve_another_in_the_same_step():
    cache = PagedKVCache(3, 4, HEADS, DIM, window=2, max_length=100)
    naive = Naive(cache)
    one, two = cache.add(), cache.add()
    naive.tokens = {one: torch.zeros(0, HEADS, DIM), two: torch.zeros(0, HEADS, DIM)}
    naive.step([two], [12])
    assert cache.free_pages == 0 and cache.pages_needed([one, two], 1) == 0  # two of two's pages are seen by nobody now
    naive.step([one, two], [1, 1])
    assert cache.pages(two)[:2] == (None, None) and cache.free_pages == 0


def test_steps_of_equal_numbers_are_dense_and_others_packed():
    cache = PagedKVCache(10, 4, HEADS, DIM)
    a, b = cache.add(), cache.add()
    step = cache.step([a, b], [3, 1])
    assert step.positions.tolist() == [[0, 1, 2, 0]] and step.cu_seqlens_q.tolist() == [0, 3, 4]
    assert step.lengths.tolist() == [0, 0] and step.max_seqlen_q == 3
    step = cache.step([b, a], 2)
    assert step.positions.tolist() == [[1, 2], [3, 4]] and step.cu_seqlens_q is None
    assert step.block_table.tolist() == [[1, -1], [0, 2]] and step.lengths.dtype == torch.int32


def test_a_step_can_be_written_over_for_a_captured_graph():
    cache = PagedKVCache(10, 4, HEADS, DIM)
    a, b = cache.add(), cache.add()
    cache.step([a, b], [7, 2])
    first = cache.step([a, b], 1, max_pages=4)
    addresses = [x.data_ptr() for x in (first.positions, first.lengths, first.block_table)]
    again = cache.step([a, b], 1, reuse=first)
    assert again is first and addresses == [x.data_ptr() for x in (first.positions, first.lengths, first.block_table)]
    assert first.lengths.tolist() == [8, 3] and first.positions.tolist() == [[8], [3]]
    assert first.block_table.tolist()[0] == [*cache.pages(a), -1]
    state = cache.pages(a), cache.length(a)
    with pytest.raises(
        InputError, match=r"reuse: got 4 pages, for \(1, 1\) tokens; allowed: at least 3 pages, for \(2, 2\) tokens"
    ):
        cache.step([a, b], 2, reuse=first)
    assert (cache.pages(a), cache.length(a)) == state


def test_compiled_steps():
    torch._dynamo.reset()
    cache, plain = (PagedKVCache(10, 4, HEADS, DIM) for _ in range(2))
    names = [(c.add(), c.add()) for c in (cache, plain)]
    for c, pair in zip((cache, plain), names, strict=True):
        k = torch.ones(1, 5, HEADS, DIM)
        c.step(pair, [4, 1]).layers[0].attend(torch.ones(1, 5, HEADS, DIM), k, k)
    graphs = []

    def count(module, _inputs):
        graphs.append(module)
        return module

    step = cache.step(names[0], 1, max_pages=8)
    layer = step.layers[0]
    compiled = torch.compile(lambda q, k: layer.attend(q, k, k) * 2, fullgraph=True, backend=count)
    for n in range(5):
        q, k = torch.randn(2, 1, HEADS, DIM), torch.randn(2, 1, HEADS, DIM)
        if n:
            cache.step(names[0], 1, reuse=step)
        expected = plain.step(names[1], 1).layers[0].attend(q, k, k) * 2
        with torch.no_grad():
            torch.testing.assert_close(compiled(q, k), expected)
    assert len(graphs) == 1


@pytest.mark.parametrize("layers_of_scale", [1, 2])
def test_e4m3_pages(layers_of_scale):
    scale = torch.full((HEADS,), 0.05) if layers_of_scale == 1 else torch.full((2, HEADS), 0.05)
    options = {"dtype": torch.float8_e4m3fn, "k_scale": scale, "v_scale": scale, "layers": 2}
    cache, exact = PagedKVCache(8, 4, HEADS, DIM, **options), PagedKVCache(8, 4, HEADS, DIM, layers=2)
    q, k = torch.randn(1, 6, HEADS, DIM), torch.randn(1, 6, HEADS, DIM)
    for layer in range(2):
        found, expected = ((c.step([c.add()], 6).layers[layer].attend(q, k, k)) for c in (cache, exact))
        assert 0 < (found - expected).abs().max() < 2**-4 * k.abs().max()
    forked = cache.fork(0)
    cache.step([forked], 1)  # copies a page of e4m3
    page, copy = cache.pages(0)[1], cache.pages(forked)[1]
    assert torch.equal(cache.keys[:, page].float(), cache.keys[:, copy].float()) and page != copy


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda c: c.step([0], 13), "new_tokens: got 13 for 1 .* takes 4 pages; .*the 3 free pages.*Free"),
        (lambda c: c.step([0, 1], [9, 4]), "which takes 4 pages; allowed: what fits into the 3 free pages"),
        (lambda c: c.step([0], 21), "new_tokens: got 21 after the 0 of sequence 0; .*at most 20 in all"),
        (lambda c: c.step([0], 9, max_pages=2), "max_pages: got 2 pages; allowed: at least 3"),
        (lambda c: c.step([0], 0), "new_tokens: got 0 after"),
        (lambda c: c.step([0, 0], 1), "sequences: got"),
        (lambda c: c.step([], 1), "sequences: got"),
        (lambda c: c.step([0, 1], [1]), "sequences: got"),
        (lambda c: c.step([7], 1), r"sequence: got 7; allowed: one of \[0, 1\]"),
        (lambda c: c.free(7), "sequence: got 7"),
        (lambda c: c.fork(7), "sequence: got 7"),
        (lambda c: c.truncate(1, 4), "length: got 4; allowed: 0 to 3"),
        (lambda c: PagedKVCache(0, 4, 1, 1), "num_pages: got 0"),
        (lambda c: PagedKVCache(1, 4, 1, 1, window=-1), "window: got -1"),
    ],
)  # fmt: skip
def test_refusals_change_nothing(call, message):
    cache = PagedKVCache(4, 4, HEADS, DIM, max_length=20)
    cache.add(), cache.add()
    cache.step([1], 3)
    state = repr((cache._sequences, cache._free, cache._users))
    with pytest.raises(InputError, match=message):
        call(cache)
    assert repr((cache._sequences, cache._free, cache._users)) == state


def test_one_page_a_sequence_is_a_contiguous_cache():
    torch.manual_seed(1)
    paged, contiguous = PagedKVCache(2, 12, HEADS, DIM), KVCache(2, 12, HEADS, DIM)
    names = [paged.add(), paged.add()]
    for new in (5, 1, 6):
        q, k = torch.randn(2, new, 2 * HEADS, DIM), torch.randn(2, new, HEADS, DIM)
        torch.testing.assert_close(paged.step(names, new).layers[0].attend(q, k, -k), contiguous.attend(q, k, -k))
    assert torch.equal(paged.keys[0], contiguous.keys)
