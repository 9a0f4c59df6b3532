"""``MultiHeadAttention`` as a torch module: errors, compilation, saving, moving."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import fastattn
from fastattn import InputError, MultiHeadAttention

E, H, N, S = 16, 4, 2, 6
EVERYTHING = {"num_kv_heads": 2, "window": (4, 1), "softcap": 5.0, "rope": True, "qk_norm": True, "sinks": True}


def build(**options):
    return MultiHeadAttention(E, H, batch_first=True, **options)


def tokens(*shape, **options):
    return torch.randn(*(shape or (N, S, E)), **options)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((0, 1), {}, "embed_dim: got 0; allowed: a positive int"),
        ((E, 0), {}, "num_heads: got 0; allowed: a positive int"),
        ((E, 3), {}, "num_heads: got 3 for embed_dim 16; allowed: a divisor"),
        ((E, H), {"num_kv_heads": 3}, "num_kv_heads: got 3 for num_heads 4; allowed: a divisor of num_heads"),
        ((E, H), {"num_kv_heads": 8}, "num_kv_heads: got 8 for num_heads 4"),
        ((E, H), {"num_kv_heads": 0}, "num_kv_heads: got 0; allowed: a positive int"),
        ((E, H, 1.5), {}, r"dropout: got 1.5; allowed: a probability in \[0, 1\]"),
        ((E, H), {"window": (-2, 0)}, "window: got -2; allowed: ints >= 0, and None or -1"),
        ((E, H), {"window": 128}, r"window: got 128; allowed: \(left, right\).*pass \(W - 1, 0\)"),
        ((E, H), {"window": (3, 0), "add_bias_kv": True}, "window: got .* with add_bias_kv or add_zero_attn"),
        ((E, H), {"window": (3, 0), "add_zero_attn": True}, "window: got .* with add_bias_kv or add_zero_attn"),
        ((E, H), {"softcap": -1.0}, "softcap: got -1.0; allowed: a positive finite number"),
        ((E, H), {"rope": -3.0}, "base: got -3.0; allowed: a positive finite number"),
        ((12, 4), {"rope": True}, "head_dim: got 3; allowed: an even number"),
        ((E, H), {"rope": True, "kdim": 8}, "rope: got True with kdim=8; allowed: kdim=None or 16"),
        ((E, H), {"backend": "fast"}, "backend: got 'fast'; allowed: None, "),
    ],
)
def test_construction_errors(arguments, options, message):
    with pytest.raises(InputError, match=message):
        MultiHeadAttention(*arguments, **options)


X = torch.zeros(N, S, E)


@pytest.mark.parametrize(
    ("inputs", "options", "message"),
    [
        ((X[None],) * 3, {}, r"query: got shape \(1, 2, 6, 16\); allowed: \(N, S, 16\), or \(S, 16\)"),
        ((X[0, 0],) * 3, {}, r"query: got shape \(16,\)"),
        ((X, X[0], X[0]), {}, r"key: got shape \(6, 16\)"),
        ((X[0], X, X), {}, r"key: got shape \(2, 6, 16\)"),
        ((X[..., :8], X, X), {}, r"query: got shape \(2, 6, 8\); allowed: \(N, S, 16\)"),
        ((X, X[..., :8], X), {}, r"key: got shape \(2, 6, 8\)"),
        ((X, X, X[:, 1:]), {}, r"value: got shape \(2, 5, 16\); allowed: \(2, 6\) before the last dimension"),
        ((X, X[:1], X[:1]), {}, "key: got batch 1; allowed: batch 2, that of query"),
        ((X.double(), X, X), {}, "query: got torch.float64 on cpu; allowed: torch.float32 on cpu, as the parameters"),
        ((X.long(), X, X), {}, "query: got torch.int64"),
        ((X, X.to("meta"), X), {}, "key: got torch.float32 on meta"),
        ((X,) * 3, {"is_causal": True}, "is_causal: got True without attn_mask; .*window=\\(None, 0\\)"),
        ((X,) * 3, {"attn_mask": torch.zeros(S, S, dtype=torch.uint8)}, "attn_mask: got torch.uint8"),
        ((X,) * 3, {"key_padding_mask": torch.zeros(N, S).long()}, "key_padding_mask: got torch.int64"),
        ((X,) * 3, {"attn_mask": torch.zeros(N, S, S)}, r"attn_mask: .*allowed: \(6, 6\) or \(8, 6, 6\)"),
        ((X,) * 3, {"attn_mask": torch.zeros(S, S - 1)}, r"attn_mask: got shape \(6, 5\)"),
        ((X,) * 3, {"attn_mask": torch.zeros(N, H, S, S)}, r"attn_mask: got shape \(2, 4, 6, 6\)"),
        ((X,) * 3, {"key_padding_mask": torch.zeros(S, N)}, r"key_padding_mask: got shape \(6, 2\); allowed: \(2, 6\)"),
        ((X[0],) * 3, {"key_padding_mask": torch.zeros(1, S)}, r"key_padding_mask: got .* allowed: \(6,\)"),
        ((X[0],) * 3, {"attn_mask": torch.zeros(N * H, S, S)}, r"attn_mask: got shape \(8, 6, 6\); .* \(4, 6, 6\)"),
    ],
)  # fmt: skip
def test_call_errors_where_torch_raises_too(inputs, options, message):
    torchs = nn.MultiheadAttention(E, H, batch_first=True)
    if "on meta" not in message:  # torch lets a single meta tensor through
        with pytest.raises((RuntimeError, AssertionError, IndexError, ValueError)):
            torchs(*inputs, **options)
    for need_weights in (True, False):
        with pytest.raises(InputError, match=message):
            build()(*inputs, need_weights=need_weights, **options)


@pytest.mark.parametrize("places", [(0, 1, 1), (0, 0, 1), (0, 1, 2)])
def test_the_gradient_of_the_packed_projection_is_one_copy(places):
    inputs = [tokens() for _ in range(3)]
    out, _ = build()(*(inputs[n] for n in places), need_weights=False)
    names, seen = [], [out.grad_fn]
    while seen:
        node = seen.pop()
        names.append(node.name())
        seen += [following for following, _ in node.next_functions if following is not None]
    assert any("Split" in name for name in names)
    assert not any("Slice" in name or "Narrow" in name for name in names), "each makes a gradient as large as the whole"


def test_what_is_no_tensor_is_named():
    with pytest.raises(InputError, match="key: got ndarray; allowed: a torch"):
        build()(tokens(), tokens().numpy(), tokens())


def test_rope_refuses_sequences_of_another_length_and_asks_for_no_object():
    """FSDP2's mixed precision casts query, key and value one by one: they are three tensors of one sequence."""
    module = build(rope=True)
    with pytest.raises(InputError, match=r"key: got shape \(2, 7, 16\), with rope on"):
        module(tokens(), tokens(N, S + 1, E), tokens(N, S + 1, E))
    x = tokens()
    torch.testing.assert_close(module(x, x.clone(), x.clone())[0], module(x, x, x)[0])


