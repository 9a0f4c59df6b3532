"""attention_with_kv_cache: every kind of cache and feature against fp64, and the promises of its docstring."""

import dataclasses

import pytest
import torch
from torch.library import opcheck

import fastattn
from fastattn import InputError, UnsupportedError, kv_cache, reference
from fastattn.backends import load
from fastattn.backends.portable import decode
from fastattn.decoding import explain_with_kv_cache
from fastattn.kv_cache import CACHE_SCALARS, CACHE_TENSORS, CacheInputs
from fastattn.nn.rotary import rotary_tables
from fastattn.testing import assert_within, cache_grid, make_cache_sample, measure_cache

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
GRID = [case for case in cache_grid(DTYPES) if not case.batch_invariant]  # which neither eager nor portable is


def by_id(cases):
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.id)


@by_id(GRID)
@pytest.mark.parametrize("backend", ["eager", "portable"])
def test_backends_against_fp64(backend, case):
    assert_within(measure_cache(load(backend), make_cache_sample(case)))


class PortableAsOnADevice(type(load("portable"))):
    """The path that looks at no length."""

    def attend_to_cache(self, inputs, spec):
        kv_cache.append(inputs)
        inputs = inputs.replace(q=kv_cache.rotated_queries(inputs, spec), rotary_cos=None, rotary_sin=None)
        return decode._on_device(inputs, spec)


@by_id([case for case in GRID if case.dtype == torch.float32 and case.s_q])
def test_portable_as_on_a_device(case):
    assert_within(measure_cache(PortableAsOnADevice(), make_cache_sample(case)))


@by_id([case for case in GRID if case.dtype in (torch.float32, torch.bfloat16) and case.s_q])
def test_small_pieces_and_groups(case, monkeypatch):
    """Every cut of the work, in problems too small to need one."""
    for name, value in (("PIECE", 64), ("SMALL", 600), ("MANY_ROWS", 3), ("LONG", 0), ("FOLD", 5)):
        monkeypatch.setattr(decode, name, value)
    assert_within(measure_cache(load("portable"), make_cache_sample(case)))


def test_a_wrong_backend_is_found():
    """What the judgement is for: each of these faults must fail it."""
    eager = load("eager")
    case = next(case for case in GRID if case.id == "window [pages of 8, float32]")
    sample = make_cache_sample(case)
    spec = sample.spec
    faults = {
        "window": (spec, dataclasses.replace(spec, left=spec.left + 1)),
        "scale": (spec, dataclasses.replace(spec, scale=spec.scale * 1.001)),
    }
    for name, (_, wrong) in faults.items():
        backend = type(
            "Wrong", (type(eager),), {"attend_to_cache": lambda self, x, s, w=wrong: reference.attend_to_cache(x, w)}
        )
        assert not all(row.ok for row in measure_cache(backend(), sample)), name

    def forgets_to_append(self, inputs, spec):
        return reference.attend_to_cache(inputs.replace(k=None, v=None), spec)

    def writes_elsewhere(self, inputs, spec):
        inputs.k_cache[-1, 0] = 0
        return reference.attend_to_cache(inputs, spec)

    assert not all(
        row.ok for row in measure_cache(type("W", (type(eager),), {"attend_to_cache": forgets_to_append})(), sample)
    )
    with pytest.raises(AssertionError, match="rows were written that are not new"):
        measure_cache(type("W", (type(eager),), {"attend_to_cache": writes_elsewhere})(), sample)


# --- the public function -------------------------------------------------------------------------------------------


def call(inputs, spec, **more):
    """The public function on the tensors of a sample."""
    options = {name: getattr(inputs, name) for name in CACHE_TENSORS[6:]}
    return fastattn.attention_with_kv_cache(
        inputs.q, inputs.k_cache, inputs.v_cache, inputs.cache_lengths, inputs.k, inputs.v,
        causal=spec.right == 0, window=(spec.left, spec.right), scale=spec.scale, softcap=spec.softcap,
        max_seqlen_q=inputs.max_seqlen_q, rotary_interleaved=inputs.rotary_interleaved, **(options | more),
    )  # fmt: skip


