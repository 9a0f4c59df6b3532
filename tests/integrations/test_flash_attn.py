"""The flash-attn-shaped functions against plain formulas written out here, and against each other."""

from __future__ import annotations

import dataclasses
import inspect
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

import fastattn
from fastattn.integrations import flash_attn
from fastattn.spec import AttentionSpec

ROOT = str(Path(fastattn.__file__).parent.parent)
B, S_Q, S_KV, H_Q, H_KV, D = 2, 5, 8, 4, 2, 16


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def qkv() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return draw(B, S_Q, H_Q, D), draw(B, S_KV, H_KV, D, seed=1), draw(B, S_KV, H_KV, D, seed=2)


def by_hand(q, k, v, *, lengths=None, scale=None, causal=False, window=(-1, -1), softcap=0.0, slopes=None, leftpad=0):
    """flash-attn's documented formula, one sequence and head at a time. lengths: keys of each sequence that count."""
    batch, s_q, heads, dim = q.shape
    out, lse = q.new_zeros(batch, s_q, heads, v.shape[-1]), q.new_zeros(batch, heads, s_q)
    for b in range(batch):
        s_k = k.shape[1] if lengths is None else int(lengths[b])
        for h in range(heads):
            kv_head = h // (heads // k.shape[2])
            scores = (q[b, :, h] @ k[b, :s_k, kv_head].T) * (dim**-0.5 if scale is None else scale)
            if softcap:
                scores = softcap * torch.tanh(scores / softcap)
            for i in range(s_q):
                for j in range(s_k):
                    away = j - (i + s_k - s_q)
                    if slopes is not None:
                        scores[i, j] -= slopes.expand(batch, heads)[b, h] * abs(away)
                    right = 0 if causal else window[1]
                    if (right >= 0 and away > right) or (window[0] >= 0 and away < -window[0]) or j < leftpad:
                        scores[i, j] = float("-inf")
            lse[b, h] = scores.logsumexp(-1)
            out[b, :, h] = scores.softmax(-1).nan_to_num(0) @ v[b, :s_k, kv_head]
    return out, lse


OPTIONS = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"window_size": (2, 1)},
    "causal window": {"causal": True, "window_size": (2, 5)},
    "left only": {"window_size": (1, -1)},
    "scale softcap": {"softmax_scale": 0.9, "softcap": 1.5},
    "alibi": {"alibi_slopes": torch.linspace(0.1, 0.7, H_Q), "causal": True},
    "alibi per batch": {"alibi_slopes": torch.linspace(0.1, 0.7, B * H_Q).view(B, H_Q)},
}
SPELLING = {"window_size": "window", "softmax_scale": "scale", "alibi_slopes": "slopes"}


def formula_options(options):
    return {SPELLING.get(name, name): value for name, value in options.items()}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_flash_attn_func(qkv, options):
    out, lse, dmask = flash_attn.flash_attn_func(*qkv, **options, return_attn_probs=True)
    expected_out, expected_lse = by_hand(*qkv, **formula_options(options))
    torch.testing.assert_close(out, expected_out)
    torch.testing.assert_close(lse, expected_lse)
    assert dmask.numel() == 0
    torch.testing.assert_close(flash_attn.flash_attn_func(*qkv, **options), expected_out)


def test_gradients_flow(qkv):
    inputs = [x.requires_grad_() for x in qkv]

    def mine(*x):
        return flash_attn.flash_attn_func(*x, causal=True, window_size=(3, 0), deterministic=True)

    grads = torch.autograd.grad(mine(*inputs).square().sum(), inputs)
    expected = torch.autograd.grad(by_hand(*inputs, causal=True, window=(3, 0))[0].square().sum(), inputs)
    torch.testing.assert_close(grads, expected)


def test_qkvpacked(qkv):
    qkv = draw(B, S_Q, 3, H_Q, D)
    out = flash_attn.flash_attn_qkvpacked_func(qkv, 0.0, 0.3, True, (2, -1))
    torch.testing.assert_close(out, by_hand(*qkv.unbind(2), scale=0.3, causal=True, window=(2, 0))[0])
    with pytest.raises(fastattn.InputError, match="qkv"):
        flash_attn.flash_attn_qkvpacked_func(qkv[:, :, :2])


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_varlen_is_each_sequence_alone(options):
    lengths_q, lengths_k = (3, 5), (6, 5)
    q, k, v = draw(8, H_Q, D), draw(11, H_KV, D, seed=1), draw(11, H_KV, D, seed=2)
    cu_q, cu_k = (torch.tensor([0, a, a + b], dtype=torch.int32) for a, b in (lengths_q, lengths_k))
    out, lse, dmask = flash_attn.flash_attn_varlen_func(
        q, k, v, cu_q, cu_k, max(lengths_q), max(lengths_k), **options, return_attn_probs=True
    )
    assert lse.shape == (H_Q, 8) and dmask.numel() == 0
    for n in range(2):
        rows, keys = slice(cu_q[n], cu_q[n + 1]), slice(cu_k[n], cu_k[n + 1])
        own = formula_options(options)
        if "slopes" in own and own["slopes"].dim() == 2:
            own["slopes"] = own["slopes"][n : n + 1]
        expected_out, expected_lse = by_hand(q[rows][None], k[keys][None], v[keys][None], **own)
        torch.testing.assert_close(out[rows], expected_out[0])
        torch.testing.assert_close(lse[:, rows], expected_lse[0])