@pytest.mark.parametrize(
    "options", [{}, EVERYTHING, {"add_bias_kv": True, "kdim": 8}], ids=["plain", "everything", "kdim"]
)
@pytest.mark.parametrize("need_weights", [True, False])
def test_compiles_as_one_graph(options, need_weights):
    module = build(**options)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    x = tokens(requires_grad=True)
    key = torch.randn(N, S, options["kdim"]) if "kdim" in options else x
    arguments = {
        "key_padding_mask": torch.arange(S)[None] >= torch.tensor([[S], [S - 2]]),
        "attn_mask": torch.zeros(S, S).masked_fill(torch.ones(S, S, dtype=torch.bool).triu(1), float("-inf")),
        "need_weights": need_weights,
    }
    found = []
    for m in (module, compiled):
        out, weights = m(x, key, x, **arguments)
        found.append((out, weights, torch.autograd.grad(out.square().sum(), [x, *module.parameters()])))
    torch.testing.assert_close(*found)


def test_compiles_with_dynamic_shapes_and_in_inference():
    module = build(window=(None, 0), rope=True, num_kv_heads=2).eval()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch.no_grad():
        for length in (5, 9, 12):
            x = tokens(3, length, E)
            torch.testing.assert_close(compiled(x, x, x, need_weights=False), module(x, x, x, need_weights=False))


