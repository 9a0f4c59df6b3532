"""The compile gates: the main shapes compile without spills for GPUs that are not present, and the gates can fail."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from pathlib import Path

import pytest

from benchmarks.__main__ import main
from fastattn.backends.triton.tools import builds, derived, figures, gates

triton = pytest.importorskip("triton")

EXPECTED = gates.expected_figures(
    Path(__file__).parents[3] / "benchmarks" / "expected" / f"triton-{triton.__version__}.json"
)
GOOD = figures.Figures(registers=255, stack=0, shared=65536, tensor_core=16, config=(128, 64, 8, 2))
BUILD = builds.Build("sm_90", "sm_90", "forward", "causal", 16, 128)


def test_the_main_shapes_compile_clean() -> None:
    todo = builds.all_builds(quick=True)
    assert {(b.target, b.kernel) for b in todo} == {(t, k) for t in ("sm_90", "gfx942") for k in builds.KERNELS[:3]}
    results = list(gates.compiled(todo))
    wrong = {build.name: gates.problems(build, figures, EXPECTED.get(build.name)) for build, figures in results}
    assert not any(wrong.values()), "\n".join([gates.table(results), *(f"{n}: {w}" for n, w in wrong.items() if w)])


def test_kernels_of_derivatives_and_statistics_compile_clean() -> None:
    from fastattn.backends.triton import derived_configs

    assert {kernel.partition("@")[0] for kernel, _, _ in derived_configs.TABLE} == set(derived.KERNELS)
    wanted = {("jvp", "sm_90"), ("statistics_dk", "sm_80")}
    todo = [b for b in derived.all_builds() if (b.kernel, b.target) in wanted and b.bits == 16 and b.head_dim == 128]
    todo = [b for b in todo if b.combination == "causal"]
    results = list(gates.compiled(todo))
    wrong = {build.name: gates.problems(build, figures, None) for build, figures in results}
    assert len(results) == 2 and not any(wrong.values()), wrong


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"stack": 8}, "spilled"),
        ({"shared": 232449}, "shared memory"),
        ({"tensor_core": 0}, "HGMMA"),
        ({"config": (128, 64, 16, 2)}, "registers in a block"),
        ({"error": "CompilationError: no"}, "CompilationError"),
    ],
)
def test_the_gates_can_fail(change: dict[str, object], reason: str) -> None:
    assert gates.problems(BUILD, GOOD, None) == []
    (found,) = gates.problems(BUILD, dataclasses.replace(GOOD, **change), None)
    assert reason in found


def test_a_figure_that_moves_is_noticed() -> None:
    expected = gates.as_expected([(BUILD, GOOD)])[BUILD.name]
    expected["config"] = list(expected["config"])
    assert gates.problems(BUILD, dataclasses.replace(GOOD, registers=250), expected) == []
    (found,) = gates.problems(BUILD, dataclasses.replace(GOOD, registers=200), expected)
    assert found == "registers was 255, is 200"


def test_every_build_has_its_expected_figures() -> None:
    if not EXPECTED:
        pytest.skip(f"no figures for Triton {triton.__version__}: python -m benchmarks gates --update")
    assert EXPECTED.keys() == {build.name for build in builds.all_builds()}


def test_rows_for_unknown_gpus_fit_the_smallest() -> None:
    build = dataclasses.replace(BUILD, row="default", target="sm_80")
    assert gates.problems(build, dataclasses.replace(GOOD, shared=102_000), None)


def test_every_row_of_the_table_is_built() -> None:
    from fastattn.backends.triton import configs, table

    served = {configs.row_for(b.row, b.kernel, b.bits, b.head_dim, b.combination.split()) for b in builds.all_builds()}
    assert table.TABLE.keys() == served
    assert {kind.partition(" ")[0] for _, kind, _, _ in table.TABLE} == set(builds.KERNELS)


def test_every_feature_is_built_at_every_width() -> None:
    """In bf16 each alone, too; decoding has no mask, segments or dropout."""
    from fastattn.backends.triton import configs

    for (kernel, bits), head_dim in itertools.product(itertools.product(builds.KERNELS, (16, 32)), (64, 128, 256, 512)):
        built = [b for b in builds.all_builds() if (b.kernel, b.bits, b.head_dim) == (kernel, bits, head_dim)]
        features = configs.REGISTER_HEAVY - ({"mask", "segments", "dropout"} if kernel == "decode" else set[str]())
        found = [configs.REGISTER_HEAVY & set(b.combination.split()) for b in built]
        assert features in found
        if bits == 16 and head_dim <= 256 and kernel in ("forward", "backward_dkdv", "backward_dq"):
            assert all({feature} in found for feature in features)


def test_features_that_need_registers_choose_the_row() -> None:
    from fastattn.backends.triton import configs

    assert configs.kinds_of("forward", {"band", "sinks"}) == ["forward"]
    assert configs.kinds_of("forward", {"mask", "band"}) == ["forward one", "forward"]
    assert configs.kinds_of("backward_dkdv", {"mask", "dropout"}) == [
        "backward_dkdv several",
        "backward_dkdv one",
        "backward_dkdv",
    ]
    assert configs.kinds_of("backward_dkdv", configs.REGISTER_HEAVY) == [
        "backward_dkdv many",
        "backward_dkdv several",
        "backward_dkdv one",
        "backward_dkdv",
    ]
    assert builds.served_by("backward_dkdv one", 16) == [
        "mask", "bias", "softcap causal", "alibi causal", "segments causal", "dropout causal"
    ]  # fmt: skip
    assert configs.kinds_of("decode", {"paged"}) == ["decode paged", "decode"]
    assert configs.kinds_of("forward", {"paged"}) == ["forward paged", "forward"]
    assert configs.kinds_of("decode", {"paged", "e4m3"}) == ["decode"] and builds.served_by("decode paged", 16)
    assert builds.served_by("decode several", 32) == [builds.DECODING_IN_FP32[1]]
    assert builds.served_by("backward_dbias", 32) == ["bias causal"]  # the table has no such row for dbias


def test_a_sample_is_new_and_compiles() -> None:
    """Every feature turns up, with every kernel, and what cannot be together is not."""
    drawn = builds.sampled(400)
    assert len(set(drawn)) == 400 and builds.sampled(400) == drawn != builds.sampled(400, seed=1)
    words = {(b.kernel, word) for b in drawn for word in b.combination.split()}
    assert {(k, w) for k in builds.KERNELS[:4] for w in builds.EVERYTHING.split()} <= words
    assert {("decode", w) for c in builds.DECODING for w in c.split()} <= words
    results = list(gates.compiled(drawn[:2]))
    assert not any(figures.error for _, figures in results), gates.table(results)


def test_repeated_products_are_counted() -> None:
    """Eight warps along 64 rows, 16 for each: half of them have none of their own."""
    layout = "#mma = #ttg.nvidia_mma<{versionMajor = 2, versionMinor = 0, warpsPerCTA = [8, 1], instrShape = [16, 8]}>"
    product = "%r = tt.dot %a, %b, %c : tensor<64x64xbf16, #a> * tensor<64x64xbf16, #b> -> tensor<64x32xf32, #mma>"
    wide = product.replace("64x32xf32", "128x32xf32")
    on_no_warp = product.replace("#mma>", "#blocked>")
    assert figures.repeats_in("\n".join([layout, product])) == 2
    assert figures.repeats_in("\n".join([layout, product, wide, on_no_warp])) == 1.5
    assert figures.repeats_in(on_no_warp) == 1


def test_a_row_serves_the_head_dims_below_it_down_to_the_next() -> None:
    """Those of the architecture and the default ones together: one row of its own hides no other."""
    from fastattn.backends.triton import configs
    from fastattn.backends.triton.table import TABLE

    assert ("gfx942", "decode", 32, 256) in TABLE and ("gfx942", "decode", 32, 128) not in TABLE
    for head_dim in (65, 128):
        assert configs.config_for("gfx942", "decode", 32, head_dim) == TABLE["default", "decode", 32, 128]
    assert configs.config_for("gfx942", "decode", 32, 129) == TABLE["gfx942", "decode", 32, 256]


def test_lengths_compile_nothing_anew() -> None:
    """Odd lengths, 1, multiples of 16, and strides that follow from them: D 40 is no multiple of 16.

    Decoding has two kernels for as long as there is one query row: whole and in parts.
    """
    found = gates.kernels_for_lengths((1, 2, 15, 16, 17, 100, 128, 1023, 4096), 40, "BHSD")
    trained = {"forward_kernel": 1, "backward_preprocess_kernel": 1, "backward_dkdv_kernel": 1, "backward_dq_kernel": 1}
    assert found == trained | {"append_kernel": 1, "turn_kernel": 1, "decode_kernel": 2, "combine_kernel": 1}


def test_ints_in_tuples_are_specialised_whatever_a_kernel_asks() -> None:
    """The reason for ``arguments.coded``: once this fails, ``do_not_specialize`` can take its place."""
    from triton._C.libtriton import native_specialize_impl
    from triton.backends.compiler import GPUTarget
    from triton.compiler.compiler import make_backend

    from fastattn.backends.triton.arguments import coded

    def specialised(*ints: int) -> list[object]:
        is_const, specialize_value, align = False, False, True  # specialize_value is what do_not_specialize turns off
        backend = make_backend(GPUTarget("cuda", 90, 32))
        return list(native_specialize_impl(backend, ints, is_const, specialize_value, align)[1])

    assert specialised(1, 16, 7) == [1, "D", ""]
    assert specialised(*map(coded, (-1, 0, 1, 7, 8, 16, 1 << 29))) == [1, *[""] * 6]


def test_loads_and_conversions_are_counted_in_the_innermost_loops() -> None:
    ttgir = """
  %0 = tt.load %p : tensor<64x!tt.ptr<f32>>
  scf.for %i = %a to %b step %c : i32 {
    %1 = tt.load %p : tensor<64x!tt.ptr<f32>>
    %2 = scf.for %j = %a to %b step %c iter_args(%x = %y) -> (tensor<64xf32>) : i32 {
      %3 = tt.load %p : tensor<64x!tt.ptr<f32>>
      %4 = ttg.convert_layout %3 : tensor<64xf32> -> tensor<64xf32>
    }
  }
  %5 = ttg.convert_layout %0 : tensor<64xf32> -> tensor<64xf32>
