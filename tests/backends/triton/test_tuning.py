"""The tuner, with a timer that returns made-up times."""

from __future__ import annotations

import argparse
import ast
from pathlib import Path

import pytest

pytest.importorskip("triton")

from benchmarks import tune
from fastattn.backends.triton import configs, table
from fastattn.backends.triton.tools import tuning
from fastattn.errors import InputError

KEY = ("gfx942", "forward", 16, 64)


def arguments(path: Path, *more: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    tune.add_arguments(parser)
    return parser.parse_args(["--kernels", "forward", "--head-dims", "64", "--table", str(path), *more])


class Timer:
    """Runs what it is given, and says that the ``best``-th candidate is the fastest."""

    def __init__(self, best: int) -> None:
        self.best, self.calls = best, 0

    def __call__(self, work: object) -> float:
        work()  # type: ignore[operator]
        self.calls += 1
        return 1.0 if self.calls - 1 == self.best else 2.0


@pytest.fixture
def three_candidates(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, int, int]]:
    tiles = [tuning.row_of(KEY), (16, 32, 4, 1), (32, 64, 8, 1)]
    monkeypatch.setattr(tuning, "candidates", lambda kernel, bits, now: tiles)
    monkeypatch.setattr(tune, "_sound", lambda key, tiles, processes: tiles)
    return tiles


def rows_in(path: Path) -> dict[tuning.Key, tuning.Config]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return ast.literal_eval(tree.body[-1].value)  # type: ignore[attr-defined]


def test_the_fastest_is_written(tmp_path, three_candidates, capsys):
    path = tmp_path / "table.py"
    assert tune.run(arguments(path), Timer(best=2), "gfx942") == 0
    assert rows_in(path) == table.TABLE | {KEY: three_candidates[2]}
    assert "1000.000 ms" in capsys.readouterr().out
    assert [p.name for p in tmp_path.iterdir()] == ["table.py"]


def test_a_dry_run_writes_nothing(tmp_path, three_candidates):
    assert tune.run(arguments(tmp_path / "table.py", "--dry-run"), Timer(best=1), "gfx942") == 0
    assert list(tmp_path.iterdir()) == []


def test_noise_changes_nothing():
    now, other = (64, 64, 4, 1), (32, 32, 4, 1)
    results = [tuning.Measured(KEY, now, 1.0), tuning.Measured(KEY, other, 0.99)]
    assert tuning.fastest(results, now) == now
    assert tuning.fastest([*results, tuning.Measured(KEY, (128, 64, 4, 1), 0.9)], now) == (128, 64, 4, 1)


def test_a_tile_that_does_not_run_is_never_chosen():
    def timer(work: object) -> float:
        raise RuntimeError("out of resource: shared memory")

    (result,) = tuning.measured(KEY, [(64, 64, 4, 1)], timer, tuning.torch.device("cpu"))
    assert result.seconds == float("inf") and "shared memory" in str(result.failure)
    assert tuning.fastest([result], (32, 32, 4, 1)) == (32, 32, 4, 1)


def test_the_written_table_is_the_table():
    assert tuning.text_of(table.TABLE) == tuning.TABLE_FILE.read_text(encoding="utf-8")


@pytest.mark.parametrize("kernel", tuning.KERNELS)
def test_every_kernel_can_be_timed(kernel):
    """Each with its kind of problem: the work is done, and a tile is asked for once."""
    times = iter([2.0, 1.0])
    key, tiles = ("gfx942", kernel, 16, 64), [(32, 32, 4, 1), (16, 32, 4, 1)]

    def timer(work: object) -> float:
        work()
        return next(times)

    results = list(tuning.measured(key, tiles, timer, tuning.torch.device("cpu")))
    assert [(r.config, r.seconds, r.failure) for r in results] == [(tiles[0], 2.0, None), (tiles[1], 1.0, None)]


def test_a_gpu_without_rows_gets_its_own(tmp_path, three_candidates):
    """The default rows stay what they are: safe anywhere."""
    path, key = tmp_path / "table.py", ("sm_89", "forward", 16, 64)
    assert configs.arch_name("cuda", 89) == configs.DEFAULT and configs.chip_name("cuda", 89) == "sm_89"
    assert tune.run(arguments(path), Timer(best=1), "sm_89") == 0
    assert rows_in(path) == table.TABLE | {key: three_candidates[1]}


@pytest.mark.parametrize("kernel", tuning.KERNELS)
def test_candidates_are_what_kernels_accept(kernel):
    now = tuning.row_of(("sm_90", kernel, 16, 128))
    tiles = tuning.candidates(kernel, 16, now)
    assert tiles[0] == now and len(set(tiles)) == len(tiles) > 5
    assert all(m >= 16 and n % 32 == 0 for m, n, _, _ in tiles)


def test_without_a_gpu_it_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(tune.torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="GPU"):
        tune.run(arguments(tmp_path / "table.py"))
