"""``MultiHeadAttention`` on nested tensors: sequences of different lengths without padding."""

import warnings

import pytest
import torch
from torch import nn

from fastattn import InputError, MultiHeadAttention

E, H = 16, 4
LENGTHS = (5, 1, 7)


def build(**options):
    return MultiHeadAttention(E, H, batch_first=True, dtype=torch.float64, **options)


def sequences():
    return [torch.randn(n, E, dtype=torch.float64) for n in LENGTHS]


def nested(rows, layout):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls one layout a prototype
        return torch.nested.as_nested_tensor(rows, layout=layout)


@pytest.mark.parametrize("layout", [torch.jagged, torch.strided], ids=str)
@pytest.mark.parametrize(
    "options",
    [{}, {"num_kv_heads": 2, "rope": True, "window": (2, 0), "qk_norm": True, "sinks": True}],
    ids=["plain", "all"],
)
def test_each_sequence_is_computed_alone(layout, options):
    module, rows = build(**options), [x.requires_grad_() for x in sequences()]
    x = nested(rows, layout)
    out, weights = module(x, x, x, need_weights=False)
    assert out.is_nested and out.layout == layout and weights is None
    alone = [module(row, row, row, need_weights=False)[0] for row in rows]
    torch.testing.assert_close(list(out.unbind()), alone)
    grads = [torch.autograd.grad(sum(y.square().sum() for y in ys), rows) for ys in (out.unbind(), alone)]
    torch.testing.assert_close(*grads)


def test_cross_attention():
    module, rows = build(), sequences()
    keys = [torch.randn(n, E, dtype=torch.float64) for n in (2, 6, 3)]
    q, k = nested(rows, torch.jagged), nested(keys, torch.jagged)
    out = module(q, k, k, need_weights=False)[0]
    alone = [module(a, b, b, need_weights=False)[0] for a, b in zip(rows, keys, strict=True)]
    torch.testing.assert_close(list(out.unbind()), alone)
    with pytest.raises(InputError, match="value: got other lengths than key"):
        module(q, k, q, need_weights=False)


def test_what_is_refused():
    module, x = build(), nested(sequences(), torch.jagged)
    with pytest.raises(InputError, match=r"a nested tensor with need_weights.*need_weights=False"):
        module(x, x, x)
    with pytest.raises(InputError, match="key_padding_mask"):
        module(x, x, x, need_weights=False, key_padding_mask=torch.zeros(3, 7, dtype=torch.bool))
    with pytest.raises(InputError, match="key: got a nested tensor beside dense ones"):
        module(torch.zeros(3, 7, E, dtype=torch.float64), x, x)


def test_an_encoder_drops_the_padding_in_inference():
    """torch's encoder nests padded inputs; what it hands over is served as it is."""
    layer = nn.TransformerEncoderLayer(E, H, 32, dropout=0.0, batch_first=True, dtype=torch.float64)
    theirs = nn.TransformerEncoder(layer, 2).eval()
    ours = nn.TransformerEncoder(layer, 2).eval()
    ours.load_state_dict(theirs.state_dict())
    for each in ours.layers:
        module = build()
        module.load_state_dict(each.self_attn.state_dict())
        each.self_attn = module
    seen = []
    forward = MultiHeadAttention.forward
    ours.layers[0].self_attn.forward = lambda *a, **k: (seen.append(a[0].is_nested), forward(module, *a, **k))[1]
    ours.layers[0].self_attn.load_state_dict(theirs.layers[0].self_attn.state_dict())
    padding = torch.arange(7)[None] >= torch.tensor(LENGTHS)[:, None]
    x = torch.randn(3, 7, E, dtype=torch.float64)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out, expected = (m(x, src_key_padding_mask=padding) for m in (ours, theirs))
    assert seen == [True]
    torch.testing.assert_close(out[~padding], expected[~padding])
