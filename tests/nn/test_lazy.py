"""Attention weights that are computed when they are first read: ways to read them, gradients, changes in place."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from fastattn import InputError, MultiHeadAttention, inspection, state, use_backend, weights
from fastattn.nn import lazy
from fastattn.nn.lazy import LazyTensor

E, H, N, S = 32, 4, 2, 6


@pytest.fixture(autouse=True)
def always_lazy(monkeypatch):
    """Few scores, such as those below, are otherwise computed at once."""
    monkeypatch.setattr(lazy, "LITTLE", 0)


def pair():
    theirs = nn.MultiheadAttention(E, H, batch_first=True, dtype=torch.float64)
    ours = MultiHeadAttention(E, H, batch_first=True, dtype=torch.float64)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours, torch.randn(N, S, E, dtype=torch.float64)


def is_read(weights):
    return weights._source.result is not None


def saved(x):
    file = io.BytesIO()
    torch.save(x, file)
    file.seek(0)
    return torch.load(file)


LOOKS = {
    "method": lambda w: w.sum(), "index": lambda w: w[0, 1], "operator": lambda w: w + 1, "reflected": lambda w: 1 - w,
    "function": lambda w: torch.stack([w, w]), "keyword": lambda w: torch.cat(tensors=[w, w]),
    "numpy": lambda w: torch.from_numpy(w.detach().numpy()), "tolist": lambda w: torch.tensor(w.tolist()),
    "dtype": lambda w: w.float(), "einsum": lambda w: torch.einsum("bij->bi", w), "view": lambda w: w.view(N, -1),
    "iteration": lambda w: torch.stack(list(w)), "repr": lambda w: torch.tensor(list(map(ord, repr(w.detach())))),
    "pickle": lambda w: pickle.loads(pickle.dumps(w.detach())), "deepcopy": lambda w: copy.deepcopy(w.detach()),
    "save": lambda w: saved(w.detach()), "compare": lambda w: w > 0.1,
    "copy into": lambda w: torch.zeros(N, S, S, dtype=w.dtype).copy_(w),
    "out": lambda w: torch.mul(w.detach(), 2, out=torch.empty(N, S, S, dtype=w.dtype)), "data": lambda w: w.data * 1,
    "module": lambda w: nn.Linear(S, 2, dtype=w.dtype).requires_grad_(False).apply(ones)(w),
}  # fmt: skip


def ones(module):
    for parameter in module.parameters():
        nn.init.ones_(parameter)


@pytest.mark.parametrize("look", LOOKS.values(), ids=LOOKS.keys())
def test_every_look_sees_the_tensor(look):
    theirs, ours, x = pair()
    weights = ours(x, x, x)[1]
    found, expected = look(weights), look(theirs(x, x, x)[1])
    assert not isinstance(found, LazyTensor)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("average", [True, False])
@pytest.mark.parametrize("unbatched", [True, False])
def test_nothing_is_computed_for_what_is_known(average, unbatched):
    theirs, ours, x = pair()
    x = x[0] if unbatched else x
    weights, expected = (m(x, x, x, average_attn_weights=average)[1] for m in (ours, theirs))
    assert isinstance(weights, LazyTensor) and isinstance(weights, torch.Tensor)
    for known in ("shape", "dtype", "device", "layout", "requires_grad", "ndim", "is_cuda"):
        assert getattr(weights, known) == getattr(expected, known)
    assert (weights.dim(), weights.size(-1), weights.numel(), len(weights)) == (
        expected.dim(), expected.size(-1), expected.numel(), len(expected),
    )  # fmt: skip
    assert not is_read(weights)
    torch.testing.assert_close(weights + 0, expected)


class Squares(torch.autograd.Function):
    """Reads its argument without a Python operation of torch's."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square().sum()

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad * ctx.saved_tensors[0]


USES = {
    "weights": lambda m, x: m(x, x, x)[1].square().sum(),
    "both": lambda m, x: sum(y.square().sum() for y in m(x, x, x)),
    "autograd.Function": lambda m, x: Squares.apply(m(x, x, x)[1]),
    "checkpoint": lambda m, x: sum(y.square().sum() for y in checkpoint(m, x, x, x, use_reentrant=False)),
    "reentrant checkpoint": lambda m, x: sum(y.square().sum() for y in checkpoint(m, x, x, x, use_reentrant=True)),
}


