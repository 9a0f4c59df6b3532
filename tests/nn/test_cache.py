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
