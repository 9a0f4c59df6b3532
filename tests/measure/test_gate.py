"""The gate passes right results and fails each kind of wrong one, which then gets no number."""

import dataclasses

import pytest
import torch

import fastattn
from fastattn.measure import comparison, correctness, peers
from fastattn.measure.workload import Operands, Workload

CPU = torch.device("cpu")
BASE = Workload(s_q=192, s_kv=192, heads_q=4, heads_kv=2, d_qk=32, d_v=32, dtype="fp32", causal=True)
WORKLOADS = {
    "full": dataclasses.replace(BASE, causal=False),
    "causal": BASE,
    "bf16": dataclasses.replace(BASE, dtype="bf16"),
    "batch": dataclasses.replace(BASE, batch=3, s_q=64, s_kv=64),
    "more keys": dataclasses.replace(BASE, s_q=40),
    "window": dataclasses.replace(BASE, window=(20, 0)),
    "softcap": dataclasses.replace(BASE, softcap=5.0),
    "alibi": dataclasses.replace(BASE, alibi=True),
    "sinks": dataclasses.replace(BASE, sinks=True),
    "bias": dataclasses.replace(BASE, bias=True, batch=2),
    "constant bias": dataclasses.replace(BASE, bias=True, bias_grad=False),
    "mask": dataclasses.replace(BASE, mask=True, causal=False),
    "scattered mask": dataclasses.replace(BASE, mask=True, scattered=True, causal=False),
    "documents": dataclasses.replace(BASE, documents=4, batch=2),
    "packed": dataclasses.replace(BASE, documents=4, packed=True),
    "many lengths": dataclasses.replace(BASE, documents=12, packed=True, spread=(5, 19), s_q=126, s_kv=126),
    "a window in many lengths": dataclasses.replace(
        BASE, documents=3, packed=True, spread=(5, 19), s_q=18, s_kv=18, window=(2, 0)
    ),
    "two head dims": dataclasses.replace(BASE, d_v=16),
    "dropout": dataclasses.replace(BASE, dropout_p=0.2),
    "one query": dataclasses.replace(BASE, s_q=1),
}
PEERS = {peer.name: peer for peer in (peers.fastattn_peer("eager"), peers.fastattn_peer(None), peers.EAGER, peers.SDPA)}


@pytest.mark.parametrize("peer", PEERS.values(), ids=PEERS)
@pytest.mark.parametrize("workload", WORKLOADS.values(), ids=WORKLOADS)
def test_right_results_are_green(workload, peer):
    why = peer.reasons(workload, "cpu")
    if why:
        pytest.skip(reason="; ".join(why))
    operands = Operands.of(workload, CPU)
    for pass_name in ("forward", "both"):
        verdict = correctness.check(peer.prepare(operands), operands, pass_name)
        assert verdict.ok, verdict


def planted(fault):
    """A peer like fastattn on eager, but for ``fault(operands, out)``."""

    def prepare(operands):
        forward = peers.fastattn_peer("eager").prepare(operands)
        return lambda: fault(operands, forward())

    return peers.Peer("planted", lambda workload, device_type: [], prepare)


class WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, out, factor):
        ctx.factor = factor
        return out.clone()

    @staticmethod
    def backward(ctx, dout):
        return dout * ctx.factor, None


def recomputed(**changes):
    def fault(operands, out):
        options = {"causal": True, "backend": "eager"} | changes
        return fastattn.attention(operands.q, operands.k, operands.v, **options)

    return fault


def one_row_dropped(operands, out):
    rows = correctness.Part.of(operands).rows
    keep = torch.ones(out.shape[1], dtype=torch.bool)
    keep[rows[5]] = False
    return torch.where(keep[None, :, None, None], out, 0)


FAULTS = {
    "scale": recomputed(scale=0.9 * 32**-0.5),
    "window one off": recomputed(window=(100, 0)),
    "not causal": recomputed(causal=False),
    "a row dropped": one_row_dropped,
    "not finite": lambda operands, out: torch.where(torch.arange(192)[None, :, None, None] == 191, torch.nan, out),
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_wrong_outputs_are_red(fault, dtype):
    operands = Operands.of(dataclasses.replace(BASE, dtype=dtype), CPU)
    verdict = correctness.check(planted(fault).prepare(operands), operands, "forward")
    assert not verdict.ok and verdict.worst > 1 and str(verdict).startswith("red")


def test_wrong_gradients_are_red_and_the_forward_pass_stays_green():
    operands = Operands.of(BASE, CPU)
    forward = planted(lambda operands, out: WrongGradient.apply(out, 1.01)).prepare(operands)
    assert correctness.check(forward, operands, "forward").ok
    verdict = correctness.check(forward, operands, "both")
    assert not verdict.ok and verdict.where.startswith("d")


def test_a_gradient_where_there_is_none_is_red():
    """dout is zero outside the sampled rows, so a gradient elsewhere is wrong, however small."""
    operands = Operands.of(BASE, CPU)

    def leaks(operands, out):
        return out + 0 * operands.q.mean() + (operands.q - operands.q.detach()).sum() * 1e-3

    verdict = correctness.check(planted(leaks).prepare(operands), operands, "both")
    assert not verdict.ok and "where dout is zero" in verdict.where


def test_the_part_has_rows_in_every_tile_and_distinct_heads():
    long = dataclasses.replace(BASE, s_q=8192, s_kv=8192, heads_q=8, heads_kv=4)
    part = correctness.Part.of(Operands.of(dataclasses.replace(long, d_qk=8, d_v=8), CPU))
    assert len(part.rows) == correctness.ROWS and len({head for _, head in part.pairs}) == correctness.SLICES
    assert len(torch.unique(part.rows // 64)) == 8192 // 64


def test_a_red_gate_prints_no_number():
    effort = comparison.Effort(rounds=3, round_s=0.0, budget_s=0.1)
    found = comparison.compare_peers(BASE, [planted(FAULTS["scale"]), PEERS["sdpa"]], CPU, effort)
    for pass_name in BASE.passes:
        red, green = found["planted"]["passes"][pass_name], found["sdpa"]["passes"][pass_name]
        assert red["error"].startswith("red") and not {"median_s", "rounds_s", "tflops", "peak_bytes"} & set(red)
        assert green["median_s"] > 0 and green["gate"].startswith("green") and len(green["rounds_s"]) == 3


def test_a_peer_that_raises_is_a_row():
    def prepare(operands):
        raise RuntimeError("no kernel\n for this")

    broken = peers.Peer("broken", lambda workload, device_type: [], prepare)
    failing = planted(lambda operands, out: out[..., :-1])
    forward_only = dataclasses.replace(peers.EAGER, has_backward=False)
    effort = comparison.Effort(rounds=1, round_s=0.0)
    found = comparison.compare_peers(BASE, [broken, failing, forward_only], CPU, effort)
    assert found["broken"]["why"] == "RuntimeError: no kernel for this"
    assert "error" in found["planted"]["passes"]["forward"]
    assert found["eager"]["passes"]["forward"]["median_s"] > 0
    assert found["eager"]["passes"]["both"] == {"error": "forward only"}


def test_a_peer_that_would_not_fit_is_refused_before_it_is_tried():
    huge = dataclasses.replace(BASE, s_q=1 << 22, s_kv=1 << 22, heads_q=64, passes=())
    found = comparison.compare_peers(huge, [peers.EAGER], CPU, comparison.Effort())
    assert "its score matrices need about" in found["eager"]["why"]
