"""Trees of new tokens over caches, and batch-invariant calls, on every backend that has them."""

import pytest
import torch

import fastattn
from fastattn import InputError, UnsupportedError
from fastattn.decoding import explain_with_kv_cache
from fastattn.nn import KVCache, PagedKVCache, tree_mask
from fastattn.nn.rotary import rotary_tables
from fastattn.trees import Tree, bits_of, words_of

PARENTS = [-1, 0, 1, 0, 3, 3, -1]  # two roots; the path to 5 is 0, 3, 5
DECODING = [name for name in ("eager", "portable", "cpu") if fastattn.backends()[name] is None]
COS, SIN = rotary_tables(torch.arange(64), 16)
TERMS = {
    "plain": {},
    "window": {"window": (4, 0)},
    "alibi": {"alibi_slopes": torch.tensor([0.5, 0.25, 0.1, 0.7])},
    "rotary": {"rotary_cos": COS, "rotary_sin": SIN, "softcap": 3.0},
}


def path_to(token):
    return [] if token < 0 else [*path_to(PARENTS[token]), token]


def drawn(*shapes, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=draw) for shape in shapes]


def test_words_hold_the_bits():
    bits = torch.rand(3, 70, generator=torch.Generator().manual_seed(0)) < 0.5
    words = words_of(bits)
    assert words.dtype == torch.int32 and words.shape == (3, 3) and torch.equal(bits_of(words, 70), bits)
    tree = Tree.of(bits_of(tree_mask(PARENTS), 7), torch.tensor([5]))
    assert tree.depths.tolist() == [[0, 1, 2, 1, 2, 2, 0]]
    assert tree.kept_pairs(torch.tensor([7]), None) == 7 * 5 + 15
    assert tree.kept_pairs(torch.tensor([7]), 1) == (1 + 0 + 0 + 0 + 0 + 0 + 1) + (1 + 2 + 2 + 2 + 2 + 2 + 1)


@pytest.mark.parametrize("backend", DECODING)
@pytest.mark.parametrize("terms", TERMS)
def test_each_path_is_what_decoding_it_alone_gives(backend, terms):
    q, k, v, k_cache, v_cache = drawn((1, 7, 4, 16), (1, 7, 2, 16), (1, 7, 2, 16), *((1, 40, 2, 16),) * 2)
    lengths, options = torch.tensor([9], dtype=torch.int32), TERMS[terms] | {"backend": backend}
    caches = [x.clone() for x in (k_cache, v_cache)]
    tree = fastattn.attention_with_kv_cache(q, *caches, lengths, k, v, tree_mask=tree_mask(PARENTS), **options)
    for token in range(7):
        path = path_to(token)
        alone = [x.clone() for x in (k_cache, v_cache)]
        out = fastattn.attention_with_kv_cache(q[:, path], *alone, lengths, k[:, path], v[:, path], **options)
        torch.testing.assert_close(tree[:, token], out[:, -1])
        rows = slice(9, 9 + len(path))  # what keep() moves there is what decoding the path stores
        assert torch.equal(caches[0][:, [9 + n for n in path]], alone[0][:, rows])


def test_a_boolean_mask_is_the_words_and_calls_are_not_confused():
    q, k, k_cache = drawn((2, 7, 4, 16), (2, 7, 2, 16), (2, 40, 2, 16))
    lengths, words = torch.tensor([9, 4], dtype=torch.int32), tree_mask(PARENTS)

    def out(mask, **more):
        cache = k_cache.clone()
        return fastattn.attention_with_kv_cache(q, cache, cache.clone(), lengths, k, k, tree_mask=mask, **more)

    plain = [out(None) for _ in range(3)][-1]  # a plan serves the last
    in_tree = out(words)
    assert not torch.equal(in_tree, plain) and torch.equal(out(None), plain)
    assert torch.equal(out(bits_of(words, 7)), in_tree) and torch.equal(out(words.expand(2, -1, -1)), in_tree)
    chain = tree_mask(list(range(-1, 6)))
    torch.testing.assert_close(out(chain), plain)
    torch._dynamo.reset()
    compiled = torch.compile(fastattn.attention_with_kv_cache, fullgraph=True, backend="aot_eager")
    cache = k_cache.clone()
    assert torch.equal(compiled(q, cache, cache.clone(), lengths, k, k, tree_mask=words), in_tree)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tree_mask": torch.ones(1, 7, 1)}, r"tree_mask: got shape \(1, 7, 1\), torch.float32.*\(1\|B, S_new, W\)"),
        ({"tree_mask": torch.ones(3, 7, 1, dtype=torch.int32)}, r"tree_mask: got shape \(3, 7, 1\)"),
        ({"tree_mask": torch.ones(1, 7, 2, dtype=torch.int32)}, r"tree_mask: got shape \(1, 7, 2\)"),
        ({"k": None, "v": None}, "k: got nothing with a tree_mask; allowed: a new token for each query"),
        ({"causal": False}, "tree_mask: got a tensor with causal=False"),
    ],
)  # fmt: skip
def test_refusals(changes, message):
    q, k, cache = drawn((2, 7, 4, 16), (2, 7, 2, 16), (2, 40, 2, 16))
    given = {"k": k, "v": k, "tree_mask": tree_mask(PARENTS)} | changes
    with pytest.raises(InputError, match=message):
        fastattn.attention_with_kv_cache(q, cache, cache.clone(), torch.zeros(2, dtype=torch.int32), **given)
    with pytest.raises(InputError, match="parents: got 1 for token 1"):
        tree_mask([-1, 1])


