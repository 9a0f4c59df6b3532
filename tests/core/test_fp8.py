"""Rounding to e4m3, and ``attention_fp8`` where no kernel multiplies in it."""

import warnings

import pytest
import torch

import fastattn
from fastattn import state
from fastattn.quantized import BLOCK


def rows(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def qkv(dtype=torch.float32):
    sizes = ((2, 150, 4, 32), (2, 140, 2, 32), (2, 140, 2, 16))
    return [rows(*shape, seed=seed, dtype=dtype) for seed, shape in enumerate(sizes)]


@pytest.mark.parametrize("role", ["key", "value"])
@pytest.mark.parametrize("size", [1e-3, 1.0, 448.0, 3e37])
def test_an_element_is_off_by_a_sixteenth_or_a_step_of_the_least(role, size):
    x = rows(2, 300, 3, 20) * size
    found = fastattn.quantize(x, role=role)
    assert found.values.shape == x.shape and found.scales.shape == (2, 3, 3)
    mantissa, _ = torch.frexp(found.scales)
    assert (mantissa == 0.5).all(), "scales are powers of two"
    blocks = torch.nn.functional.pad(x.abs().amax(-1), (0, 0, 0, -300 % BLOCK)).unflatten(1, (-1, BLOCK)).amax(2)
    filled = blocks.transpose(1, 2) / found.scales
    assert (filled <= 448).all() and (filled > 224).all(), "the least that fits"
    steps = found.scales.repeat_interleave(BLOCK, 2)[:, :, :300].transpose(1, 2)[..., None] * 2**-10
    assert ((found.dequantize() - x).abs() <= torch.maximum(x.abs() / 16, steps)).all()
    assert torch.equal(found.dequantize(torch.bfloat16).float(), found.dequantize()), "exact in bf16"


def test_what_is_not_finite_becomes_nan_and_leaves_its_block_alone():
    x = rows(1, 40, 1, 8)
    clean = fastattn.quantize(x)
    x[0, 3, 0, 1], x[0, 5, 0, 2] = float("inf"), float("nan")
    found = fastattn.quantize(x)
    assert torch.equal(found.scales, clean.scales)
    assert found.dequantize().isnan().sum() == 2 and found.dequantize()[0, [3, 5], 0, [1, 2]].isnan().all()
    zeros = fastattn.quantize(torch.zeros(1, 0, 2, 8)), fastattn.quantize(torch.zeros(1, 3, 2, 8))
    assert zeros[0].scales.shape == (1, 2, 0) and (zeros[1].scales == 1).all()


def test_dequantized_operands_are_served_with_a_warning():
    q, k, v = qkv()
    state.forget()
    with pytest.warns(UserWarning, match="no kernel multiplies in e4m3.*cpu: .*no fp8"):
        out, lse = fastattn.attention_fp8(q, k, v, causal=True, return_lse=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once
        again = fastattn.attention_fp8(
            fastattn.quantize(q), fastattn.quantize(k), fastattn.quantize(v, role="value"), causal=True
        )
    assert torch.equal(again, out)
    rounded = (fastattn.quantize(x).dequantize() for x in (q, k, v))
    expected = fastattn.attention(*rounded, causal=True, return_lse=True)
    torch.testing.assert_close((out, lse), expected)


@pytest.mark.filterwarnings("ignore:attention_fp8")
def test_layouts_dtypes_and_autocast():
    q, k, v = qkv()
    out = fastattn.attention_fp8(q, k, v, window=(9, 0))
    turned = fastattn.attention_fp8(*(x.transpose(1, 2) for x in (q, k, v)), window=(9, 0), layout="BHSD")
    assert torch.equal(turned.transpose(1, 2), out)
    halves = qkv(torch.float16)
    half, whole = (
        fastattn.attention_fp8(*(x.to(to) for x in halves), causal=True) for to in (torch.float16, torch.float32)
    )
    assert half.dtype == torch.float16 and (half - whole).abs().max() < 2e-3
    with torch.autocast("cpu", torch.bfloat16):
        assert fastattn.attention_fp8(q, k, v).dtype == torch.bfloat16


@pytest.mark.filterwarnings("ignore:attention_fp8")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_largest_numbers_are_not_rounded_to_infinity(dtype):
    x = torch.full((1, 4, 1, 8), torch.finfo(dtype).max, dtype=dtype)
    assert (fastattn.quantize(x).dequantize() == x.float() * 0 + fastattn.quantize(x).scales * 240).all()
    assert fastattn.attention_fp8(x * 0, x * 0, x).isfinite().all()


@pytest.mark.filterwarnings("ignore:attention_fp8")
def test_a_compiled_model_calls_it_outside_its_graph():
    q, k, v = qkv()
    compiled = torch.compile(lambda q: fastattn.attention_fp8(q * 1.0, k, v) + 1, backend="eager")
    torch.testing.assert_close(compiled(q), fastattn.attention_fp8(q, k, v) + 1)


def test_what_is_refused():
    q, k, v = qkv()
    with pytest.raises(fastattn.InputError, match="q: got a tensor that requires grad"):
        fastattn.attention_fp8(q.requires_grad_(), k, v)
    q = q.detach()
    with pytest.raises(fastattn.InputError, match="k: got head dim 16; allowed: head dim 32"):
        fastattn.attention_fp8(q, k[..., :16], v)
    with pytest.raises(fastattn.InputError, match="v: got list"):
        fastattn.attention_fp8(q, k, [v])
    with pytest.raises(fastattn.InputError, match="q: got shape"):
        fastattn.attention_fp8(q[0], k, v)
    with pytest.raises(TypeError, match="Did you mean causal="):
        fastattn.attention_fp8(q, k, v, is_causal=True)
    with pytest.raises(fastattn.InputError, match=r"role: got 'x'; allowed: \"key\" or \"value\""):
        fastattn.quantize(q, role="x")
    with pytest.raises(fastattn.InputError, match=r"x: got shape .*int64"):
        fastattn.quantize(q.long())
