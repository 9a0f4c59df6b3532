"""The contract with torch: operators, compile, export, transforms, checkpointing, FLOPs, autocast, determinism."""

import itertools
import subprocess
import sys
import textwrap

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, hessian, jvp, vmap
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

import fastattn
from fastattn import ops
from fastattn.backends import BACKENDS, load
from fastattn.spec import AttentionSpec, keep
from fastattn.testing import Case, grid, make

HOME = [name for name in BACKENDS if name in ("portable", "eager")]  # at home on a CPU
STATE = torch.tensor([5, 6])
CU = torch.tensor([0, 3, 3, 9], dtype=torch.int32)


@pytest.fixture
def backend():
    """The backend that a CPU gets by itself, without Triton's interpreter, and no graph of another test."""
    torch._dynamo.reset()
    with fastattn.use_backend(HOME[0]):
        yield HOME[0]


@pytest.fixture(params=HOME)
def each_backend(request):
    with fastattn.use_backend(request.param):
        yield request.param


def leaves(*shapes, dtype=torch.float32):
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


def dense_leaves(s_q=9, s_kv=12, dtype=torch.float32):
    return leaves((2, s_q, 4, 8), (2, s_kv, 2, 8), (2, s_kv, 2, 6), (1, 4, s_q, s_kv), (4,), dtype=dtype)


