"""The choice of a backend, the reasons against the others, and the warning for a slow one."""

import asyncio
import concurrent.futures
import dataclasses
import inspect
import threading
import types
import warnings

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fastattn
from fastattn import backends as public_backends
from fastattn import dispatch
from fastattn.backends import BACKENDS, load
from fastattn.backends.base import Backend, Capabilities, capability_reasons
from fastattn.problem import FEATURES, Problem, used_features
from fastattn.testing import grid, make

PROBLEM = Problem("cpu", 0, torch.float32, 64, 64, 1, frozenset({"band"}))


def with_changes(**changes):
    return dataclasses.replace(PROBLEM, **changes)


@pytest.mark.parametrize("name", BACKENDS)
def test_a_backend_keeps_the_contract(name):
    backend = load(name)
    assert isinstance(backend, Backend) and backend.name == name
    assert isinstance(backend.capabilities, Capabilities)
    assert backend.unavailable_reason() is None or backend.unavailable_reason()
    assert all(isinstance(reason, str) and reason for reason in backend.unsupported_reasons(PROBLEM))


def test_eager_is_last_and_serves_everything():
    assert BACKENDS[-1] == "eager"
    assert load("eager").unsupported_reasons(with_changes(features=frozenset(FEATURES), head_dim_qk=1000)) == []
    assert public_backends()["eager"] is None and tuple(public_backends()) == BACKENDS


@pytest.mark.parametrize(
    ("capabilities", "problem", "reason"),
    [
        ({"devices": frozenset({"cuda"})}, {}, "device cpu (has cuda)"),
        ({"min_arch": 90}, {"device": "cuda", "arch": 80}, "compute capability 8.0 (needs 9.0)"),
        ({"dtypes": (torch.float16,)}, {}, "dtype torch.float32 (has torch.float16)"),
        ({"max_head_dim": 128}, {"head_dim_v": 192}, "head dim 64/192 (at most 128)"),
        ({"features": frozenset()}, {}, "no band"),
        ({"deterministic": False}, {"deterministic": True}, "not deterministic"),
    ],
)
def test_each_reason(capabilities, problem, reason):
    assert capability_reasons(Capabilities(**capabilities), with_changes(**problem)) == [reason]
    assert capability_reasons(Capabilities(), with_changes(**problem)) == []


def test_capabilities_know_their_features():
    with pytest.raises(ValueError, match=r"unknown features.*bend"):
        Capabilities(features=frozenset({"bend"}))


def test_every_feature_is_seen_and_is_in_the_grid():
    samples = (make(case) for case in grid([torch.float32]))
    assert {feature for s in samples for feature in used_features(s.inputs, s.spec)} == set(FEATURES)


class Picky(Backend):
    name = "picky"
    capabilities = Capabilities(features=frozenset(), max_head_dim=8)
    forward = backward = None


@pytest.fixture
def picky(monkeypatch):
    """A registry of a backend that can do little, and eager."""
    real = load
    monkeypatch.setattr(dispatch, "BACKENDS", ("picky", "eager"))
    monkeypatch.setattr(dispatch, "load", lambda name: Picky() if name == "picky" else real(name))
    dispatch.reasons.cache_clear()
    dispatch._warn_slow.cache_clear()
    yield
    dispatch.reasons.cache_clear()
    dispatch._warn_slow.cache_clear()


@pytest.mark.usefixtures("picky")
def test_the_first_that_can_is_chosen():
    assert dispatch.select(with_changes(features=frozenset(), head_dim_qk=8, head_dim_v=8)).name == "picky"
    assert dispatch.select(PROBLEM).name == "eager"


@pytest.mark.usefixtures("picky")
def test_what_is_asked_for_runs_or_raises():
    assert dispatch.select(PROBLEM, "eager").name == "eager"
    with pytest.raises(fastattn.UnsupportedError) as caught:
        dispatch.select(PROBLEM, "picky")
    message = str(caught.value)
    assert "backend='picky' cannot serve this call" in message
    assert "picky: head dim 64/64 (at most 8); no band" in message
    assert "Use backend=None" in message and "fastattn.explain" in message


def test_nobody_can(monkeypatch):
    monkeypatch.setattr(dispatch, "BACKENDS", ("picky",))
    monkeypatch.setattr(dispatch, "load", lambda name: Picky())
    dispatch.reasons.cache_clear()
    with pytest.raises(fastattn.UnsupportedError, match=r"no backend can serve this call:\n  picky: .*no band"):
        dispatch.select(PROBLEM)
    dispatch.reasons.cache_clear()


@pytest.mark.usefixtures("picky")
def test_explanations_print_every_backend():
    text = str(dispatch.Explanation.of(PROBLEM))
    assert text.splitlines()[0] == "cpu torch.float32, head dims 64/64, uses: band"
    assert "     picky      head dim 64/64 (at most 8); no band" in text
    assert "  -> eager      chosen" in text
    easy = dispatch.Explanation.of(with_changes(features=frozenset(), head_dim_qk=8, head_dim_v=8))
    assert easy.chosen == "picky" and easy.reasons == {"picky": [], "eager": []}
    assert "nothing special" in str(easy) and "can serve it too" in str(easy)


@pytest.mark.usefixtures("picky")
def test_eager_on_an_accelerator_warns_once():
    on_gpu = with_changes(device="cuda", arch=90)
    with pytest.warns(UserWarning, match=r"slow 'eager'.*serves cuda tensors \(picky: .*no band\)"):
        assert dispatch.select(on_gpu).name == "eager"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dispatch.select(on_gpu)  # said already
        dispatch.select(PROBLEM)  # a CPU is what eager is for
        dispatch.select(on_gpu, "eager")  # asked for


