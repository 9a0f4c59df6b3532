"""The Triton kernels through Triton's interpreter: the whole grid of cases against fp64, without a GPU."""

from __future__ import annotations

import dataclasses

import pytest
import torch

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from fastattn import reference, rng, testing  # noqa: E402
from fastattn.backends import load  # noqa: E402
from fastattn.backends.triton import configs, launch, launch_derivatives  # noqa: E402
from fastattn.backends.triton.arguments import Flags, Sizes, Terms, coded  # noqa: E402
from fastattn.backends.triton.tile import open_head, survivors, tanh  # noqa: E402
from fastattn.problem import Inputs, Problem, Tangents  # noqa: E402
from fastattn.spec import AttentionSpec  # noqa: E402
from fastattn.testing.derivatives import DerivativeYardstick, Motion, measure_derivatives  # noqa: E402
from fastattn.testing.statistics import measure_statistics  # noqa: E402

# 16 bits are computed in fp32 here, so that what they add is loads and stores: beyond the quick grid, one of the two.
WIDEST = load("triton").capabilities.max_head_dim
QUICK = {case.id for case in testing.grid(quick=True)}
HALVES = [testing.grid((dtype,)) for dtype in (torch.float16, torch.bfloat16)]
GRID = testing.grid((torch.float32,))
GRID += [case for turn, half in enumerate(HALVES) for n, case in enumerate(half) if case.id in QUICK or n % 2 == turn]
GRID = [case for case in GRID if max(case.D_qk, case.D_v) <= WIDEST]
EVERYTHING = [case for case in GRID if case.id in ("everything [float32]", "everything, packed [float32]")]


@pytest.mark.parametrize("case", GRID, ids=lambda case: case.id)
def test_grid(case: testing.Case) -> None:
    testing.assert_within(testing.measure(load("triton"), testing.make(case)))


DERIVED = ("everything", "everything, packed", "intervals and the rest")


@pytest.mark.parametrize("name", [*(f"{name} [float32]" for name in DERIVED), "gqa of three [float16]"])
def test_derivatives_and_statistics(name: str) -> None:
    sample = testing.make(next(case for case in GRID if case.id == name))
    testing.assert_within(measure_derivatives("triton", sample))
    testing.assert_within(measure_statistics("triton", sample))


def test_what_stands_still() -> None:
    """Each input alone along its tangent, as ``jvp`` with few arguments has it."""
    sizes = {"B": 1, "S_q": 9, "S_kv": 7, "H_q": 2, "H_kv": 1, "D_qk": 8, "D_v": 4}
    sample = testing.make(testing.Case("small", **sizes, softcap=2.0, bias=(1, 1, 9, 7), sinks=True))
    full = Motion.of(sample)
    for name in sample.needs:
        motion = Motion(Tangents(**{name: getattr(full.tangents, name)}), torch.zeros_like(sample.dout), None)
        testing.assert_within(measure_derivatives("triton", sample, yardstick=DerivativeYardstick(sample, motion)))


def test_derivatives_in_chunks_in_half_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """As NVIDIA's GPUs compute long rows: the interpreter would only do so in fp32."""
    monkeypatch.setattr(
        launch_derivatives.BackwardJvp,
        "_in_chunks",
        lambda self, most: dataclasses.replace(self.call.flags, chunked=True),
    )
    sizes = {"B": 1, "S_q": 9, "S_kv": 7, "H_q": 2, "H_kv": 1, "D_qk": 40, "D_v": 20}
    case = testing.Case("chunks", **sizes, dtype=torch.float16, softcap=2.0, bias=(1, 1, 9, 7))
    testing.assert_within(measure_derivatives("triton", testing.make(case)))


@pytest.mark.parametrize("dims", [(1, 1), (3, 2), (80, 80), (160, 160), (255, 256)], ids=str)
def test_head_dims(dims: tuple[int, int]) -> None:
    """Those that the grid has no case of: the ends, and what lies between powers of two."""
    plain = next(case for case in GRID if case.id == "plain [float32]")
    case = dataclasses.replace(plain, B=1, S_q=5, S_kv=7, right=0, D_qk=dims[0], D_v=dims[1])
    testing.assert_within(testing.measure(load("triton"), testing.make(case)))


@pytest.mark.parametrize("case", EVERYTHING, ids=lambda case: case.id)
@pytest.mark.parametrize("pair", [("triton", "eager"), ("eager", "triton")], ids=" then ".join)
def test_forward_and_backward_of_different_backends(case: testing.Case, pair: tuple[str, str]) -> None:
    testing.assert_within(testing.measure(pair[0], testing.make(case), pair[1]))


SMALL_TILES = ("everything", "everything, packed", "segments, causal", "intervals of blocks", "intervals and the rest")


