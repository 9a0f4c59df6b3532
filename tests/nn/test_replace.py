"""``replace_attention``, and ``MultiHeadAttention`` inside torch's transformer layers."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune

from fastattn import InputError, MultiHeadAttention, replace_attention

E, H, N, S, T = 16, 2, 3, 6, 4


def quiet(build, *args, **kwargs):
    """Build without torch's remarks on its own fast path."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return build(*args, **kwargs).double()


def transformer(batch_first=True, norm_first=False, dropout=0.0):
    return quiet(nn.Transformer, E, H, 2, 2, 32, dropout=dropout, batch_first=batch_first, norm_first=norm_first)


def arguments(batch_first=True):
    """src, tgt and masks as a translation model passes them: boolean padding at the end, a causal float mask."""
    src, tgt = torch.randn(N, S, E).double(), torch.randn(N, T, E).double()
    padding = torch.arange(S)[None] >= torch.tensor([[S], [S - 2], [1]])
    tgt_padding = torch.arange(T)[None] >= torch.tensor([[T], [T - 1], [2]])
    masks = {
        "tgt_mask": nn.Transformer.generate_square_subsequent_mask(T, dtype=torch.float64),
        "src_key_padding_mask": padding,
        "memory_key_padding_mask": padding,
        "tgt_key_padding_mask": tgt_padding.double().masked_fill(tgt_padding, float("-inf")),
    }
    return ((src, tgt) if batch_first else (src.transpose(0, 1), tgt.transpose(0, 1))), masks


def count_calls(model):
    calls = []
    for name, module in model.named_modules():
        if isinstance(module, MultiHeadAttention):
            forward = module.forward
            module.forward = lambda *a, name=name, forward=forward, **k: (calls.append(name), forward(*a, **k))[1]
    return calls


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_transformer_gives_the_same_outputs_and_gradients(batch_first, norm_first, training):
    theirs = transformer(batch_first, norm_first).train(training)
    ours = copy.deepcopy(theirs)
    names = replace_attention(ours)
    assert len(names) == 6
    inputs, masks = arguments(batch_first)
    calls = count_calls(ours)
    out, expected = ours(*inputs, **masks), theirs(*inputs, **masks)
    assert sorted(calls) == sorted(names)
    torch.testing.assert_close(out, expected)
    grads = torch.autograd.grad(out.square().sum(), ours.parameters())
    torch.testing.assert_close(grads, torch.autograd.grad(expected.square().sum(), theirs.parameters()))


@pytest.mark.parametrize(
    "masked", [(), ("src_key_padding_mask",), ("mask",), ("src_key_padding_mask", "mask")], ids=str
)
def test_encoder_in_inference_does_not_bypass_it(masked):
    """Without the replacement torch would nest the padded input and call a fused operator of its own."""
    encoder = transformer().encoder.eval()
    ours = copy.deepcopy(encoder)
    src = arguments()[0][0]
    padding = arguments()[1]["src_key_padding_mask"]
    masks = {"src_key_padding_mask": padding, "mask": torch.ones(S, S, dtype=torch.bool).triu(1)}
    masks = {name: masks[name] for name in masked}
    replace_attention(ours)
    calls = count_calls(ours)
    with torch.no_grad():
        out, expected = ours(src, **masks), encoder(src, **masks)
    assert len(calls) == 2
    attended = ~padding if masked == ("src_key_padding_mask",) else torch.ones_like(padding)  # torch zeroes the rest
    torch.testing.assert_close(out[attended], expected[attended])


def test_layers_built_with_it_need_no_replacement():
    layer = quiet(nn.TransformerEncoderLayer, E, H, 32, dropout=0.0, batch_first=True)
    layer.self_attn = MultiHeadAttention(E, H, batch_first=True, window=(None, 0), rope=True, dtype=torch.float64)
    encoder = quiet(nn.TransformerEncoder, layer, 2).eval()
    src, padding = arguments()[0][0], arguments()[1]["src_key_padding_mask"]
    calls = count_calls(encoder)
    with torch.no_grad():
        out = encoder(src, src_key_padding_mask=padding)
        changed = encoder(torch.cat([src[:, :-1], -src[:, -1:]], 1), src_key_padding_mask=padding)
    assert len(calls) == 4
    torch.testing.assert_close(out[:, :-1], changed[:, :-1])  # causal: the last token changes no other
    assert not torch.allclose(out[0, -1], changed[0, -1])


def test_names_are_those_of_named_modules():
    model = transformer()
    expected = [name for name, m in model.named_modules() if type(m) is nn.MultiheadAttention]
    assert replace_attention(model) == expected
    assert all(type(model.get_submodule(name)) is MultiHeadAttention for name in expected)
    assert not any(type(m) is nn.MultiheadAttention for m in model.modules())
    assert replace_attention(model) == []


