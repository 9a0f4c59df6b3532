"""``MultiHeadAttention`` against ``torch.nn.MultiheadAttention`` over its whole option grid."""

import contextlib
import itertools

import pytest
import torch
from torch import nn

from fastattn import MultiHeadAttention

E, H, L, S, N = 8, 2, 5, 7, 3
LAYOUTS = ("batch first", "sequence first", "unbatched")
PADDING = (None, "bool", "float")
MASKS = (None, "bool 2d", "float 2d", "bool 3d", "float 3d")
OUTPUTS = ({"need_weights": False}, {"need_weights": True}, {"need_weights": True, "average_attn_weights": False})
CONSTRUCTIONS = [
    {"bias": bias, "add_bias_kv": add_bias_kv, "add_zero_attn": add_zero_attn, "kdim": kdim, "vdim": vdim}
    for bias, add_bias_kv, add_zero_attn, (kdim, vdim) in itertools.product(
        (True, False), (True, False), (True, False), ((None, None), (6, 4))
    )
]


def pair(dtype=torch.float64, **options):
    """Both modules with the same parameters, which are made non-zero everywhere."""
    torch.manual_seed(0)
    theirs = nn.MultiheadAttention(E, H, dtype=dtype, **options)
    with torch.no_grad():
        for p in theirs.parameters():
            p.normal_(std=0.5)
    ours = MultiHeadAttention(E, H, dtype=dtype, **options)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def tensors(layout, is_self=True, kdim=None, vdim=None, dtype=torch.float64):
    """query, key and value: one tensor for self-attention, three otherwise."""
    torch.manual_seed(1)

    def one(length, width):
        shape = {"batch first": (N, length, width), "sequence first": (length, N, width), "unbatched": (length, width)}
        return torch.randn(shape[layout], dtype=dtype, requires_grad=True)

    if is_self:
        x = one(L, E)
        return x, x, x
    return one(L, E), one(S, kdim or E), one(S, vdim or E)


def masks(layout, padding, mask, s_kv, dtype=torch.float64):
    """key_padding_mask and attn_mask that leave every query the first key."""
    generator = torch.Generator().manual_seed(2)
    batch = 1 if layout == "unbatched" else N

    def one(kind, *shape):
        if kind.startswith("float"):
            values = torch.randn(shape, generator=generator).to(dtype)
            values[..., 1] = float("-inf")
            return values
        masked = torch.rand(shape, generator=generator) < 0.4
        masked[..., 0] = False
        return masked

    found = {}
    if padding:
        found["key_padding_mask"] = one(padding, *(() if layout == "unbatched" else (batch,)), s_kv)
    if mask:
        found["attn_mask"] = one(mask, *(() if mask.endswith("2d") else (batch * H,)), L, s_kv)
    return found