def dense(q, k, v, bias, sinks):
    """Every term of the spec at once."""
    segments = tuple((torch.arange(x.shape[1]) // 5).expand(2, -1) for x in (q, k))
    out, lse = fastattn.attention(
        q, k, v, causal=True, window=(7, 0), softcap=4.0, bias=bias, sinks=sinks, segment_ids=segments,
        mask=torch.ones(k.shape[1], dtype=torch.bool), alibi_slopes=torch.full((4,), 0.1),
        dropout_p=0.1, rng_state=STATE, return_lse=True,
    )  # fmt: skip
    return out, lse


def packed_leaves():
    return leaves((9, 4, 8), (9, 2, 8), (9, 2, 6), (3, 4))


def packed(q, k, v, sinks, cu_seqlens=CU):
    return fastattn.attention_varlen(
        q, k, v, cu_seqlens, cu_seqlens, max_seqlen_q=6, max_seqlen_kv=6, causal=True, sinks=sinks, return_lse=True
    )


def loss(outputs):
    """Uses out and lse; an empty row's lse of -inf must not reach the sum."""
    out, lse = outputs
    return out.square().sum() + torch.where(lse.isfinite(), lse, 0).sin().sum()


def gradients(function, tensors):
    return torch.autograd.grad(loss(function(*tensors)), tensors)


# --- operators ---------------------------------------------------------------------------------------------------

OPERATOR_TESTS = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
OPERATOR_CASES = [*grid([torch.float32], quick=True), Case(id="only dq", needs=("q",)), Case(id="no key", S_kv=0)]


@pytest.mark.parametrize("case", OPERATOR_CASES, ids=lambda case: case.id)
def test_opcheck(case):
    sample = make(case)
    flat = ops.flatten(sample.inputs, sample.spec, HOME[0])
    torch.library.opcheck(torch.ops.fastattn.forward.default, (*flat, True), test_utils=OPERATOR_TESTS)
    out, lse, low = torch.ops.fastattn.forward(*flat, True)
    needed = [name in sample.needs for name in ("q", "k", "v", "bias", "sinks")]
    args = (sample.dout, sample.dlse, out, lse, low, *flat, needed)
    torch.library.opcheck(torch.ops.fastattn.backward.default, args, test_utils=OPERATOR_TESTS)


def test_flatten_and_back():
    sample = make(grid(quick=True)[-1])
    inputs, spec, name = ops.unflatten(ops.flatten(sample.inputs, sample.spec, "eager"))
    assert spec == sample.spec and name == "eager"
    for field in ("q", "cu_seqlens_q", "max_seqlen_kv", "rng_state"):
        assert getattr(inputs, field) is getattr(sample.inputs, field)


# --- compile and export ------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize(("function", "tensors"), [(dense, dense_leaves), (packed, packed_leaves)])
@pytest.mark.parametrize(
    ("compiler", "dynamic"),
    [("aot_eager", False), ("aot_eager", True), pytest.param("inductor", False, marks=pytest.mark.slow)],
)
def test_compiled_functions_and_their_gradients(function, tensors, compiler, dynamic):
    tensors = tensors()
    compiled = torch.compile(function, fullgraph=True, backend=compiler, dynamic=dynamic)
    torch.testing.assert_close(compiled(*tensors), function(*tensors))
    torch.testing.assert_close(gradients(compiled, tensors), gradients(function, tensors))


@pytest.mark.usefixtures("backend")
def test_one_compiled_graph_serves_all_lengths():
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(dense, fullgraph=True, backend=counter, dynamic=True)
    for s_q, s_kv in ((9, 12), (17, 33), (20, 20), (7, 40)):
        tensors = dense_leaves(s_q, s_kv)
        torch.testing.assert_close(gradients(compiled, tensors), gradients(dense, tensors))
    # bounds on S_q against S_kv may ask for one more graph, but not one for each length
    assert counter.frame_count <= 2


class Layer(nn.Module):
    def forward(self, q, k, v):
        return fastattn.attention(q, k, v, causal=True)


@pytest.mark.usefixtures("backend")
def test_export_holds_one_opaque_node():
    q, k, v = (x.detach() for x in leaves((2, 9, 4, 8), (2, 9, 2, 8), (2, 9, 2, 8)))
    length = torch.export.Dim("length", min=2, max=512)
    exported = torch.export.export(Layer(), (q, k, v), dynamic_shapes=({1: length},) * 3)
    targets = [str(node.target) for node in exported.graph.nodes if node.op == "call_function"]
    assert sum("fastattn.forward" in target for target in targets) == 1
    q, k, v = (torch.randn(2, 30, heads, 8) for heads in (4, 2, 2))
    torch.testing.assert_close(exported.module()(q, k, v), Layer()(q, k, v))


# --- transforms --------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("each_backend")
@pytest.mark.parametrize(("function", "tensors"), [(dense, dense_leaves), (packed, packed_leaves)])
def test_func_grad_is_autograd(function, tensors):
    tensors = tensors()
    found = grad(lambda *x: loss(function(*x)), argnums=tuple(range(len(tensors))))(*tensors)
    torch.testing.assert_close(found, gradients(function, tensors))


@pytest.mark.usefixtures("each_backend")
@pytest.mark.parametrize("shared", [(), (0,), (1, 2), (3,), (4,), (3, 4)])
def test_gradients_of_each_sample(shared):
    """vmap(grad): what is shared by the samples still has a gradient for each of them."""
    samples = [dense_leaves() for _ in range(3)]
    columns = enumerate(zip(*samples, strict=True))
    tensors = [column[0] if n in shared else torch.stack(column) for n, column in columns]
    where = tuple(None if n in shared else 0 for n in range(5))
    found = vmap(grad(lambda *x: loss(without_dropout(*x)), argnums=tuple(range(5))), in_dims=where)(*tensors)
    for n in range(3):
        at = [(x if m in shared else x[n]).detach().requires_grad_() for m, x in enumerate(tensors)]
        torch.testing.assert_close([x[n] for x in found], list(gradients(without_dropout, at)))


def without_dropout(q, k, v, bias, sinks):
    """Dropout is left out where samples are compared with a loop: there every sample is batch entry 0."""
    return fastattn.attention(q, k, v, causal=True, softcap=4.0, bias=bias, sinks=sinks, return_lse=True)


@pytest.mark.usefixtures("each_backend")
@pytest.mark.parametrize("lengths_too", [False, True])
def test_gradients_of_each_packed_sample(lengths_too):
    samples = [packed_leaves() for _ in range(3)]
    tensors = [torch.stack(column) for column in zip(*samples, strict=True)]
    cu = torch.tensor([[0, 3, 3, 9], [0, 6, 8, 9], [0, 1, 4, 9]], dtype=torch.int32)
    cu = cu if lengths_too else cu[:1].expand(3, -1)
    per_sample = grad(lambda *x: loss(packed(*x)), argnums=(0, 1, 2, 3))
    found = vmap(per_sample)(*tensors, cu) if lengths_too else vmap(per_sample, (0, 0, 0, 0, None))(*tensors, cu[0])
    for n in range(3):
        at = [x[n].detach().requires_grad_() for x in tensors]
        expected = gradients(lambda *x, n=n: packed(*x, cu[n]), at)
        torch.testing.assert_close([x[n] for x in found], list(expected))


@pytest.mark.usefixtures("each_backend")
def test_nested_vmap_and_other_dimensions():
    q = torch.randn(3, 2, 5, 4, 2, 8)  # two mapped dimensions, the second one last but one
    found = vmap(vmap(lambda x: fastattn.attention(x, x, x), in_dims=-2, out_dims=-2))(q)
    for n, m in itertools.product(range(3), range(2)):
        x = q[n].select(-2, m)
        torch.testing.assert_close(found[n].select(-2, m), fastattn.attention(x, x, x))


@pytest.mark.usefixtures("each_backend")
def test_jvp_is_the_slope():
    tensors = [x.detach() for x in dense_leaves(dtype=torch.float64)]
    tangents = [torch.randn_like(x) for x in tensors]
    _, found = jvp(lambda *x: loss(dense(*x)), tuple(tensors), tuple(tangents))
    ahead, behind = (
        loss(dense(*(x + step * t for x, t in zip(tensors, tangents, strict=True)))) for step in (1e-6, -1e-6)
    )
    torch.testing.assert_close(found, (ahead - behind) / 2e-6, rtol=1e-6, atol=1e-6)


@pytest.mark.usefixtures("each_backend")
def test_hessian_is_the_gradient_twice():
    x = torch.randn(1, 3, 1, 2, dtype=torch.float64)

    def scalar(x):
        return fastattn.attention(x, x, x, causal=True).sin().sum()

    expected = torch.autograd.functional.hessian(scalar, x)
    torch.testing.assert_close(hessian(scalar)(x), expected)


# --- checkpointing -----------------------------------------------------------------------------------------------


@pytest.fixture
def calls(monkeypatch, backend):
    """Counts the forward passes of the backend."""
    counted = []
    chosen = load(backend)
    real = chosen.forward
    monkeypatch.setattr(type(chosen), "forward", lambda self, *args: counted.append(1) or real(*args))
    return counted


def save_attention(ctx, op, *args, **kwargs):
    return CheckpointPolicy.MUST_SAVE if op in fastattn.SAC_SAVE_OPS else CheckpointPolicy.PREFER_RECOMPUTE


@pytest.mark.parametrize(("selective", "expected"), [(False, 2), (True, 1)])
def test_selective_checkpointing_computes_attention_once(calls, selective, expected):
    q, k, v = leaves((2, 9, 4, 8), (2, 9, 2, 8), (2, 9, 2, 8))

    def block(q, k, v):
        return fastattn.attention(q.sin(), k, v, causal=True).cos()

    options = {"context_fn": lambda: create_selective_checkpoint_contexts(save_attention)} if selective else {}
    found = checkpoint(block, q, k, v, use_reentrant=False, **options)
    grads = torch.autograd.grad(found.sum(), (q, k, v))
    assert len(calls) == expected
    torch.testing.assert_close(grads, torch.autograd.grad(block(q, k, v).sum(), (q, k, v)))


# --- FLOPs -------------------------------------------------------------------------------------------------------


def enumerated_pairs(spec, s_q, s_kv):
    return sum(bool(keep(spec, i, j, s_q, s_kv)) for i in range(s_q) for j in range(s_kv))


def counted_flops(function, tensors):
    with FlopCounterMode(display=False) as counter:
        out = function(*tensors)
    forward = counter.get_total_flops()
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    return forward, counter.get_total_flops()


@pytest.mark.usefixtures("each_backend")
@pytest.mark.parametrize("window", [None, (3, 1), (0, 0)])
@pytest.mark.parametrize(("s_q", "s_kv"), [(9, 12), (12, 5)])
def test_flops_are_those_of_the_pairs_kept(window, s_q, s_kv):
    tensors = leaves((2, s_q, 4, 8), (2, s_kv, 2, 8), (2, s_kv, 2, 6))
    left, right = window or (None, None)
    pairs = 2 * 4 * enumerated_pairs(AttentionSpec(1.0, left=left, right=right), s_q, s_kv)
    found = counted_flops(lambda q, k, v: fastattn.attention(q, k, v, window=window), tensors)
    assert found == (2 * (8 + 6) * pairs, 2 * (3 * 8 + 2 * 6) * pairs)


@pytest.mark.usefixtures("each_backend")
def test_flops_of_packed_sequences():
    pairs = 4 * sum(enumerated_pairs(AttentionSpec(1.0, right=0), s, s) for s in (3, 0, 6))
    found = counted_flops(lambda *x: packed(*x)[0], packed_leaves())
    assert found == (2 * (8 + 6) * pairs, 2 * (3 * 8 + 2 * 6) * pairs)


def test_formulas_wait_for_the_counter_and_importing_loads_no_other_package():
    program = """
        import sys, torch
        before = set(sys.modules)
        import fastattn
        print(sorted({"triton", "matplotlib", "tokenizers", "transformers"} & (set(sys.modules) - before)))
        from torch.utils.flop_counter import FlopCounterMode
        with FlopCounterMode(display=False) as counter:
            fastattn.attention(*torch.randn(3, 1, 16, 2, 8))
        print(counter.get_total_flops())
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:2] == ["[]", str(2 * (8 + 8) * 2 * 16 * 16)], done.stderr


# --- autocast, determinism, modules ------------------------------------------------------------------------------


@pytest.mark.usefixtures("each_backend")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype):
    tensors = dense_leaves()
    with torch.autocast("cpu", dtype=dtype):
        out, lse = dense(*tensors)
        plain = fastattn.scaled_dot_product_attention(*(x.transpose(1, 2) for x in tensors[:3]), enable_gqa=True)
    assert out.dtype == plain.dtype == dtype and lse.dtype == torch.float32
    # no rounding but that of q, k and v: inside, fp32 stays fp32, in the backward pass and in forward mode too
    cast = [(x.to(dtype) if n < 3 else x) for n, x in enumerate(tensors)]
    expected = dense(*cast)
    assert torch.equal(out, expected[0]) and torch.equal(lse, expected[1])
    with torch.autocast("cpu", dtype=dtype):
        found = torch.autograd.grad(out.float().sum(), tensors)
        _, tangent = jvp(lambda *x: dense(*x)[1], tuple(cast), tuple(torch.ones_like(x) for x in cast))
    assert all(map(torch.equal, found, torch.autograd.grad(expected[0].float().sum(), tensors)))
    assert torch.equal(tangent, jvp(lambda *x: dense(*x)[1], tuple(cast), tuple(torch.ones_like(x) for x in cast))[1])


@pytest.mark.usefixtures("each_backend")
def test_deterministic_mode_is_seen_and_kept():
    torch.use_deterministic_algorithms(True)
    try:
        tensors = dense_leaves()
        assert fastattn.explain(*tensors[:3]).problem.deterministic
        first, second = gradients(dense, tensors), gradients(dense, tensors)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(one, two) for one, two in zip(first, second, strict=True))


@pytest.mark.usefixtures("each_backend")
def test_no_gradient_is_tracked_without_need():
    q, k, v, *_ = (x.detach() for x in dense_leaves())
    assert fastattn.attention(q, k, v).grad_fn is None
    with torch.no_grad():
        assert fastattn.attention(q.requires_grad_(), k, v).grad_fn is None
    with torch.inference_mode():
        assert fastattn.attention(q, k, v).is_inference()


@pytest.mark.usefixtures("each_backend")
def test_functional_call_trains_a_module():
    layer = nn.Linear(8, 8)
    x = torch.randn(2, 5, 2, 8)

    def objective(parameters):
        y = functional_call(layer, parameters, (x,))
        return fastattn.attention(y, y, y).square().sum()

    parameters = dict(layer.named_parameters())
    found = grad(objective)(parameters)
    expected = torch.autograd.grad(objective(parameters), list(parameters.values()))
    torch.testing.assert_close(list(found.values()), list(expected))
