"""Forward mode and second derivatives: the judge's grid, torch's transforms and their nestings, memory."""

import itertools

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, linearize, vjp, vmap

import fastattn
from fastattn import UnsupportedError, reference, state
from fastattn.arguments import dense_problem
from fastattn.backends import BACKENDS, load
from fastattn.backends.base import Capabilities
from fastattn.testing import assert_within, grid, make
from fastattn.testing.derivatives import DerivativeYardstick, measure_derivatives
from fastattn.testing.statistics import measure_statistics
from fastattn.weights import WITHOUT_OPTIONS

STATE = torch.tensor([5, 6])


def able(feature):
    """The backends of this machine that declare a feature, but the reference and Triton, whose tests interpret it."""
    others = (name for name in BACKENDS if name not in ("eager", "triton"))
    names = (name for name in others if feature in load(name).capabilities.features)
    return [name for name in names if load(name).unavailable_reason() is None]


@pytest.mark.parametrize("case", grid(), ids=lambda case: case.id)
def test_within_tolerance(case):
    sample = make(case)
    yardstick = DerivativeYardstick(sample)
    for name in able("jvp"):
        assert_within(measure_derivatives(name, sample, yardstick=yardstick))
    for name in able("statistics"):
        assert_within(measure_statistics(name, sample))


# --- torch's transforms, against the same of the formula in torch operators ----------------------------------------


def tensors(*batch):
    shapes = (1, 5, 4, 3), (1, 6, 2, 3), (1, 6, 2, 2)
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(*batch, *shape, generator=generator, dtype=torch.float64) for shape in shapes]


X, TANGENTS = tensors(), [x.flip(-1).sin() for x in tensors()]
OPTIONS = {"causal": True, "softcap": 3.0, "dropout_p": 0.3, "rng_state": STATE}


def fused(q, k, v):
    return fastattn.attention(q, k, v, **OPTIONS, backend="portable")


def formula(q, k, v):
    inputs, spec = dense_problem(q, k, v, **{**WITHOUT_OPTIONS, **OPTIONS})
    return reference.forward(inputs, spec)[0]


def scalar(attend):
    return lambda *x: attend(*x).sin().sum()


def of_dual_numbers(attend):
    with forward_ad.dual_level():
        return tuple(forward_ad.unpack_dual(attend(*map(forward_ad.make_dual, X, TANGENTS))))


def gradient_of_dual_numbers(attend):
    leaves = [x.clone().requires_grad_() for x in X]
    with forward_ad.dual_level():
        out, moved = forward_ad.unpack_dual(attend(*map(forward_ad.make_dual, leaves, TANGENTS)))
        return torch.autograd.grad((moved.sin() * out).sum(), leaves)


def dual_gradient(attend):
    with forward_ad.dual_level():
        q = forward_ad.make_dual(X[0].clone().requires_grad_(), TANGENTS[0])
        return tuple(forward_ad.unpack_dual(torch.autograd.grad(scalar(attend)(q, *X[1:]), q, create_graph=True)[0]))


def mean_flow(attend):
    """The loss of MeanFlow (Geng et al., 2025): a network, its total derivative in time, and the gradient of both."""
    weight = torch.eye(3, dtype=torch.float64, requires_grad=True)

    def network(x, time):
        return attend(x @ weight * (1 + time), X[1] @ weight, X[2])

    out, moved = jvp(network, (X[0], torch.tensor(0.3).double()), (TANGENTS[0], torch.tensor(1.0).double()))
    return torch.autograd.grad((out - moved.detach()).square().sum() + (out * moved).sum(), weight)


def three_times(attend):
    leaves = [x.clone().requires_grad_() for x in X]
    first = torch.autograd.grad(scalar(attend)(*leaves), leaves, create_graph=True)
    second = torch.autograd.grad(sum(x.square().sum() for x in first), leaves, create_graph=True)
    return *second, *torch.autograd.grad(sum(x.cos().sum() for x in second), leaves)


def along_q(attend):
    return lambda q: scalar(attend)(q, *X[1:])


