"""Host overhead on tiny problems, with pytest-benchmark; run with ``--benchmark-enable`` to see the times.

Under ``--benchmark-disable``, as in ``make test``, each runs once and only its result is checked.
"""

import pytest
import torch

import fastattn
from fastattn.measure.peers import EAGER, SDPA, fastattn_peer, pass_call
from fastattn.measure.workload import Operands, Workload

TINY = Workload(s_q=16, s_kv=16, heads_q=1, heads_kv=1, d_qk=16, d_v=16, dtype="fp32", causal=True)
LONGER = Workload(s_q=512, s_kv=512, heads_q=2, heads_kv=2, d_qk=64, d_v=64, dtype="fp32", causal=True)
PEERS = {
    peer.name: peer
    for peer in (SDPA, EAGER, fastattn_peer(None), *(fastattn_peer(name) for name in fastattn.backends()))
}


@pytest.mark.parametrize("workload", [TINY, LONGER], ids=["tiny", "longer"])
@pytest.mark.parametrize("pass_name", ["forward", "both"])
@pytest.mark.parametrize("peer", PEERS.values(), ids=PEERS)
def test_call(benchmark, peer, pass_name, workload):
    why = peer.reasons(workload, "cpu")
    if why:
        pytest.skip(reason="; ".join(why))
    operands = Operands.of(workload, torch.device("cpu"))
    benchmark.group = f"{workload.id}, {pass_name}"
    out, gradients = benchmark(pass_call(peer.prepare(operands), operands, pass_name))
    assert out.shape == operands.dout.shape
    assert [gradient.shape for gradient in gradients] == [x.shape for x in operands.leaves.values() if gradients]


def test_explain(benchmark):
    q = torch.randn(1, 16, 1, 16)
    assert benchmark(fastattn.explain, q, q, q, causal=True).chosen is not None
