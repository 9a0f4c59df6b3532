"""The rows of compiled calls, with a compiler that changes nothing: compiling takes longer than all else."""

import torch

from benchmarks import compiled_calls


def test_each_call_has_its_row(monkeypatch):
    options = []
    monkeypatch.setattr(torch, "compile", lambda function, **given: options.append(given) or function)
    rows = compiled_calls.rows(rounds=2, round_s=0.001)
    assert [row["what"] for row in rows] == [*compiled_calls.compiled_calls()]
    assert all(row["seconds"] > 0 for row in rows) and rows[0]["ratio"] == 1
    assert all(given["fullgraph"] for given in options) and "options" in options[2] and "options" not in options[1]
