"""Rotary position embedding."""

import copy

import pytest
import torch

from fastattn import InputError
from fastattn.nn import Rotary
from fastattn.nn.rotary import apply_rotary, rotary_tables


def by_complex_numbers(x, positions, base):
    """``(a + ib) * exp(i * position * base^(-2n/D))`` in fp64, for x ``(B, S, H, D)``."""
    a, b = x.double().chunk(2, -1)
    d = x.shape[-1]
    frequencies = torch.tensor([base ** (-2 * n / d) for n in range(d // 2)], dtype=torch.float64)
    angles = positions.double()[..., None, None] * frequencies
    rotated = torch.complex(a, b) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([rotated.real, rotated.imag], -1)


@pytest.mark.parametrize("base", [10.0, 10000.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_is_the_complex_rotation(base, dtype):
    x = torch.randn(2, 7, 3, 8).to(dtype)
    for positions in (torch.arange(7), torch.tensor([0, 1, 2, 0, 1, 0, 1]), torch.randint(0, 50, (2, 7))):
        out = Rotary(8, base)(x, positions)
        expected = by_complex_numbers(x, positions, base)
        assert out.dtype == dtype
        # one rounding to the dtype of x, on top of fp32 arithmetic with angles of up to 50
        tolerance = {"rtol": torch.finfo(dtype).eps / 2, "atol": 1e-14 if dtype == torch.float64 else 3e-5}
        torch.testing.assert_close(out.double(), expected, **tolerance)


def test_scores_depend_on_distance_alone():
    rotary = Rotary(16)
    q, k = torch.randn(2, 1, 1, 1, 16, dtype=torch.float64)
    scores = [(rotary(q, m) * rotary(k, n)).sum() for m, n in ((3, 1), (13, 11), (1002, 1000))]
    torch.testing.assert_close(scores, [scores[0]] * 3)


def test_offset_continues_the_sequence_and_packed_tokens_work():
    x = torch.randn(2, 6, 3, 8)
    rotary = Rotary(8)
    torch.testing.assert_close(rotary(x)[:, 4:], rotary(x[:, 4:], 4), rtol=0, atol=0)
    torch.testing.assert_close(rotary(x[0], torch.arange(6)), rotary(x)[0], rtol=0, atol=0)
    torch.testing.assert_close(apply_rotary(x, *rotary_tables(torch.arange(6), 8)), rotary(x), rtol=0, atol=0)


def test_gradient():
    x = torch.randn(1, 4, 2, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(Rotary(6, 20.0), (x,))


def test_has_no_state_and_keeps_its_precision_through_casts():
    rotary = Rotary(8)
    x = torch.randn(1, 300, 2, 8)
    assert not rotary.state_dict() and not list(rotary.parameters()) and not list(rotary.buffers())
    torch.testing.assert_close(copy.deepcopy(rotary).to(torch.bfloat16)(x), rotary(x), rtol=0, atol=0)


def test_meta_device_and_compile():
    assert Rotary(8)(torch.empty(1, 3, 2, 8, device="meta")).device.type == "meta"
    compiled = torch.compile(Rotary(8), fullgraph=True, backend="aot_eager", dynamic=True)
    for length in (3, 5):
        x = torch.randn(1, length, 2, 8)
        torch.testing.assert_close(compiled(x), Rotary(8)(x))
        torch.testing.assert_close(compiled(x, torch.arange(length) % 2), Rotary(8)(x, torch.arange(length) % 2))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Rotary(7), "head_dim: got 7; allowed: an even number"),
        (lambda: Rotary(0), "head_dim: got 0"),
        (lambda: Rotary(8, -1.0), "base: got -1.0; allowed: a positive finite number"),
        (lambda: Rotary(8)(torch.zeros(2, 3, 2, 6)), r"x: got shape \(2, 3, 2, 6\); allowed: .* with D = 8"),
        (lambda: Rotary(8)(torch.zeros(8)), r"x: got shape \(8,\)"),
        (lambda: Rotary(8)(torch.zeros(2, 3, 2, 8), torch.arange(4)), r"positions: got shape \(4,\); allowed: \(3,\)"),
    ],
)  # fmt: skip
def test_errors(call, message):
    with pytest.raises(InputError, match=message):
        call()