@pytest.mark.parametrize("name", [f"{name} [float32]" for name in SMALL_TILES])
def test_the_tile_does_not_matter(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The smallest there is: many blocks of rows, and many of columns. One program sums dk and dv of a whole group."""
    monkeypatch.setattr(configs, "INTERPRETED", configs.Config(16, 16, 4, 1))
    monkeypatch.setattr(launch, "parts_of", lambda *_: 1)
    configs.config_for.cache_clear()
    case = next(case for case in GRID if case.id == name)
    testing.assert_within(testing.measure(load("triton"), testing.make(case)))
    configs.config_for.cache_clear()


def test_wide_rows_are_served_but_not_their_derivatives_and_statistics() -> None:
    q = torch.empty(1, 4, 1, 320)
    inputs = Inputs(q, q, q, max_seqlen_q=4, max_seqlen_kv=4)
    reasons = [
        load("triton").unsupported_reasons(Problem.of(inputs, AttentionSpec(1.0), also=also))
        for also in ((), ("jvp",), ("statistics",))
    ]
    assert reasons == [[], ["jvp at head dim 320/320 (at most 256)"], ["statistics at head dim 320/320 (at most 256)"]]


def test_parts_of_a_group_fill_the_device_and_no_more() -> None:
    assert launch.parts_of(programs=32, group=16, on=132) == 8
    assert launch.parts_of(programs=32, group=3, on=132) == 3
    assert launch.parts_of(programs=132, group=16, on=132) == launch.parts_of(programs=1, group=1, on=132) == 1


def test_dbias_in_chunks_in_half_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """As NVIDIA's GPUs compute it for long rows: the interpreter would only do so in fp32."""
    monkeypatch.setattr(launch.Backward, "dbias_in_chunks", lambda self: True)
    case = next(case for case in GRID if case.id == "everything [float16]")
    assert case.bias
    testing.assert_within(testing.measure(load("triton"), testing.make(dataclasses.replace(case, D_qk=80, D_v=40))))


@pytest.mark.parametrize("seed_and_offset", [(0, 0), (0x1234_5678_9ABC_DEF0, 0x7FFF_FFFF_FFFF), (-1, 2**32 + 5)])
@pytest.mark.parametrize("is_transposed", [False, True], ids=["by rows", "by keys"])
@pytest.mark.parametrize(("j0", "columns"), [(64, 64), (96, 32), (64, 16), (80, 16)])
def test_dropout_is_that_of_the_definition(
    seed_and_offset: tuple[int, int], is_transposed: bool, j0: int, columns: int
) -> None:
    spec, state = AttentionSpec(1.0, dropout_p=0.3), torch.tensor(seed_and_offset)
    found = torch.empty((columns, 32) if is_transposed else (32, columns), dtype=torch.int8)
    threshold, flags = coded(spec.dropout_threshold), Flags(16, 16, 16, 16, dropout=True)
    dropout_tile[(1,)](found, state, threshold, j0, F=flags, COLUMNS=columns, TRANSPOSED=is_transposed)
    i, j = torch.arange(96, 128)[:, None], torch.arange(j0, j0 + columns)[None, :]
    expected = rng.dropout_keep(spec, state, torch.tensor(2 * 5 + 3), i, j)
    assert torch.equal(found.bool(), expected.T if is_transposed else expected)


@triton.jit
def dropout_tile(found, state, threshold, j0, F: tl.constexpr, COLUMNS: tl.constexpr, TRANSPOSED: tl.constexpr):
    """The survivors of rows 96 .. 127 and the columns from j0 of head 3 of 5 in sequence 2."""
    sizes = Sizes(3, 3, 2 * 5 + 3, 5, 3, 3, 3, threshold, 1.0, 1.0, 1.0)
    terms = Terms(0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, state)
    head = open_head(tl.program_id(0) + 2, tl.program_id(0) + 3, terms, sizes, F)
    spared = survivors(head, tl.program_id(0) + 96, j0, 32, COLUMNS, TRANSPOSED)
    rows: tl.constexpr = COLUMNS if TRANSPOSED else 32
    width: tl.constexpr = 32 if TRANSPOSED else COLUMNS
    at = tl.arange(0, rows)[:, None] * width + tl.arange(0, width)[None, :]
    tl.store(found + at, spared.to(tl.int8))


@triton.jit
def tanh_kernel(x, y, PRECISE: tl.constexpr):
    at = tl.arange(0, 1024)
    tl.store(y + at, tanh(tl.load(x + at), PRECISE))


@pytest.mark.parametrize(("is_precise", "worst"), [(True, 1e-6), (False, 1e-3)])
def test_tanh_is_relatively_exact(is_precise: bool, worst: float) -> None:
    """Near zero, where the quick form cancels, the precise one does not; both are odd, and 1 far out."""
    x = torch.cat([torch.logspace(-4, 4.5, 510, base=2.718281828), torch.tensor([0.0, 200.0])])
    x, y = torch.cat([x, -x]), torch.empty(1024)
    tanh_kernel[(1,)](x, y, PRECISE=is_precise)
    exact = torch.tanh(x.double())
    assert float(((y - exact).abs() / exact.abs().clamp(min=1e-30)).max()) < worst
    assert y[511] == 1 and y[1023] == -1 and y[510] == 0


def results(inputs: Inputs, spec: AttentionSpec, dout: torch.Tensor) -> list[torch.Tensor]:
    backend = load("triton")
    out, lse, low = backend.forward(inputs, spec)
    grads = backend.backward(dout, None, out, lse, low, inputs, spec, ("q", "k", "v"))
    return [out, lse, grads.dq, grads.dk, grads.dv]  # type: ignore[list-item]


@pytest.mark.parametrize("heads_kv", [1, 2, 4])
def test_a_key_that_one_head_of_the_group_uses_is_used(heads_kv: int) -> None:
    """Each key is kept by one query head only, in one row, so no head alone tells which keys are used."""
    heads, s = 4, 40
    q, dout = torch.randn(1, s, heads, 16), torch.randn(1, s, heads, 16)
    k, v = torch.randn(1, s, heads_kv, 16), torch.randn(1, s, heads_kv, 16)
    mask = torch.zeros(1, heads, s, s, dtype=torch.bool)
    for j in range(s):
        mask[0, j % heads, (7 * j) % s, j] = True
    inputs, spec = Inputs(q, k, v, mask=mask, max_seqlen_q=s, max_seqlen_kv=s), AttentionSpec(0.25)
    out, lse, low = reference.forward(inputs, spec)
    grads = reference.backward(dout, None, out, lse, low, inputs, spec)
    expected = [out, lse, grads.dq, grads.dk, grads.dv]
    for found, right in zip(results(inputs, spec, dout), expected, strict=True):
        torch.testing.assert_close(found, right, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("feature", ["mask", "segments", "softcap, segments", "window"])
def test_keys_that_no_query_keeps_may_hold_nan(feature: str) -> None:
    """In the middle of tiles, and for every gradient; elsewhere the results are those of clean keys, bit for bit."""
    s_q, s_kv = 70, 90
    q, dout = torch.randn(1, s_q, 2, 16), torch.randn(1, s_q, 2, 16)
    k, v = torch.randn(1, s_kv, 1, 16), torch.randn(1, s_kv, 1, 16)
    unused = torch.zeros(s_kv, dtype=torch.bool)
    spec, terms = AttentionSpec(0.25, softcap=3.0 if "softcap" in feature else None), {}
    if feature == "window":  # upper left: the last keys are out of reach of the last query
        spec, unused = AttentionSpec(0.25, left=4, right=2, anchor="upper_left"), torch.arange(s_kv) > s_q + 1
    elif feature == "mask":
        unused[[0, 5, 31, 32, 77, 89]] = True
        terms["mask"] = (torch.rand(1, 2, s_q, s_kv) < 0.8) & ~unused
    else:
        unused[20:40] = True
        terms["segment_ids_q"] = torch.randint(0, 3, (1, s_q))
        terms["segment_ids_kv"] = torch.randint(0, 3, (1, s_kv)).masked_fill(unused, 7)
    clean = Inputs(q, k, v, **terms, max_seqlen_q=s_q, max_seqlen_kv=s_kv)
    hole = unused[None, :, None, None]
    dirty = clean.replace(k=k.masked_fill(hole, float("nan")), v=v.masked_fill(hole, float("nan")))
    for found, right in zip(results(dirty, spec, dout), results(clean, spec, dout), strict=True):
        assert torch.equal(found, right)


def test_bias_of_minus_infinity_is_a_mask() -> None:
    """Additive masks are common: a row that they empty is an empty row."""
    s = 40
    q, dout = torch.randn(1, s, 1, 16), torch.randn(1, s, 1, 16)
    mask = torch.rand(1, 1, s, s) < 0.5
    mask[..., 11, :] = False
    spec = AttentionSpec(0.25)
    masked = Inputs(q, q, q, mask=mask, max_seqlen_q=s, max_seqlen_kv=s)
    biased = masked.replace(mask=None, bias=torch.zeros(mask.shape).masked_fill(~mask, float("-inf")))
    for found, right in zip(results(biased, spec, dout), results(masked, spec, dout), strict=True):
        torch.testing.assert_close(found, right, rtol=1e-5, atol=1e-6)


def test_rows_too_far_apart_for_32_bits_are_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastattn.backends.triton import launch

    monkeypatch.setattr(launch, "MAX_ROW_STRIDE", 60)
    case = dataclasses.replace(next(c for c in GRID if c.id == "plain [float32]"), bias=(1, 2, 37, 37), memory="sliced")
    testing.assert_within(testing.measure(load("triton"), testing.make(case)))


def test_too_long_a_sequence_is_refused() -> None:
    x = torch.empty(1, 1 << 29, 1, 16, device="meta")
    with pytest.raises(ValueError, match="2\\^29"):
        load("triton").forward(Inputs(x, x, x, max_seqlen_q=1 << 29, max_seqlen_kv=1 << 29), AttentionSpec(1.0))