@pytest.mark.parametrize("use", USES.values(), ids=USES.keys())
@pytest.mark.parametrize("hooked", [False, True])
def test_gradients(use, hooked):
    theirs, ours, x = pair()
    grads = []
    for module in (theirs, ours):
        if hooked:
            module.register_full_backward_hook(lambda *_: None)
        leaf = x.clone().requires_grad_()
        use(module, leaf).backward()
        grads.append((leaf.grad, module.in_proj_weight.grad))
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode):
    theirs, ours, x = pair()
    with mode():
        weights, expected = (m(x, x, x)[1] for m in (ours, theirs))
        assert not is_read(weights)
    assert not weights.requires_grad
    torch.testing.assert_close(weights.clone(), expected.clone())


def test_a_mask_that_changes_in_place_is_noticed():
    _, ours, x = pair()
    for change in (False, True):
        mask = torch.zeros(S, S, dtype=torch.float64)
        weights = ours(x, x, x, attn_mask=mask)[1]
        if change:
            mask[0, 0] = -1.0
            with pytest.raises(InputError, match="changed in place"):
                weights.sum()
        else:
            weights.sum()


def test_inputs_and_boolean_masks_may_change_before_they_are_read():
    """The module owns what it projected, and turned a boolean mask around into a tensor of its own."""
    theirs, ours, x = pair()
    mask = torch.ones(S, S, dtype=torch.bool).triu(1)
    expected = theirs(x, x, x, attn_mask=mask)[1]
    weights = ours(x, x, x, attn_mask=mask)[1]
    mask.fill_(False)
    x.zero_()
    torch.testing.assert_close(weights + 0, expected)


def test_compiled_they_are_plain_and_dead_code_if_unused():
    theirs, ours, x = pair()
    sizes = []

    def count(graph, inputs):
        return torch._dynamo.backends.debugging.aot_eager(graph, inputs)

    for look in (lambda m: m(x, x, x)[0], lambda m: m(x, x, x)[1]):
        compiled = torch.compile(lambda m=ours, look=look: look(m), fullgraph=True, backend=count)
        found = compiled()
        sizes.append(type(found))
        torch.testing.assert_close(found, look(theirs))
    assert sizes == [torch.Tensor, torch.Tensor]


@pytest.mark.parametrize("budget", [1, 10 * 2**20])
def test_averaging_takes_as_many_heads_at_a_time_as_the_budget_allows(budget, monkeypatch):
    monkeypatch.setattr(weights, "BUDGET", budget)
    q, k = torch.randn(N, S, H, 8), torch.randn(N, S, 2, 8)
    numbers = torch.tensor([3, 0])
    for options in ({}, {"alibi_slopes": torch.rand(H), "dropout_p": 0.3, "rng_state": numbers}):
        with use_backend("eager"):
            mean = inspection.mean_attention_weights(q, k, causal=True, **options)
        torch.testing.assert_close(mean, inspection.attention_weights(q, k, causal=True, **options).mean(1))


@pytest.mark.parametrize("little", [0, 1 << 15])
@pytest.mark.parametrize("grad", [False, True])
def test_a_layer_whose_tokens_are_sharded_leaves_no_rank_to_itself(monkeypatch, little, grad):
    """The attention of all ranks serves the call, however few its scores; weights of one rank would be wrong."""
    _, ours, x = pair()
    monkeypatch.setattr(lazy, "LITTLE", little)
    monkeypatch.setattr(state, "whole_rows", lambda q, k, v, **options: torch.zeros_like(q))
    with torch.set_grad_enabled(grad):
        out, weights = ours(x, x, x)
    torch.testing.assert_close(out, ours.out_proj.bias.expand_as(out))
    with pytest.raises(InputError, match=r"attention weights: got tokens of one rank.*need_weights=False"):
        weights.sum()


@pytest.mark.parametrize("averaged", [True, False])
@pytest.mark.parametrize("layout", ["batch first", "sequence first", "one sequence"])
def test_results_and_gradients_of_every_layout(averaged, layout):
    theirs, ours, x = pair()
    theirs.batch_first = ours.batch_first = layout != "sequence first"
    x = (x[0] if layout == "one sequence" else x).requires_grad_()

    def results(module):
        out, weights = module(x, x, x, average_attn_weights=averaged)
        wanted = [x, module.in_proj_weight, module.out_proj.weight]
        return out, weights * 1, *torch.autograd.grad((out * weights.square().sum()).sum(), wanted)

    for _ in range(2):  # the second time by a plan
        torch.testing.assert_close(results(ours), results(theirs))