def copied(inputs):
    """With caches of its own, cut from NaN: what a call writes stays there."""
    return inputs.replace(k_cache=inputs.k_cache.clone(), v_cache=inputs.v_cache.clone())


@by_id([case for case in GRID if case.dtype == torch.bfloat16])
def test_the_function_is_the_backend(case):
    sample = make_cache_sample(case)
    mine, theirs = copied(sample.inputs), copied(sample.inputs)
    out, lse = call(mine, sample.spec, return_lse=True, backend="portable")
    expected = load("portable").attend_to_cache(theirs, sample.spec)
    assert torch.equal(out, expected[0]) and torch.equal(lse, expected[1])
    assert torch.equal(mine.k_cache.view(torch.uint8), theirs.k_cache.view(torch.uint8))


def test_token_by_token_is_attention_over_the_whole_text():
    torch.manual_seed(1)
    q, k, v = torch.randn(1, 50, 4, 16), torch.randn(1, 50, 2, 16), torch.randn(1, 50, 2, 16)
    cos, sin = rotary_tables(torch.arange(64), 16)
    turn = fastattn.nn.Rotary(16)
    whole = fastattn.attention(turn(q), turn(k), v, causal=True, window=(9, 0))
    k_cache, v_cache = torch.full((2, 8, 8, 2, 16), float("nan"))
    table = torch.tensor([[6, 1, 3, 0, 7, 2, 5, 4]], dtype=torch.int32)
    parts, have = [], 0
    for new in (20, 1, 1, 7, 21):
        rows = slice(have, have + new)
        lengths = torch.tensor([have], dtype=torch.int32)
        parts.append(fastattn.attention_with_kv_cache(
            q[:, rows], k_cache, v_cache, lengths, k[:, rows], v[:, rows], block_table=table, window=(9, 0),
            rotary_cos=cos, rotary_sin=sin,
        ))  # fmt: skip
        have += new
    torch.testing.assert_close(torch.cat(parts, 1), whole)


def test_rows_of_a_contiguous_cache_are_named_by_a_block_table_of_one_column():
    store = torch.randn(5, 9, 1, 8)
    q, lengths = torch.randn(2, 1, 2, 8), torch.tensor([4, 9], dtype=torch.int32)
    rows = torch.tensor([3, 0], dtype=torch.int32)
    named = fastattn.attention_with_kv_cache(q, store, store, lengths, block_table=rows[:, None])
    gathered = store[rows.long()]
    torch.testing.assert_close(named, fastattn.attention_with_kv_cache(q, gathered, gathered, lengths))


def test_dispatch_names_what_a_backend_lacks():
    sample = make_cache_sample(next(case for case in GRID if case.id == "ragged, everything [pages of 8, float32]"))
    inputs = sample.inputs
    before = inputs.k_cache.clone()
    found = explain_with_kv_cache(
        inputs.q, inputs.k_cache, inputs.v_cache, inputs.cache_lengths, inputs.k, inputs.v,
        block_table=inputs.block_table, cu_seqlens_q=inputs.cu_seqlens_q, rotary_cos=inputs.rotary_cos,
        rotary_sin=inputs.rotary_sin,
    )  # fmt: skip
    assert found.chosen == ("portable" if found.reasons["cpu"] else "cpu") and found.reasons["eager"] == []
    assert {"append", "cache", "gqa", "packed", "paged cache", "rotary"} <= found.problem.features
    assert found.problem.page_size == 8
    assert torch.equal(before.nan_to_num(7), inputs.k_cache.nan_to_num(7)), "explaining must not append"
    with pytest.raises(UnsupportedError, match="cuda"):
        call(inputs, sample.spec, backend="cuda")


def test_a_backend_that_declares_no_cache_is_not_asked():
    from fastattn.backends.base import Capabilities, capability_reasons

    sample = make_cache_sample(GRID[0])
    reasons = capability_reasons(Capabilities(), kv_cache.facts_of(sample.inputs, sample.spec))
    assert "no cache" in reasons


# --- torch ----------------------------------------------------------------------------------------------------------


# opcheck compares mutated arguments with allclose, which torch does not have for e4m3
OPERATOR_CASES = (
    "one token [pages of 8, float32]",
    "everything [contiguous, float32]",
    "ragged, everything [pages of 8, float32]",
)


