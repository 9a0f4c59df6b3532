"""Extreme values: rows that share an offset of any size, and NaN and infinity, which do not spread to other rows."""

import itertools

import pytest
import torch

import fastattn
from fastattn import numerics

BACKENDS = ("cpu", "portable", "eager")
OFFSETS = (torch.finfo(torch.float32).min, -1e30, -1e9, -1e6, 1e6)
torch.manual_seed(0)


def tensors(s_q=40, s_kv=40, heads_kv=2, dim=8, dtype=torch.float32):
    shapes = ((2, s_q, 4, dim), (2, s_kv, heads_kv, dim), (2, s_kv, heads_kv, dim))
    return [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]


def serve(backend, q, k, v, **options):
    """``(out, lse)`` of one backend; skips where it does not serve the call."""
    if reasons := fastattn.explain(q, k, v, **options).reasons[backend]:
        pytest.skip(f"{backend}: {reasons[0]}")
    return fastattn.attention(q, k, v, return_lse=True, backend=backend, **options)


def softmax_of_differences(scores, v):
    """A second oracle: the scores as fp32 has them, offsets and all, their softmax and product in fp64."""
    p = (scores.double() - scores.double().amax(-1, keepdim=True)).softmax(-1)
    return torch.einsum("bhij,bjhd->bihd", p, v.double().repeat_interleave(2, dim=2))