def test_functional_call_and_per_sample_gradients():
    module = build(**EVERYTHING)
    x = tokens()
    parameters = dict(module.named_parameters())

    def loss(parameters, sample):
        return torch.func.functional_call(module, parameters, (sample, sample, sample), {"need_weights": False})[
            0
        ].sum()

    by_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    for n in range(N):
        expected = torch.autograd.grad(loss(parameters, x[n]), parameters.values())
        torch.testing.assert_close(
            {k: g[n] for k, g in by_sample.items()}, dict(zip(parameters, expected, strict=True))
        )


def _pickled(module):
    return pickle.loads(pickle.dumps(module))


def _saved(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy, _pickled, _saved])
def test_copies_compute_the_same(copied):
    module = build(**EVERYTHING).eval()
    x = tokens()
    other = copied(module)
    torch.testing.assert_close(other(x, x, x), module(x, x, x), rtol=0, atol=0)
    assert other._qkv_same_embed_dim is True and other.window == (4, 1)


def test_deepcopies_are_independent():
    module = build()
    other = copy.deepcopy(module)
    with torch.no_grad():
        other.in_proj_weight.zero_()
    assert not torch.equal(module.in_proj_weight, other.in_proj_weight)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_to_dtype(dtype):
    module = build(**EVERYTHING).to(dtype)
    x = tokens().to(dtype)
    out, weights = module(x, x, x)
    assert out.dtype == weights.dtype == dtype and all(p.dtype == dtype for p in module.parameters())


def test_autocast_with_every_option():
    module = build(**EVERYTHING)
    x = tokens()
    exact = module(x, x, x, need_weights=False)[0]
    with torch.autocast("cpu", torch.bfloat16):
        out = module(x, x, x, need_weights=False)[0]
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), exact, rtol=0, atol=0.05)


def test_meta_device_and_materialising_it():
    module = build(device="meta", **EVERYTHING)
    assert {p.device.type for p in module.parameters()} == {"meta"}
    x = tokens(device="meta")
    for need_weights in (True, False):
        assert module(x, x, x, need_weights=need_weights)[0].shape == (N, S, E)
    real = build(**EVERYTHING)
    module.to_empty(device="cpu").load_state_dict(real.state_dict())
    x = tokens()
    torch.testing.assert_close(module(x, x, x), real(x, x, x))


def test_weights_do_not_change_the_output():
    """``attention`` computes them beside the output, which stays on the fused path and in its precision."""
    q, k = tokens(N, S, H, 8), tokens(N, S, 2, 8)
    bias = tokens(1, H, S, S)
    out, lse, weights = fastattn.attention(q, k, k, causal=True, bias=bias, return_lse=True, return_weights=True)
    torch.testing.assert_close(out, fastattn.attention(q, k, k, causal=True, bias=bias), rtol=0, atol=0)
    assert weights.shape == (N, H, S, S) and weights.dtype == lse.dtype == torch.float32
    torch.testing.assert_close(torch.einsum("nhij,njhd->nihd", weights, k.repeat_interleave(2, 2)), out)


def test_per_head_weights_average_to_the_mean_and_share_the_dropout_of_the_output():
    module = build(dropout=0.5, qk_norm=True).train()
    x = tokens()
    results = []
    for average in (True, False):
        torch.manual_seed(0)
        results.append(module(x, x, x, average_attn_weights=average))
    torch.testing.assert_close(results[0][1], results[1][1].mean(1))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=0, atol=0)
    assert (results[1][1] == 0).any()