@by_id([case for case in GRID if case.id in OPERATOR_CASES])
def test_operators_pass_opcheck(case):
    inputs, spec = make_cache_sample(case).inputs, make_cache_sample(case).spec
    clean = {n: torch.randn(x.shape).to(x.dtype) for n in ("k_cache", "v_cache") for x in (getattr(inputs, n),)}
    inputs = inputs.replace(**clean)
    scalars = (spec.scale, spec.softcap, spec.left, spec.right, spec.anchor, spec.dropout_p)
    for operator, given in (
        (torch.ops.fastattn.extend_cache, inputs),
        (torch.ops.fastattn.attend_to_cache, inputs.replace(k=None, v=None)),
    ):
        tensors = (getattr(given, name) for name in CACHE_TENSORS)
        opcheck(operator, (*tensors, *(getattr(given, name) for name in CACHE_SCALARS), *scalars, None))


def test_compiled_steps_write_the_same_cache():
    def step(q, k, v, k_cache, v_cache, lengths, table):
        out = fastattn.attention_with_kv_cache(q, k_cache, v_cache, lengths, k, v, block_table=table, window=(6, 0))
        lengths.add_(1)
        return out * 2

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    table = torch.tensor([[2, 0], [1, 3]], dtype=torch.int32)
    caches = [[torch.zeros(4, 8, 2, 16) for _ in range(2)] for _ in range(2)]
    lengths = [torch.tensor([0, 5], dtype=torch.int32) for _ in range(2)]
    for _ in range(4):
        q, k, v = torch.randn(2, 1, 4, 16), torch.randn(2, 1, 2, 16), torch.randn(2, 1, 2, 16)
        expected = step(q, k, v, *caches[0], lengths[0], table)
        torch.testing.assert_close(compiled(q, k, v, *caches[1], lengths[1], table), expected)
    assert all(map(torch.equal, *caches)) and lengths[1].tolist() == [4, 9]