@pytest.mark.parametrize("offset", OFFSETS, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_softmax_does_not_see_an_offset(backend, offset):
    """Scores that are the offset and nothing else: the bits of ``q @ k`` would be lost in it. A plain row stays one."""
    q, k, v = tensors()
    with torch.no_grad():
        q.mul_(2.0**-60)
    bias = torch.full((40, 40), offset)
    bias[20:] = torch.randn(20, 40)
    out, lse = serve(backend, q, k, v, bias=bias)
    exact = softmax_of_differences(bias.expand(2, 4, -1, -1), v)
    torch.testing.assert_close(out, exact.float())
    torch.testing.assert_close(lse, (bias.double().logsumexp(-1)).float().expand_as(lse))
    dout = torch.randn_like(out)
    found = torch.autograd.grad(out, (q, k, v), dout)
    again = tensors_like(q, k, v)
    zero = torch.zeros_like(bias)
    zero[20:] = bias[20:]
    plain, _ = fastattn.attention(*again, bias=zero, return_lse=True, backend="eager")
    for a, b in zip(found, torch.autograd.grad(plain, again, dout), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
def test_scores_that_are_rounded_coarsely_still_weigh_to_one(backend):
    """Equal keys at scores of 1e8 and 1e10: rounding tells them apart, so only the sum of their weights is exact."""
    q, k, v = tensors()
    for size in (1e4, 1e5):
        keys = k[:, :1].expand_as(k) * size
        out, _ = serve(backend, q * size, keys, torch.ones_like(v))
        torch.testing.assert_close(out, torch.ones_like(out))
        out, _ = serve(backend, q.double() * size, keys.double(), v.double())
        mean = v.double().mean(1, keepdim=True).repeat_interleave(2, 2).expand_as(out)
        torch.testing.assert_close(out.float(), mean.float())


def test_parts_of_the_keys_are_joined_whatever_their_offset():
    """Beside 4e9 an fp32 number has steps of 256, so that a low part alone can be beyond what exp can hold."""
    exact = torch.tensor([[4e9 + 100, 1.5, -torch.inf], [4e9 + 99, -torch.inf, -torch.inf]], dtype=torch.float64)
    high = exact.float()
    low = torch.where(high.isinf(), 0, (exact - high.double()).float())
    lse, lse_low, shares = numerics.merge_lse(high, low)
    whole = exact.logsumexp(0)
    assert float(low.max()) > 88 and bool(torch.isneginf(lse[2])) and lse_low[2] == 0
    torch.testing.assert_close((lse.double() + lse_low)[:2], whole[:2], rtol=0, atol=1e-5)
    expected = (exact - torch.where(whole.isinf(), 0, whole)).exp()
    torch.testing.assert_close(shares.double(), expected, rtol=0, atol=1e-6)


def tensors_like(*given):
    return [x.detach().clone().requires_grad_() for x in given]


@pytest.mark.parametrize("backend", BACKENDS)
def test_learned_biases_get_the_gradient_of_their_differences(backend):
    q, k, v = tensors()
    dout, grads = torch.randn(2, 40, 4, 8), []
    for offset in (0.0, -(2.0**20)):
        bias = (torch.randn(40, 40, generator=torch.Generator().manual_seed(1)) * 16).round() + offset
        bias.requires_grad_()
        out, _ = serve(backend, q * 0, k, v, bias=bias)
        grads.append(torch.autograd.grad(out, bias, dout)[0])
    torch.testing.assert_close(*grads)


MASKED = {
    "causal": {"causal": True},
    "window": {"window": (3, 2)},
    "mask": {"mask": torch.rand(40, 40) > 0.5},
    "bias of -inf": {"bias": torch.randn(40, 40).masked_fill(torch.rand(40, 40) > 0.5, float("-inf"))},
    "segments": {"segment_ids": torch.arange(40).expand(2, -1) // 7},
    "softcap": {"softcap": 3.0, "causal": True},
}


def kept(options):
    """Which pairs the options keep, ``(40, 40)``."""
    weights = fastattn.attention_weights(torch.zeros(2, 40, 4, 8), torch.zeros(2, 40, 2, 8), **options)
    return (weights > 0)[0, 0]


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("options", MASKED.values(), ids=MASKED)
@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_not_finite_reaches_the_rows_that_keep_it(backend, options, value):
    """In out and in every gradient, the other rows are as they are without it; those that keep it are not finite."""
    clean, keep = tensors(), kept(options)
    for name, at in itertools.product("qkv", (0, 17)):
        dirty = tensors_like(*clean)
        with torch.no_grad():
            dirty["qkv".index(name)][:, at, :, 3] = value
        rows = keep[:, at] if name != "q" else torch.arange(40) == at
        columns = keep[rows].any(0)
        results = []
        for given in (clean, dirty):
            out, _ = serve(backend, *given, **options)
            results.append((out, *torch.autograd.grad(out.sum(), given)))
        for n, (before, after) in enumerate(zip(*results, strict=True)):
            untouched = ~rows if n < 2 else ~columns
            torch.testing.assert_close(after[:, untouched], before[:, untouched])
        if value != value:
            assert not results[1][0][:, rows].isfinite().all(-1).any()


@pytest.mark.parametrize(("rows", "length"), [(1, 1), (3, 7), (3, 33), (20, 33)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_not_finite_in_a_cache_reaches_the_rows_that_keep_it(backend, rows, length):
    """One row and one key too, where torch's CPU kernel takes scores that are all NaN for those of an empty row."""
    hidden = torch.zeros(1, 1, rows, length)
    hidden[:, :, :-1, -1] = -torch.inf
    lengths, clean = torch.tensor([length, length], dtype=torch.int32), [x.detach() for x in tensors()]
    for options, name in itertools.product(({"causal": True}, {"causal": False, "bias": hidden}), "qkv"):
        found = []
        for value in (None, float("nan")):
            q, k, v = given = [x.clone() for x in clean]
            if value is not None:
                given["qkv".index(name)][:, (rows if name == "q" else length) - 1] = value
            found.append(fastattn.attention_with_kv_cache(q[:, :rows], k, v, lengths, **options, backend=backend))
        torch.testing.assert_close(found[1][:, :-1], found[0][:, :-1])
        assert found[1][:, -1].isnan().all(), (options, name)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("backend", BACKENDS)
def test_values_at_the_limit_of_their_dtype_do_not_overflow(backend, dtype):
    q, k, v = (x.detach() for x in tensors(dtype=dtype))
    v = torch.full_like(v, 0.999 * torch.finfo(dtype).max)  # what rounding may add
    out, _ = serve(backend, q, k, v)
    torch.testing.assert_close(out, v[:, :, :1].expand_as(out))