"""
    lines = figures.loops_in(ttgir)
    assert sum("tt.load" in line for line in lines) == sum("convert_layout" in line for line in lines) == 1


def test_programs_of_a_multiprocessor() -> None:
    """Limited by registers, by shared memory, and by warps."""
    target = builds.TARGETS["sm_90"]
    assert figures.programs_of(255, 1024, 8, target) == 1 and figures.programs_of(219, 72192, 4, target) == 2
    assert figures.programs_of(32, 120_000, 4, target) == 1 and figures.programs_of(16, 0, 8, target) == 8


def test_loads_of_a_mask_are_pipelined() -> None:
    """No load in the loop waits for memory: a branch would bring that back.

    Known builds are left out, those of another number of stages are not.
    """
    todo = [builds.Build("sm_90", "sm_90", kernel, "mask", 16, 128) for kernel in builds.KERNELS[:2]]
    found = dict(gates.compiled(todo, 1))
    assert found.keys() == set(todo)
    assert not any(gates.problems(build, figures, None) for build, figures in found.items())
    known = gates.codes(gates.as_expected(found.items()))
    of_more_stages = dataclasses.replace(todo[1], config=(*found[todo[1]].config[:3], 3))
    ((build, figures),) = gates.compiled([todo[0], of_more_stages], 1, known)
    assert build == of_more_stages and figures.code == found[todo[1]].code
    (reason,) = gates.problems(todo[1], dataclasses.replace(found[todo[1]], sync_loads=1), None)
    assert "mask are not pipelined" in reason


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--only", "sm_91"], "--only: no build's name contains 'sm_91'. One of them: '"),
        (["--config", "32x64x8x2", "--update"], "leave out --update"),
        (["--config", "32x64"], "got '32x64'; allowed: four numbers"),
    ],
)
def test_wrong_options_compile_nothing(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with contextlib.suppress(SystemExit):  # of argparse
        assert main(["gates", *options]) == 2
    assert message in capsys.readouterr().err


def test_another_configuration_is_tried(capsys: pytest.CaptureFixture[str]) -> None:
    """In place of the table's, which has another."""
    of_forward = "default@sm_80 forward 32 D64 causal"
    main(["gates", "--only", of_forward, "--processes", "1", "--config", "16x32x4x1", "--config", "32x32x4x1"])
    printed = capsys.readouterr().out
    assert printed.count("16x32x4x1") == printed.count("32x32x4x1") == 1 and "2 builds pass" in printed


def test_small_chips_are_among_the_targets() -> None:
    """With 99 KiB of shared memory for a block, and each kind of row with everything in use."""
    built = {(b.target, b.kernel, b.head_dim) for b in builds.all_builds() if b.bits == 16}
    for target in ("sm_86", "sm_89", "sm_120"):
        assert builds.TARGETS[target].shared_limit == 99 * 1024
        assert {(target, kernel, d) for kernel in builds.KERNELS for d in (128, 256)} <= built
    assert {("gfx950", kernel, d) for kernel in builds.KERNELS for d in (128, 256)} <= built
