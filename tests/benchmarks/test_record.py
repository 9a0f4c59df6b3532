"""Records are complete after each result, also after a kill; reports refuse mixed records; tables are right."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from benchmarks import plots, report, tables
from benchmarks.record import Record, read
from fastattn.errors import DataError, InputError
from fastattn.files import write_text
from fastattn.measure.workload import Workload

CPU = torch.device("cpu")
ROOT = report.RESULTS.parent.parent

WRITER = """
import sys, torch
from pathlib import Path
from benchmarks.record import Record
record = Record("rows", "test", torch.device("cpu"), Path(sys.argv[1]))
n = 0
while True:
    record.add({"n": n, "ballast": "x" * 10000})
    print(n, flush=True)
    n += 1
"""


def test_a_kill_at_any_moment_leaves_a_whole_record(tmp_path):
    path = tmp_path / "record.json"
    with subprocess.Popen([sys.executable, "-c", WRITER, path], cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        seen = [int(process.stdout.readline()) for _ in range(30)][-1]
        time.sleep(0.003)
        os.kill(process.pid, signal.SIGKILL)
    results = read(path)["results"]
    assert len(results) > seen and [row["n"] for row in results] == list(range(len(results)))


def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path, monkeypatch):
    path = tmp_path / "record.json"
    write_text(path, "old")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DataError, match="disk is full"):
        write_text(path, "new")
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["record.json"]


def test_a_record_states_its_conditions(tmp_path):
    record = Record("rows", "python -m benchmarks rows", CPU, tmp_path / "r.json")
    record.finish(CPU)
    data = read(tmp_path / "r.json")
    environment = data["environment"]
    assert environment["versions"]["torch"] == torch.__version__
    assert len(environment["source"]) == 16 and environment["device_facts"]["threads"] == torch.get_num_threads()
    assert {"commit", "dirty", "clocks", "driver"} <= set(environment)
    assert data["command"] == "python -m benchmarks rows" and data["finished"] >= data["started"]


def test_appending_goes_on_with_the_same_kind_only(tmp_path):
    path = tmp_path / "r.json"
    Record("rows", "first", CPU, path).add({"n": 0})
    again = Record("rows", "second", CPU, path, append=True)
    again.add({"n": 1})
    assert [row["n"] for row in read(path)["results"]] == [0, 1] and read(path)["command"] == "first && second"
    with pytest.raises(InputError, match="another command, device or code"):
        Record("other", "third", CPU, path, append=True)


@pytest.mark.parametrize(("text", "message"), [("{", "not JSON"), ("[]", "schema"), ('{"schema": 0}', "schema")])
def test_what_is_no_record_is_refused(tmp_path, text, message):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(DataError, match=message):
        read(tmp_path / "x.json")
    with pytest.raises(DataError, match="No such file"):
        read(tmp_path / "missing.json")


# Reports


SHAPE = Workload(s_q=128, s_kv=128, heads_q=2, heads_kv=2, d_qk=64, d_v=64, dtype="fp32", passes=("forward",)).to_dict()


def ops_record(device="a CPU", commit="1" * 40, dirty=False, length=128, ours=1.0):
    def a_pass(rounds, **more):
        return {"median_s": rounds[1], "spread": 0.1, "rounds_s": rounds, "tflops": 2.0, "gate": "green", **more}

    results = [
        {
            "suite": "made up",
            "id": f"fp32 b1 s{s} h2 d64 full",
            "workload": SHAPE | {"s_q": s, "s_kv": s},
            "peers": {
                "fastattn": {"why": None, "passes": {"forward": a_pass([ours] * 3, peak_bytes=1_000_000 * s)}},
                "eager": {"why": None, "passes": {"forward": a_pass([4.0, 5.0, 6.0], peak_bytes=9_000_000 * s)}},
                "sdpa": {"why": None, "passes": {"forward": a_pass([1.0, 2.0, 3.0])}},
                "flex": {"why": "no sinks", "passes": {}},
                "wrong": {"why": None, "passes": {"forward": {"error": "red: out max at 9 of the bound"}}},
            },
        }
        for s in (length, 2 * length)
    ]
    environment = {"device": device, "commit": commit, "dirty": dirty, "source": "abcd", "versions": {"torch": "2.13"}}
    return {
        "schema": 1,
        "kind": "ops",
        "command": "python -m benchmarks ops",
        "started": "2026-01-02T03:04:05+00:00",
        "finished": "2026-01-02T03:05:05+00:00",
        "environment": environment,
        "ceilings": {"matmul_fp32_tflops": 4.0, "copy_gbps": 10.0},
        "peers": ["fastattn", "eager", "sdpa", "flex", "wrong"],
        "results": results,
    }


def test_the_table_says_what_was_measured_and_why_a_number_is_missing():
    text = tables.table(ops_record())
    row = next(line for line in text.splitlines() if "s128" in line)
    assert "1 s ±10%" in row and "128.0 MB" in row and "2.00× sdpa" in row and "50%" in row
    assert "- flex: no sinks (2 cases)" in text
    assert "- wrong: red: out max at 9 of the bound (2 cases)" in text


def test_a_feature_is_shown_as_a_share_of_the_dense_case_of_its_shape():
    record = ops_record()
    dense = record["results"][0]
    peers = {"fastattn": {"why": None, "passes": {"forward": {"tflops": 0.5}}}}
    window = dense["workload"] | {"window": (3, 0)}
    record["results"].append(dense | {"id": "window", "workload": window, "peers": peers})
    row = next(line for line in tables.table(record).splitlines() if "window" in line)
    assert [cell.strip() for cell in row.split("|")][-4:-2] == ["12%", "25%"]


def test_the_best_peer_is_the_fastest_and_losses_are_shown():
    record = ops_record(ours=4.0)
    assert tables.best_rival(record["results"][0], "forward") == ("sdpa", 0.5)
    assert "0.50×" in tables.summary(record) and "1.25×" in tables.summary(record)


def test_conditions_tell_dirty_and_unfinished():
    record = ops_record(dirty=True) | {"finished": None}
    text = tables.conditions(record)
    assert "with uncommitted changes (source abcd)" in text and "did not finish" in text and "copy 10 GB/s" in text


def test_records_of_different_devices_or_code_are_not_mixed_silently():
    one = ops_record()
    for other, what in ((ops_record(device="a GPU"), "devices"), (ops_record(commit="2" * 40), "code")):
        with pytest.raises(InputError, match=rf"different {what}.*--mixed"):
            report.report({"one": one, "other": other})
        text = report.report({"one": one, "other": other}, mixed=True)
        assert "Not comparable" in text and f"different {what}" in text
    assert "Not comparable" not in report.report({"one": one, "other": ops_record(length=512)})


def test_plots_are_drawn_for_what_there_is(tmp_path):
    pytest.importorskip("matplotlib")
    text = report.report({"one": ops_record()}, out=tmp_path)
    pictures = sorted(path.name for path in tmp_path.iterdir())
    assert pictures == ["one-memory.png", "one-ratio.png", "one-speed.png"]
    assert all((tmp_path / name).read_bytes()[:4] == b"\x89PNG" and f"]({name})" in text for name in pictures)


def test_lines_join_cases_that_differ_in_length_alone():
    pytest.importorskip("matplotlib")
    record = ops_record()  # lengths 128 and 256 with 2 heads
    record["results"].append(record["results"][0] | {"id": "fp32 b1 s128 h9 d64 full"})
    (panel,) = plots._by_length(record, "tflops", "", "").axes
    lengths = [list(line.get_xdata()) for line in panel.lines if line.get_label() == "fastattn"]
    assert lengths == [[128, 256], [128]]


# Pages


def test_regions_are_rewritten_and_the_rest_is_left_alone(tmp_path):
    write_text(tmp_path / "results" / "cpu.json", json.dumps(ops_record()))
    text = "# Title\n<!-- results:cpu -->\nold numbers\n<!-- /results:cpu -->\nafter\n"
    new = report.rendered(text, tmp_path / "results", tmp_path)
    assert new.startswith("# Title\n<!-- results:cpu -->\n") and new.endswith("<!-- /results:cpu -->\nafter\n")
    assert "old numbers" not in new and tables.summary(ops_record()) in new
    assert report.rendered(new, tmp_path / "results", tmp_path) == new
    tampered = new.replace("2.00×", "3.00×")
    assert tampered != new and report.rendered(tampered, tmp_path / "results", tmp_path) == new


PAGES = [
    ROOT / page
    for page in ("README.md", "docs/performance.md", "docs/reference/testing.md", "docs/guides/train_from_scratch.md")
]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages_show_the_committed_records(page):
    """If this fails, run ``make tables``: the numbers of the page are not those of benchmarks/results."""
    shown = report.bodies(page.read_text(encoding="utf-8"))
    assert shown
    for name, text in shown.items():
        assert text == report.body(name, report.RESULTS, page.parent), "run `make tables`"


def test_every_committed_record_is_on_a_page():
    committed = {path.stem for path in report.RESULTS.glob("*.json")}
    shown = {name for page in PAGES for name in report.bodies(page.read_text(encoding="utf-8"))}
    assert committed | {"highlights", "examples", *report.UNMEASURED} == shown


def test_the_readme_has_six_rows():
    text = report.bodies(PAGES[0].read_text(encoding="utf-8"))["highlights"]
    assert len([line for line in text.splitlines() if line.startswith("| ")]) == 2 + 6
