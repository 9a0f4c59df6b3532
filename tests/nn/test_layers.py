"""The layers of newer models against the formulas of their papers in plain torch, and against transformers' code."""

import math

import pytest
import torch
from torch.nn import functional as F

from fastattn import InputError
from fastattn.nn import DifferentialAttention, GatedAttention, KVCache, LatentAttention, PagedKVCache, SelfAttention

B, S, E = 2, 7, 12
CAUSAL = {"window": (None, 0)}
LATENT = {"kv_lora_rank": 6, "qk_nope_head_dim": 4, "qk_rope_head_dim": 2, "v_head_dim": 5}
LAYERS = {
    "self": lambda **o: SelfAttention(
        E, 4, num_kv_heads=2, head_dim=6, rope=True, rotary_dim=4, qk_norm=True, sinks=True, softcap=5.0, **o
    ),
    "gated": lambda **o: GatedAttention(E, 4, num_kv_heads=2, head_dim=6, rope=100.0, qk_norm=True, bias=True, **o),
    "gated by head": lambda **o: GatedAttention(E, 4, gate="head", **o),
    "differential": lambda **o: DifferentialAttention(E, 4, depth=3, num_kv_heads=2, head_dim=8, rope=True, **o),
    "differential, normed": lambda **o: DifferentialAttention(E, 2, qk_norm=True, rope=True, rotary_dim=2, **o),
    "latent": lambda **o: LatentAttention(E, 3, q_lora_rank=5, rope_interleaved=False, **LATENT, **o),
    "latent, queries in one step": lambda **o: LatentAttention(E, 3, bias=True, scale=0.3, **LATENT, **o),
}
WINDOWS = (None, (None, 0), (3, 0), (2, 1))
each_layer = pytest.mark.parametrize("name", LAYERS)


def make(name, **options):
    torch.manual_seed(0)
    layer = LAYERS[name](dtype=torch.float64, **options)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return layer


