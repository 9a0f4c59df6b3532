"""override_sdpa and the entry in torch's flash-attention registry."""

from __future__ import annotations

import inspect

import pytest
import torch
import torch.nn.functional as F
from torch.nn import attention as torch_attention
from torch.nn.attention.bias import causal_lower_right, causal_upper_left

import fastattn
from fastattn.backends.eager import BACKEND
from fastattn.integrations import torch as integration
from fastattn.integrations.torch import override_sdpa

TORCH_SDPA = F.scaled_dot_product_attention


@pytest.fixture
def counted(monkeypatch):
    """How often fastattn's operators ran."""
    calls = []
    for name in ("forward", "backward"):
        run = getattr(BACKEND, name)
        monkeypatch.setattr(BACKEND, name, lambda *a, run=run, name=name: calls.append(name) or run(*a))
    with fastattn.use_backend("eager"):
        yield calls


def grads(function, *inputs):
    inputs = [x.detach().requires_grad_() for x in inputs]
    out = function(*inputs)
    return out, *torch.autograd.grad(out.square().sum(), inputs)


CALLS = {
    "plain": {},
    "causal": {"is_causal": True},
    "scale": {"scale": 0.3},
    "boolean mask": {"attn_mask": torch.ones(5, 5).tril().bool()},
    "float mask": {"attn_mask": torch.linspace(-1, 1, 25).view(5, 5)},
}


@pytest.mark.parametrize("options", CALLS.values(), ids=CALLS.keys())
def test_same_results_and_gradients(options, counted):
    q, k, v = torch.randn(3, 2, 4, 5, 8)
    with override_sdpa(quiet=True) as report:
        found = grads(lambda *x: F.scaled_dot_product_attention(*x, **options), q, k, v)
    assert counted == ["forward", "backward"] and report.served == 1 and not report.fallbacks
    torch.testing.assert_close(found, grads(lambda *x: TORCH_SDPA(*x, **options), q, k, v))


def test_gqa_and_three_dimensions(counted):
    q, k = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 5, 8)
    with override_sdpa() as report:
        torch.testing.assert_close(
            F.scaled_dot_product_attention(q, k, k, enable_gqa=True), TORCH_SDPA(q, k, k, enable_gqa=True)
        )
        torch.testing.assert_close(F.scaled_dot_product_attention(q[0], q[1], q[1]), TORCH_SDPA(q[0], q[1], q[1]))
    assert report.served == 2


def test_library_modules_use_it_and_torch_is_back_afterwards(counted):
    layer = torch.nn.MultiheadAttention(16, 2, batch_first=True)
    x = torch.randn(2, 5, 16)
    expected = layer(x, x, x, need_weights=False)[0]
    with override_sdpa() as report:
        torch.testing.assert_close(layer(x, x, x, need_weights=False)[0], expected)
    assert report.served == 1
    assert F.scaled_dot_product_attention is TORCH_SDPA
    with pytest.raises(RuntimeError, match="inside"), override_sdpa():
        raise RuntimeError("inside")
    assert F.scaled_dot_product_attention is TORCH_SDPA


def test_fallbacks_are_computed_by_torch_counted_and_printed(capsys):
    jagged = torch.nested.nested_tensor([torch.randn(n, 2, 8) for n in (3, 5)], layout=torch.jagged).transpose(1, 2)
    with override_sdpa() as report:
        for _ in range(2):
            found = F.scaled_dot_product_attention(jagged, jagged, jagged)
    torch.testing.assert_close(found.values(), TORCH_SDPA(jagged, jagged, jagged).values())
    assert report.served == 0 and report.fallbacks.total() == 2
    printed = capsys.readouterr().err
    assert "served 0 of 2" in printed and "2 left to torch: nested" in printed
    with override_sdpa(quiet=True):
        F.scaled_dot_product_attention(jagged, jagged, jagged)
    assert capsys.readouterr().err == ""


def test_a_wrong_call_gets_torchs_error():
    q = torch.randn(1, 2, 3, 8)
    with override_sdpa(quiet=True) as report, pytest.raises(RuntimeError):
        F.scaled_dot_product_attention(q, torch.randn(1, 2, 3, 9), q)
    assert next(iter(report.fallbacks)).startswith("k:")


def test_a_backend_that_uses_torchs_attention_gets_torchs(monkeypatch):
    """Otherwise the two would call each other for ever."""

    def forward(inputs, spec):
        out = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (inputs.q, inputs.k, inputs.v)))
        return out.transpose(1, 2), out[..., 0].clone(), torch.zeros_like(out[..., 0])

    monkeypatch.setattr(BACKEND, "forward", forward)
    q = torch.randn(1, 2, 3, 8)
    with override_sdpa() as report, fastattn.use_backend("eager"):
        torch.testing.assert_close(F.scaled_dot_product_attention(q, q, q), TORCH_SDPA(q, q, q))
    assert report.served == 1


