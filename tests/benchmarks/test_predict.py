"""Predictions of the CUDA kernels' time: counts are those of docs/measured.md, and the page shows what is computed."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from benchmarks import predict, suites
from benchmarks.__main__ import main
from fastattn.backends.cuda.instances import DkdvConfig, DqConfig, dkdv_configs, dq_configs, forward_configs
from fastattn.backends.cuda.tools import model
from fastattn.backends.cuda.tools.makespan import Shape

PAGE = Path(__file__).parents[2] / "docs" / "measured.md"
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++ to compile the schedulers")


def test_counts_are_those_of_the_page() -> None:
    """The clocks of tensor cores, exponentials and shared memory; issue was counted in machine code, to within 6 %."""
    page, seen = PAGE.read_text(encoding="utf-8"), 0
    for d_qk, d_v, rows, keys, *clocks in re.findall(r"\| D (\d+)/?(\d*), (\d+) x (\d+) \|" + r" (\d+) \|" * 4, page):
        dims = int(d_qk), int(d_v or d_qk), int(rows), int(keys)
        config = next((x for x in forward_configs() if (x.d_qk, x.d_v, x.block_m, x.block_n) == dims), None)
        if config is None:  # of decoding
            continue
        counted, seen = model.forward_clocks(config), seen + 1
        tensor, exponential, issue, shared = map(int, clocks)
        assert (counted.tensor, counted.exponential, counted.shared) == (tensor, exponential, shared), dims
        assert abs(counted.issue - issue) < 0.06 * issue, dims
    row = r"\| backward_(dkdv|dq)(, fused)?, D (\d+), (\d+) x (\d+)[^|]*\|" + r" (\d+) \|" * 3
    for kind, fused, d, rows, keys, *clocks in re.findall(row, page):
        configs: list[DkdvConfig | DqConfig] = [*dkdv_configs()] if kind == "dkdv" else [*dq_configs()]
        sizes = int(d), int(rows), int(keys)
        config = next(
            x
            for x in configs
            if (x.d_qk, x.block_m, x.block_n) == sizes and bool(getattr(x, "fused", 0)) == bool(fused)
        )
        counted, seen = (
            model.dkdv_clocks(config) if isinstance(config, DkdvConfig) else model.dq_clocks(config),
            seen + 1,
        )
        assert [counted.tensor, counted.exponential, counted.shared] == [int(x) for x in clocks], sizes
    assert seen >= 10


@needs_compiler
def test_the_page_shows_what_is_computed() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert text == predict.with_predictions(text), "run `python -m benchmarks predict --page docs/measured.md`"


@needs_compiler
def test_every_case_of_a_suite_is_predicted_or_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", "--suite", "llm", "features"]) == 0
    said = capsys.readouterr().out
    cases = [*suites.SUITES["llm"].cases, *suites.SUITES["features"].cases]
    assert all(f"| {case.id} " in said for case in cases)
    assert "not served" not in said
    assert main(["predict", "--case", "nonsense"]) == 2


@needs_compiler
def test_predictions_follow_the_work() -> None:
    """More work takes longer; a pass never beats the products, a kernel neither the memory nor its launch."""
    causal, full, windowed = (Shape(1, 8192, 8192, 16, 16, 128, 128, *band) for band in ((None, 0), (), (255, 0)))
    passes = [model.forward_kernels(x) for x in (windowed, causal, full)] + [model.backward_kernels(full)]
    found = model.predict(passes)
    faster = [x.seconds[0] for x in found]
    assert faster == sorted(faster) and all(x.seconds[0] < x.seconds[1] for x in found)
    assert 4 * 8192**2 * 128 * 16 / faster[2] < model.PRODUCT_FLOPS
    assert model.Kernel("preprocess", model.MEMORY).seconds(None, 4.0) == 1 + model.LAUNCH
    deterministic = model.predict([model.backward_kernels(full, deterministic=True)])
    assert deterministic[0].seconds[0] > faster[3], "7 products for 5"
