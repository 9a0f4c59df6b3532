"""attention_weights against attention itself, rows and heads against the whole, the summaries and the plot."""

from __future__ import annotations

import math

import pytest
import torch

import fastattn
from fastattn.inspection import (
    attention_entropy,
    attention_rollout,
    attention_statistics,
    mean_attention_weights,
    weights_of_call,
)
from fastattn.weights import attention_with_weights

S_Q, S_KV, H_Q, H_KV, D = 7, 9, 4, 2, 8
OPTIONS = {
    "plain": {},
    "causal window softcap": {"causal": True, "window": (3, 0), "softcap": 2.0, "scale": 0.7},
    "bias": {"bias": torch.randn(1, H_Q, S_Q, S_KV, generator=torch.Generator().manual_seed(1))},
    "shared bias row": {"bias": torch.randn(2, 1, 1, S_KV, generator=torch.Generator().manual_seed(2))},
    "mask with an empty row": {"mask": torch.arange(S_Q)[:, None] * torch.arange(S_KV)[None, :] % 3 == 1},
    "alibi and sinks": {"alibi_slopes": torch.linspace(0.1, 1, H_Q), "sinks": torch.linspace(-1, 1, H_Q)},
    "segments": {"segment_ids": (torch.arange(S_Q)[None] // 3, torch.arange(S_KV)[None] // 4)},
    "intervals": {"intervals": torch.arange(H_Q * S_Q * 4).view(H_Q, S_Q, 2, 2).int() * 7 % (S_KV + 2)},
    "dropout": {"dropout_p": 0.4, "rng_state": torch.tensor([11, 3])},
}


@pytest.fixture
def qkv() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    shapes = ((2, S_Q, H_Q, D), (2, S_KV, H_KV, D), (2, S_KV, H_KV, D))
    q, k, v = (torch.randn(shape, generator=draw, dtype=torch.float64) for shape in shapes)
    return q, k, v


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_weights_are_those_that_attention_uses(qkv, options):
    q, k, v = qkv
    weights = fastattn.attention_weights(q, k, **options)
    by_weights = weights @ v.repeat_interleave(H_Q // H_KV, dim=2).transpose(1, 2)
    torch.testing.assert_close(by_weights.transpose(1, 2), fastattn.attention(q, k, v, **options))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_chosen_rows_and_heads_are_cut_from_the_whole(qkv, options):
    q, k, _ = qkv
    whole = fastattn.attention_weights(q, k, **options)
    some = fastattn.attention_weights(q, k, rows=[5, 0, -1], heads=[3, 1], **options)
    assert some.shape == (2, 2, 3, S_KV)
    torch.testing.assert_close(some, whole[:, [3, 1]][:, :, [5, 0, -1]])


KERNEL_OPTIONS = {name: options for name, options in OPTIONS.items() if name != "dropout"}
needs_kernel = pytest.mark.skipif(
    fastattn.backends()["cpu"] is not None, reason="without the C++ kernels the formula gives all weights"
)


def weights_and_gradients(function, q, k, backend, **options):
    """Of values that differ from row to row, and in the number of keys, with those of the sinks and a bias."""
    more = [x.requires_grad_() for name in ("bias", "sinks") if (x := options.get(name)) is not None]
    with fastattn.use_backend(backend):
        found = function(q.requires_grad_(), k.requires_grad_(), **options)
        factors = torch.randn(found.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        assert ("WeightsByKernel" in found.grad_fn.name()) == (backend is None)
        return found, *torch.autograd.grad(found, (q, k, *more), factors.to(found.dtype))


@needs_kernel
@pytest.mark.parametrize("function", [fastattn.attention_weights, mean_attention_weights])
@pytest.mark.parametrize("options", KERNEL_OPTIONS.values(), ids=KERNEL_OPTIONS.keys())
def test_the_kernel_gives_what_the_formula_gives(qkv, options, function):
    q, k, _ = qkv
    options = {name: x.double() if name in ("bias", "sinks") else x for name, x in options.items()}
    by_formula = weights_and_gradients(function, q, k, "eager", **options)
    torch.testing.assert_close(weights_and_gradients(function, q, k, None, **options), by_formula)


@needs_kernel
@pytest.mark.parametrize("function", [fastattn.attention_weights, mean_attention_weights])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_weights_of_many_tiles_are_those_of_fp32(dtype, causal, function):
    draw = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, s, h, 40, generator=draw).to(dtype) for s, h in ((130, 4), (1100, 2)))
    with fastattn.use_backend("eager"):
        exact = function(q.double(), k.double(), causal=causal)
    found = function(q, k, causal=causal)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=1e-6)


@needs_kernel
def test_weights_beside_attention_and_gradients_of_both(qkv):
    q, k, v = (x.detach().requires_grad_() for x in qkv)
    k, v = (x.detach().repeat_interleave(2, 2).requires_grad_() for x in (k, v))

    def both(averages):
        results = attention_with_weights(q, k, v, averages, torch.float64)
        expected = fastattn.attention(q, k, v), fastattn.attention_weights(q, k)
        return results, (expected[0], expected[1].mean(1) if averages else expected[1])

    for averages in (False, True, True):
        results, expected = both(averages)
        torch.testing.assert_close(results, expected)
        for chosen in ((0, 1), (0,), (1,)):
            given = [torch.randn_like(results[n]) for n in chosen]
            found, wanted = (
                torch.autograd.grad([x[n] for n in chosen], (q, k, v), given, retain_graph=True, allow_unused=True)
                for x in (results, expected)
            )
            torch.testing.assert_close(found, wanted)
    assert torch.autograd.gradgradcheck(
        lambda *x: attention_with_weights(*x, True, x[0].dtype), (q, k, v), fast_mode=True
    )
    with torch.no_grad():
        torch.testing.assert_close(attention_with_weights(q, k, v, True, torch.float64), expected)


@needs_kernel
@pytest.mark.parametrize("options", [{}, {"mask": torch.ones(S_Q, S_KV, dtype=torch.bool)}], ids=["plain", "mask"])
def test_freed_memory_is_refused(qkv, options):
    q, k = (x.clone() for x in qkv[:2])
    weights_of_call(q, k, True, options, q.dtype)  # a plan, of the first
    k.untyped_storage().resize_(8)
    with pytest.raises(fastattn.InputError, match="storage"):
        weights_of_call(q, k, True, options, q.dtype)


@needs_kernel
def test_second_derivatives_and_rows_of_nan(qkv):
    q, k = (x[:1, :4].requires_grad_() for x in qkv[:2])
    for function in (fastattn.attention_weights, mean_attention_weights):
        assert torch.autograd.gradgradcheck(lambda q, k, f=function: f(q, k, causal=True), (q, k), fast_mode=True)
        spoiled = k.detach().clone()
        spoiled[0, 2, 0] = math.nan  # which only the last two rows see
        with fastattn.use_backend("eager"):
            expected = function(q.detach(), spoiled, causal=True)
        torch.testing.assert_close(function(q.detach(), spoiled, causal=True), expected, equal_nan=True)


def test_chosen_rows_do_not_allocate_the_square(qkv):
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                Largest.size = max(Largest.size, result.numel())
            return result

    q = torch.randn(1, 512, 2, 8)
    with Largest():
        fastattn.attention_weights(q, q, rows=[17], causal=True, window=(9, 0))
    assert Largest.size < 512 * 512 / 8


def test_layout_dtype_and_gradient(qkv):
    q, k, _ = qkv
    half = fastattn.attention_weights(q.half().transpose(1, 2), k.half().transpose(1, 2), layout="BHSD")
    assert half.dtype == torch.float32
    torch.testing.assert_close(
        half.double(), fastattn.attention_weights(q.half().double(), k.half().double()), atol=1e-6, rtol=0
    )
    q = q.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: fastattn.attention_weights(x, k, rows=[2], causal=True), (q,))


