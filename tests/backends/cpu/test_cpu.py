"""The C++ kernels for CPUs: every instruction set of this machine against fp64, selection, build and delivery."""

from pathlib import Path

import pytest
import torch

import fastattn
from fastattn import InputError
from fastattn.backends import load
from fastattn.backends.cpu import build, decode, delivery, library
from fastattn.decoding import explain_with_kv_cache
from fastattn.kv_cache import CacheInputs
from fastattn.spec import AttentionSpec
from fastattn.testing import assert_within, cache_grid, make_cache_sample, measure_cache

ROOT = Path(__file__).parents[3]
FOUND, HOW = library.delivered()
try:
    build.find_compiler()
    assert FOUND is not None, HOW  # a kernel that does not compile must not look like a machine without a compiler
except build.BuildError:
    pass
pytestmark = pytest.mark.skipif(FOUND is None, reason=HOW)
MACHINES = [name for name, runs in FOUND.machines().items() if runs] if FOUND else []


class OnMachine(type(load("cpu"))):
    """The backend with one instruction set."""

    def __init__(self, name):
        self.index = list(FOUND.machines()).index(name)

    def attend_to_cache(self, inputs, spec):
        return decode.attend(FOUND, inputs, spec, self.index)


@pytest.mark.parametrize("case", cache_grid(), ids=lambda case: case.id)
@pytest.mark.parametrize("machine", MACHINES)
def test_against_fp64(machine, case):
    assert_within(measure_cache(OnMachine(machine), make_cache_sample(case)))


def test_the_judge_finds_a_call_that_depends_on_its_batch():
    class Deaf(OnMachine):
        def attend_to_cache(self, inputs, spec):
            return super().attend_to_cache(inputs.replace(batch_invariant=False), spec)

    case = next(case for case in cache_grid((torch.float32,)) if case.batch_invariant)
    with pytest.raises(AssertionError, match="sequence 0 has other bits alone"):
        measure_cache(Deaf(MACHINES[0]), make_cache_sample(case))


def test_every_machine_has_the_baseline():
    assert list(FOUND.machines()) == list(build.machines())
    assert MACHINES and MACHINES[-1] == "baseline"


