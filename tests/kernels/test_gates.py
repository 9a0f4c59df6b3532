"""The compile gates: the main shapes compile clean for GPUs that are not there, and the gates can fail."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from fastattn.testing import gates

triton = pytest.importorskip("triton")

EXPECTED = gates.expected_figures(
    Path(__file__).parents[2] / "benchmarks" / "expected" / f"triton-{triton.__version__}.json"
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

    served = {(b.row, b.bits, b.head_dim, b.kernel + " heavy" * gates.is_heavy(b)) for b in gates.builds()}
    assert {(row, bits, head_dim, kernel) for row, kernel, bits, head_dim in table.TABLE} <= served
    assert {kernel.removesuffix(" heavy") for _, kernel, _, _ in table.TABLE} == set(configs.HEAVY)


def test_lengths_compile_nothing_anew() -> None:
    """Odd lengths, 1, multiples of 16, and strides that follow from them: D 40 is no multiple of 16.

    Decoding has two kernels for as long as there is one query row: whole and in parts.
    """
    found = gates.kernels_for_lengths((1, 2, 15, 16, 17, 100, 128, 1023, 4096), 40, "BHSD")
    trained = {"forward_kernel": 1, "delta_kernel": 1, "dkdv_kernel": 1, "dq_kernel": 1}
    assert found == trained | {"append_kernel": 1, "turn_kernel": 1, "decode_kernel": 2, "combine_kernel": 1}
