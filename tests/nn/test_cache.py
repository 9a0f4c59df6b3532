"""The key/value cache."""

import pytest
import torch

import fastattn
from fastattn import InputError
from fastattn.nn import KVCache


def test_decoding_token_by_token_is_causal_attention():
    q, k = torch.randn(2, 6, 4, 8), torch.randn(2, 6, 2, 8)
    v = torch.randn(2, 6, 2, 5)
    cache = KVCache(2, 6, 2, 8, head_dim_v=5)
    whole = fastattn.attention(q, k, v, causal=True)
    parts = []
    for begin, end in ((0, 3), (3, 4), (4, 6)):
        keys, values = cache.append(k[:, begin:end], v[:, begin:end])
        assert cache.length == end == keys.shape[1]
        parts.append(fastattn.attention(q[:, begin:end], keys, values, causal=True))
    torch.testing.assert_close(torch.cat(parts, 1), whole)


def test_append_writes_in_place_and_reset_keeps_the_memory():
    cache = KVCache(1, 4, 1, 2)
    address = cache.keys.data_ptr()
    k = torch.randn(1, 3, 1, 2)
    keys, values = cache.append(k, 2 * k)
    assert keys.data_ptr() == address and torch.equal(keys, k) and torch.equal(values, 2 * k)
    cache.reset()
    assert cache.length == 0 and cache.max_length == 4
    keys, _ = cache.append(-k[:, :1], k[:, :1])
    assert keys.data_ptr() == address and torch.equal(keys, -k[:, :1])


def test_device_and_dtype():
    cache = KVCache(1, 2, 1, 2, device="meta", dtype=torch.bfloat16)
    assert cache.keys.device.type == cache.values.device.type == "meta" and cache.keys.dtype == torch.bfloat16


@pytest.mark.parametrize("grad", [torch.no_grad, torch.inference_mode])
def test_tensors_that_require_grad_are_fine_where_none_is_recorded(grad):
    cache = KVCache(1, 2, 1, 2)
    k = torch.randn(1, 1, 1, 2, requires_grad=True)
    with grad():
        keys, _ = cache.append(k, k)
    assert torch.equal(keys, k.detach())


ROOM = torch.zeros(2, 2, 3, 4)


@pytest.mark.parametrize(
    ("k", "v", "message"),
    [
        (torch.zeros(2, 3, 3, 4), torch.zeros(2, 3, 3, 4), "k: got 3 tokens after 2; allowed: at most 4 in all"),
        (torch.zeros(1, 1, 3, 4), torch.zeros(1, 1, 3, 4), r"k: got shape \(1, 1, 3, 4\).*allowed: \(2, S, 3, 4\)"),
        (torch.zeros(2, 1, 3, 5), torch.zeros(2, 1, 3, 4), r"k: got shape \(2, 1, 3, 5\)"),
        (torch.zeros(2, 3, 4), torch.zeros(2, 3, 4), r"k: got shape \(2, 3, 4\)"),
        (torch.zeros(2, 1, 3, 4), torch.zeros(2, 2, 3, 4), r"v: got shape \(2, 2, 3, 4\)"),
        (torch.zeros(2, 1, 3, 4).half(), torch.zeros(2, 1, 3, 4), "k: got .*torch.float16.*allowed: .*torch.float32"),
        (torch.zeros(2, 1, 3, 4), torch.zeros(2, 1, 3, 4, device="meta"), "v: got .*meta"),
        (torch.zeros(2, 1, 3, 4, requires_grad=True), torch.zeros(2, 1, 3, 4), "k: got a tensor that requires grad"),
    ],
)
def test_a_refused_append_leaves_the_cache_as_it_was(k, v, message):
    cache = KVCache(2, 4, 3, 4)
    cache.append(ROOM + 1, ROOM + 2)
    keys, values = cache.keys.clone(), cache.values.clone()
    with pytest.raises(InputError, match=message):
        cache.append(k, v)
    assert cache.length == 2 and torch.equal(cache.keys, keys) and torch.equal(cache.values, values)


def test_sizes_are_checked():
    with pytest.raises(InputError, match="max_length: got 0; allowed: a positive int"):
        KVCache(1, 0, 1, 2)
    with pytest.raises(InputError, match="head_dim_v: got -1"):
        KVCache(1, 1, 1, 2, head_dim_v=-1)