def step(batch=2, keys=700, heads=(8, 2), dtype=torch.float32, rows=1, page_size=None):
    """Arguments of one call on a long cache."""
    torch.manual_seed(0)
    q = torch.randn(batch, rows, heads[0], 64).to(dtype)
    lengths = torch.tensor([keys - 100 * b for b in range(batch)], dtype=torch.int32)
    if page_size is None:
        return (q, *torch.randn(2, batch, keys, heads[1], 64).to(dtype), lengths), {}
    each = -(-keys // page_size)
    table = torch.randperm(batch * each).int().view(batch, each)
    return (q, *torch.randn(2, batch * each, page_size, heads[1], 64).to(dtype), lengths), {"block_table": table}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("page_size", [None, 1, 16])
def test_long_caches_in_many_parts(dtype, page_size):
    """More keys than a part or a block holds, and more rows than are worked on at once."""
    for heads, rows in (((8, 2), 1), ((6, 6), 3), ((7, 1), 5)):
        args, options = step(heads=heads, rows=rows, dtype=dtype, page_size=page_size)
        exact = fastattn.attention_with_kv_cache(*(x.double() if x.is_floating_point() else x for x in args), **options)
        out = fastattn.attention_with_kv_cache(*args, **options, backend="cpu")
        by_torch = fastattn.attention_with_kv_cache(*args, **options, backend="portable")
        limit = 2 * (by_torch - exact).abs().max() + 1e-6
        assert (out - exact).abs().max() <= limit


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("where", ["q", "k_cache", "v_cache", "every key"])
def test_nan_and_infinity_come_through(machine, where):
    """What is not finite must not become so: the same rows as with the reference, where a kept infinity is NaN."""
    for bad in (float("nan"), float("inf"), float("-inf")):
        (q, k_cache, v_cache, lengths), _ = step(keys=230)
        places = {"q": q[0, 0, 1], "k_cache": k_cache[1, 60, 0], "v_cache": v_cache[0, 200, 1], "every key": k_cache}
        places[where].fill_(bad)
        inputs = CacheInputs(q, k_cache, v_cache, lengths, max_seqlen_q=1)
        out, lse = OnMachine(machine).attend_to_cache(inputs, AttentionSpec(0.1))
        exact, exact_lse = load("eager").attend_to_cache(inputs, AttentionSpec(0.1))
        assert torch.equal(out.isfinite(), exact.isfinite()) and torch.equal(lse.isnan(), exact_lse.isnan())
        torch.testing.assert_close(*(torch.where(exact.isfinite(), x, 0) for x in (out, exact)))


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_a_row_does_not_keep_never_reaches_it(machine, dtype):
    """The last key, which the rows before the last do not keep, and one that a bias of -inf hides from all."""
    (q, k_cache, v_cache, lengths), _ = step(keys=230, rows=5, dtype=dtype)
    bias = torch.zeros(2, 8, 5, 231)
    bias[..., 17] = float("-inf")
    found = []
    for bad in (0.0, float("nan"), float("inf")):
        for cache in (k_cache, v_cache):
            cache[:, 17] = bad
            cache[torch.arange(2), lengths.long() - 1] = bad
        inputs = CacheInputs(q, k_cache, v_cache, lengths, bias=bias, max_seqlen_q=5)
        found.append(OnMachine(machine).attend_to_cache(inputs, AttentionSpec(0.1, right=0)))
    for out, lse in found[1:]:
        assert torch.equal(out[:, :4], found[0][0][:, :4]) and torch.equal(lse[..., :4], found[0][1][..., :4])
        assert not out[:, 4].isfinite().all()


def test_the_number_of_threads_changes_no_bit():
    args, options = step(batch=3, keys=3000, page_size=8)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(fastattn.attention_with_kv_cache(*args, **options, return_lse=True, backend="cpu"))
    finally:
        torch.set_num_threads(before)
    for out, lse in results[1:]:
        assert torch.equal(out, results[0][0]) and torch.equal(lse, results[0][1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn])
@pytest.mark.parametrize("machine", MACHINES)
def test_every_stored_number_is_read_as_torch_reads_it(machine, dtype):
    """One key: its value comes out. All numbers of the dtype, NaN and infinity included.

    So do subnormal numbers, but for the processor's products of bf16, which take them for 0, as in torch's ``matmul``.
    """
    bits = torch.arange(1 << 8 * dtype.itemsize, dtype=torch.int32)
    stored = bits.to(torch.uint16 if dtype.itemsize == 2 else torch.uint8).view(dtype).view(-1, 1, 1, 64)
    for values in (stored, stored.flip(0)):
        q = torch.zeros(values.shape[0], 1, 1, 64, dtype=torch.float32 if dtype.itemsize == 1 else dtype)
        inputs = CacheInputs(
            q, torch.zeros_like(values), values, torch.ones(values.shape[0], dtype=torch.int32), max_seqlen_q=1
        )
        out, _ = OnMachine(machine).attend_to_cache(inputs, AttentionSpec(1.0))
        is_flushed = (values.float().abs() < 2.0**-126) & (machine == "avx512bf16" and dtype == torch.bfloat16)
        expected = torch.where(is_flushed, 0, values.to(q.dtype))
        torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)


def test_it_says_what_it_runs_on():
    assert str(FOUND) == f"{MACHINES[0]}, threads of torch"
    assert load("cpu").unavailable_reason() is None and delivery().endswith(str(FOUND))


# --- who chooses them -----------------------------------------------------------------------------------------------