def test_dropout_probabilities_carry_the_dropped_sign(qkv):
    q, k, v = qkv
    torch.manual_seed(0)
    out, _, dmask = flash_attn.flash_attn_func(q, k, v, 0.5, causal=True, return_attn_probs=True)
    probabilities = fastattn.attention_weights(q, k, causal=True)
    torch.testing.assert_close(dmask.abs(), probabilities)
    assert 0.2 < (dmask < 0).double().mean() < 0.5  # half of what causal keeps
    kept = dmask.clamp(min=0) * 2
    torch.testing.assert_close(out, (kept @ v.repeat_interleave(2, 2).transpose(1, 2)).transpose(1, 2))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("s_new", [0, 1, 3])
@pytest.mark.parametrize("lengths", [3, torch.tensor([1, 4], dtype=torch.int32)], ids=["int", "tensor"])
def test_kvcache(options, s_new, lengths):
    q, k_cache, v_cache = draw(B, 2, H_Q, D), draw(B, S_KV, H_KV, D, seed=1), draw(B, S_KV, H_KV, D, seed=2)
    k, v = (draw(B, s_new, H_KV, D, seed=3), draw(B, s_new, H_KV, D, seed=4)) if s_new else (None, None)
    before = torch.as_tensor(lengths).expand(B)
    expected_k, expected_v = k_cache.clone(), v_cache.clone()
    for b in range(B if s_new else 0):
        expected_k[b, before[b] : before[b] + s_new], expected_v[b, before[b] : before[b] + s_new] = k[b], v[b]
    out, lse = flash_attn.flash_attn_with_kvcache(
        q, k_cache, v_cache, k, v, cache_seqlens=lengths, **options, return_softmax_lse=True
    )
    assert torch.equal(k_cache, expected_k) and torch.equal(v_cache, expected_v)
    expected = by_hand(q, expected_k, expected_v, lengths=before + s_new, **formula_options(options))
    torch.testing.assert_close((out, lse), expected)


def test_kvcache_in_pages():
    k_pages, v_pages = draw(6, 4, H_KV, D, seed=1), draw(6, 4, H_KV, D, seed=2)
    table, lengths = torch.tensor([[5, 0], [2, 3]], dtype=torch.int32), torch.tensor([3, 6], dtype=torch.int32)
    q, k, v = draw(B, 2, H_Q, D), draw(B, 2, H_KV, D, seed=3), draw(B, 2, H_KV, D, seed=4)
    out = flash_attn.flash_attn_with_kvcache(
        q, k_pages, v_pages, k, v, cache_seqlens=lengths, block_table=table, causal=True
    )
    assert torch.equal(k_pages[5, 3], k[0, 0]) and torch.equal(k_pages[0, 0], k[0, 1])
    gathered = (x[table.long()].flatten(1, 2) for x in (k_pages, v_pages))
    torch.testing.assert_close(out, by_hand(q, *gathered, lengths=lengths + 2, causal=True)[0])