LAST_ROWS = X[0][:, -2:]  # of q: a Jacobian of a Jacobian is computed row by row
DIRECTIONS = torch.stack([X[0].cos(), X[0].exp(), X[0]])
TRANSFORMS = {
    "jvp": lambda f: jvp(f, tuple(X), tuple(TANGENTS)),
    "jvp along v": lambda f: jvp(lambda v: f(*X[:2], v), (X[2],), (TANGENTS[2],)),
    "jacfwd": lambda f: jacfwd(f, (0, 1, 2))(*X),
    "jacrev": lambda f: jacrev(f, (0, 1, 2))(*X),
    "hessian": lambda f: hessian(scalar(f), (0, 1, 2))(*X),
    "jacrev of jacrev": lambda f: jacrev(jacrev(scalar(f)))(*X),
    "jacrev of jacfwd": lambda f: jacrev(jacfwd(along_q(f)))(LAST_ROWS),
    "jacfwd of jacfwd": lambda f: jacfwd(jacfwd(along_q(f)))(LAST_ROWS),
    "gradient of jvp": lambda f: grad(lambda *x: jvp(f, x, tuple(TANGENTS))[1].sin().sum(), (0, 1, 2))(*X),
    "dual numbers": of_dual_numbers,
    "gradient of dual numbers": gradient_of_dual_numbers,
    "dual gradient": dual_gradient,
    "MeanFlow": mean_flow,
    "third derivatives": three_times,
    "Hessian products": lambda f: vmap(lambda t: jvp(grad(along_q(f)), (X[0],), (t,))[1])(DIRECTIONS),
    "Hessian products, reverse": lambda f: vmap(lambda t: vjp(grad(along_q(f)), X[0])[1](t)[0])(DIRECTIONS),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_as_the_formula(name):
    torch.testing.assert_close(TRANSFORMS[name](fused), TRANSFORMS[name](formula), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "modes", itertools.product((jacfwd, jacrev), repeat=3), ids=lambda x: "-".join(mode.__name__ for mode in x)
)
def test_third_derivatives_are_right_or_refused(modes):
    """torch turns forward mode off inside a rule, so an outer one would find zeros."""
    q, k, v = X[0][:, 3:, :1, 1:], X[1][:, :2, :1, 1:], X[2][:, :2, :1]

    def derived(attend):
        function = lambda x: scalar(attend)(x, k, v)  # noqa: E731
        for mode in reversed(modes):
            function = mode(function)
        return function(q)

    if set(modes) == {jacfwd}:
        with pytest.raises(UnsupportedError, match="in reverse"):
            derived(fused)
    else:
        torch.testing.assert_close(derived(fused), derived(formula))


def test_linearize():
    out, push = linearize(fused, *X)
    torch.testing.assert_close((out, push(*TANGENTS)), jvp(formula, tuple(X), tuple(TANGENTS)))


@pytest.mark.parametrize("second", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_samples_under_vmap(packed, second):
    """Without dropout, whose elements tell samples apart."""
    ends = torch.tensor([0, 2, 5], dtype=torch.int32)

    def attend(x, shared):
        if packed:
            return fastattn.attention_varlen(x[0], shared, shared, ends, ends, causal=True, sinks=x[0, 0, :, 0])
        return fastattn.attention(x, shared, shared, causal=True, bias=x[..., :1].transpose(1, 2), softcap=2.0)

    def derived(x, along):
        first = grad(lambda x: attend(x, shared).sin().sum()) if second else lambda x: attend(x, shared)
        return jvp(first, (x,), (along,))[1]

    samples = torch.stack([X[0][:, :, :2], X[0][:, :, 2:]])
    shared = X[1][0, :5] if packed else X[1]
    expected = torch.stack([derived(x, x.cos()) for x in samples])
    torch.testing.assert_close(vmap(derived)(samples, samples.cos()), expected)


def test_compiled():
    compiled = torch.compile(lambda *x: jvp(fused, x, tuple(TANGENTS)), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*X), jvp(formula, tuple(X), tuple(TANGENTS)))


def test_a_backend_without_derivatives_leaves_them_to_one_that_has_them(monkeypatch):
    eager = load("eager")
    lacking = Capabilities(features=eager.capabilities.features - {"jvp"})
    monkeypatch.setattr(eager, "capabilities", lacking, raising=False)
    monkeypatch.setattr(type(eager), "jvp", None)
    state.forget()
    try:
        found = jvp(lambda *x: fastattn.attention(*x, **OPTIONS, backend="eager"), tuple(X), tuple(TANGENTS))
    finally:
        monkeypatch.undo()
        state.forget()
    torch.testing.assert_close(found, jvp(formula, tuple(X), tuple(TANGENTS)))


# --- memory -----------------------------------------------------------------------------------------------------------


class Watch(torch.utils._python_dispatch.TorchDispatchMode):
    """The operators that ran, and elements of the largest tensor that one made."""

    def __init__(self):
        super().__init__()
        self.most, self.seen = 0, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        made = (x for x in torch.utils._pytree.tree_leaves(result) if isinstance(x, torch.Tensor))
        self.most = max([self.most, *(x.untyped_storage().nbytes() // x.element_size() for x in made)])
        self.seen.append(str(func).removesuffix(".default"))
        return result


def largest_tensor(function):
    with Watch() as watch:
        function()
    return watch.most


@pytest.mark.parametrize("return_lse", [False, True])
@pytest.mark.parametrize("backend", [None, "portable"])
def test_a_second_backward_does_not_repeat_the_first(backend, return_lse):
    """out and lse get no gradient, so their node has nothing to do."""
    leaves = [x.float().requires_grad_() for x in X]
    for _ in range(2):  # the second call has a plan
        out = fastattn.attention(*leaves, return_lse=return_lse, backend=backend)
        scalar = out[0].sum() + out[1].sum() if return_lse else out.sum()
        gradients = torch.autograd.grad(scalar, leaves, create_graph=True)
        with Watch() as watch:
            torch.autograd.grad(gradients, leaves, [x.detach().cos() for x in leaves])
        assert [name for name in watch.seen if name.startswith("fastattn")] == ["fastattn.jvp", "fastattn.backward_jvp"]


def test_no_matrix_of_scores():
    q = torch.randn(1, 3000, 1, 8, requires_grad=True)

    def penalty():
        (gradient,) = torch.autograd.grad(fastattn.attention(q, q, q, backend="portable").sum(), q, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), q)

    def moved():
        return jvp(lambda x: fastattn.attention(x, x, x, backend="portable"), (q.detach(),), (q.detach(),))

    assert largest_tensor(penalty) <= 1 << 20 and largest_tensor(moved) <= 1 << 20


LAYER = fastattn.MultiHeadAttention(16, 2, dtype=torch.float64)
OF_ONE_TENSOR = {
    "attention": lambda x: fastattn.attention(x, x, x.sin(), causal=True),
    "lse and a bias": lambda x: fastattn.attention(x, x.sin(), x, bias=x.sum() * torch.eye(6), return_lse=True)[1],
    "statistics": lambda x: fastattn.attention(x, x, x, return_stats=True)[1].entropy,
    "weights": lambda x: fastattn.attention_weights(x, x, causal=True),
    "weights of a layer": lambda x: LAYER(x.flatten(2), x.sin().flatten(2), x.flatten(2))[1] * 1,
    "both of a layer": lambda x: torch.stack([y.sum() for y in LAYER(*3 * [x.flatten(2)])]),
}


@pytest.mark.parametrize("name", OF_ONE_TENSOR)
def test_batches_of_gradients_and_operands_made_of_each_other(name):
    """``is_grads_batched=True``, which ``jacobian(vectorize=True)`` takes, and gradients with a graph of their own."""
    x = torch.randn(2, 6, 2, 8, dtype=torch.float64, requires_grad=True)
    for _ in range(2):  # the second call has a plan
        out = OF_ONE_TENSOR[name](x)
        given = torch.randn(3, *out.shape, dtype=out.dtype)
        one_by_one = torch.stack([torch.autograd.grad(out, x, dout, retain_graph=True)[0] for dout in given])
        (together,) = torch.autograd.grad(out, x, given, is_grads_batched=True, retain_graph=True)
        torch.testing.assert_close(together, one_by_one)
        (first,) = torch.autograd.grad(out, x, given[0], create_graph=True)
        torch.testing.assert_close(first, one_by_one[0])
    torch.autograd.gradcheck(OF_ONE_TENSOR[name], x, fast_mode=True)
