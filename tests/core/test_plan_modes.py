"""Whatever modes of torch earlier calls ran in, a call gives what it would give as the first one, at every door."""

import contextlib
import itertools

import pytest
import torch
import torch.nn.functional as F

import fastattn
from fastattn import InputError, state
from fastattn.integrations import flash_attn
from fastattn.integrations.torch import override_sdpa
from fastattn.nn import PagedKVCache, SelfAttention, replace_attention

ENDS = torch.tensor([0, 3, 7], dtype=torch.int32)
TREE = torch.tensor([[1, 0, 0], [1, 1, 0], [1, 0, 1]], dtype=torch.bool)


@contextlib.contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


# Each with the leaves that require a gradient in it: all, none, or the last.
MODES = {
    "gradients": (contextlib.nullcontext, "all"),
    "no_grad": (torch.no_grad, "all"),
    "inference_mode": (torch.inference_mode, "all"),
    "no leaves": (contextlib.nullcontext, "none"),
    "the last leaf": (contextlib.nullcontext, "last"),
    "autocast": (lambda: torch.autocast("cpu", torch.bfloat16), "all"),
    "deterministic": (deterministic, "all"),
}


def draw(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


class Door:
    """A public way into attention: leaves, and a function of them."""

    def __init__(self, shapes, call):
        self.leaves, self.call = [draw(*shape) for shape in shapes], call

    def outcome(self, mode):
        """In a mode: results and gradients, and which results and leaves have some; or the error."""
        context, wanted = MODES[mode]
        for n, leaf in enumerate(self.leaves):
            leaf.requires_grad_(wanted == "all" or (wanted == "last" and n == len(self.leaves) - 1))
            leaf.grad = None
        try:
            with context():
                results = self.call(*self.leaves)
        except InputError as error:
            return [], str(error)
        results = [x for x in (results if isinstance(results, tuple) else (results,)) if x is not None]
        tracked = [x for x in results if x.requires_grad]
        if tracked:
            with deterministic() if mode == "deterministic" else contextlib.nullcontext():
                sum(x.float().square().sum() for x in tracked).backward()
        grads = [x.grad for x in self.leaves]
        present = [x.requires_grad for x in results], [x is not None for x in grads]
        return [*(x.detach().clone() for x in results), *grads], present


def of_module(module, call):
    """A door whose leaves are the parameters of a module, those of its last projection last."""
    door = Door((), lambda *_: call(module))
    door.leaves = [x.requires_grad_() for x in module.parameters()]
    return door


def cache_door(call, **changes):
    """A step of decoding: the cache is a new one each time."""

    def step(q, k, v):
        pages = changes.get("block_table") is not None
        keys = draw(6, 8, 2, 16) if pages else draw(2, 24, 2, 16)
        lengths = torch.tensor([9, 3], dtype=torch.int32)
        return (*call(q, keys, keys + 1, lengths, k, v, **changes), keys)

    tokens = 3 if "tree_mask" in changes else 1
    return Door(((2, tokens, 4, 16), *((2, tokens, 2, 16),) * 2), step)


def flash_step(q, k_cache, v_cache, lengths, k, v, **options):
    return flash_attn.flash_attn_with_kvcache(
        q, k_cache, v_cache, k, v, cache_seqlens=lengths, causal=True, return_softmax_lse=True, **options
    )


def fastattn_step(*args, **options):
    return fastattn.attention_with_kv_cache(*args, return_lse=True, **options)


def mha(**options):
    torch.manual_seed(0)
    module = fastattn.MultiHeadAttention(16, 2, batch_first=True)
    return of_module(module, lambda module: module(*(draw(2, 5, 16),) * 3, **options))


def encoder():
    torch.manual_seed(0)
    model = torch.nn.TransformerEncoder(torch.nn.TransformerEncoderLayer(16, 2, 16, 0.0, batch_first=True), 2)
    replace_attention(model)
    padding = torch.arange(5) >= torch.tensor([[5], [3]])
    kept = ~padding[..., None]
    return of_module(model, lambda model: model(draw(2, 5, 16), src_key_padding_mask=padding) * kept)


def swapped(q, k, v):
    with override_sdpa(quiet=True):
        return F.scaled_dot_product_attention(q, k, v)


def decoding_layer(make_cache):
    torch.manual_seed(0)
    layer = SelfAttention(16, 2, window=(None, 0), rope=True)
    return of_module(layer, lambda layer: layer(draw(2, 3, 16), cache=make_cache(layer)))


def pages_of(layer):
    cache = PagedKVCache(num_pages=8, page_size=4, **layer.cache_sizes)
    return cache.step([cache.add(), cache.add()], 3).layers[0]


def llama():
    transformers = pytest.importorskip("transformers")
    from fastattn.integrations import transformers as integration

    integration.register()
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=11, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=16, attn_implementation="fastattn",
    )  # fmt: skip
    model, tokens = transformers.LlamaForCausalLM(config), torch.arange(10).view(2, 5)
    return of_module(model, lambda model: model(tokens, use_cache=False).logits)