@pytest.mark.parametrize("rows", [[S_Q], [-S_Q - 1], [0.5], [[1]], [True]])
def test_wrong_rows_are_refused(qkv, rows):
    with pytest.raises(fastattn.InputError, match="rows"):
        fastattn.attention_weights(qkv[0], qkv[1], rows=rows)


def test_the_mean_over_heads_draws_dropout_like_the_weights(qkv):
    options = {"dropout_p": 0.5, "causal": True}
    torch.manual_seed(1)
    mean = mean_attention_weights(*qkv[:2], **options)
    torch.manual_seed(1)
    torch.testing.assert_close(mean, fastattn.attention_weights(*qkv[:2], **options).mean(1))


def test_entropy_and_rollout():
    even = torch.full((1, 4, 4), 0.25)
    torch.testing.assert_close(attention_entropy(even), torch.full((1, 4), math.log(4)))
    assert attention_entropy(torch.eye(4)).max() == 0
    torch.testing.assert_close(attention_rollout([torch.eye(4)[None]] * 3), torch.eye(4))
    first, second = (torch.rand(2, 5, 5).softmax(-1) for _ in range(2))
    half = [0.5 * x.mean(0) + 0.5 * torch.eye(5) for x in (first, second)]
    torch.testing.assert_close(attention_rollout([first, second]), half[1] @ half[0])
    with pytest.raises(fastattn.InputError, match="layers"):
        attention_rollout([torch.rand(2, 4, 5)])