def run(module, inputs, arguments):
    """Output, weights, and the gradients of the inputs and parameters."""
    leaves = [*dict.fromkeys(inputs), *module.parameters()]
    out, weights = module(*inputs, **arguments)
    loss = (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum()
    if weights is not None:
        loss = loss + (weights * torch.linspace(-1, 1, weights.numel(), dtype=out.dtype).view_as(weights)).sum()
    return out, weights, torch.autograd.grad(loss, leaves, materialize_grads=True)


def assert_same(theirs, ours, inputs, arguments):
    out, weights, grads = run(ours, inputs, arguments)
    with pytest.warns(UserWarning, match="mismatched") if _mixes(arguments) else contextlib.nullcontext():
        expected_out, expected_weights, expected_grads = run(theirs, inputs, arguments)
    assert torch.isfinite(expected_out).all(), "the test should compare numbers"
    torch.testing.assert_close(out, expected_out)
    torch.testing.assert_close(grads, expected_grads)
    assert (weights is None) == (expected_weights is None)
    if weights is not None:
        torch.testing.assert_close(weights, expected_weights)


def _mixes(arguments):
    """torch deprecates a boolean mask together with a floating one."""
    both = [arguments.get(name) for name in ("key_padding_mask", "attn_mask")]
    return all(x is not None for x in both) and both[0].dtype != both[1].dtype


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("construction", CONSTRUCTIONS, ids=lambda c: ",".join(k for k, x in c.items() if x))
def test_option_grid(construction, layout):
    theirs, ours = pair(batch_first=layout == "batch first", **construction)
    kdim, vdim = construction["kdim"], construction["vdim"]
    inputs = tensors(layout, is_self=kdim is None, kdim=kdim, vdim=vdim)
    for padding, mask, output in itertools.product(PADDING, MASKS, OUTPUTS):
        s_kv = L if kdim is None else S
        assert_same(theirs, ours, inputs, masks(layout, padding, mask, s_kv) | output)


@pytest.mark.parametrize("padding", PADDING)
@pytest.mark.parametrize("mask", MASKS)
def test_option_grid_fp32(padding, mask):
    for construction, layout, output in zip(CONSTRUCTIONS, LAYOUTS * 6, OUTPUTS * 6, strict=False):
        theirs, ours = pair(torch.float32, batch_first=layout == "batch first", **construction)
        kdim, vdim = construction["kdim"], construction["vdim"]
        inputs = tensors(layout, kdim is None, kdim, vdim, torch.float32)
        masked = masks(layout, padding, mask, L if kdim is None else S, torch.float32)
        assert_same(theirs, ours, inputs, masked | output)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("output", OUTPUTS)
def test_cross_attention_with_packed_weights(layout, output):
    theirs, ours = pair(batch_first=layout == "batch first")
    query, key, value = tensors(layout, is_self=False)
    other = query.detach().flip(0).requires_grad_()
    for inputs in ((query, key, value), (query, key, key), (query, query, other)):
        s_kv = L if inputs[1] is query else S
        assert_same(theirs, ours, inputs, masks(layout, "bool", "float 3d", s_kv) | output)


@pytest.mark.parametrize("s_kv", [L, L - 2, L + 2])
@pytest.mark.parametrize("padding", [None, "bool"])
@pytest.mark.parametrize("is_true", [True, False], ids=["true hint", "false hint"])
@pytest.mark.parametrize("appended", [{}, {"add_bias_kv": True}, {"add_zero_attn": True, "add_bias_kv": True}], ids=str)
def test_is_causal_is_believed_where_torch_believes_it(s_kv, padding, is_true, appended):
    """Even where the hint contradicts the mask, or torch forgets the appended keys over it."""
    theirs, ours = pair(batch_first=True, **appended)
    query = tensors("batch first")[0]
    key = query if s_kv == L else torch.randn(N, s_kv, E, dtype=torch.float64, requires_grad=True)
    causal = torch.ones(L, s_kv, dtype=torch.bool).triu(1)
    mask = causal if is_true else causal.flip(1) & (torch.arange(s_kv) > 0)
    padded = masks("batch first", padding, None, s_kv)
    for output in OUTPUTS:
        assert_same(theirs, ours, (query, key, key), padded | output | {"attn_mask": mask, "is_causal": True})


def test_float_masks_have_gradients():
    theirs, ours = pair(batch_first=True)
    x = tensors("batch first")[0].detach()
    for need_weights in (True, False):
        found = []
        for module in (theirs, ours):
            mask = torch.ones(N * H, L, L, dtype=torch.float64).tril().requires_grad_()
            padding = torch.linspace(0, 1, N * L, dtype=torch.float64).view(N, L).requires_grad_()
            out, _ = module(x, x, x, attn_mask=mask, key_padding_mask=padding, need_weights=need_weights)
            found.append(torch.autograd.grad(out.square().sum(), [mask, padding]))
        torch.testing.assert_close(*reversed(found))


@pytest.mark.parametrize("masked", [{}, {"key_padding_mask": "bool"}, {"attn_mask": "bool 2d"}], ids=str)
@pytest.mark.parametrize("output", OUTPUTS)
def test_inference(masked, output):
    """torch takes its native path here."""
    theirs, ours = pair(batch_first=True)
    theirs.eval(), ours.eval()
    x = tensors("batch first")[0].detach()
    arguments = masks("batch first", masked.get("key_padding_mask"), masked.get("attn_mask"), L)
    with torch.no_grad():
        torch.testing.assert_close(ours(x, x, x, **arguments, **output), theirs(x, x, x, **arguments, **output))


@pytest.mark.parametrize("construction", CONSTRUCTIONS, ids=lambda c: ",".join(k for k, x in c.items() if x))
def test_state_dict_both_ways_and_the_same_initial_values(construction):
    modules = []
    for kind in (nn.MultiheadAttention, MultiHeadAttention):
        torch.manual_seed(5)
        modules.append(kind(E, H, **construction))
    theirs, ours = modules
    assert list(theirs.state_dict()) == list(ours.state_dict())
    torch.testing.assert_close(dict(ours.state_dict()), dict(theirs.state_dict()), rtol=0, atol=0)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    assert torch.rand(()) == _random_number_after(theirs, construction), "construction drew more numbers than torch's"


def _random_number_after(module, construction):
    torch.manual_seed(5)
    type(module)(E, H, **construction)
    return torch.rand(())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("output", OUTPUTS)
def test_low_precision_and_autocast_give_torchs_dtypes(dtype, output):
    theirs, ours = pair(torch.float32, batch_first=True)
    x = tensors("batch first", dtype=torch.float32)[0].detach()
    with torch.autocast("cpu", dtype):
        _assert_alike(theirs(x, x, x, **output), ours(x, x, x, **output), dtype)
    theirs, ours, x = theirs.to(dtype), ours.to(dtype), x.to(dtype)
    _assert_alike(theirs(x, x, x, **output), ours(x, x, x, **output), dtype)


def _assert_alike(theirs, ours, dtype):
    rounding = 8 * torch.finfo(dtype).eps
    for expected, found in zip(theirs, ours, strict=True):
        assert (found is None) == (expected is None)
        if expected is not None:
            torch.testing.assert_close(found, expected, rtol=rounding, atol=rounding)


@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("need_weights", [True, False])
def test_fully_masked_queries_give_the_output_bias_and_no_nan(kind, need_weights):
    _, ours = pair(batch_first=True)
    x = tensors("batch first")[0]
    masked = torch.zeros(N, L, dtype=torch.bool)
    masked[0] = True
    padding = masked if kind == "bool" else torch.zeros(N, L, dtype=torch.float64).masked_fill(masked, float("-inf"))
    out, weights, grads = run(ours, (x, x, x), {"key_padding_mask": padding, "need_weights": need_weights})
    torch.testing.assert_close(out[0], ours.out_proj.bias.expand(L, E))
    assert all(torch.isfinite(g).all() for g in grads)
    assert (grads[0][0] == 0).all()
    if weights is not None:
        assert (weights[0] == 0).all()
        torch.testing.assert_close(weights[1:].sum(-1), torch.ones(N - 1, L, dtype=torch.float64))


def test_output_is_contiguous_for_callers_that_view_it():
    for layout in LAYOUTS:
        _, ours = pair(batch_first=layout == "batch first")
        inputs = tensors(layout)
        assert ours(*inputs, need_weights=False)[0].is_contiguous()
