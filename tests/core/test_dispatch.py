"""The choice of a backend: which one, why not the others, and that it is loud."""

import dataclasses
import threading
import warnings

import pytest
import torch

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


def test_explain_computes_nothing_and_leaves_no_trace():
    q = torch.randn(1, 16, 2, 8, requires_grad=True)
    explained = fastattn.explain(q, q, q, causal=True, dropout_p=0.1)
    assert explained.chosen in BACKENDS and explained.reasons["eager"] == []
    assert explained.problem.features == {"band", "dropout"}
    assert fastattn.attention(q, q, q).grad_fn is not None
    with pytest.raises(fastattn.InputError):
        fastattn.explain(q, q, q, window=3)
    assert fastattn.attention(q, q, q).grad_fn is not None


def test_explain_in_one_thread_leaves_the_others_computing(monkeypatch):
    q = torch.randn(1, 16, 2, 8)
    expected = fastattn.attention(q, q, q)
    found = []
    real = Problem.of

    def meanwhile(*args, **options):
        worker = threading.Thread(target=lambda: found.append(fastattn.attention(q, q, q)))
        monkeypatch.setattr(Problem, "of", real)
        worker.start()
        worker.join()
        return real(*args, **options)

    monkeypatch.setattr(Problem, "of", meanwhile)
    assert fastattn.explain(q, q, q).chosen in BACKENDS
    assert torch.equal(found[0], expected)


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
