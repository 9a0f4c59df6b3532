"""torch.compile in difficult cases: without gradients, one tensor as two arguments, function transforms inside."""

import pytest
import torch
from torch.func import grad, vmap

import fastattn


def compiled(function, dynamic=None):
    return torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)


@pytest.fixture
def q():
    torch.manual_seed(0)
    return torch.randn(3, 7, 2, 8, dtype=torch.float64)  # so that backends differ by nothing that matters here


def test_without_gradients(q):
    with torch.no_grad():
        out = compiled(lambda x: fastattn.attention(x, x + 1, x, causal=True))(q)
    torch.testing.assert_close(out, fastattn.attention(q, q + 1, q, causal=True))


@pytest.mark.parametrize("dynamic", [False, True])
def test_one_tensor_in_several_places(q, dynamic):
    ids = torch.arange(7).expand(3, 7) // 3

    def loss(x):
        return fastattn.attention(x, x, x, segment_ids=ids).square().sum()

    expected, actual = q.clone().requires_grad_(), q.clone().requires_grad_()
    loss(expected).backward()
    compiled(loss, dynamic)(actual).backward()
    torch.testing.assert_close(actual.grad, expected.grad)


def test_transforms_inside_a_compiled_function(q):
    def loss(x):
        return fastattn.attention(x[None], 2 * x[None], x[None], causal=True).square().sum()

    torch.testing.assert_close(compiled(grad(loss))(q[0]), grad(loss)(q[0]))
    torch.testing.assert_close(compiled(vmap(grad(loss)))(q), torch.stack([grad(loss)(x) for x in q]))
