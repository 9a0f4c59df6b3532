"""Problems that random search found: each once failed on a backend, and runs on all of them since."""

import dataclasses

import pytest
import torch

import fastattn
from fastattn import dispatch
from fastattn.backends.eager import EagerBackend
from fastattn.testing import Case, assert_within, make
from fastattn.testing.fuzz import Trial
from fastattn.testing.tolerance import Limits, Row
from fastattn.testing.verify import judge
from fastattn.testing.ways import measure_way

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
    # All rows of fifty are alike, and so are their roundings: the sums of their weights move by fifty times one.
    "rows that are alike": (Case(id="found", B=1, S_q=50, S_kv=3, H_q=1, H_kv=1, D_qk=1, D_v=1, magnitude=1e-3), 39800),
    # The exact result, in fp64 too, was taken for free of rounding: its products of 512 numbers are summed in order.
    "products of 512 numbers in fp64": (
        Case(
            id="found", H_q=1, H_kv=1, D_qk=512, D_v=1, dtype=torch.float64, lengths=((15, 4), (31, 1), (16, 7)),
            magnitude=300.0,
        ), 62974,
    ),
    # The weights of a row share the rounding of its lse, which does not average out over the keys.
    "weights that share an error": (
        Case(
            id="found", S_q=15, S_kv=128, H_q=1, H_kv=1, D_qk=512, D_v=512, dtype=torch.float64, anchor="upper_left",
            alibi=True, magnitude=1e-3,
        ), 67508,
    ),
    # torch's kernel rounds exponentials to some 14 bits in fp16; lse is their logarithm, near 0 with one key.
    "one key in fp16": (
        Case(
            id="found", B=1, S_q=16, S_kv=16, H_q=1, H_kv=1, D_qk=1, D_v=1, dtype=torch.float16, left=0, right=0,
            magnitude=1e-3,
        ), 85665,
    ),
}  # fmt: skip
FOUND_IN_WAYS = {
    # A tangent of a bias that all pairs share moves lse by itself, but for what rounding took from the sum of weights.
    "double backward of equal scores": (
        Case(
            id="found", B=1, S_q=7, S_kv=48, H_q=3, H_kv=1, D_qk=6, D_v=24, dtype=torch.float64, bias=(1, 1, 1, 1),
            magnitude=0.0,
        ), 87259, "double backward",
    ),
    # A tangent of 186,000 is stored as infinity in fp16, and was called wrong.
    "double backward beyond fp16": (
        Case(id="found", S_q=32, S_kv=48, H_q=4, D_qk=8, D_v=8, dtype=torch.float16, magnitude=300.0), 90119,
        "double backward",
    ),
    # A key of NaN that a bias of -inf hides made the row NaN.
    "a cache with NaN behind a bias": (
        Case(id="found", B=1, S_q=1, S_kv=1, H_q=1, H_kv=1, D_qk=8, bias=(1, 1, 1, 1), bias_values="infinity",
             nan_rows=True),
        41066, "cache",
    ),
}  # fmt: skip


@pytest.mark.parametrize("backend", USABLE)
@pytest.mark.parametrize(("case", "seed"), FOUND.values(), ids=FOUND)
def test_it_stays_right(backend, case, seed):
    result = judge(backend, case, seed=seed)
    assert result.ok, result


@pytest.mark.parametrize("backend", sorted({*USABLE} & {"cpu", "portable", "eager"}))
@pytest.mark.parametrize(("case", "seed", "way"), FOUND_IN_WAYS.values(), ids=FOUND_IN_WAYS)
def test_it_stays_right_in_this_way(backend, case, seed, way):
    assert_within(measure_way(way, make(case, seed=seed), backend))


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


def test_a_fault_that_few_values_show_is_none_of_chance(monkeypatch):
    """Other values are right, but the result is also outside of the bound that they have."""

    class Rare(EagerBackend):
        """Wrong by a little where one of a dozen queries begins with a large number."""

        def forward(self, inputs, spec):
            out, lse, low = super().forward(inputs, spec)
            return out * (1.05 if float(inputs.q.flatten()[0]) > 1.3 else 1.0), lse, low

    monkeypatch.setattr("fastattn.testing.tolerance.load", lambda name: Rare())
    case, found = Case(id="found", dtype=torch.bfloat16, S_q=9, S_kv=9, H_q=1, H_kv=1, D_qk=8), []
    for seed in range(20):
        result = judge("eager", case, seed=seed, parts=("passes",))
        if not result.ok:
            found.append(Trial(result, "cpu", seed, "passes"))
    assert found and all(trial.result.worst.strain < 10 and trial.failed for trial in found)


def test_a_small_result_in_fp64_has_a_bound():
    """The floor below which squares underflow lets nothing pass that is larger than itself."""
    for size in (1e-100, 1e-150, 1e-165):
        exact = torch.tensor([size], dtype=torch.float64)
        condition = exact.square().sqrt()
        limits = Limits.of(exact, exact, condition, torch.float64, torch.float64, (2.0, 4.0))
        assert all(row.ok for row in limits.judge("dq", exact * (1 + 2.0**-52)))
        assert not any(row.ok for row in limits.judge("dq", exact * 1.001))
        assert not any(row.ok for row in limits.judge("dq", exact * 0))


def test_what_a_dtype_cannot_hold_is_infinite():
    exact = torch.tensor([1e5, -2e5, 10.0], dtype=torch.float64)
    limits = Limits.of(exact, exact, exact.abs() * 1e-3, torch.float16, torch.float32, (2.0, 4.0))
    inf, nan = float("inf"), float("nan")

    def judged(*found):
        return all(row.ok for row in limits.judge("dq", torch.tensor(found, dtype=torch.float16)))

    assert judged(inf, -inf, 10)
    assert not any(judged(*found) for found in ((inf, inf, 10), (nan, -inf, 10), (inf, -inf, inf), (100, -inf, 10)))


@pytest.mark.parametrize("backend", USABLE)
def test_one_column_of_any_stride(backend):
    """Padding such queries left them in channels-last order, which the kernel below took for another."""
    q, k, v = torch.randn(1, 2, 3, 1), torch.randn(1, 1, 3, 1), torch.randn(1, 1, 3, 2)
    if fastattn.explain(q, k, v).reasons[backend]:
        pytest.skip(f"{backend} does not serve it")
    strided = torch.empty_strided(q.shape, (6, 1, 2, 2)).copy_(q)
    assert torch.equal(fastattn.attention(strided, k, v, backend=backend), v.expand(1, 2, 3, 2))
