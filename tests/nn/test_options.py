"""The options that torch's module lacks, against plain formulas in this file."""

import itertools
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fastattn import MultiHeadAttention
from fastattn.nn import Rotary

E, H, N, L = 16, 4, 2, 9
D = E // H


def formula(m, query, key, value, masked=None):
    """Batch-first multi-head attention in plain torch ops: ``(out, weights)``."""
    e_kv = D * m.num_kv_heads
    if m.in_proj_weight is None:
        weights = (m.q_proj_weight, m.k_proj_weight, m.v_proj_weight)
    else:
        weights = m.in_proj_weight.split([E, e_kv, e_kv])
    biases = [None] * 3 if m.in_proj_bias is None else m.in_proj_bias.split([E, e_kv, e_kv])
    q, k, v = (
        F.linear(x, w, b).unflatten(-1, (-1, D)).transpose(1, 2)
        for x, w, b in zip((query, key, value), weights, biases, strict=True)
    )
    if m.q_norm is not None:
        q, k = (
            x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * w
            for x, w in ((q, m.q_norm.weight), (k, m.k_norm.weight))
        )
    if m.rotary is not None:
        q, k = complex_rotation(q, m.rotary.base), complex_rotation(k, m.rotary.base)
    k, v = (x.repeat_interleave(H // m.num_kv_heads, dim=1) for x in (k, v))
    scores = q @ k.transpose(-1, -2) / math.sqrt(D)
    if m.softcap:
        scores = m.softcap * torch.tanh(scores / m.softcap)
    i, j = torch.arange(scores.shape[-2])[:, None], torch.arange(scores.shape[-1])[None]
    offset = j - i - (scores.shape[-1] - scores.shape[-2])
    left, right = m.window or (None, None)
    hidden = torch.zeros_like(offset, dtype=torch.bool)
    if left is not None:
        hidden |= offset < -left
    if right is not None:
        hidden |= offset > right
    scores = scores.masked_fill(hidden if masked is None else hidden | masked, float("-inf"))
    if m.sinks is not None:
        sinks = m.sinks[None, :, None, None].expand(*scores.shape[:-1], 1)
        p = torch.cat([scores, sinks], -1).softmax(-1)[..., :-1]
    else:
        p = scores.softmax(-1)
    return m.out_proj((p @ v).transpose(1, 2).flatten(2)), p


def complex_rotation(x, base):
    """Rotary embedding as multiplication by ``exp(i * position * frequency)``; x is ``(B, H, S, D)``."""
    a, b = x.chunk(2, -1)
    frequencies = base ** (-torch.arange(0, D, 2, dtype=x.dtype) / D)
    angles = torch.arange(x.shape[-2], dtype=x.dtype)[:, None] * frequencies
    rotated = torch.complex(a, b) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([rotated.real, rotated.imag], -1)


def build(**options):
    torch.manual_seed(0)
    m = MultiHeadAttention(E, H, batch_first=True, dtype=torch.float64, **options)
    with torch.no_grad():
        for p in m.parameters():
            p.normal_(std=0.5)
    return m


def assert_formula(m, query, key, value, masked=None, **masks):
    leaves = [*dict.fromkeys((query, key, value)), *m.parameters()]
    expected, expected_weights = formula(m, query, key, value, masked)
    cotangent = torch.randn_like(expected)
    expected_grads = torch.autograd.grad(expected, leaves, cotangent, materialize_grads=True)
    for need_weights in (False, True):
        out, weights = m(query, key, value, need_weights=need_weights, average_attn_weights=False, **masks)
        grads = torch.autograd.grad(out, leaves, cotangent, materialize_grads=True)
        torch.testing.assert_close(out, expected)
        torch.testing.assert_close(grads, expected_grads)
        if need_weights:
            torch.testing.assert_close(weights, expected_weights)


def tokens(length=L, width=E):
    return torch.randn(N, length, width, dtype=torch.float64, requires_grad=True)


SETTINGS = {
    "num_kv_heads": (None, 2, 1),
    "window": (None, (None, 0), (2, 1)),
    "softcap": (None, 0.7),
    "rope": (False, 100.0),
    "qk_norm": (False, True),
    "sinks": (False, True),
}


COMBINATIONS = [dict(zip(SETTINGS, values, strict=True)) for values in itertools.product(*SETTINGS.values())]


@pytest.mark.parametrize(
    "options", COMBINATIONS, ids=lambda o: ",".join(f"{name}={x}" for name, x in o.items() if x) or "none"
)
def test_every_combination_is_the_formula(options):
    x = tokens()
    assert_formula(build(**options), x, x, x)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("num_kv_heads", [1, 2, 4])
def test_cross_attention_with_other_widths(bias, num_kv_heads):
    m = build(kdim=6, vdim=10, bias=bias, num_kv_heads=num_kv_heads, window=(3, 2), sinks=True, qk_norm=True)
    masked = torch.rand(N * H, L, L + 3) < 0.3
    masked[..., -4:] = False  # a key inside every window
    padding = torch.zeros(N, L + 3, dtype=torch.bool)
    padding[0, :3] = True
    every = masked.view(N, H, L, L + 3) | padding[:, None, None]
    assert_formula(m, tokens(), tokens(L + 3, 6), tokens(L + 3, 10), every, attn_mask=masked, key_padding_mask=padding)


@pytest.mark.parametrize("s_kv", [L, L + 2])
def test_window_together_with_the_causal_hint(s_kv):
    m = build(window=(2, None))
    query = tokens()
    key = query if s_kv == L else tokens(s_kv)
    causal = torch.ones(L, s_kv, dtype=torch.bool).triu(1 + s_kv - L)
    assert_formula(m, query, key, key, causal, attn_mask=causal, is_causal=True)


def test_appended_keys_follow_grouped_heads():
    m = build(num_kv_heads=2, add_bias_kv=True, add_zero_attn=True)
    assert m.bias_k.shape == (1, 1, 2 * D)
    x = tokens()
    out, weights = m(x, x, x)
    assert weights.shape == (N, L, L + 2)
    k, v = (torch.cat([b.view(2, 1, D), torch.zeros(2, 1, D, dtype=torch.float64)], 1) for b in (m.bias_k, m.bias_v))
    q, keys, values = (y.unflatten(-1, (-1, D)).transpose(1, 2)
                       for y in F.linear(x, m.in_proj_weight, m.in_proj_bias).split([E, 2 * D, 2 * D], -1))  # fmt: skip
    keys, values = (torch.cat([y, z.expand(N, -1, -1, -1)], 2) for y, z in ((keys, k), (values, v)))
    expected = F.scaled_dot_product_attention(q, keys, values, enable_gqa=True)
    torch.testing.assert_close(out, m.out_proj(expected.transpose(1, 2).flatten(2)))


@pytest.mark.parametrize("kdim", [None, 6])
def test_parameter_shapes_of_grouped_heads(kdim):
    shapes = {
        name: tuple(p.shape) for name, p in MultiHeadAttention(E, H, kdim=kdim, num_kv_heads=1).named_parameters()
    }
    expected = {"in_proj_bias": (E + 2 * D,), "out_proj.weight": (E, E), "out_proj.bias": (E,)}
    if kdim is None:
        expected["in_proj_weight"] = (E + 2 * D, E)
    else:
        expected |= {"q_proj_weight": (E, E), "k_proj_weight": (D, 6), "v_proj_weight": (D, E)}
    assert shapes == expected


def test_grouped_heads_are_initialised():
    m = MultiHeadAttention(E, H, num_kv_heads=1, add_bias_kv=True)
    limit = math.sqrt(6 / (E + E + 2 * D))
    assert m.in_proj_weight.abs().max() <= limit and m.in_proj_weight.std() > 0.5 * limit / math.sqrt(3)
    assert (m.in_proj_bias == 0).all() and m.bias_k.std() > 0


def test_new_parameters_and_their_names():
    m = MultiHeadAttention(E, H, qk_norm=True, sinks=True, rope=True)
    added = set(m.state_dict()) - set(nn.MultiheadAttention(E, H).state_dict())
    assert added == {"q_norm.weight", "k_norm.weight", "sinks"}
    assert m.sinks.shape == (H,) and (m.sinks == 0).all() and (m.q_norm.weight == 1).all()
    assert m.rotary.base == 10000.0


def test_dropout_is_of_the_weights_and_the_output_uses_the_weights_returned():
    m = build(dropout=0.25, num_kv_heads=2)
    x = torch.randn(1, 200, E, dtype=torch.float64)
    torch.manual_seed(1)
    out, weights = m(x, x, x, average_attn_weights=False)
    torch.manual_seed(1)
    again, _ = m(x, x, x, need_weights=False)
    torch.testing.assert_close(out, again)
    full = m.eval()(x, x, x, average_attn_weights=False)[1]
    dropped = weights == 0
    rate = dropped.double().mean().item()
    deviation = math.sqrt(0.25 * 0.75 / dropped.numel())
    assert abs(rate - 0.25) < 5 * deviation
    torch.testing.assert_close(weights[~dropped], full[~dropped] / 0.75)
    value = F.linear(x, m.in_proj_weight[E + 2 * D :], m.in_proj_bias[E + 2 * D :]).unflatten(-1, (2, D))
    heads = torch.einsum("nhij,njhd->nihd", weights, value.repeat_interleave(2, dim=2))
    torch.testing.assert_close(out, m.out_proj(heads.flatten(2)))


def test_dropout_only_in_training_and_follows_the_seed():
    m = build(dropout=0.5)
    x = tokens()
    one, two = (m(x, x, x, need_weights=False)[0] for _ in range(2))
    assert not torch.allclose(one, two)
    torch.testing.assert_close(m.eval()(x, x, x)[0], formula(m, x, x, x)[0])


def test_backend_is_passed_on():
    m = build(backend="eager")
    x = tokens()
    torch.testing.assert_close(m(x, x, x)[0], formula(m, x, x, x)[0])
    m.backend = "no such backend"
    with pytest.raises(ValueError, match="backend: got 'no such backend'"):
        m(x, x, x, need_weights=False)


def test_repr_names_the_options():
    text = repr(MultiHeadAttention(E, H, num_kv_heads=2, window=(3, 0), rope=True))
    assert "num_kv_heads=2, window=(3, 0)" in text
    assert repr(Rotary(D)) in text
