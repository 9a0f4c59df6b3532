"""The compile gates: the main shapes compile clean for GPUs that are not there, and the gates can fail."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import pytest

from fastattn.backends.triton.tools import gates

triton = pytest.importorskip("triton")

EXPECTED = gates.expected_figures(
    Path(__file__).parents[3] / "benchmarks" / "expected" / f"triton-{triton.__version__}.json"
)
GOOD = gates.Figures(registers=255, stack=0, shared=65536, tensor_core=16, tile=(128, 64, 8, 2))
BUILD = gates.Build("sm_90", "sm_90", "forward", "causal", 16, 128)


def test_the_main_shapes_compile_clean() -> None:
    todo = gates.builds(quick=True)
    assert {(b.target, b.kernel) for b in todo} == {(t, k) for t in ("sm_90", "gfx942") for k in gates.KERNELS[:3]}
    results = list(gates.compiled(todo))
    wrong = {build.name: gates.problems(build, figures, EXPECTED.get(build.name)) for build, figures in results}
    assert not any(wrong.values()), "\n".join([gates.table(results), *(f"{n}: {w}" for n, w in wrong.items() if w)])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"stack": 8}, "spilled"),
        ({"shared": 232449}, "shared memory"),
        ({"tensor_core": 0}, "HGMMA"),
        ({"tile": (128, 64, 16, 2)}, "registers in a block"),
        ({"error": "CompilationError: no"}, "CompilationError"),
    ],
)
def test_the_gates_can_fail(change: dict[str, object], reason: str) -> None:
    assert gates.problems(BUILD, GOOD, None) == []
    (found,) = gates.problems(BUILD, dataclasses.replace(GOOD, **change), None)
    assert reason in found


def test_a_figure_that_moves_is_noticed() -> None:
    expected = gates.as_expected([(BUILD, GOOD)])[BUILD.name]
    expected["tile"] = list(expected["tile"])
    assert gates.problems(BUILD, dataclasses.replace(GOOD, registers=250), expected) == []
    (found,) = gates.problems(BUILD, dataclasses.replace(GOOD, registers=200), expected)
    assert found == "registers was 255, is 200"


def test_every_build_has_its_expected_figures() -> None:
    if not EXPECTED:
        pytest.skip(f"no figures for Triton {triton.__version__}: python -m benchmarks gates --update")
    assert EXPECTED.keys() == {build.name for build in gates.builds()}


def test_rows_for_unknown_gpus_fit_the_smallest() -> None:
    build = dataclasses.replace(BUILD, row="default", target="sm_80")
    assert gates.problems(build, dataclasses.replace(GOOD, shared=102_000), None)


def test_every_row_of_the_table_is_built() -> None:
    from fastattn.backends.triton import configs, table

    served = {configs.row_for(b.row, b.kernel, b.bits, b.head_dim, b.combination.split()) for b in gates.builds()}
    assert table.TABLE.keys() == served
    assert {kind.partition(" ")[0] for _, kind, _, _ in table.TABLE} == set(gates.KERNELS)


def test_every_feature_is_built_at_every_width() -> None:
    """In bf16 each alone, too; decoding has no mask, segments or dropout."""
    from fastattn.backends.triton import configs

    for (kernel, bits), head_dim in itertools.product(itertools.product(gates.KERNELS, (16, 32)), (64, 128, 256)):
        built = [b for b in gates.builds() if (b.kernel, b.bits, b.head_dim) == (kernel, bits, head_dim)]
        features = configs.CROWDING - ({"mask", "segments", "dropout"} if kernel == "decode" else set[str]())
        found = [configs.CROWDING & set(b.combination.split()) for b in built]
        assert features in found
        if bits == 16 and kernel in ("forward", "dkdv", "dq"):
            assert all({feature} in found for feature in features)


def test_features_crowd() -> None:
    from fastattn.backends.triton import configs

    assert configs.kinds_of("forward", {"band", "sinks"}) == ["forward"]
    assert configs.kinds_of("forward", {"mask", "band"}) == ["forward heavy", "forward"]
    assert configs.kinds_of("dkdv", {"mask", "dropout"}) == ["dkdv crowded", "dkdv heavy", "dkdv"]
    assert configs.kinds_of("dkdv", configs.CROWDING) == ["dkdv crowded", "dkdv heavy", "dkdv"]
    assert gates.served_by("dkdv heavy", 16) == [
        "mask", "bias", "softcap causal", "alibi causal", "segments causal", "dropout causal"
    ]  # fmt: skip
    assert gates.served_by("decode crowded", 32) == [gates.DECODING_IN_FP32[1]]
    assert gates.served_by("dbias", 32) == ["bias causal"]  # there are no heavy rows for dbias


def test_a_sample_is_new_and_compiles() -> None:
    """Every feature turns up, with every kernel, and what cannot be together is not."""
    drawn = gates.sampled(400)
    assert len(set(drawn)) == 400 and gates.sampled(400) == drawn != gates.sampled(400, seed=1)
    words = {(b.kernel, word) for b in drawn for word in b.combination.split()}
    assert {(k, w) for k in gates.KERNELS[:4] for w in gates.EVERYTHING.split()} <= words
    assert {("decode", w) for c in gates.DECODING for w in c.split()} <= words
    results = list(gates.compiled(drawn[:4]))
    assert not any(figures.error for _, figures in results), gates.table(results)


def test_repeated_products_are_counted() -> None:
    """Eight warps along 64 rows, 16 for each: half of them have none of their own."""
    layout = "#mma = #ttg.nvidia_mma<{versionMajor = 2, versionMinor = 0, warpsPerCTA = [8, 1], instrShape = [16, 8]}>"
    product = "%r = tt.dot %a, %b, %c : tensor<64x64xbf16, #a> * tensor<64x64xbf16, #b> -> tensor<64x32xf32, #mma>"
    wide = product.replace("64x32xf32", "128x32xf32")
    on_no_warp = product.replace("#mma>", "#blocked>")
    assert gates._repeats("\n".join([layout, product])) == 2
    assert gates._repeats("\n".join([layout, product, wide, on_no_warp])) == 1.5
    assert gates._repeats(on_no_warp) == 1


def test_a_row_serves_the_head_dims_below_it_down_to_the_next() -> None:
    """Those of the architecture and the default ones together: one row of its own hides no other."""
    from fastattn.backends.triton import configs
    from fastattn.backends.triton.table import TABLE

    assert ("gfx942", "decode", 32, 256) in TABLE and ("gfx942", "decode", 32, 128) not in TABLE
    for head_dim in (65, 128):
        assert configs.tile_for("gfx942", "decode", 32, head_dim) == TABLE["default", "decode", 32, 128]
    assert configs.tile_for("gfx942", "decode", 32, 129) == TABLE["gfx942", "decode", 32, 256]


def test_lengths_compile_nothing_anew() -> None:
    """Odd lengths, 1, multiples of 16, and strides that follow from them: D 40 is no multiple of 16.

    Decoding has two kernels for as long as there is one query row: whole and in parts.
    """
    found = gates.kernels_for_lengths((1, 2, 15, 16, 17, 100, 128, 1023, 4096), 40, "BHSD")
    trained = {"forward_kernel": 1, "delta_kernel": 1, "dkdv_kernel": 1, "dq_kernel": 1}
    assert found == trained | {"append_kernel": 1, "turn_kernel": 1, "decode_kernel": 2, "combine_kernel": 1}
