"""Opacus: gradients of each sample of ``MultiHeadAttention`` by hooks."""

import copy

import pytest
import torch
from torch import nn

from fastattn import InputError, MultiHeadAttention, replace_attention
from fastattn.nn import GatedAttention

pytest.importorskip("opacus", reason="opacus is not installed: pip install opacus")

from opacus import GradSampleModule

from fastattn.integrations.opacus import prepare

E, H, N, S = 16, 4, 3, 6
PADDING = torch.arange(S)[None] >= torch.tensor([[S], [S - 2], [1]])
OPTIONS = {
    "plain": {}, "no bias": {"bias": False}, "dropout of 0": {"dropout": 0.0},
    "everything": {"num_kv_heads": 2, "rope": True, "window": (2, 0), "softcap": 5.0, "qk_norm": True},
}  # fmt: skip


class Twice(nn.Module):
    """Self-attention with padding, then to other tokens, by one layer."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x, y, padding):
        x = self.layer(x, x, x, key_padding_mask=padding)[0]
        return self.layer(x, y, y, need_weights=False)[0]


def assert_samples_are_those_alone(model, plain, inputs):
    """Each ``grad_sample`` is the gradient of that sample alone."""
    for parameter in model.parameters():
        parameter.grad_sample = None
    GradSampleModule(model, loss_reduction="sum")(*inputs).square().sum().backward()
    parameters = model.state_dict(keep_vars=True)
    for n in range(N):
        loss = plain(*(x[n : n + 1] for x in inputs)).square().sum()
        for name, parameter in plain.named_parameters():
            (alone,) = torch.autograd.grad(loss, parameter, retain_graph=True)
            torch.testing.assert_close(parameters[name].grad_sample[n], alone)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.filterwarnings("ignore:Full backward hook")
def test_the_gradient_of_each_sample(options):
    plain = Twice(MultiHeadAttention(E, H, batch_first=True, dtype=torch.float64, **options))
    model = copy.deepcopy(plain)
    assert prepare(model) == ["layer"]
    inputs = (torch.randn(N, S, E).double(), torch.randn(N, S, E).double(), PADDING)
    torch.testing.assert_close(model(*inputs), plain(*inputs))
    assert_samples_are_those_alone(model, plain, inputs)


@pytest.mark.filterwarnings("ignore:Full backward hook")
def test_an_encoder_and_layers_of_linear_ones():
    encoder = nn.TransformerEncoderLayer(E, H, 32, dropout=0.0, batch_first=True, dtype=torch.float64)
    replace_attention(encoder)
    for plain in (encoder, GatedAttention(E, H, qk_norm=True).double()):
        model = copy.deepcopy(plain)
        prepare(model)
        assert_samples_are_those_alone(model, plain, (torch.randn(N, S, E).double(),))


def test_state_dicts_and_what_is_refused():
    plain = nn.ModuleDict({"a": MultiHeadAttention(E, H)})
    model = copy.deepcopy(plain)
    weight = model["a"].in_proj_weight
    prepare(model)
    assert model["a"].in_proj_weight is weight and prepare(model) == []
    assert sorted(model.state_dict()) == sorted(plain.state_dict())
    nn.init.ones_(weight)
    model.load_state_dict(plain.state_dict())
    assert torch.equal(weight, plain["a"].in_proj_weight)
    for options, named in (
        ({"add_bias_kv": True}, "bias_k"), ({"sinks": True}, "sinks"), ({"kdim": 8}, "kdim or vdim"),
        ({"qk_norm": True}, "qk_norm without batch_first"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=f"model: got a with {named}"):
            prepare(nn.ModuleDict({"a": MultiHeadAttention(E, H, **options)}))