def test_compiles_fullgraph(counted):
    q = torch.randn(2, 2, 5, 8)

    def function(q):
        return F.scaled_dot_product_attention(q, q, q, is_causal=True) * 2

    with override_sdpa():
        found = torch.compile(function, fullgraph=True, backend="aot_eager")(q)
    assert counted == ["forward"]
    torch.testing.assert_close(found, TORCH_SDPA(q, q, q, is_causal=True) * 2)


@pytest.fixture
def on_cpu():
    """The registry's override, on the device that this machine has and torch has no such kernel for."""
    override = integration._Override("CPU")
    yield
    override.remove()


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"scale": 0.4}])
def test_flash_operators_forward_and_backward(options, counted, on_cpu):
    q, k, v = torch.randn(3, 2, 4, 6, 8)
    operator = torch.ops.aten._scaled_dot_product_flash_attention

    found = grads(lambda *x: operator(*x, **options)[0], q, k, v)
    assert counted == ["forward", "backward"]
    torch.testing.assert_close(found, grads(lambda *x: TORCH_SDPA(*x, **options), q, k, v))
    out, lse, *_, seed, offset, debug = operator(q, k, v, **options)
    scores = q @ k.mT * options.get("scale", 8**-0.5)
    if options.get("is_causal"):
        scores = scores.masked_fill(~torch.ones(6, 6).tril().bool(), float("-inf"))
    torch.testing.assert_close(lse, scores.logsumexp(-1))
    assert out.stride() == q.stride() and seed.dtype == torch.uint64 and offset.dim() == 0 and debug.numel() == 0


def test_flash_operators_drop_the_same_elements_backward(on_cpu):
    """The gradient of v is the transpose of what multiplied it, so of the weights that dropout left."""
    q, k = torch.randn(2, 1, 1, 6, 6)
    v = torch.eye(6)[None, None].requires_grad_()
    weights = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.5)[0]
    assert (weights == 0).any() and (weights > 0).any()
    (dv,) = torch.autograd.grad(weights, v, torch.eye(6)[None, None])
    torch.testing.assert_close(dv, weights.mT)


def test_flash_operators_refuse_a_debug_mask(on_cpu):
    q = torch.randn(1, 2, 3, 8)
    with pytest.raises(fastattn.UnsupportedError, match="debug"):
        torch.ops.aten._scaled_dot_product_flash_attention(q, q, q, 0.0, False, True)


varlen = pytest.importorskip("torch.nn.attention.varlen", reason="this torch has no varlen_attn")


@pytest.mark.parametrize("window", [(-1, -1), (-1, 0), (2, 1)], ids=str)
def test_varlen_attn(window, counted, on_cpu):
    if "window_size" not in inspect.signature(varlen.varlen_attn).parameters:
        pytest.skip("this torch's varlen_attn has no windows")
    q, k, v = torch.randn(3, 9, 4, 8)
    starts = torch.tensor([0, 2, 9], dtype=torch.int32)

    def theirs(q, k, v):
        return varlen.varlen_attn(q, k, v, starts, starts, 7, 7, window_size=window)

    def alone(*x):
        parts = ([part[None] for part in y.split([2, 7])] for y in x)
        return torch.cat([fastattn.attention(*y, window=window, backend="eager")[0] for y in zip(*parts, strict=True)])

    found = grads(theirs, q, k, v)
    assert counted == ["forward", "backward"]
    torch.testing.assert_close(found, grads(alone, q, k, v))
    if hasattr(varlen, "varlen_attn_out"):
        out = torch.empty_like(q)
        varlen.varlen_attn_out(out, q, k, v, starts, starts, 7, 7, window_size=window)
        torch.testing.assert_close(out, found[0])


def test_varlen_attn_of_pages(on_cpu):
    if "block_table" not in inspect.signature(varlen.varlen_attn).parameters:
        pytest.skip("this torch's varlen_attn has no pages")
    q, pages = torch.randn(2, 4, 8), torch.randn(6, 16, 4, 8)
    starts, used = torch.tensor([0, 1, 2], dtype=torch.int32), torch.tensor([20, 7], dtype=torch.int32)
    table = torch.tensor([[4, 1], [2, 0]], dtype=torch.int32)
    found = varlen.varlen_attn(q, pages, pages, starts, None, 1, 32, seqused_k=used, block_table=table)
    for n, length in enumerate(used.tolist()):
        k = pages[table[n].long()].flatten(0, 1)[None, :length]
        torch.testing.assert_close(found[n : n + 1], fastattn.attention(q[None, n : n + 1], k, k, backend="eager")[0])


def test_registry(monkeypatch):
    activated = []

    class Handle:
        def __init__(self):
            activated.append("on")

        def remove(self):
            activated.append("off")

    monkeypatch.setattr(integration, "_Override", Handle)
    integration.register_flash_attention("fastattn-test")
    assert "fastattn-test" in torch_attention.list_flash_attention_impls() and activated == []
    torch_attention.activate_flash_attention_impl("fastattn-test")
    assert torch_attention.current_flash_attention_impl() == "fastattn-test"
    torch_attention.restore_flash_attention_impl()
    assert activated == ["on", "off"]