def test_autocast_casts_the_new_tensors_and_not_the_cache():
    store = torch.zeros(1, 4, 1, 8, dtype=torch.bfloat16)
    x, lengths = torch.randn(1, 1, 1, 8), torch.zeros(1, dtype=torch.int32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = fastattn.attention_with_kv_cache(x, store, store.clone(), lengths, x, x)
    assert out.dtype == torch.bfloat16 and torch.equal(store[0, 0], x[0, 0].bfloat16())


# --- refusals -------------------------------------------------------------------------------------------------------


def given(**changes):
    base = {
        "q": torch.randn(2, 1, 4, 16),
        "k_cache": torch.zeros(6, 8, 2, 16),
        "v_cache": torch.zeros(6, 8, 2, 16),
        "cache_lengths": torch.tensor([3, 9], dtype=torch.int32),
        "k": torch.ones(2, 1, 2, 16),
        "v": torch.ones(2, 1, 2, 16),
        "block_table": torch.tensor([[0, 1], [4, 5]], dtype=torch.int32),
    }
    return base | changes


def ints(*values):
    return torch.tensor(values, dtype=torch.int32)


FP8 = torch.zeros(6, 8, 2, 16).to(torch.float8_e4m3fn)
PACKED = {"q": torch.randn(3, 4, 16), "k": torch.ones(3, 2, 16), "v": torch.ones(3, 2, 16)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": torch.randn(2, 4, 16)}, r"q: got shape \(2, 4, 16\).*packed needs cu_seqlens_q"),
        ({"q": torch.randn(2, 1, 3, 16)}, "k_cache: got 2 heads for 3 query heads"),
        ({"q": torch.randn(2, 1, 4, 8)}, "k_cache: got head dim 16; allowed: head dim 8"),
        ({"q": torch.randn(2, 1, 4, 16).half()}, "k_cache: got torch.float32; allowed: torch.float16"),
        ({"q": torch.randn(2, 1, 4, 16).int()}, "q: got torch.int32"),
        ({"k_cache": torch.zeros(6, 8, 16)}, r"k_cache: got shape \(6, 8, 16\)"),
        ({"k_cache": torch.zeros(6, 0, 2, 16)}, "k_cache: got shape .*at least one row"),
        ({"v_cache": torch.zeros(6, 4, 2, 16)}, "v_cache: got shape .*the shape of k_cache"),
        ({"v_cache": FP8}, "v_cache: got torch.float8_e4m3fn"),
        ({"cache_lengths": [3, 9]}, "cache_lengths: got list"),
        ({"cache_lengths": torch.tensor([3, 9])}, "cache_lengths: got torch.int64; allowed: torch.int32"),
        ({"cache_lengths": ints(3)}, r"cache_lengths: got shape \(1,\); allowed: \(B,\) = \(2,\)"),
        ({"cache_lengths": ints(3, -1)}, "cache_lengths: got -1 for sequence 1"),
        ({"cache_lengths": ints(3, 16)}, "cache_lengths: got 16 for sequence 1 with 1 new tokens; allowed: 0 to 15"),
        ({"v": None}, "k, v: got one of the two"),
        ({"k": torch.ones(2, 2, 2, 16)}, r"v: got shape \(2, 1, 2, 16\).*allowed: \(2, 2, 2, 16\)"),
        ({"k": torch.ones(2, 1, 2, 16).half()}, "k: got .*float16"),
        ({"k": torch.ones(2, 17, 2, 16), "v": torch.ones(2, 17, 2, 16)}, "k: got 17 new tokens; allowed: at most 16"),
        ({"block_table": None}, "k_cache: got 6 rows; allowed: 2, one for each sequence.*block_table"),
        ({"block_table": torch.tensor([[0, 1], [4, 5]])}, "block_table: got torch.int64"),
        ({"block_table": ints(0, 1)}, r"block_table: got shape \(2,\)"),
        ({"block_table": torch.tensor([[0, 1], [4, 6]], dtype=torch.int32)}, r"block_table: got page 6 at \[1, 1\]"),
        ({"block_table": torch.tensor([[-1, 1], [4, 5]], dtype=torch.int32)}, r"page -1 at \[0, 0\]"),
        ({name: torch.zeros(0, 8, 2, 16) for name in ("k_cache", "v_cache")}, r"page 0 at \[0, 0\]; allowed: no page"),
        ({"rotary_cos": torch.ones(16, 8)}, "rotary_cos, rotary_sin: got one of the two"),
        ({"rotary_cos": torch.ones(9, 8), "rotary_sin": torch.ones(9, 8)}, "rotary_cos: got 9 .*at least 16"),
        ({"rotary_cos": torch.ones(16, 9), "rotary_sin": torch.ones(16, 9)}, "rotary_cos: got shape .*D_rotary <= 16"),
        ({"k_scale": torch.ones(2)}, "k_scale: got a tensor; allowed: None with a cache of torch.float32"),
        ({"k_cache": FP8, "v_cache": FP8, "k_scale": torch.ones(3)}, r"k_scale: got shape \(1, 3\)"),
        ({"k_cache": FP8, "v_cache": FP8, "v_scale": torch.ones(2).half()}, "v_scale: got .*float16"),
        ({"bias": torch.ones(2, 3, 1, 16)}, "bias: got shape"),
        ({"bias": torch.ones(1, 1, 1, 9)}, "cache_lengths: got 9 for sequence 1 .*allowed: 0 to 8"),
        ({"alibi_slopes": torch.ones(3)}, "alibi_slopes: got shape"),
        ({"sinks": torch.ones(3, 4)}, "sinks: got shape"),
        ({"softcap": -1.0}, "softcap: got -1.0"),
        ({"scale": float("nan")}, "scale: got nan"),
        ({"window": 5}, "window: got 5"),
        ({"backend": "flash"}, "backend: got 'flash'"),
        ({"k": torch.ones(2, 1, 2, 16, requires_grad=True)}, "k: got a tensor that requires grad"),
        ({"sinks": torch.ones(4, requires_grad=True)}, "sinks: got a tensor that requires grad.*no_grad"),
        ({"cache_lengths": torch.zeros(2, dtype=torch.int32, device="meta")}, "cache_lengths: got device meta"),
        ({**PACKED, "cu_seqlens_q": ints(0, 1)}, r"cache_lengths: got shape \(2,\); allowed: \(B,\) = \(1,\)"),
        ({**PACKED, "cu_seqlens_q": ints(0, 1, 2)}, "cu_seqlens_q: got last value 2; allowed: last value 3"),
        ({**PACKED, "cu_seqlens_q": ints(0, 1, 3), "max_seqlen_q": 1}, "max_seqlen_q: got 1; allowed: at least 2"),
        ({**PACKED, "k": torch.ones(2, 2, 16), "cu_seqlens_q": ints(0, 1, 3)}, "k: got shape .*a row for each of q"),
        ({**PACKED, "cu_seqlens_q": ints(0, 1, 3), "bias": torch.ones(1, 1, 1, 1)}, "bias: got a tensor"),
    ],
)  # fmt: skip
def test_refusals_leave_the_cache_as_it_was(changes, message):
    arguments = given(**changes)
    caches = [arguments[name] for name in ("k_cache", "v_cache")]
    before = [x.float().clone() for x in caches]
    with pytest.raises(InputError, match=message):
        fastattn.attention_with_kv_cache(**arguments)
    assert all(torch.equal(x.float(), old) for x, old in zip(caches, before, strict=True))


