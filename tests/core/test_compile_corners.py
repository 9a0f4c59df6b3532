"""torch.compile in difficult cases: without gradients, one tensor as two arguments, function transforms inside."""

import math
import re
import shutil

import pytest
import torch
from torch._inductor.utils import run_and_get_code
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


def copies_of(cache, step):
    """Tensors at least as large as a cache that the code compiled from ``step`` allocates."""
    torch._dynamo.reset()
    with torch.no_grad():
        _, codes = run_and_get_code(torch.compile(step, fullgraph=True))
    allocated = re.findall(r"= empty_strided\w*\(\(([\d, ]*)\)", "\n".join(codes))
    sizes = [math.prod(map(int, filter(None, shape.replace(" ", "").split(",")))) for shape in allocated]
    return sum(size >= cache.numel() for size in sizes)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="the code is compiled by a C++ compiler")
@pytest.mark.parametrize("paged", [False, True])
def test_no_compiled_step_copies_a_cache(paged):
    shape = (8, 16, 2, 16) if paged else (2, 64, 2, 16)
    k_cache, v_cache = (torch.zeros(shape) for _ in range(2))
    q, new, lengths = torch.randn(2, 1, 4, 16), torch.randn(2, 1, 2, 16), torch.tensor([17, 5], dtype=torch.int32)
    table = torch.arange(8, dtype=torch.int32).view(2, 4) if paged else None

    def step():
        return fastattn.attention_with_kv_cache(q, k_cache, v_cache, lengths, new * 2, new, block_table=table) + 1

    assert copies_of(k_cache, step) == 0
    row = k_cache[1, 1] if paged else k_cache[0, 17]
    assert torch.equal(row, new[0, 0] * 2), "written in place"
    assert copies_of(k_cache, lambda: (step(), k_cache + 1)) == 1, "a copy is seen"


def test_a_compiled_step_of_caches_in_one_memory_is_refused():
    k_cache, v_cache = torch.zeros(2, 2, 64, 2, 16)
    q, new, lengths = torch.randn(2, 1, 4, 16), torch.randn(2, 1, 2, 16), torch.tensor([17, 5], dtype=torch.int32)
    step = torch.compile(fastattn.attention_with_kv_cache, fullgraph=True, backend="eager")
    with torch.no_grad(), pytest.raises(Exception, match=r"v_cache.*memory of its own"):
        step(q, k_cache, v_cache, lengths, new, new)
