"""Attention in C++: the grid on every instruction set, further cases, and tensors that a call must not change."""

import functools
import subprocess
import sys

import pytest
import torch

from fastattn import InputError, intervals
from fastattn.backends import load
from fastattn.backends.cpu import attention, build, derivatives, library, statistics
from fastattn.problem import DIFFERENTIABLE, Inputs, Rows, StatisticsGradient, Tangents
from fastattn.spec import AttentionSpec
from fastattn.testing import Case, assert_within, grid, make
from fastattn.testing.derivatives import DerivativeYardstick, measure_derivatives
from fastattn.testing.statistics import measure_statistics
from fastattn.testing.tolerance import Yardstick, measure

FOUND, HOW = library.delivered()
try:
    build.find_compiler()
    assert FOUND is not None, HOW  # a kernel that does not compile must not look like a machine without a compiler
except build.BuildError:
    pass
pytestmark = pytest.mark.skipif(FOUND is None, reason=HOW)
MACHINES = [name for name, runs in FOUND.machines().items() if runs] if FOUND else []
NAN = float("nan")


class OnMachine(type(load("cpu"))):
    """The backend with one instruction set."""

    def __init__(self, name):
        self.machine = list(FOUND.machines()).index(name)

    def forward(self, inputs, spec):
        return attention.forward(FOUND, inputs, spec, self.machine)

    def backward(self, dout, dlse, out, lse, lse_low, inputs, spec, needs):
        results = (out, lse, lse_low)
        return attention.backward(FOUND, dout, dlse, results, inputs, spec, needs, machine=self.machine)

    def jvp(self, tangents, results, inputs, spec):
        return derivatives.jvp(FOUND, tangents, results, inputs, spec, machine=self.machine)

    def backward_jvp(self, rows, moved, tangents, inputs, spec, needs):
        return derivatives.backward_jvp(FOUND, rows, moved, tangents, inputs, spec, needs, machine=self.machine)

    def statistics(self, inputs, spec):
        return statistics.forward(FOUND, inputs, spec, machine=self.machine)

    def statistics_backward(self, gradient, inputs, spec, needs):
        return statistics.backward(FOUND, gradient, inputs, spec, needs, machine=self.machine)


BACKENDS = [OnMachine(name) for name in MACHINES]


def assert_right_everywhere(case):
    yardstick = Yardstick(make(case))
    for backend in BACKENDS:
        assert_within(measure(backend, yardstick.sample, yardstick=yardstick))


@pytest.mark.parametrize("case", grid(), ids=lambda case: case.id)
def test_the_grid_on_every_instruction_set(case):
    assert_right_everywhere(case)


@pytest.mark.parametrize("case", grid(quick=True), ids=lambda case: case.id)
def test_derivatives_on_every_instruction_set(case):
    yardstick = DerivativeYardstick(make(case))
    for backend in BACKENDS:
        assert_within(measure_derivatives(backend, yardstick.sample, yardstick=yardstick))
        assert_within(measure_statistics(backend, yardstick.sample))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_head_dims_from_1_to_512(dtype):
    for d_qk, d_v in ((1, 1), (2, 7), (15, 130), (65, 31), (257, 5), (512, 300)):
        sizes = {"S_q": 27, "S_kv": 40, "D_qk": d_qk, "D_v": d_v}
        assert_right_everywhere(Case(f"{d_qk}, {d_v}", **sizes, dtype=dtype, right=0, dlse=True))
    assert load("cpu").capabilities.max_head_dim == attention.MAX_HEAD_DIM == 512