def test_registry_overrides_cuda_kernels_by_name():
    """The real override installs on CUDA without a GPU, and goes away."""
    name = "aten::_scaled_dot_product_flash_attention"
    integration.register_flash_attention()
    before = torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA")
    torch_attention.activate_flash_attention_impl("fastattn")
    assert torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA")
    torch_attention.restore_flash_attention_impl()
    assert torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA") == before


# --- scaled_dot_product_attention as torch's callers know it ----------------------------------------------------


@pytest.mark.parametrize("make", [causal_upper_left, causal_lower_right])
@pytest.mark.parametrize("sizes", [(16, 16), (4, 16)], ids=str)
def test_causal_biases_hold_no_values_and_say_what_they_mask(make, sizes):
    q, k = torch.randn(1, 2, sizes[0], 8), torch.randn(1, 2, sizes[1], 8)
    expected = TORCH_SDPA(q, k, k, attn_mask=make(*sizes))
    torch.testing.assert_close(fastattn.scaled_dot_product_attention(q, k, k, attn_mask=make(*sizes)), expected)
    with override_sdpa(quiet=True) as report:
        torch.testing.assert_close(F.scaled_dot_product_attention(q, k, k, attn_mask=make(*sizes)), expected)
    assert report.served == 1
    with pytest.raises(fastattn.InputError, match="a CausalBias of"):
        fastattn.scaled_dot_product_attention(q, k[:, :, 1:], k[:, :, 1:], attn_mask=make(*sizes))


class Own(torch.Tensor):
    """A subclass of somebody's."""


def test_subclasses_are_kept_as_torch_keeps_them():
    q, mask = torch.randn(2, 3, 5, 8), torch.randn(5, 5)
    out = fastattn.scaled_dot_product_attention(q.as_subclass(Own), q, q, attn_mask=mask)
    assert type(out) is Own is type(TORCH_SDPA(q.as_subclass(Own), q, q, attn_mask=mask))
    torch.testing.assert_close(out.as_subclass(torch.Tensor), TORCH_SDPA(q, q, q, attn_mask=mask))


@pytest.mark.parametrize("order", ["BHSD", "BSHD"])
@pytest.mark.parametrize("is_causal", [False, True])
def test_memory_order_is_that_of_the_query(order, is_causal):
    q = torch.randn(2, 3, 10, 8) if order == "BHSD" else torch.randn(2, 10, 3, 8).transpose(1, 2)
    for _ in range(2):  # by its plan the second time
        out = fastattn.scaled_dot_product_attention(q, q, q, is_causal=is_causal)
        assert out.stride() == TORCH_SDPA(q, q, q, is_causal=is_causal).stride()


def test_float64_stays_under_autocast():
    q = torch.randn(1, 2, 9, 16, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        out = fastattn.scaled_dot_product_attention(q, q, q)
    assert out.dtype == torch.float64
    torch.testing.assert_close(out, TORCH_SDPA(q, q, q))


def test_vmap_gives_every_sample_the_same_dropout_if_asked():
    q = torch.randn(1, 2, 8, 16).expand(3, -1, -1, -1, -1)

    def loss(q):
        return fastattn.scaled_dot_product_attention(q, q, q, dropout_p=0.5)

    for randomness in ("same", "different"):
        out = torch.vmap(loss, randomness=randomness)(q)
        grads = torch.vmap(torch.func.grad(lambda q: loss(q).square().sum()), randomness=randomness)(q)
        for result in (out, grads):
            assert torch.equal(result[0], result[1]) is (randomness == "same")


@pytest.mark.parametrize("error", [ValueError, RuntimeError])
def test_wrong_calls_raise_what_callers_of_torch_catch(error):
    with pytest.raises(error):
        fastattn.scaled_dot_product_attention(torch.randn(1, 2, 3, 8), *torch.randn(2, 1, 2, 4, 9))


def test_jagged_tensors():
    rows = [torch.randn(n, 2, 8) for n in (3, 5)]
    x = torch.nested.nested_tensor(rows, layout=torch.jagged).transpose(1, 2)
    for is_causal in (False, True):
        out = fastattn.scaled_dot_product_attention(x, x, x, is_causal=is_causal)
        for found, row in zip(out.transpose(1, 2).unbind(), rows, strict=True):
            q = row.transpose(0, 1)[None]
            torch.testing.assert_close(found.transpose(0, 1)[None], TORCH_SDPA(q, q, q, is_causal=is_causal))
    with pytest.raises(fastattn.InputError, match="a nested tensor with attn_mask"):
        fastattn.scaled_dot_product_attention(x, x, x, attn_mask=torch.ones(5, 5, dtype=torch.bool))
