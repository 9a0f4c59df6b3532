"""The log of random problems: what a killed run leaves, what is judged again, and the record."""

import json

import pytest

from benchmarks import fuzz, tables
from benchmarks.__main__ import main
from benchmarks.record import read
from fastattn.errors import InputError
from fastattn.testing import Case
from fastattn.testing.fuzz import Trial
from fastattn.testing.tolerance import Row
from fastattn.testing.verify import Result

ABOUT = {"seed": 0, "device": "cpu", "backends": ["eager"]}


def block(first, source="a", failures=(), by_chance=0):
    counts = {"passes/eager/float32": [50, 0, len(failures), 0, 0.25]}
    counts |= {"module/eager/float64": [1, 2, 0, by_chance, 0.5]}
    more = {"seconds": 1.0, "counts": counts, "failures": list(failures)}
    return {"first": first, "end": first + fuzz.BLOCK, "source": source, **more}


def test_a_run_goes_on_where_it_stopped(tmp_path):
    path = tmp_path / "deep" / "log.jsonl"
    log = fuzz.Log(path, ABOUT, "a")
    log.add(block(0))
    log.add(block(50, failures=["import torch"]))
    log.add(block(150, by_chance=1))
    path.write_text(path.read_text() + '{"first": 100, "end"')  # killed while it wrote
    again = fuzz.Log(path, ABOUT, "a")
    assert set(again.blocks) == {(0, 50), (50, 100), (150, 200)}
    again.add(block(100))
    mended = fuzz.Log(path, ABOUT, "b")
    assert set(mended.blocks) == {(0, 50), (100, 150)}, "what missed a bound is judged again with other code"
    with pytest.raises(InputError, match="is of other problems or backends"):
        fuzz.Log(path, ABOUT | {"seed": 1}, "b")


def test_blocks_add_up_to_a_table():
    first, second = fuzz.rows([block(0), block(50, failures=["x"], by_chance=3)])
    assert first["judged"] == "passes, eager" and first["float32"] == 100 and first["failed"] == 1
    assert second == {
        "judged": "module", "float32": 0, "bfloat16": 0, "float16": 0, "float64": 2, "refused": 4, "failed": 0,
        "by chance": 3, "closest to its bound": 0.5,
    }  # fmt: skip
    assert fuzz.summary([block(0), block(50, "b")])["sources"] == {"a": 50, "b": 50}


def test_a_block_counts_what_ran_was_refused_and_failed(monkeypatch):
    case = Case(id="fuzz", right=0)
    wrong = Row("out max", 30.0, 1.0, 2.0, ok=False)
    results = (
        Result("x", case, (Row("out max", 1.0, 1.0, 2.0, ok=True),)),
        Result("x", case, (wrong,)),
        Result("x", case, broken="ValueError: x"),
        Result("x", case, skipped="no x"),
    )
    monkeypatch.setattr(Trial, "smallest", lambda trial: trial)
    monkeypatch.setattr(fuzz, "examine", lambda *_: (Trial(result, "cpu", 7, "packed") for result in results))
    found = fuzz.judge_block((7, 8), 0, "cpu", ["x"])
    assert found["counts"] == {"packed/x/float32": [3, 1, 2, 0, 0.5]}
    assert len(found["failures"]) == 2 and found["failures"][0].startswith("# problem 7\nimport torch")


def test_it_judges_records_and_reuses_its_log(tmp_path, capsys):
    log, path = tmp_path / "log.jsonl", tmp_path / "fuzz.json"
    command = ["fuzz", "--quick", "--quiet", "--backend", "eager", "--log", str(log), "--out", str(path)]
    assert main(command) == 0
    data = read(path)
    assert data["problems"] == 20 and data["failures"] == [] and data["finished"]
    assert sum(data["results"][0][dtype] for dtype in fuzz.DTYPES) == 20
    assert "| passes, eager" in capsys.readouterr().out
    assert "20 problems of seed 0, 0 failures; " in tables.conditions(data)
    head, line = log.read_text().splitlines()
    log.write_text(f"{head}\n{json.dumps(json.loads(line) | {'seconds': 99.0})}\n")
    assert main(command) == 0 and read(path)["cpu_seconds"] == 99, "the finished block is not judged again"


def test_wrong_numbers_are_refused(capsys):
    assert main(["fuzz", "--problems", "0"]) == 2
    assert "--problems: got 0; allowed: at least 1." in capsys.readouterr().err