ROWS, HEADS_FIRST, PACKED = (2, 5, 2, 16), (2, 2, 5, 16), (7, 2, 16)
PAGES = {"block_table": torch.tensor([[5, 0, 3], [1, 2, 4]], dtype=torch.int32)}
DOORS = {
    "attention": lambda: Door((ROWS,) * 3, lambda q, k, v: fastattn.attention(q, k, v, causal=True, return_lse=True)),
    "heads first": lambda: Door((HEADS_FIRST,) * 3, lambda *qkv: fastattn.attention(*qkv, layout="BHSD")),
    "bias": lambda: Door((ROWS,) * 3 + ((5, 5),), lambda *x: fastattn.attention(*x[:3], bias=x[3])),
    "sinks": lambda: Door((ROWS,) * 3 + ((2,),), lambda *x: fastattn.attention(*x[:3], sinks=x[3])),
    "packed": lambda: Door(
        (PACKED,) * 3, lambda *x: fastattn.attention_varlen(*x, ENDS, ENDS, max_seqlen_q=4, max_seqlen_kv=4)
    ),
    "sdpa": lambda: Door((HEADS_FIRST,) * 3, lambda *x: fastattn.scaled_dot_product_attention(*x, is_causal=True)),
    "sdpa with a mask": lambda: Door(
        (HEADS_FIRST,) * 3, lambda *x: fastattn.scaled_dot_product_attention(*x, draw(5, 5) > -1)
    ),
    "override_sdpa": lambda: Door((HEADS_FIRST,) * 3, swapped),
    "MultiHeadAttention": lambda: mha(need_weights=False),
    "MultiHeadAttention with weights": mha,
    "encoder": encoder,
    "fp8": lambda: Door((ROWS,) * 3, lambda *x: fastattn.attention_fp8(*x, return_lse=True)),
    "flash_attn": lambda: Door((ROWS,) * 3, lambda *x: flash_attn.flash_attn_func(*x, causal=True)),
    "flash_attn, qkv": lambda: Door(((2, 5, 3, 2, 16),), flash_attn.flash_attn_qkvpacked_func),
    "flash_attn, varlen": lambda: Door(
        (PACKED,) * 3, lambda *x: flash_attn.flash_attn_varlen_func(*x, ENDS, ENDS, 4, 4)
    ),
    "flash_attn, cache": lambda: cache_door(flash_step),
    "cache": lambda: cache_door(fastattn_step),
    "pages": lambda: cache_door(fastattn_step, **PAGES),
    "tree": lambda: cache_door(fastattn_step, tree_mask=TREE),
    "tree on pages": lambda: cache_door(fastattn_step, tree_mask=TREE, **PAGES),
    "KVCache": lambda: decoding_layer(lambda layer: layer.make_cache(2, 8)),
    "PagedKVCache": lambda: decoding_layer(pages_of),
    "transformers": llama,
}


@pytest.mark.filterwarnings("ignore:attention_fp8")
@pytest.mark.parametrize("name", DOORS)
def test_every_mode_after_every_other(name):
    """Three calls in each: the first makes a plan, the second finds it, the third is recognised by torch's check."""
    door, expected = DOORS[name](), {}
    for mode in MODES:
        with fastattn.use_backend("eager"):  # which has no plans
            _, present = door.outcome(mode)
        state.forget()
        expected[mode] = door.outcome(mode)
        assert expected[mode][1] == present, mode
    for pair in itertools.permutations(MODES, 2):
        state.forget()
        for mode in (pair[0],) * 3 + (pair[1],) * 3:
            found = door.outcome(mode)
            assert found[1] == expected[mode][1], (pair, mode)
            torch.testing.assert_close(found[0], expected[mode][0], rtol=0, atol=0)