def test_gradients_may_be_there_where_none_is_recorded():
    with torch.no_grad():
        fastattn.attention_with_kv_cache(**given(k=torch.ones(2, 1, 2, 16, requires_grad=True)))


def test_pages_behind_the_window_are_not_looked_up():
    arguments = given(block_table=torch.tensor([[0, 1], [-1, 5]], dtype=torch.int32), cache_lengths=ints(3, 14))
    fastattn.attention_with_kv_cache(**arguments, window=(5, 0))
    with pytest.raises(InputError, match="page -1"):
        fastattn.attention_with_kv_cache(**arguments, window=(7, 0))


def test_inputs_name_every_tensor():
    """The operators take the fields in order: a new field must stand among the tensors or the scalars."""
    names = [field.name for field in dataclasses.fields(CacheInputs)]
    assert tuple(names) == CACHE_TENSORS + CACHE_SCALARS and CACHE_SCALARS[0] == "max_seqlen_q"


@pytest.mark.parametrize("magnitude", [0.01, 1.0, 30.0])
def test_the_error_of_e4m3_is_what_is_stated(magnitude):
    """Against fp64 on the numbers before rounding: out is off by less than 5 % of its size (docs/decoding.md)."""
    q, k, v = torch.randn(2, 1, 8, 64), torch.randn(2, 300, 2, 64), magnitude * torch.randn(2, 300, 2, 64)
    lengths, empty = torch.tensor([0, 0], dtype=torch.int32), torch.zeros(2, 320, 2, 64)
    scales = {"k_scale": k.abs().amax((0, 1, 3)) / 448, "v_scale": v.abs().amax((0, 1, 3)) / 448}
    caches = [empty.to(torch.float8_e4m3fn), empty.to(torch.float8_e4m3fn)]
    found = fastattn.attention_with_kv_cache(q, *caches, lengths, k, v, **scales)
    exact = fastattn.attention(q.double(), k.double(), v.double(), causal=True)
    error = (found - exact).square().mean().sqrt() / exact.square().mean().sqrt()
    assert error < 0.05


def test_what_is_kept_between_calls_is_shared_with_no_result(monkeypatch):
    """The copies of pages lie in memory that is kept: made in inference mode or not, and for the next call as well."""
    monkeypatch.setattr(decode, "_memory", decode._Memory())
    draw = torch.Generator().manual_seed(0)
    q, new = (torch.randn(1, 1, heads, 16, generator=draw) for heads in (4, 2))
    first, second = (torch.randn(8, 4, 2, 16, generator=draw) for _ in range(2))
    lengths, pages = torch.tensor([20], dtype=torch.int32), torch.tensor([[6, 1, 4, 0, 3, 2]], dtype=torch.int32)

    def out(cache, backend="portable"):
        return fastattn.attention_with_kv_cache(
            q, cache.clone(), cache.clone(), lengths, new, new, block_table=pages, backend=backend
        )

    with torch.inference_mode():
        before = out(first)
    after = out(second)
    torch.testing.assert_close(before.clone(), out(first, "eager"))
    torch.testing.assert_close(after, out(second, "eager"))