def test_plot_draws_a_png_with_labels(tmp_path):
    imread = pytest.importorskip("matplotlib.image").imread
    layers = [torch.rand(heads, 5, 5).softmax(-1) for heads in (3, 2)]
    tokens = ["the", "cat", "$at", "on", "_"]
    path = fastattn.plot_attention(layers, tmp_path / "new" / "maps.png", tokens=tokens)
    image = imread(path)
    assert image.shape[0] > 300 and image.shape[1] > 300 and image[..., :3].std() > 0.05
    assert [p.name for p in path.parent.iterdir()] == ["maps.png"]
    fastattn.plot_attention(torch.rand(1, 2, 5), tmp_path / "rows.png", tokens=tokens, query_tokens=["a", "b"])


def test_plot_refuses_what_it_cannot_draw(tmp_path):
    with pytest.raises(fastattn.InputError, match="tokens"):
        fastattn.plot_attention(torch.rand(2, 3, 3), tmp_path / "x.png", tokens=["one"])
    with pytest.raises(fastattn.InputError, match="weights"):
        fastattn.plot_attention(torch.rand(2, 2, 3, 3), tmp_path / "x.png")
    with pytest.raises(fastattn.InputError, match="weights"):
        fastattn.plot_attention([], tmp_path / "x.png")


def test_plot_without_matplotlib_says_what_to_install(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"fastattn\[bench\]"):
        fastattn.plot_attention(torch.rand(1, 2, 2), tmp_path / "x.png")


# --- statistics -----------------------------------------------------------------------------------------------------


def differentiable(found):
    return found.entropy, found.largest_logit, found.key_sum


def test_statistics_are_those_of_the_weights():
    options = {"causal": True, "softcap": 3.0, "sinks": torch.randn(4)}
    q, k = torch.randn(2, 9, 4, 8), torch.randn(2, 12, 2, 8)
    weights = fastattn.attention_weights(q, k, **options)
    found = attention_statistics(q, k, **options)
    torch.testing.assert_close(found.entropy, attention_entropy(weights))
    torch.testing.assert_close((found.key_sum, found.key_max), (weights.sum(-2), weights.amax(-2)))
    assert found.largest_key.equal(weights.argmax(-1))
    _out, lse, beside = fastattn.attention(q, k, k, **options, return_lse=True, return_stats=True)
    torch.testing.assert_close(tuple(beside), tuple(found))
    largest = torch.exp(found.largest_logit - lse)
    torch.testing.assert_close(largest, weights.amax(-1))


@pytest.mark.parametrize("backend", ["cpu", "portable", "eager"])
def test_gradients_of_statistics(backend):
    q, k = (torch.randn(1, s, 2, 3, dtype=torch.float64, requires_grad=True) for s in (4, 5))
    sinks = torch.randn(2, dtype=torch.float64, requires_grad=True)

    def statistics(q, k, sinks):
        with fastattn.use_backend(backend):
            return differentiable(attention_statistics(q, k, causal=True, softcap=2.0, sinks=sinks))

    assert torch.autograd.gradcheck(statistics, (q, k, sinks))
    assert torch.autograd.gradgradcheck(statistics, (q, k, sinks), fast_mode=True)


def test_statistics_under_transforms_and_packed():
    q = torch.randn(3, 1, 6, 2, 4)
    each = [attention_statistics(x, x, causal=True) for x in q]
    together = torch.vmap(lambda x: tuple(attention_statistics(x, x, causal=True)))(q)
    ends = torch.tensor([0, 6, 12, 18], dtype=torch.int32)
    flat = q.reshape(18, 2, 4)
    _, packed = fastattn.attention_varlen(flat, flat, flat, ends, ends, causal=True, return_stats=True)
    for n, found in enumerate(each):
        for name, x, y, z in zip(found._fields, found, together, packed, strict=True):
            torch.testing.assert_close((y[n], z[:, 6 * n : 6 * n + 6]), (x, x[0]), msg=name)