EXPLAINED = {fastattn.attention: fastattn.explain, fastattn.attention_varlen: fastattn.explain_varlen,
             fastattn.attention_with_kv_cache: fastattn.explain_with_kv_cache}  # fmt: skip


@pytest.mark.parametrize("function", EXPLAINED, ids=lambda function: function.__name__)
def test_explain_takes_the_arguments_of_what_it_explains(function):
    def parameters(f):
        return [(p.name, p.kind, p.default) for p in inspect.signature(f).parameters.values()]

    assert parameters(EXPLAINED[function]) == parameters(function)


class Watch(TorchDispatchMode):
    """The operators called inside."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


def test_explain_computes_nothing():
    """No operator but views, so no memory; no random number; nothing appended; no check of values."""
    q = torch.randn(1, 16, 2, 8, requires_grad=True)
    packed, cu_seqlens = q.detach()[0], torch.tensor([0, 16], dtype=torch.int32)
    cache, lengths = torch.zeros(1, 32, 2, 8), torch.tensor([5], dtype=torch.int32)
    before = torch.get_rng_state()
    with Watch() as watch:
        dense = fastattn.explain(q, q, q, causal=True, dropout_p=0.1, return_weights=True, bias=torch.zeros(()))
        varlen = fastattn.explain_varlen(
            packed, packed, packed, cu_seqlens, cu_seqlens, max_seqlen_q=16, max_seqlen_kv=16, dropout_p=0.1
        )
        new = q[:, :1].detach()
        cached = fastattn.explain_with_kv_cache(new, cache, cache, lengths, new, new)
    assert torch.equal(torch.get_rng_state(), before) and not cache.any()
    assert all(op.is_view or op in (torch.ops.aten.detach.default, torch.ops.aten.zeros.default) for op in watch.seen)
    assert dense.problem.features == {"band", "bias", "dropout"} and dense.problem.needs_grad
    assert "packed" in varlen.problem.features and "append" in cached.problem.features
    assert all(found.chosen in BACKENDS and found.reasons["eager"] == [] for found in (dense, varlen, cached))
    with pytest.raises(fastattn.InputError):
        fastattn.explain(q, q, q, window=3)
    assert fastattn.attention(q, q, q).grad_fn is not None


def test_explain_names_the_backend_that_derives_for_another(monkeypatch):
    """One without jvp and statistics leaves them to the first that has them."""
    lacking = types.SimpleNamespace(
        unsupported_reasons=lambda problem: capability_reasons(Capabilities(), problem), automatic_reasons=lambda _: []
    )
    monkeypatch.setattr(dispatch, "BACKENDS", ("lacking", "eager"))
    monkeypatch.setattr(dispatch, "load", lambda name: lacking if name == "lacking" else load(name))
    dispatch.reasons.cache_clear()
    found = dispatch.Explanation.of(PROBLEM)
    assert found.chosen == "lacking" and found.delegates == {"jvp": "eager", "statistics": "eager"}
    assert "eager computes Jacobian-vector products and second derivatives; lacking has none" in str(found)
    monkeypatch.setattr(dispatch, "BACKENDS", ("lacking",))
    dispatch.reasons.cache_clear()
    assert "no backend computes statistics of the weights" in str(dispatch.Explanation.of(PROBLEM))
    dispatch.reasons.cache_clear()
    assert "computes" not in str(dispatch.Explanation("eager", {"eager": []}, PROBLEM, {}, {"jvp": "eager"}))


def test_threads_and_tasks_choose_for_themselves():
    """Overlapping choices neither disturb each other nor outlive their blocks."""
    turn = threading.Barrier(4, timeout=30)

    def choose(name):
        assert dispatch.requested(None) is None
        with fastattn.use_backend(name):
            turn.wait()
            found = dispatch.requested(None)
            turn.wait()
        return found, dispatch.requested(None)

    names = ["eager", "portable", "eager", None]
    with fastattn.use_backend("eager"), concurrent.futures.ThreadPoolExecutor(4) as pool:
        assert list(pool.map(choose, names)) == [(name, None) for name in names]

    async def task(name):
        with fastattn.use_backend(name):
            await asyncio.sleep(0)
            return dispatch.requested(None)

    async def tasks():
        return await asyncio.gather(*(task(name) for name in names))

    assert asyncio.run(tasks()) == names


def test_use_backend_nests_and_restores():
    with fastattn.use_backend("eager"):
        assert dispatch.requested(None) == "eager"
        with fastattn.use_backend(None):
            assert dispatch.requested(None) is None
        with pytest.raises(RuntimeError), fastattn.use_backend(BACKENDS[0]):
            raise RuntimeError
        assert dispatch.requested(None) == "eager"
        assert dispatch.requested(BACKENDS[0]) == BACKENDS[0]
    assert dispatch.requested(None) is None


def test_unknown_names_are_refused():
    q = torch.randn(1, 4, 2, 8)
    for use in (lambda: fastattn.use_backend("x").__enter__(), lambda: fastattn.attention(q, q, q, backend="x")):
        with pytest.raises(fastattn.InputError, match=r"backend: got 'x'; allowed: None, .*'eager'"):
            use()
    with pytest.raises(KeyError):
        load("x")