def test_it_is_chosen_for_all_but_prompts_in_a_cache():
    args, options = step(page_size=16)
    assert explain_with_kv_cache(*args, **options).chosen == "cpu"
    prompt = step(rows=33)[0]
    assert explain_with_kv_cache(*prompt).chosen == "portable"
    assert explain_with_kv_cache(*prompt).reasons["cpu"] == ["no prompt"]
    assert fastattn.explain(prompt[0], prompt[0], prompt[0]).chosen == "cpu"


def test_elsewhere_it_has_to_be_asked_for(monkeypatch):
    problem = explain_with_kv_cache(*step()[0]).problem
    monkeypatch.setattr("platform.machine", lambda: "riscv64")
    assert load("cpu").automatic_reasons(problem) == ["not yet run on riscv64"]


@pytest.mark.parametrize("page_size", [None, 4])
def test_wrong_values_leave_the_cache_as_it_was(page_size):
    (q, k_cache, v_cache, lengths), options = step(keys=40, batch=1, page_size=page_size)
    new, before = torch.randn(1, 3, 2, 64), k_cache.clone()
    wrong = [(torch.tensor([39], dtype=torch.int32), options), (torch.tensor([-1], dtype=torch.int32), options)]
    if page_size:
        wrong += [(lengths - 3, {"block_table": table}) for table in wrong_tables(options["block_table"])]
    for given, more in wrong:
        with pytest.raises(InputError, match=r"cache_lengths|block_table"):
            fastattn.attention_with_kv_cache(q, k_cache, v_cache, given, new, new, **more, backend="cpu")
        assert torch.equal(k_cache, before)


def wrong_tables(table):
    for number in (-1, 10, 2**31 - 1):
        wrong = table.clone()
        wrong[0, -1] = number
        yield wrong


# --- how they are built ---------------------------------------------------------------------------------------------


@pytest.fixture
def not_built(tmp_path, monkeypatch):
    """As in a checkout that was never built: an empty cache folder, and nothing beside the backend."""
    monkeypatch.setattr(library, "PATH", tmp_path / "nothing.so")
    monkeypatch.setenv("FASTATTN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(build, "UNITS", {})  # the baseline alone, unoptimised: what is compiled here need not be fast
    monkeypatch.setattr(build, "ARITHMETIC", ("-O0",))
    monkeypatch.setattr(build, "FLAGS", (*build.FLAGS, "-DFA_BASELINE_ALONE"))
    library.delivered.cache_clear()
    yield tmp_path / "cache"
    library.delivered.cache_clear()


def test_compiled_at_first_use_and_kept(not_built, caplog):
    found, how = library.delivered()
    assert found is not None and "compiled at first use" in how and "compiling the CPU kernels" in caplog.text
    (kept,) = not_built.glob("*.so")
    library.delivered.cache_clear()
    caplog.clear()
    assert library.delivered()[0] is not None and "compiling" not in caplog.text
    assert list(not_built.glob("*.so")) == [kept]


def test_without_a_compiler_torch_serves_and_the_reason_is_given(not_built, monkeypatch):
    from fastattn import dispatch

    monkeypatch.setenv("CXX", "no-such-compiler")
    dispatch.reasons.cache_clear()
    try:
        found = explain_with_kv_cache(*step()[0])
    finally:
        dispatch.reasons.cache_clear()
    assert found.chosen == "portable" and "no C++ compiler was found (CXX=no-such-compiler)" in found.reasons["cpu"][0]


def test_a_compiler_that_fails_is_quoted(not_built, monkeypatch, tmp_path):
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\necho 'unknown option: -O3'\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    found, how = library.delivered()
    assert found is None and "unknown option: -O3" in how
    assert not list(not_built.glob("*.so"))


def test_a_library_of_other_sources_is_not_used(monkeypatch):
    monkeypatch.setattr(build, "fingerprint", lambda csrc: "of other sources")
    with pytest.raises(OSError, match="built from other sources"):
        library.Library(FOUND.path)