def tokens():
    return torch.randn(B, S, E, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


# --- the formulas -------------------------------------------------------------------------------------------------


def maps(q, k, layer, scale, masked):
    """Attention weights of ``(B, S, H, D)`` queries and keys with as many heads."""
    scores = scale * torch.einsum("bihd,bjhd->bhij", q, k)
    if layer.softcap:
        scores = layer.softcap * torch.tanh(scores / layer.softcap)
    scores = scores.masked_fill(masked, -math.inf)
    if layer.sinks is None:
        return scores.softmax(-1)
    sinks = layer.sinks[None, :, None, None].expand(*scores.shape[:-1], 1)
    return torch.cat([scores, sinks], -1).softmax(-1)[..., :-1]


def rms(x, norm, eps=1e-6):
    return x if norm is None else x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * norm.weight


def turned(x, base, width, interleaved=False):
    """RoFormer's rotation as multiplication by ``exp(i m theta)``, of the first ``width`` dims of ``(B, S, H, D)``."""
    if base is None:
        return x
    angles = torch.arange(x.shape[1])[:, None] * base ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    a, b = (x[..., 0:width:2], x[..., 1:width:2]) if interleaved else x[..., :width].chunk(2, -1)
    z = torch.complex(a, b) * torch.polar(torch.ones_like(angles), angles)[:, None]
    pairs = torch.stack((z.real, z.imag), -1).flatten(-2) if interleaved else torch.cat((z.real, z.imag), -1)
    return torch.cat((pairs, x[..., width:]), -1)


def formula(layer, x, masked):
    """``layer(x)`` as its paper has it; ``masked`` broadcasts to ``(B, H, S, S)``."""
    of_class = {LatentAttention: latent, DifferentialAttention: differential}
    return layer.o_proj(of_class.get(type(layer), gated)(layer, x, masked).flatten(2))


def gated(layer, x, masked):
    q, k, v = (p(x).unflatten(-1, (-1, layer.head_dim)) for p in (layer.q_proj, layer.k_proj, layer.v_proj))
    q, k = rms(q, layer.q_norm), rms(k, layer.k_norm)
    q, k = (turned(y, layer.rope_base, layer.rotary_dim) for y in (q, k))
    k, v = (y.repeat_interleave(layer.num_heads // layer.num_kv_heads, 2) for y in (k, v))
    out = torch.einsum("bhij,bjhd->bihd", maps(q, k, layer, layer.head_dim**-0.5, masked), v)
    if not isinstance(layer, GatedAttention):
        return out
    return out * (1 / (1 + torch.exp(-layer.gate_proj(x)))).unflatten(-1, (layer.num_heads, -1))


def differential(layer, x, masked):
    """Ye et al. (2024), equations 1 to 3, head by head."""
    d = layer.head_dim // 2
    heads = []
    for h in range(layer.num_heads):
        g = h // (layer.num_heads // layer.num_kv_heads)
        q = layer.q_proj(x)[..., 2 * d * h : 2 * d * (h + 1)]
        k, v = (p(x)[..., 2 * d * g : 2 * d * (g + 1)] for p in (layer.k_proj, layer.v_proj))
        of_head = masked[:, h : h + 1] if masked.shape[1] > 1 else masked
        first, second = (
            maps(
                turned(rms(q[..., half], layer.q_norm)[:, :, None], layer.rope_base, layer.rotary_dim),
                turned(rms(k[..., half], layer.k_norm)[:, :, None], layer.rope_base, layer.rotary_dim),
                layer, d**-0.5, of_head,
            )[:, 0]
            for half in (slice(0, d), slice(d, 2 * d))
        )  # fmt: skip
        init = 0.8 - 0.6 * math.exp(-0.3 * (3 if layer.num_heads == 4 else 0))
        lam = torch.exp(layer.lambda_q1 @ layer.lambda_k1) - torch.exp(layer.lambda_q2 @ layer.lambda_k2) + init
        heads.append((1 - init) * rms((first - lam * second) @ v, layer.subln, 1e-5))
    return torch.stack(heads, 2)


def latent(layer, x, masked):
    """DeepSeek-V2, equations 37 to 47."""
    if layer.q_proj is None:
        q = F.linear(rms(layer.q_a_proj(x), layer.q_a_layernorm), layer.q_b_proj.weight)
    else:
        q = layer.q_proj(x)
    q = q.unflatten(-1, (layer.num_heads, -1))
    down = layer.kv_a_proj_with_mqa(x)
    c, k_rope = rms(down[..., : layer.kv_lora_rank], layer.kv_a_layernorm), down[..., layer.kv_lora_rank :]
    up = layer.kv_b_proj(c).unflatten(-1, (layer.num_heads, -1))
    n, r = layer.nope_dim, layer.rotary_dim
    q_rope, k_rope = (turned(y, layer.rope_base, r, layer.rope_interleaved) for y in (q[..., n:], k_rope[:, :, None]))
    q = torch.cat((q[..., :n], q_rope), -1)
    k = torch.cat((up[..., :n], k_rope.expand(-1, -1, layer.num_heads, -1)), -1)
    scale = 0.3 if layer.q_proj is not None else (n + r) ** -0.5
    return torch.einsum("bhij,bjhd->bihd", maps(q, k, layer, scale, masked), up[..., n:])


def band(window, length=S):
    offset = torch.arange(length)[None] - torch.arange(length)[:, None]
    left, right = window or (None, None)
    return (offset < -(length if left is None else left)) | (offset > (length if right is None else right))


def assert_same(layer, masked, x, *arguments, **options):
    """Output, and the gradients of the tokens and of every parameter."""
    leaves = [x.requires_grad_(), *layer.parameters()]
    results = []
    for out in (layer(x, *arguments, **options), formula(layer, x, masked)):
        loss = (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum()
        results.append((out, *torch.autograd.grad(loss, leaves)))
    torch.testing.assert_close(*results)


@each_layer
@pytest.mark.parametrize("window", WINDOWS)
def test_the_papers_formula_and_its_gradients(name, window):
    layer = make(name, window=window)
    ways = ({}, {"absorb": True}) if name.startswith("latent") else ({},)
    for way in ways:
        assert_same(layer, band(window)[None, None], tokens(), **way)


@each_layer
def test_masks_are_those_of_multi_head_attention(name):
    layer = make(name, **CAUSAL)
    heads, base = layer.num_heads, band((None, 0))[None, None]
    padding = torch.tensor([[False] * S, [False] * (S - 3) + [True] * 3])
    of_head = torch.rand(B * heads, S, S, generator=torch.Generator().manual_seed(2)) < 0.3
    of_head &= ~torch.eye(S, dtype=torch.bool)
    padded = base | padding[:, None, None]
    assert_same(layer, padded, tokens(), padding)
    assert_same(layer, padded, tokens(), torch.where(padding, -math.inf, 0.0).double())
    by_head = base | of_head.unflatten(0, (B, heads))
    for way in ({}, {"absorb": True}) if name.startswith("latent") else ({},):
        assert_same(layer, by_head, tokens(), None, of_head, **way)
    assert_same(layer, base | of_head[0], tokens(), None, of_head[0])


# --- caches -------------------------------------------------------------------------------------------------------


@each_layer
@pytest.mark.parametrize("window", [(None, 0), (3, 0)])
@torch.no_grad()
def test_a_cache_gives_what_the_whole_sequence_gives(name, window):
    layer, x = make(name, window=window).eval(), tokens()
    whole = layer(x)
    ways = ({}, {"absorb": False}, {"absorb": True}) if name.startswith("latent") else ({},)
    for way in ways:
        cache = layer.make_cache(B, S)
        parts = [layer(x[:, begin:end], cache=cache, **way) for begin, end in ((0, 4), (4, 5), (5, S))]
        torch.testing.assert_close(torch.cat(parts, 1), whole)


@each_layer
@torch.no_grad()
def test_pages_give_what_the_whole_sequence_gives(name):
    layer, x = make(name, **CAUSAL).eval(), tokens()
    whole = layer(x)
    pages = PagedKVCache(12, 2, **layer.cache_sizes, dtype=torch.float64)
    one, two = pages.add(), pages.add()
    packed = torch.cat((x[0, :5], x[1, :2]))[None]
    out = layer(packed, cache=pages.step([one, two], [5, 2]).layers[0])[0]
    torch.testing.assert_close(out, torch.cat((whole[0, :5], whole[1, :2])))
    fork = pages.fork(two)  # its last page is full, that of one is copied by a fork of its own
    again = pages.fork(one)
    step = pages.step([one, again, fork], 1)
    out = layer(torch.stack((x[0, 5:6], x[0, 5:6], x[1, 2:3])), cache=step.layers[0])
    torch.testing.assert_close(out, torch.stack((whole[0, 5:6], whole[0, 5:6], whole[1, 2:3])))


@each_layer
@torch.no_grad()
def test_padding_on_the_left_with_a_cache(name):
    """A batch of prompts of 4 and 2 tokens: positions and the mask leave the padding out."""
    layer, x = make(name, **CAUSAL).eval(), tokens()
    prompt = torch.stack((x[0, :4], torch.cat((torch.zeros(2, E, dtype=x.dtype), x[1, :2]))))
    masked = torch.tensor([[False] * 5, [True] * 2 + [False] * 3])
    positions = torch.tensor([[0, 1, 2, 3, 4], [0, 0, 0, 1, 2]])
    cache = layer.make_cache(B, S)
    layer(prompt, masked[:, :4], positions=positions[:, :4], cache=cache)
    last = torch.stack((x[0, 4:5], x[1, 2:3]))
    out = layer(last, masked, positions=positions[:, 4:], cache=cache)
    torch.testing.assert_close(out, torch.stack((layer(x)[0, 4:5], layer(x)[1, 2:3])))


def test_a_latent_cache_holds_one_vector_a_token_and_rows_move_once():
    layer = make("latent")
    cache = layer.make_cache(B, S)
    assert cache.values.data_ptr() == cache.keys.data_ptr() and cache.keys.shape == (B, S, 1, 6 + 2)
    k = torch.randn(B, 3, 1, 8, dtype=torch.float64)
    cache.append(k, k[..., :6])
    cache.select([1, 0])
    assert torch.equal(cache.append(k, k[..., :6])[0][:, :3], k[[1, 0]])


def test_e4m3_caches_with_one_scale():
    scale = torch.full((1,), 0.5)
    cache = KVCache(1, 4, 1, 8, head_dim_v=6, values_in_keys=True, dtype=torch.float8_e4m3fn, k_scale=scale)
    k = torch.arange(8.0).view(1, 1, 1, 8)
    out = cache.attend(k, k, k[..., :6])
    torch.testing.assert_close(out, k[..., :6])


# --- transformers' code -------------------------------------------------------------------------------------------


def test_deepseek_v3_of_transformers():
    """A state_dict of theirs loads as it is; the last rows see all tokens, so no mask is needed there."""
    theirs = pytest.importorskip("transformers.models.deepseek_v3.modeling_deepseek_v3")
    config = theirs.DeepseekV3Config(
        hidden_size=E, num_attention_heads=3, num_key_value_heads=3, q_lora_rank=5, kv_lora_rank=6,
        qk_nope_head_dim=4, qk_rope_head_dim=2, v_head_dim=5, max_position_embeddings=S, attn_implementation="eager",
    )  # fmt: skip
    torch.manual_seed(0)
    their = theirs.DeepseekV3Attention(config, 0).double()
    layer = LatentAttention(E, 3, q_lora_rank=5, **LATENT, dtype=torch.float64)
    layer.load_state_dict(their.state_dict())
    tables = theirs.DeepseekV3RotaryEmbedding(config).double()(tokens(), torch.arange(S)[None])
    torch.testing.assert_close(layer(tokens()), their(tokens(), tables, None)[0], atol=1e-6, rtol=1e-6)


def test_qwen3_next_of_transformers():
    """Theirs has the gate inside q_proj, after each head's query, and norms whose weights are 1 + theirs."""
    theirs = pytest.importorskip("transformers.models.qwen3_next.modeling_qwen3_next")
    config = theirs.Qwen3NextConfig(
        hidden_size=E, num_attention_heads=4, num_key_value_heads=2, head_dim=8, attn_implementation="eager",
        rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25},
    )  # fmt: skip
    torch.manual_seed(0)
    their = theirs.Qwen3NextAttention(config, 0).double()
    layer = GatedAttention(E, 4, num_kv_heads=2, head_dim=8, rope=True, rotary_dim=2, qk_norm=True, dtype=torch.float64)
    state = their.state_dict()
    q, gate = state.pop("q_proj.weight").view(4, 2, 8, E).unbind(1)
    state |= {"q_proj.weight": q.reshape(-1, E), "gate_proj.weight": gate.reshape(-1, E)}
    state |= {name: 1 + state[name] for name in ("q_norm.weight", "k_norm.weight")}
    layer.load_state_dict(state)
    tables = theirs.Qwen3NextRotaryEmbedding(config).double()(tokens(), torch.arange(S)[None])
    torch.testing.assert_close(layer(tokens()), their(tokens(), tables, None)[0], atol=1e-6, rtol=1e-6)


# --- options and errors -------------------------------------------------------------------------------------------


def test_dropout_drops_in_training_alone():
    layer = make("differential", dropout=0.5)
    assert not torch.equal(layer(tokens()), layer(tokens()))
    layer.eval()
    torch.testing.assert_close(layer(tokens()), formula(layer, tokens(), band(None)[None, None]))


REFUSED = {
    "gate": (lambda: GatedAttention(E, 4, gate="row"), "gate: got 'row'"),
    "head_dim": (lambda: DifferentialAttention(E, 4, head_dim=3), "an even number"),
    "depth": (lambda: DifferentialAttention(E, 3, depth=-1), "depth"),
    "rotary_dim": (lambda: SelfAttention(E, 4, rope=True, rotary_dim=4), "at most 3"),
    "odd rotary_dim": (lambda: SelfAttention(E, 4, rope=True), "an even number"),
    "kv heads": (lambda: SelfAttention(E, 4, num_kv_heads=3), "num_kv_heads"),
    "rank": (lambda: LatentAttention(E, 4, kv_lora_rank=0), "kv_lora_rank"),
    "backend": (lambda: LatentAttention(E, 4, kv_lora_rank=2, backend="none such"), "backend"),
    "tokens": (lambda: SelfAttention(E, 4)(torch.zeros(2, 3, E + 1)), "batch first"),
    "positions": (lambda: SelfAttention(E, 4)(torch.zeros(2, 3, E), positions=torch.zeros(4)), "positions"),
    "mask": (lambda: SelfAttention(E, 4)(torch.zeros(2, 3, E), torch.zeros(2, 4).bool()), "key_padding_mask"),
    "wide values": (lambda: KVCache(1, 2, 1, 4, head_dim_v=5, values_in_keys=True), "beginning of its key"),
    "two scales": (lambda: KVCache(1, 2, 1, 4, values_in_keys=True, v_scale=torch.ones(1)), "v_scale"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(case):
    call, text = REFUSED[case]
    with pytest.raises(InputError, match=text):
        call()


@torch.no_grad()
def test_masks_and_expansion_need_a_cache_of_rows():
    layer = make("latent").eval()
    pages = PagedKVCache(4, 2, **layer.cache_sizes, dtype=torch.float64)
    step = pages.step([pages.add()], 3).layers[0]
    with pytest.raises(InputError, match="absorb=False"):
        layer(tokens()[:1, :3], cache=step, absorb=False)
    with pytest.raises(InputError, match="tokens"):
        layer(tokens()[:1, :2], cache=step)