def test_parameters_are_shared_so_the_optimizer_still_steps():
    model = transformer()
    before = dict(model.named_parameters())
    state = {name: x.clone() for name, x in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    replace_attention(model)
    assert all(p is before[name] for name, p in model.named_parameters())
    assert list(model.state_dict()) == list(state)
    inputs, masks = arguments()
    model(*inputs, **masks).square().sum().backward()
    optimizer.step()
    assert not torch.equal(
        model.encoder.layers[0].self_attn.in_proj_weight, state["encoder.layers.0.self_attn.in_proj_weight"]
    )


class Shared(nn.Module):
    """One attention module in three places, one of them inside a module that itself stands in two."""

    def __init__(self):
        super().__init__()
        self.first = nn.MultiheadAttention(E, H)
        self.second = self.first
        self.block = nn.ModuleDict({"attention": self.first})
        self.again = self.block
        self.other = nn.Sequential(nn.MultiheadAttention(E, H))


def test_shared_modules_stay_shared():
    model = Shared()
    assert replace_attention(model) == ["first", "other.0"]
    new = model.first
    assert type(new) is MultiHeadAttention and new is not model.other[0]
    assert new is model.second is model.block["attention"] is model.again["attention"]


def test_hooks_mode_and_options_move_along():
    model = nn.ModuleDict({"a": nn.MultiheadAttention(E, H, 0.3, add_bias_kv=True, add_zero_attn=True, kdim=6, vdim=4,
                                                      batch_first=True, bias=False, dtype=torch.float64)})  # fmt: skip
    old = model["a"]
    old.eval()
    seen = []
    handle = old.register_forward_hook(lambda *_: seen.append("hook"))
    old.in_proj_comment = "an attribute of the user's"
    torch.manual_seed(0)
    random = torch.rand(())
    torch.manual_seed(0)
    replace_attention(model, backend="eager")
    assert torch.rand(()) == random, "replacing consumed random numbers"
    new = model["a"]
    assert not new.training and new.backend == "eager" and new.dropout == 0.3
    assert new.in_proj_comment == "an attribute of the user's" and new.out_proj is old.out_proj
    inputs = [torch.randn(N, S, width).double() for width in (E, 6, 4)]
    torch.testing.assert_close(new(*inputs), old(*inputs))
    assert seen == ["hook"] * 2
    del old
    handle.remove()
    new(*inputs)
    assert seen == ["hook"] * 2


class Subclass(nn.MultiheadAttention):
    """Somebody's own attention."""


def test_subclasses_are_left_alone():
    model = nn.ModuleList([Subclass(E, H), nn.MultiheadAttention(E, H), MultiHeadAttention(E, H, sinks=True)])
    kept = [model[0], model[2]]
    with pytest.warns(UserWarning, match="left 0 alone"):
        assert replace_attention(model) == ["1"]
    assert [model[0], model[2]] == kept


class Halved(nn.Module):
    def forward(self, weight):
        return weight * 0.5


def tweaked():
    """One layer with parametrizations and one pruned."""
    torch.manual_seed(0)
    model = nn.ModuleList([nn.MultiheadAttention(E, H, batch_first=True, dtype=torch.float64) for _ in range(2)])
    nn.init.normal_(model[0].in_proj_bias)
    parametrize.register_parametrization(model[0], "in_proj_bias", Halved())
    parametrize.register_parametrization(model[0], "in_proj_weight", Halved())
    prune.l1_unstructured(model[1], "in_proj_weight", 0.5)
    prune.l1_unstructured(model[1].out_proj, "weight", 0.5)
    return model


def test_parametrized_and_pruned_layers_are_replaced():
    model, theirs = tweaked(), tweaked()
    keys = list(model.state_dict())
    assert replace_attention(model) == ["0", "1"] and list(model.state_dict()) == keys
    x = torch.randn(N, S, E).double()
    for new, old in zip(model, theirs, strict=True):
        assert isinstance(new, MultiHeadAttention)
        out, expected = (m(x, x, x, need_weights=False)[0] for m in (new, old))
        torch.testing.assert_close(out, expected)
        grads = [torch.autograd.grad(y.square().sum(), list(m.parameters())) for m, y in ((new, out), (old, expected))]
        torch.testing.assert_close(*grads)
    parametrize.remove_parametrizations(model[0], "in_proj_bias")
    torch.testing.assert_close(model[0](x, x, x, need_weights=False), theirs[0](x, x, x, need_weights=False))


@pytest.mark.parametrize("targets", [["self_attn"], ["linear1", "out_proj"]], ids=str)
def test_peft_adapts_replaced_layers(targets):
    """torch itself bypasses adapters: of ``out_proj`` always, of the whole layer in inference."""
    peft = pytest.importorskip("peft", reason="peft is not installed: pip install 'fastattn[lora]'")
    encoder = transformer().encoder
    x = torch.randn(N, S, E).double()
    before = encoder(x)
    assert replace_attention(encoder)
    adapted = peft.get_peft_model(encoder, peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False))
    adapted.double()
    out = adapted(x)
    out.square().sum().backward()
    assert all(p.grad.abs().max() > 0 for p in adapted.parameters() if p.requires_grad)
    assert not torch.allclose(out, before)
    torch.testing.assert_close(adapted.eval()(x), out)
    torch.testing.assert_close(adapted.merge_and_unload()(x), out)


def test_errors():
    with pytest.raises(
        InputError, match=r"model: got a nn\.MultiheadAttention itself; .*Pass the module that holds it"
    ):
        replace_attention(nn.MultiheadAttention(E, H))
    with pytest.raises(InputError, match="model: got str; allowed: a torch"):
        replace_attention("model")
    model = transformer()
    with pytest.raises(InputError, match="backend: got 'fast'; allowed: None, "):
        replace_attention(model, backend="fast")
    assert type(model.encoder.layers[0].self_attn) is nn.MultiheadAttention