# --- keep -----------------------------------------------------------------------------------------------------------


def test_a_contiguous_cache_keeps_the_accepted_paths():
    x, more = drawn((2, 3, 2, 16), (2, 7, 2, 16))
    cache = KVCache(2, 12, 2, 16)
    cache.attend(x, x, x)
    cache.attend(more, more, more + 1, tree_mask=tree_mask(PARENTS))
    cache.keep(7, [path_to(5), [6]])
    assert cache.row_lengths == [6, 4] and cache.lengths.tolist() == [6, 4]
    assert torch.equal(cache.keys[0, :6], torch.cat([x[0], more[0, [0, 3, 5]]]))
    assert torch.equal(cache.values[1, :4], torch.cat([x[1], more[1, [6]] + 1]))
    for kept in ([[1, 0], [6]], [[0, 7], []], [[0]]):
        with pytest.raises(InputError, match="kept: got"):
            cache.keep(4, kept)
    assert cache.row_lengths == [6, 4]


@pytest.mark.parametrize("page_size", [1, 2, 16])
def test_a_paged_cache_keeps_the_accepted_paths_of_every_layer(page_size):
    """Trees of different sizes, one in pages that a fork shares, whose own tokens must stay."""
    cache = PagedKVCache(64 // page_size, page_size, 2, 16, layers=2, dtype=torch.float64)
    one, two = cache.add(), cache.add()
    texts = {one: drawn((3, 2, 16))[0].double(), two: drawn((5, 2, 16), seed=1)[0].double()}

    def step(names, tokens, parents=None):
        new = dict(
            zip(names, (x.double() for x in drawn(*((n, 2, 16) for n in tokens), seed=sum(tokens))), strict=True)
        )
        step = cache.step(names, tokens, parents=parents)
        k = torch.cat(list(new.values()))[None]
        k = k if step.cu_seqlens_q is not None else k.view(len(names), -1, 2, 16)
        outs = [layer.attend(k, k + n, k - n) for n, layer in enumerate(step.layers)]
        return new, step, outs[1].flatten(0, 1)

    for name, text in texts.items():
        got = cache.step([name], len(text))
        for n, layer in enumerate(got.layers):
            layer.attend(text[None], text[None] + n, text[None] - n)
    new, made, out = step([one, two], [7, 3], [PARENTS, [-1, -1, 1]])
    assert made.positions.tolist() == [[3, 4, 5, 4, 5, 5, 3, 5, 5, 6]]
    before = {one: torch.cat([texts[one], new[one]]), two: torch.cat([texts[two], new[two]])}
    shared = cache.fork(one)
    cache.keep([one, two], [7, 3], [path_to(5), [1, 2]])
    texts = {one: torch.cat([texts[one], new[one][path_to(5)]]), two: torch.cat([texts[two], new[two][1:]])}
    for row, name in ((5, one), (9, two)):  # the end of each path saw what is kept
        expected = fastattn.attention(texts[name][None, -1:], texts[name][None] + 1, texts[name][None] - 1)
        torch.testing.assert_close(out[row], expected[0, 0])
    texts[shared] = before[one]
    for name, text in texts.items():
        assert cache.length(name) == len(text)
        pages = torch.tensor(cache.pages(name))
        for layer in range(2):
            assert torch.equal(cache.keys[layer, pages].flatten(0, 1)[: len(text)], text + layer)
            assert torch.equal(cache.values[layer, pages].flatten(0, 1)[: len(text)], text - layer)
    for name in texts:
        cache.free(name)
    assert cache.free_pages == cache.num_pages


def test_a_paged_cache_refuses_what_it_cannot_keep():
    cache = PagedKVCache(2, 4, 2, 16)
    name, x = cache.add(), torch.randn(1, 5, 2, 16)
    first = cache.step([name], 5, parents=[[-1, 0, 0, 1, 1]])
    first.layers[0].attend(x, x, x)
    cache.fork(name)
    for kept, message in (
        ([[0, 5]], "kept: got .0, 5. of 5 tokens"), ([], "kept: got 0 rows"),
        ([[1]], "kept: got 1 shared pages to copy; allowed: 0, the free ones"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=message):
            cache.keep([name], 5, kept)
    cache = PagedKVCache(8, 4, 2, 16)
    name = cache.add()
    step = cache.step([name], 5, parents=[[-1, 0, 0, 1, 1]])
    for options, message in (
        ({"parents": [[-1, 0]]}, "parents: got for .2. tokens; allowed: one for each of .5. new tokens"),
        ({"reuse": step}, "reuse: got a step with, or without, parents"),
    ):
        with pytest.raises(InputError, match=message):
            cache.step([name], 5, **options)
    cache.keep([name], 5, [[0, 1]])
    again = cache.step([name], 5, parents=[[-1, 0, 1, 2, 0]], reuse=step)
    assert again is step and again.positions.tolist() == [[2, 3, 4, 5, 3]]
    assert again.tree_mask.flatten().tolist() == [1, 3, 7, 15, 17]


# --- batch-invariant calls ------------------------------------------------------------------------------------------

LENGTHS = (700, 33, 1500, 5, 512)
CALLS = {
    "plain": {},
    "window, sinks": {"window": (600, 0), "sinks": torch.tensor([0.5, -1.0, 0.2, 1.5])},
    "alibi, softcap": {"alibi_slopes": torch.tensor([0.5, 0.25, 0.01, 0.002]), "softcap": 4.0},
    "not causal": {"causal": False, "window": (40, 900)},
}
needs_cpu = pytest.mark.skipif("cpu" not in DECODING, reason="no C++ compiler")


def stores(dtype, rows=3):
    """Queries ``[S, H, D]`` of each sequence, and its keys and values."""
    made = [drawn((length, 2, 32), (length, 2, 32), (rows, 4, 32), seed=length) for length in LENGTHS]
    return [tuple(x.to(dtype) for x in of_sequence) for of_sequence in made]


def paged(sequences, page_size, seed):
    """The caches of the sequences in pages in random order, among others that hold NaN."""
    draw = torch.Generator().manual_seed(seed)
    counts = [-(-len(k) // page_size) for k, _, _ in sequences]
    pages = torch.randperm(sum(counts) + 2, generator=draw)
    table = torch.full((len(sequences), max(counts) + seed % 3), -1, dtype=torch.int32)
    caches = [torch.full((len(pages), page_size, 2, 32), torch.nan, dtype=sequences[0][0].dtype) for _ in range(2)]
    begin = 0
    for row, count, (k, v, _) in zip(table, counts, sequences, strict=True):
        row[:count] = pages[begin : begin + count]
        begin += count
        for cache, x in zip(caches, (k, v), strict=True):
            flat = torch.cat([x, x.new_full((count * page_size - len(x), 2, 32), torch.nan)])
            cache[row[:count].long()] = flat.unflatten(0, (count, page_size))
    return caches, table


def invariant(q, caches, lengths, **options):
    lengths = torch.tensor(lengths, dtype=torch.int32)
    return fastattn.attention_with_kv_cache(
        q, *caches, lengths, return_lse=True, backend="cpu", batch_invariant=True, **options
    )


@needs_cpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("call", CALLS)
def test_a_sequence_has_the_same_bits_whatever_stands_beside_it(call, dtype):
    sequences = stores(dtype)
    alone = [invariant(q[None], (k[None], v[None]), [len(k)], **CALLS[call]) for k, v, q in sequences]
    exact = [invariant(q[None].double().float(), (k[None].float(), v[None].float()), [len(k)], **CALLS[call])
             for k, v, q in sequences]  # fmt: skip
    for order, page_size in (((3, 0, 2), 1), ((4, 3, 2, 1, 0), 16), ((1, 2), 512), ((2, 0, 4, 1), 40)):
        chosen = [sequences[n] for n in order]
        caches, table = paged(chosen, page_size, seed=len(order))
        q = torch.stack([q for _, _, q in chosen])
        out, lse = invariant(q, caches, [len(k) for k, _, _ in chosen], block_table=table, **CALLS[call])
        for row, n in enumerate(order):
            assert torch.equal(out[row], alone[n][0][0]) and torch.equal(lse[row], alone[n][1][0])
            torch.testing.assert_close(out[row].float(), exact[n][0][0], atol=2e-2, rtol=2e-2)


@needs_cpu
@pytest.mark.parametrize("call", CALLS)
def test_a_prompt_has_the_same_bits_in_any_chunks_and_beside_decoding(call):
    """70 rows, more than are computed at a time: at once, in chunks as they are read, and beside other sequences."""
    q, k, v = drawn((70, 4, 32), (600, 2, 32), (600, 2, 32))
    options, one = CALLS[call], (k[None], v[None])
    whole, lse = invariant(q[None], one, [600], **options)
    if options.get("causal", True):
        chunks = [invariant(q[None, a:b], one, [530 + b], **options) for a, b in ((0, 1), (1, 38), (38, 70))]
        assert torch.equal(torch.cat([out for out, _ in chunks], 1), whole)
        assert torch.equal(torch.cat([lse for _, lse in chunks], 2), lse)
    others = stores(torch.float32, rows=1)[:2]
    sequences = [others[0], (k, v, q), others[1]]
    caches, table = paged(sequences, 16, seed=5)
    cu = torch.tensor([0, 1, 71, 72], dtype=torch.int32)
    packed = torch.cat([q for _, _, q in sequences])
    out, of_packed = invariant(packed, caches, [700, 600, 33], block_table=table, cu_seqlens_q=cu, **options)
    assert torch.equal(out[1:71], whole[0]) and torch.equal(of_packed[:, 1:71], lse[0])
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert torch.equal(invariant(q[None], one, [600], **options)[0], whole)
    finally:
        torch.set_num_threads(before)


@needs_cpu
def test_trees_are_batch_invariant_too():
    k, v, x = drawn((1, 800, 2, 32), (1, 800, 2, 32), (1, 40, 4, 32))
    parents = [max(-1, n - 1 - n % 3) for n in range(40)]
    options = {
        "tree_mask": tree_mask(parents),
        "window": (300, 0),
        "alibi_slopes": CALLS["alibi, softcap"]["alibi_slopes"],
    }
    new = x[:, :, :2].contiguous()

    def out(copies):
        caches = [y.repeat(copies, 1, 1, 1) for y in (k, v)]
        lengths = [760] * (copies - 1) + [700]
        many = [y.repeat(copies, 1, 1, 1) for y in (x, new)]
        return invariant(many[0], caches, lengths, k=many[1], v=many[1], **options)[0][-1]

    assert torch.equal(out(1), out(3))


@pytest.mark.parametrize("backend", DECODING)
def test_a_packed_call_without_a_token(backend):
    """A step of a server in which every sequence waits; the longest that it was made for is 1."""
    x, cache, ends = torch.randn(0, 2, 16), torch.randn(1, 8, 2, 16), torch.zeros(2, dtype=torch.int32)
    before = cache.clone()
    out = fastattn.attention_with_kv_cache(
        x, cache, cache.clone(), torch.tensor([5], dtype=torch.int32), x, x, cu_seqlens_q=ends, max_seqlen_q=1,
        tree_mask=torch.zeros(0, 1, dtype=torch.int32), backend=backend,
    )  # fmt: skip
    assert out.shape == (0, 2, 16) and torch.equal(cache, before)


def test_who_can_be_batch_invariant_and_how_it_is_asked_for():
    q, cache, lengths = torch.randn(1, 1, 2, 16), torch.randn(1, 8, 2, 16), torch.tensor([5], dtype=torch.int32)
    found = explain_with_kv_cache(q, cache, cache, lengths, batch_invariant=True)
    assert "batch invariant" in found.problem.features
    assert found.reasons["portable"] == found.reasons["eager"] == ["no batch invariant"]
    for name in ("batch_invariant", "rotary_interleaved"):
        with pytest.raises(InputError, match=f"{name}: got 'yes'; allowed: True or False"):
            fastattn.attention_with_kv_cache(q, cache, cache, lengths, **{name: "yes"})
    with fastattn.use_batch_invariance():
        assert explain_with_kv_cache(q, cache, cache, lengths) == found
        with pytest.raises(UnsupportedError, match="no batch invariant"):
            fastattn.attention_with_kv_cache(q, cache, cache, lengths, backend="portable")
        with fastattn.use_batch_invariance(False):
            fastattn.attention_with_kv_cache(q, cache, cache, lengths, backend="portable")