# --- attend ---------------------------------------------------------------------------------------------------------


def test_attend_is_append_and_attention():
    one, two = KVCache(2, 9, 2, 8, head_dim_v=5), KVCache(2, 9, 2, 8, head_dim_v=5)
    for new in (4, 1, 3):
        q, k, v = torch.randn(2, new, 4, 8), torch.randn(2, new, 2, 8), torch.randn(2, new, 2, 5)
        sinks = torch.randn(4)
        out = one.attend(q, k, v, window=(3, 0), softcap=5.0, sinks=sinks)
        expected = fastattn.attention(q, *two.append(k, v), causal=True, window=(3, 0), softcap=5.0, sinks=sinks)
        torch.testing.assert_close(out, expected)
        assert one.lengths.tolist() == [one.length] * 2 == [two.length] * 2
    assert torch.equal(one.keys, two.keys) and torch.equal(one.values, two.values)


def test_rows_of_different_lengths():
    cache = KVCache(2, 9, 1, 4)
    k = torch.randn(2, 6, 1, 4)
    cache.append(k, k)
    cache.truncate([2, 5])
    assert cache.row_lengths == [2, 5] == cache.lengths.tolist()
    with pytest.raises(InputError, match=r"length: got rows of \[2, 5\]"):
        cache.length  # noqa: B018
    with pytest.raises(InputError, match="rows of"):
        cache.append(k[:, :1], k[:, :1])
    q, new = torch.randn(2, 1, 2, 4), torch.randn(2, 1, 1, 4)
    out = cache.attend(q, new, new)
    for row, length in enumerate((2, 5)):
        keys = torch.cat([k[row, :length], new[row]])[None]
        torch.testing.assert_close(out[row : row + 1], fastattn.attention(q[row : row + 1], keys, keys))
    assert cache.row_lengths == [3, 6]


def test_select_makes_rows_copies_of_others():
    cache = KVCache(3, 6, 1, 2)
    k = torch.arange(3.0)[:, None, None, None].expand(3, 4, 1, 2).contiguous()
    cache.append(k, k)
    cache.truncate([4, 2, 3])
    cache.select([2, 0, 0])
    assert cache.row_lengths == [3, 4, 4] == cache.lengths.tolist()
    assert cache.keys[:, 0, 0, 0].tolist() == [2, 0, 0] == cache.values[:, 0, 0, 0].tolist()
    for rows in ([0, 1], [0, 1, 3], [0, 1, -1]):
        with pytest.raises(InputError, match="rows: got"):
            cache.select(rows)
    with pytest.raises(InputError, match="lengths: got"):
        cache.truncate(4)
    assert cache.row_lengths == [3, 4, 4]


def test_compiled_steps_count_on_the_device_and_make_one_graph():
    torch._dynamo.reset()
    graphs = []

    def count(module, _inputs):
        graphs.append(module)
        return module

    cache, plain = KVCache(2, 6, 1, 4), KVCache(2, 6, 1, 4)
    compiled = torch.compile(lambda q, k: cache.attend(q, k, k) * 2, fullgraph=True, backend=count)
    for _ in range(6):
        q, k = torch.randn(2, 1, 2, 4), torch.randn(2, 1, 1, 4)
        with torch.no_grad():
            cache.advance(1)
            torch.testing.assert_close(compiled(q, k), plain.attend(q, k, k) * 2)
    assert len(graphs) == 1 and cache.length == 6 and cache.lengths.tolist() == [6, 6]
    with pytest.raises(InputError, match="k: got 1 tokens after 6"):
        cache.advance(1)
    assert cache.length == 6


def test_e4m3():
    scale = torch.tensor([0.05])
    cache = KVCache(1, 6, 1, 4, dtype=torch.float8_e4m3fn, k_scale=scale, v_scale=scale)
    q, k = torch.randn(1, 4, 2, 4), torch.randn(1, 4, 1, 4)
    error = (cache.attend(q, k, k) - fastattn.attention(q, k, k, causal=True)).abs().max()
    assert 0 < error < 2**-4 * k.abs().max()
    with pytest.raises(InputError, match="cache: got e4m3"):
        cache.append(k, k)
    assert cache.length == 4
