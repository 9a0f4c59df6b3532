"""``fastattn.scaled_dot_product_attention`` against torch's, in values, gradients, shapes and errors."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention as torch_sdpa

import fastattn
from fastattn.backends import BACKENDS


@pytest.fixture(autouse=True, params=[name for name in BACKENDS if name in ("portable", "eager")])
def backend(request):
    with fastattn.use_backend(request.param):
        yield


def leaf(*shape):
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


def boolean(*shape):
    """A random mask without empty rows, where torch's result depends on its version."""
    mask = torch.rand(shape) > 0.4
    mask[..., 0] = True
    return mask


# shapes of query, key and value
SHAPES = {
    "2-D": ((5, 8), (7, 8), (7, 6)),
    "3-D": ((3, 5, 8), (3, 7, 8), (3, 7, 6)),
    "4-D": ((2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 6)),
    "5-D": ((2, 2, 3, 5, 8), (2, 2, 3, 7, 8), (2, 2, 3, 7, 6)),
    "shared keys": ((2, 3, 5, 8), (1, 3, 7, 8), (1, 3, 7, 6)),
    "shared heads": ((2, 3, 5, 8), (2, 1, 7, 8), (2, 1, 7, 6)),
    "shared query": ((1, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 6)),
    "shared in 5-D": ((2, 1, 3, 5, 8), (1, 4, 3, 7, 8), (2, 4, 1, 7, 6)),
    "one of each": ((1, 1, 1, 8), (1, 1, 1, 8), (1, 1, 1, 8)),
}


def same(shapes, *masks, **options):
    """Values and gradients of both, on the same leaves; ``masks`` with requires_grad are leaves too."""
    tensors = [leaf(*shape) for shape in shapes]
    leaves = [*tensors, *(mask for mask in masks if mask is not None and mask.requires_grad)]
    with sdpa_kernel(SDPBackend.MATH):
        expected = torch_sdpa(*tensors, *masks, **options)
    found = fastattn.scaled_dot_product_attention(*tensors, *masks, **options)
    torch.testing.assert_close(found, expected)
    weight = torch.randn_like(expected)
    grads = (torch.autograd.grad((out * weight).sum(), leaves) for out in (found, expected))
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"scale": 0.3}], ids=str)
def test_shapes(name, options):
    same(SHAPES[name], **options)


@pytest.mark.parametrize(
    ("name", "mask"),
    [
        ("2-D", (5, 7)),
        ("3-D", (5, 7)),
        ("3-D", (3, 1, 7)),
        ("4-D", (5, 7)),
        ("4-D", (7,)),
        ("4-D", (3, 1, 1)),
        ("4-D", (2, 3, 5, 7)),
        ("4-D", (2, 1, 1, 7)),
        ("4-D", (1, 3, 5, 1)),
        ("5-D", (5, 7)),
        ("5-D", (2, 1, 3, 5, 7)),
        ("shared keys", (2, 1, 5, 7)),
        ("shared in 5-D", (4, 1, 5, 7)),
    ],
)
@pytest.mark.parametrize("kind", ["boolean", "bias"])
def test_masks(name, mask, kind):
    same(SHAPES[name], boolean(*mask) if kind == "boolean" and mask[-1] > 1 else leaf(*mask))


@pytest.mark.parametrize(("heads", "heads_kv"), [(6, 2), (4, 1), (3, 3)])
@pytest.mark.parametrize("is_causal", [False, True])
def test_grouped_heads(heads, heads_kv, is_causal):
    shapes = ((2, heads, 5, 8), (2, heads_kv, 7, 8), (2, heads_kv, 7, 6))
    same(shapes, enable_gqa=True, is_causal=is_causal)
    same(shapes, leaf(2, heads, 5, 7), enable_gqa=True)


def test_grouped_heads_in_other_dimensions():
    same(((6, 5, 8), (2, 7, 8), (2, 7, 6)), enable_gqa=True)
    same(((2, 2, 6, 5, 8), (2, 2, 2, 7, 8), (2, 2, 2, 7, 6)), enable_gqa=True, is_causal=True)


def test_rows_that_attend_to_nothing_are_zero():
    q, k = leaf(1, 1, 3, 4), leaf(1, 1, 5, 4)
    mask = torch.tensor([[True] * 5, [False] * 5, [True] * 5])
    out = fastattn.scaled_dot_product_attention(q, k, k, mask)
    assert out[0, 0, 1].eq(0).all() and out.isfinite().all()
    out.sum().backward()
    assert q.grad[0, 0, 1].eq(0).all() and q.grad.isfinite().all() and k.grad.isfinite().all()


def test_positional_arguments_are_torch_s():
    q = leaf(1, 2, 5, 8)
    torch.testing.assert_close(
        fastattn.scaled_dot_product_attention(q, q, q, None, 0.0, True), torch_sdpa(q, q, q, None, 0.0, True)
    )


def test_dropout_keeps_the_mean_and_follows_the_seed():
    q, k = torch.randn(2, 4, 64, 16), torch.randn(2, 4, 128, 16)
    ones = torch.ones(2, 4, 128, 16)
    torch.manual_seed(3)
    first = fastattn.scaled_dot_product_attention(q, k, ones, dropout_p=0.3)
    torch.manual_seed(3)
    assert torch.equal(first, fastattn.scaled_dot_product_attention(q, k, ones, dropout_p=0.3))
    assert not torch.equal(first, fastattn.scaled_dot_product_attention(q, k, ones, dropout_p=0.3))
    assert abs(float(first.mean()) - 1) < 0.02 and float(first.std()) > 0.01


def test_strides_of_the_result():
    """Those of the query, as in torch: heads stay beside each other in memory if a projection put them there."""
    q = leaf(2, 3, 5, 8)
    assert fastattn.scaled_dot_product_attention(q, q, q).is_contiguous()
    q = leaf(2, 5, 3, 8).transpose(1, 2)
    assert fastattn.scaled_dot_product_attention(q, q, q).transpose(1, 2).is_contiguous()
