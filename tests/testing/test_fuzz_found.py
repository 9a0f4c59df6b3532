"""Problems that random search found: each once failed on a backend, and runs on all of them since."""

import dataclasses

import pytest
import torch

import fastattn
from fastattn import dispatch
from fastattn.testing import Case
from fastattn.testing.fuzz import Trial
from fastattn.testing.tolerance import Row
from fastattn.testing.verify import judge

USABLE = [name for name, why in dispatch.backends().items() if why is None]
FOUND = {
    # The gradient of the bias of a key in a run of keys that segments skip was that of the sequence before.
    "bias beside skipped segments": (
        Case(id="found", B=3, S_q=4, S_kv=65, H_q=1, H_kv=1, D_qk=16, bias=(1, 1, 4, 65), segments=2), 5121,
    ),
    # The weight of the largest score was not quite 1 in bf16, which lse shows.
    "one key of score zero": (
        Case(id="found", S_q=1, S_kv=1, D_qk=1, D_v=1, dtype=torch.bfloat16, magnitude=0.0), 9055,
    ),
    # The gradient of the entropy was NaN: a weight of 0 times the logarithm of finfo.min's exponential.
    "entropy of a row with padding": (
        Case(id="found", B=3, S_q=2, S_kv=2, D_qk=1, D_v=1, bias=(3, 1, 1, 2), bias_values="padding"), 7,
    ),
    # The bound forgot that sums over keys and query rows round, where eager in fp64 is the exact result itself.
    "statistics in fp64": (
        Case(id="found", B=1, S_q=33, S_kv=15, H_q=6, D_qk=8, D_v=1, dtype=torch.float64, magnitude=0.001), 520,
    ),
    # A mask that all query rows share did not fit the rows of the heads in a group, looked at where a value is NaN.
    "padding of NaN, grouped": (
        Case(id="found", B=1, S_q=2, S_kv=2, H_q=6, H_kv=3, D_qk=1, D_v=1, mask="padding", nan_rows=True), 8807,
    ),
    # The weight of a sink of 1e-160 was taken from what the others leave of 1, and so was the bound of its gradient.
    "sinks far below the scores": (
        Case(id="found", S_q=7, S_kv=7, H_q=6, D_v=1, dtype=torch.float64, sinks=True, magnitude=300.0), 11056,
    ),
    # A gradient of 1e-256 had no bound: its square is 0 in fp64.
    "a gradient whose square underflows": (
        Case(
            id="found", S_q=16, S_kv=14, H_q=1, H_kv=1, D_qk=40, D_v=1, dtype=torch.float64, right=0, sinks=True,
            magnitude=300.0,
        ), 4007,
    ),
    # The bound was NaN: the square of such a bias overflows in fp64.
    "padding in fp64": (
        Case(id="found", S_q=2, S_kv=1, D_qk=1, D_v=2, dtype=torch.float64, bias=(1, 1, 2, 1), bias_values="padding"),
        1079,
    ),
}  # fmt: skip


@pytest.mark.parametrize("backend", USABLE)
@pytest.mark.parametrize(("case", "seed"), FOUND.values(), ids=FOUND)
def test_it_stays_right(backend, case, seed):
    result = judge(backend, case, seed=seed)
    assert result.ok, result


@pytest.mark.parametrize("backend", USABLE)
def test_no_sequence_with_slopes_for_each(backend):
    q, none = torch.randn(0, 4, 16), torch.zeros(1, dtype=torch.int32)
    options = {"alibi_slopes": torch.ones(0, 4), "max_seqlen_q": 0, "max_seqlen_kv": 0}
    assert fastattn.attention_varlen(q, q, q, none, none, **options, backend=backend).shape == q.shape


@pytest.mark.parametrize("backend", sorted({*USABLE} & {"cpu", "portable", "eager"}))
def test_heads_of_a_bias_that_all_rows_share(backend):
    """As with a mask; kernels for GPUs find no unused keys in a bias (docs/decisions/empty_rows.md)."""
    case = Case(id="found", S_q=2, S_kv=2, H_q=3, H_kv=1, bias=(2, 3, 1, 2), bias_values="infinity", nan_rows=True)
    result = judge(backend, case, seed=61)
    assert result.ok, result


@pytest.mark.skipif("cpu" not in USABLE, reason="no C++ compiler")
def test_eager_is_exact_by_chance():
    """One element in bf16 whose weights round: a miss for these values alone is none of the backend."""
    case = Case(
        id="found", dtype=torch.bfloat16, lengths=((7, 0), (1, 7)), H_q=1, H_kv=1, D_qk=1, D_v=1, magnitude=1e-3
    )
    case = dataclasses.replace(case, anchor="upper_left", alibi=True)
    trial = Trial(judge("cpu", case, seed=10192, parts=("passes",)), "cpu", 10192, "passes")
    assert not trial.result.ok and trial.is_by_chance and not trial.failed
    off = dataclasses.replace(trial.result, rows=(Row("out max", 3.0, 0.1, 0.2, ok=False),))
    assert dataclasses.replace(trial, result=off).failed


@pytest.mark.parametrize("backend", USABLE)
def test_one_column_of_any_stride(backend):
    """Padding such queries left them in channels-last order, which the kernel below took for another."""
    q, k, v = torch.randn(1, 2, 3, 1), torch.randn(1, 1, 3, 1), torch.randn(1, 1, 3, 2)
    if fastattn.explain(q, k, v).reasons[backend]:
        pytest.skip(f"{backend} does not serve it")
    strided = torch.empty_strided(q.shape, (6, 1, 2, 2)).copy_(q)
    assert torch.equal(fastattn.attention(strided, k, v, backend=backend), v.expand(1, 2, 3, 2))