LONG = {
    "blocks": {"S_q": 210, "S_kv": 1100},
    "window": {"S_q": 700, "S_kv": 700, "left": 130, "right": 3, "H_q": 4},
    "parts that no row keeps": {"S_q": 100, "S_kv": 1700, "left": 90, "right": 0},
    "rows that keep no part": {"S_q": 1500, "S_kv": 600, "left": 90, "right": 0},
    "segments": {"S_q": 700, "S_kv": 700, "segments": 4, "right": 0},
    "terms": {"S_q": 300, "S_kv": 640, "bias": (1, 2, 300, 640), "mask": "random", "alibi": True, "softcap": 5.0},
    "intervals": {"S_q": 150, "S_kv": 1300, "intervals": "random", "H_q": 4, "dlse": True, "right": 0},
    "intervals of blocks": {
        "S_q": 300,
        "S_kv": 1100,
        "intervals": "blocks",
        "dropout_p": 0.2,
        "bias": (1, 2, 300, 1100),
    },
    "dropout": {"S_q": 130, "S_kv": 600, "dropout_p": 0.2, "H_q": 6},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", LONG)
def test_more_keys_than_a_block_or_a_part(name, dtype):
    case = Case(name, B=1, dtype=dtype, D_qk=16, D_v=16, **LONG[name])
    assert_right_everywhere(case)
    assert_within(measure_derivatives("cpu", make(case)))


# --- bits -----------------------------------------------------------------------------------------------------------


def problem(batch, rows, heads, dim, dtype=torch.float32, **options):
    """``(dout, inputs, spec)`` of self-attention; ``options`` are fields of the spec and tensors."""
    torch.manual_seed(0)
    q, dout = torch.randn(2, batch, rows, heads[0], dim).to(dtype)
    k, v = torch.randn(2, batch, rows, heads[1], dim).to(dtype)
    of_spec = {name: options.pop(name) for name in ("left", "right", "dropout_p", "softcap") if name in options}
    spec = AttentionSpec(dim**-0.5, **of_spec)
    return dout, Inputs(q, k, v, max_seqlen_q=rows, max_seqlen_kv=rows, **options), spec


def results(dout, inputs, spec, backend=None):
    """Everything that both passes give."""
    backend = backend or load("cpu")
    found = backend.forward(inputs, spec)
    needs = [name for name in DIFFERENTIABLE if getattr(inputs, name) is not None]
    grads = backend.backward(dout, None, *found, inputs, spec, needs)
    by_name = {"out": found[0], "lse": found[1], "low": found[2]} | {f"d{n}": getattr(grads, f"d{n}") for n in needs}
    by_name |= derived(Rows(dout, None, *found), inputs, spec, needs, backend)
    return by_name | described(found[1], inputs, spec, needs, backend)


def described(of_rows, inputs, spec, needs, backend):
    """Statistics of the weights, and the gradients of some."""
    found = backend.statistics(inputs, spec)
    gradient = StatisticsGradient(of_rows.sin(), of_rows.cos(), found.key_sum.cos())
    needs = [n for n in needs if n != "v"]
    grads = backend.statistics_backward(gradient, inputs, spec, needs)
    return found._asdict() | {f"d{n} of statistics": getattr(grads, f"d{n}") for n in needs}


def derived(rows, inputs, spec, needs, backend):
    """Jacobian-vector products of both passes, along what they start from."""
    along = Tangents(**{name: getattr(inputs, name) for name in needs})
    moved = backend.jvp(along, rows, inputs, spec)
    grads = backend.backward_jvp(rows, Rows(rows.dout, None, *moved), along, inputs, spec, needs)
    return {"out'": moved[0], "lse'": moved[1]} | {f"d{n}'": getattr(grads, f"d{n}") for n in needs}


BITS = {
    "one unit of several parts": ((1, 1700, (1, 1), 32), {}),
    "fewer units than threads, causal": ((1, 1100, (3, 1), 32), {"right": 0}),
    "window": ((1, 900, (2, 2), 32), {"left": 70, "right": 3}),
    "window, the last rows of many heads": ((1, 1019, (6, 1), 32), {"left": 70, "right": 0}),
    "intervals": ((1, 1100, (2, 1), 32), {"intervals": intervals.neighbourhood((22, 50), (5, 7))[None, None]}),
    "dropout": ((2, 600, (4, 2), 24), {"dropout_p": 0.3, "rng_state": torch.tensor([1, 2])}),
    "bias of all": ((3, 300, (4, 4), 16), {"bias": torch.ones(1, 1, 300, 300)}),
    "bias of heads": ((3, 300, (4, 2), 16), {"bias": torch.ones(1, 4, 300, 300)}),
    "bias of the batch": ((3, 300, (4, 2), 16), {"bias": torch.ones(3, 1, 1, 300)}),
    "bias of rows": ((2, 700, (2, 2), 16), {"bias": torch.ones(1, 1, 700, 1)}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", BITS)
def test_the_number_of_threads_changes_no_bit(name, dtype):
    sizes, options = BITS[name]
    call = problem(*sizes, dtype=dtype, **options)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(results(*call))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert [name for name, x in other.items() if not torch.equal(x, found[0][name])] == []


SHORT = {  # queries, keys, heads of both, head dim; the first ones are served on tensors as they lie
    "as they lie": (32, 32, (4, 4), 32),
    "parts of vectors and of strips": (13, 61, (4, 2), 16),
    "the longest": (96, 128, (2, 1), 64),
    "one row": (1, 17, (4, 4), 48),
    "more queries than keys": (95, 3, (2, 2), 128),
    "longer than the longest": (97, 129, (2, 1), 64),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", SHORT)
def test_short_sequences_take_another_way_to_the_same_bits(name, dtype):
    s_q, s_kv, heads, dim = SHORT[name]
    for band in ({}, {"right": 0}, {"left": 5, "right": 2}):
        for special in (None, 1e35 if dtype == torch.float32 else 1e305, NAN):
            dout, inputs, spec = problem(2, s_q, heads, dim, dtype=dtype, **band)
            k, v = torch.randn(2, 2, s_kv, heads[1], dim, dtype=dtype)
            inputs = inputs.replace(k=k, v=v, max_seqlen_kv=s_kv)
            if special is not None:
                inputs.v[0, -1, 0, 0] = inputs.k[-1, 0, -1, -1] = inputs.q[0, s_q // 2, 0, 0] = special
            masked = inputs.replace(mask=torch.ones(1, 1, 1, s_kv, dtype=torch.bool))  # takes the way of long ones
            for backend in BACKENDS:
                found, expected = (results(dout, x, spec, backend) for x in (inputs, masked))
                for result, x in expected.items():
                    assert torch.equal(found[result].nan_to_num(), x.nan_to_num()), result


# --- numbers that are not finite, and very large ones ---------------------------------------------------------------


def hidden(rows):
    """Pairs that are kept, all but one key for the first third of the rows; and that key."""
    kept, key = torch.ones(rows, rows, dtype=torch.bool), rows // 2 + 3
    kept[: rows // 3, key] = False
    return kept, key


HIDING = {
    "intervals": lambda kept: {"intervals": intervals.from_mask(kept)[None, None]},
    "mask": lambda kept: {"mask": kept[None, None]},
    "bias of -inf": lambda kept: {"bias": torch.zeros(1, 1, *kept.shape).masked_fill(~kept, -torch.inf)},
    "softcap": lambda kept: {"mask": kept[None, None], "softcap": 3.0},
    "dropout": lambda kept: {"mask": kept[None, None], "dropout_p": 0.2, "rng_state": torch.tensor([3, 4])},
}
BANDS = {"causal": {"right": 0}, "window": {"left": 9, "right": 2}}


def assert_same(found, clean, name, where):
    """The selected rows of a result, to the bit."""
    assert torch.equal(found[name][:, where], clean[name][:, where]), name


@pytest.mark.parametrize("value", [NAN, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", [*HIDING, *BANDS])
@pytest.mark.parametrize("backend", BACKENDS, ids=MACHINES)
def test_what_a_row_does_not_keep_never_reaches_it(backend, name, value):
    rows = 150
    kept, key = hidden(rows)
    options = HIDING[name](kept) if name in HIDING else BANDS[name]
    if name in BANDS:
        kept = torch.ones_like(kept).tril(options["right"]).triu(-options.get("left", rows))
    blind, others = ~kept[:, key], torch.arange(rows) != key
    apart = ~kept[~blind].any(0)  # keys that no row keeps which keeps this one
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        dout, inputs, spec = problem(1, rows, (2, 2), 24, dtype=dtype, **options)
        clean = results(dout, inputs, spec, backend)
        for which in ("k", "v"):
            x = getattr(inputs, which).clone()
            x[:, key] = value
            found = results(dout, inputs.replace(**{which: x}), spec, backend)
            for result, where in (("out", blind), ("dq", blind), ("dk", apart), ("dv", apart)):
                assert_same(found, clean, result, where)
            assert value == value or found["out"][:, ~blind].isnan().all()
        for which in ("q", "dout"):
            x = (dout if which == "dout" else inputs.q).clone()
            x[:, key] = value
            call = (x, inputs) if which == "dout" else (dout, inputs.replace(q=x))
            found = results(*call, spec, backend)
            for result, where in (("out", others), ("dq", others), ("dk", ~kept[key]), ("dv", ~kept[key])):
                assert_same(found, clean, result, where)
            assert value == value or found["dq"][:, key].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_the_largest_values_do_not_overflow(dtype):
    _, inputs, spec = problem(1, 100, (1, 1), 16, dtype=dtype)
    largest = torch.finfo(dtype).max
    inputs = inputs.replace(q=torch.zeros_like(inputs.q), v=torch.full_like(inputs.v, largest))
    for backend in BACKENDS:
        out = backend.forward(inputs, spec)[0]
        assert out.isfinite().all() and (out.double() / largest - 1).abs().max() <= torch.finfo(dtype).eps


@pytest.mark.parametrize("offset", [torch.finfo(torch.float32).min, -1e9, 1e8])
def test_rows_that_share_a_large_offset(offset):
    """All scores of a row are rounded to the offset: weights are equal, in the backward pass too."""
    dout, inputs, spec = problem(1, 64, (2, 2), 16, bias=torch.full((1, 1, 64, 1), offset))
    inputs = inputs.replace(q=inputs.q / 100)
    for backend in BACKENDS:
        found = results(dout, inputs, spec, backend)
        torch.testing.assert_close(found["out"], inputs.v.mean(1, keepdim=True).expand_as(found["out"]))
        torch.testing.assert_close(found["dv"], dout.mean(1, keepdim=True).expand_as(dout))


# --- what a call takes ------------------------------------------------------------------------------------------------


def test_a_long_sequence_takes_little_more_than_its_results():
    """Scores of 16384 x 16384 would take 1 GiB for each head; each thread has some keys and a block of queries."""
    script = (
        "import torch; from fastattn.backends import load; from fastattn.problem import Inputs;"
        "from fastattn.spec import AttentionSpec; from fastattn.measure.memory import process_peak\n"
        "def run(rows):\n"
        "    q, k, v, dout = torch.randn(4, 1, rows, 2, 64)\n"
        "    inputs, spec = Inputs(q, k, v, max_seqlen_q=rows, max_seqlen_kv=rows), AttentionSpec(0.1, right=0)\n"
        "    def both():\n"
        "        results = load('cpu').forward(inputs, spec)\n"
        "        return results, load('cpu').backward(dout, None, *results, inputs, spec, 'qkv')\n"
        "    return process_peak(both)[0]\n"
        "torch.set_num_threads(2)\n"
        "run(64), print(run(16384))"
    )
    taken = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    results = 4 * 16384 * 2 * 64 * 4 + 2 * 16384 * 2 * 4  # out and three gradients, lse in two parts
    assert int(taken.stdout) < results + (4 << 20)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_prepared_passes_give_the_same_bits(dtype):
    backend = load("cpu")
    dout, inputs, spec = problem(2, 40, (4, 2), 16, dtype=dtype, right=0)
    expected, qkv = results(dout, inputs, spec), (inputs.q, inputs.k, inputs.v)
    out, kept = backend.prepared_forward(inputs, spec, keep=True)(*qkv)
    (alone,) = backend.prepared_forward(inputs, spec, keep=False)(*qkv)
    grads = backend.prepared_backward(inputs, spec, dout.to("meta"))(dout, out, kept, *qkv)
    found = (out, alone, *kept, *grads)
    for x, name in zip(found, ("out", "out", "lse", "low", "dq", "dk", "dv"), strict=True):
        assert torch.equal(x, expected[name])
    drawn = inputs.replace(rng_state=torch.tensor([1, 2]))
    assert backend.prepared_forward(drawn, spec, keep=True) is None


def test_ids_of_64_bits_keep_their_differences():
    ids = torch.tensor([[0, 0, 1 << 40, 1 << 40]])
    _, inputs, spec = problem(1, 4, (1, 1), 8, segment_ids_q=ids, segment_ids_kv=ids)
    small = inputs.replace(segment_ids_q=(ids > 0).int(), segment_ids_kv=(ids > 0).int())
    assert torch.equal(*(load("cpu").forward(given, spec)[0] for given in (inputs, small)))


@pytest.mark.parametrize(
    ("starts", "allowed"), [([0, 3, 8], True), ([0, 9, 8], False), ([1, 3, 8], False), ([0, 3, 7], False)]
)
def test_boundaries_are_checked_where_they_are_read(starts, allowed):
    """The caller checks them, too; but between the two another thread may write to them."""
    cu_seqlens = torch.tensor(starts, dtype=torch.int32)
    q = torch.randn(8, 1, 4)
    inputs = Inputs(q, q, q, cu_seqlens_q=cu_seqlens, cu_seqlens_kv=cu_seqlens, max_seqlen_q=8, max_seqlen_kv=8)
    run = functools.partial(load("cpu").forward, inputs, AttentionSpec(1.0))
    if allowed:
        assert run()[0].isfinite().all()
    else:
        with pytest.raises(RuntimeError, match="cu_seqlens changed"):
            run()


def test_an_instruction_set_can_be_asked_for(monkeypatch):
    machines = {"best": False, "good": True, "baseline": True}
    monkeypatch.setenv("FASTATTN_CPU_ISA", "baseline")
    assert library.asked_for(machines) == 2
    for wrong in ("best", "sse9"):
        monkeypatch.setenv("FASTATTN_CPU_ISA", wrong)
        with pytest.raises(InputError, match=f"FASTATTN_CPU_ISA: got '{wrong}'.*good, baseline"):
            library.asked_for(machines)
    monkeypatch.delenv("FASTATTN_CPU_ISA")
    assert library.asked_for(machines) == library.BEST