def test_kvcache_rows_left_padding_and_full_length():
    q, k_cache, v_cache = draw(B, 1, H_Q, D), draw(5, S_KV, H_KV, D, seed=1), draw(5, S_KV, H_KV, D, seed=2)
    rows, k, v = torch.tensor([4, 1], dtype=torch.int32), draw(B, 1, H_KV, D, seed=3), draw(B, 1, H_KV, D, seed=4)
    lengths = torch.tensor([6, 4])
    untouched = k_cache[[0, 2, 3]].clone()
    out = flash_attn.flash_attn_with_kvcache(
        q, k_cache, v_cache, k, v, cache_seqlens=lengths, cache_batch_idx=rows, cache_leftpad=torch.tensor([2, 2])
    )
    assert torch.equal(k_cache[4, 6], k[0, 0]) and torch.equal(v_cache[1, 4], v[1, 0])
    assert torch.equal(k_cache[[0, 2, 3]], untouched)
    expected, _ = by_hand(q, k_cache[[4, 1]], v_cache[[4, 1]], lengths=lengths + 1, leftpad=2)
    torch.testing.assert_close(out, expected)
    everything = flash_attn.flash_attn_with_kvcache(q, k_cache[:B], v_cache[:B])
    torch.testing.assert_close(everything, by_hand(q, k_cache[:B], v_cache[:B])[0])


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("causal", [True, False])
def test_kvcache_rotary(interleaved, causal):
    dims, lengths = 8, torch.tensor([2, 3])
    angles = draw(S_KV, dims // 2, seed=9)
    q, k, v = draw(B, 2, H_Q, D), draw(B, 2, H_KV, D, seed=1), draw(B, 2, H_KV, D, seed=2)
    k_cache, v_cache = draw(B, S_KV, H_KV, D, seed=3), draw(B, S_KV, H_KV, D, seed=4)

    def rotate(x, advances):
        turned = x.clone()
        for b in range(B):
            for i in range(x.shape[1]):
                at = angles[lengths[b] + (i if advances else 0)]
                for pair in range(dims // 2):
                    one, two = (2 * pair, 2 * pair + 1) if interleaved else (pair, pair + dims // 2)
                    a, c = x[b, i, :, one], x[b, i, :, two]
                    turned[b, i, :, one] = a * at[pair].cos() - c * at[pair].sin()
                    turned[b, i, :, two] = a * at[pair].sin() + c * at[pair].cos()
        return turned

    out = flash_attn.flash_attn_with_kvcache(
        q, k_cache, v_cache, k, v, angles.cos(), angles.sin(), lengths, causal=causal, rotary_interleaved=interleaved
    )
    for b in range(B):
        torch.testing.assert_close(k_cache[b, lengths[b] : lengths[b] + 2], rotate(k, True)[b])
    expected, _ = by_hand(rotate(q, causal), k_cache, v_cache, lengths=lengths + 2, causal=causal)
    torch.testing.assert_close(out, expected)


def test_positions_and_defaults_are_those_of_flash_attn():
    """The signatures of flash-attn 2.8.3, written down: positional calls must mean the same."""
    common = "dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, "
    common += "deterministic=False, return_attn_probs=False"
    signatures = {
        "flash_attn_func": f"q, k, v, {common}",
        "flash_attn_qkvpacked_func": f"qkv, {common}",
        "flash_attn_kvpacked_func": f"q, kv, {common}",
        "flash_attn_varlen_qkvpacked_func": f"qkv, cu_seqlens, max_seqlen, {common}",
        "flash_attn_varlen_kvpacked_func": f"q, kv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, {common}",
        "flash_attn_varlen_func": "q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, "
        f"{common}, block_table=None",
        "flash_attn_with_kvcache": "q, k_cache, v_cache, k=None, v=None, rotary_cos=None, rotary_sin=None, "
        "cache_seqlens=None, cache_batch_idx=None, cache_leftpad=None, block_table=None, softmax_scale=None, "
        "causal=False, window_size=(-1, -1), softcap=0.0, rotary_interleaved=True, alibi_slopes=None, num_splits=0, "
        "return_softmax_lse=False",
    }
    for name, expected in signatures.items():
        parameters = inspect.signature(getattr(flash_attn, name)).parameters.values()
        bare = ", ".join(str(p.replace(annotation=p.empty)) for p in parameters)
        assert bare == expected


def test_what_is_refused(qkv):
    q, k, v = qkv
    table = torch.zeros(1, 1, dtype=torch.int32)
    cu = torch.tensor([0, S_Q], dtype=torch.int32)
    with pytest.raises(fastattn.UnsupportedError, match="dropout_p > 0 with a block_table"):
        flash_attn.flash_attn_varlen_func(q[0], k, v, cu, cu, S_Q, S_Q, 0.5, block_table=table)
    with pytest.raises(fastattn.InputError, match=r"kv: got shape .*allowed: \(B, S_kv, 2, H_kv, D\)"):
        flash_attn.flash_attn_kvpacked_func(q, k)
    new = draw(B, 3, H_KV, D)
    with pytest.raises(fastattn.InputError, match="window_size: got 4"):
        flash_attn.flash_attn_func(*qkv, window_size=4)
    with pytest.raises(fastattn.InputError, match="cache_seqlens"):
        flash_attn.flash_attn_with_kvcache(q, k, v, new, new)
    with pytest.raises(fastattn.InputError, match="room in a cache of 8"):
        flash_attn.flash_attn_with_kvcache(q, k, v, new, new, cache_seqlens=6)
    with pytest.raises(fastattn.InputError, match="one for each batch entry"):
        flash_attn.flash_attn_with_kvcache(q, k, v, cache_seqlens=torch.tensor([1, 2, 3]))
    with pytest.raises(fastattn.InputError, match="both or neither"):
        flash_attn.flash_attn_with_kvcache(q, k, v, new, cache_seqlens=1)
    with pytest.raises(fastattn.InputError, match="rotary_cos"):
        flash_attn.flash_attn_with_kvcache(q, k, v, rotary_cos=draw(8, 4), rotary_sin=draw(8, 4), cache_seqlens=1)


def test_deterministic_chooses_only_backends_that_are(qkv, monkeypatch):
    from fastattn import dispatch
    from fastattn.backends import BACKENDS, load

    first = next(name for name in BACKENDS if fastattn.explain(*qkv).chosen == name)
    shaky = dataclasses.replace(load(first).capabilities, deterministic=False)
    monkeypatch.setattr(type(load(first)), "capabilities", shaky)
    dispatch.reasons.cache_clear()
    served = []
    for name in BACKENDS:
        forward = load(name).forward
        monkeypatch.setattr(load(name), "forward", lambda *a, f=forward, n=name: served.append(n) or f(*a))
        monkeypatch.setattr(load(name), "prepared_forward", lambda *_, **__: None)  # calls by a plan would not be seen
    cu = torch.tensor([0, S_Q], dtype=torch.int32)
    packed = (qkv[0][0], qkv[0][0], qkv[0][0], cu, cu, S_Q, S_Q)
    for deterministic in (False, True):
        flash_attn.flash_attn_func(*qkv, deterministic=deterministic)
        flash_attn.flash_attn_varlen_func(*packed, deterministic=deterministic)
    assert served[:2] == [first, first] and first not in served[2:] and len(served) == 4
    with fastattn.use_backend(first), pytest.raises(fastattn.UnsupportedError, match="not deterministic"):
        flash_attn.flash_attn_func(*qkv, deterministic=True)
    dispatch.reasons.cache_clear()


def test_deterministic_asks_for_the_flag_where_a_backend_needs_it(qkv, monkeypatch):
    from fastattn.backends import load

    chosen = load(fastattn.explain(*qkv).chosen)
    monkeypatch.setattr(chosen, "capabilities", dataclasses.replace(chosen.capabilities, deterministic_by_flag=True))
    with pytest.raises(fastattn.UnsupportedError, match="use_deterministic_algorithms"):
        flash_attn.flash_attn_func(*qkv, deterministic=True)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    flash_attn.flash_attn_func(*qkv, deterministic=True)


CU_Q, CU_K = torch.tensor([0, 3, 3, 8], dtype=torch.int32), torch.tensor([0, 5, 6, 10], dtype=torch.int32)


def test_kv_packed():
    q, kv = draw(B, S_Q, H_Q, D), draw(B, S_KV, 2, H_KV, D, seed=1)
    out, lse, empty = flash_attn.flash_attn_kvpacked_func(q, kv, causal=True, return_attn_probs=True)
    expected = by_hand(q, *kv.unbind(2), causal=True)
    torch.testing.assert_close((out, lse), expected)
    assert empty.numel() == 0


def test_packed_forms_of_packed_sequences():
    qkv, q, kv = draw(8, 3, H_Q, D), draw(8, H_Q, D), draw(10, 2, H_KV, D, seed=1)
    options = {"causal": True, "window_size": torch.tensor([2, -1]), "softcap": 1.5}
    found = flash_attn.flash_attn_varlen_qkvpacked_func(qkv, CU_Q, 5, **options)
    separate = flash_attn.flash_attn_varlen_func(*qkv.unbind(1), CU_Q, CU_Q, 5, 5, **options)
    torch.testing.assert_close(found, separate, rtol=0, atol=0)
    found = flash_attn.flash_attn_varlen_kvpacked_func(q, kv, CU_Q, CU_K, 5, 5, **options)
    torch.testing.assert_close(found, flash_attn.flash_attn_varlen_func(q, *kv.unbind(1), CU_Q, CU_K, 5, 5, **options))


def test_dropped_probabilities_of_packed_sequences():
    """What S_dmask keeps, times the values, is the output: signs, sequences and heads are those of the call."""
    q, k, v = draw(8, H_Q, D), draw(10, H_KV, D, seed=1), draw(10, H_KV, D, seed=2)
    slopes = torch.linspace(0.1, 0.9, 3 * H_Q).view(3, H_Q)
    torch.manual_seed(0)
    out, lse, signed = flash_attn.flash_attn_varlen_func(
        q, k, v, CU_Q, CU_K, 5, 5, 0.4, causal=True, alibi_slopes=slopes, return_attn_probs=True
    )
    assert signed.shape == (3, H_Q, 5, 5) and (signed < 0).any() and lse.shape == (H_Q, 8)
    for n in range(3):
        (i0, i1), (j0, j1) = CU_Q[n : n + 2], CU_K[n : n + 2]
        kept = signed[n, :, : i1 - i0, : j1 - j0].clamp(min=0) * AttentionSpec(1.0, dropout_p=0.4).dropout_scale
        values = v[j0:j1].repeat_interleave(H_Q // H_KV, 1)
        torch.testing.assert_close(torch.einsum("hij,jhd->ihd", kept, values), out[i0:i1])


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window_size": (2, 0), "softcap": 1.5}], ids=str)
def test_packed_queries_read_a_paged_cache(options):
    q, k, v = draw(8, H_Q, D), draw(6, 2, H_KV, D, seed=1), draw(6, 2, H_KV, D, seed=2)
    table = torch.tensor([[4, 0, 2], [1, 1, 1], [3, 5, 1]], dtype=torch.int32)
    lengths = CU_K.diff()
    out, lse, _ = flash_attn.flash_attn_varlen_func(
        q, k, v, CU_Q, CU_K, 5, 5, block_table=table, return_attn_probs=True, **options
    )
    gathered = (torch.cat([x[table[n]].flatten(0, 1)[: lengths[n]] for n in range(3)]) for x in (k, v))
    expected = flash_attn.flash_attn_varlen_func(q, *gathered, CU_Q, CU_K, 5, 5, return_attn_probs=True, **options)
    torch.testing.assert_close((out, lse), expected[:2])


def test_padding_and_back():
    from fastattn.integrations.flash_attn import bert_padding

    x = draw(B, S_Q, H_Q, D).requires_grad_()
    mask = torch.tensor([[0, 1, 1, 0, 1], [1, 1, 0, 0, 0]])
    rows, indices, cu_seqlens, longest, lengths = bert_padding.unpad_input(x, mask)
    torch.testing.assert_close(rows, x[mask.bool()])
    assert (cu_seqlens.tolist(), longest, lengths.tolist()) == (
        [0, 3, 5],
        3,
        [3, 2],
    ) and cu_seqlens.dtype == torch.int32
    padded = bert_padding.pad_input(rows, indices, B, S_Q)
    torch.testing.assert_close(padded, x * mask[:, :, None, None])
    (grad,) = torch.autograd.grad(padded.square().sum(), x)
    torch.testing.assert_close(grad, 2 * x.detach() * mask[:, :, None, None])
    unused = torch.tensor([[1, 0, 0, 0, 0], [0, 0, 1, 0, 0]])
    rows, _, cu_seqlens, longest, lengths = bert_padding.unpad_input(x, mask, unused)
    assert (len(rows), cu_seqlens.tolist(), longest, lengths.tolist()) == (7, [0, 4, 7], 4, [3, 2])
    several = torch.tensor([[2, 1, 0, 0, 0], [4, 0, 0, 0, 0]])
    rows, indices, cu_seqlens, longest = bert_padding.unpad_input_for_concatenated_sequences(x, several)
    torch.testing.assert_close(rows, torch.cat([x[0, :3], x[1, :4]]))
    assert (cu_seqlens.tolist(), longest) == ([0, 2, 3, 7], 4)
    assert bert_padding.index_first_axis_residual(x[0], torch.tensor([1]))[1] is not None


SCRIPT = """
import sys, torch, flash_attn
from flash_attn import flash_attn_func, flash_attn_varlen_kvpacked_func
from flash_attn.bert_padding import pad_input, unpad_input
from flash_attn.flash_attn_interface import flash_attn_with_kvcache
q = torch.randn(1, 4, 2, 8)
print(flash_attn.__version__, flash_attn_func(q, q, q, causal=True).shape, sys.argv[1:])
"""


def test_scripts_find_it_under_the_name_of_the_package(tmp_path):
    script = tmp_path / "third_party.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "fastattn.integrations.flash_attn", str(script), "--flag"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, env=dict(os.environ, PYTHONPATH=ROOT))
    assert printed.stdout.strip() == "2.8.3 torch.Size([1, 4, 2, 8]) ['--flag']"


def test_a_real_installation_is_not_replaced(monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn", types.ModuleType("flash_attn"))
    with pytest.raises(fastattn.UnsupportedError, match="flash-attn itself is installed"):
        flash_attn.install()
