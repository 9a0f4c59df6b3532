"""GLUE on a folder: every task by its own metric, the average, and a run that goes on."""

import json
import re

import pytest

from fastattn.cli import main
from fastattn.errors import DataError
from fastattn.lm.finetune.glue import GLUE, GlueOutcome, find_glue
from fastattn.lm.models import PRESETS

ROWS = "".join(f"{'up' if n % 2 else 'down'} {n}\tthen\t{n % 2}\n" for n in range(8))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    sizes = {"width": 16, "layers": 1, "heads": 2, "kv_heads": 1, "max_length": 24}
    monkeypatch.setitem(PRESETS, "encoder-tiny", PRESETS["encoder-tiny"] | sizes)
    heads = {"SST2": "sentence\tx\tlabel\n", "STS-B": "sentence1\tsentence2\tscore\n"}
    heads |= {"mnli": "sentence1\tsentence2\tgold_label\n"}
    for name, head in heads.items():
        splits = ("dev_matched", "dev_mismatched") if name == "mnli" else ("dev",)
        (tmp_path / "glue" / name).mkdir(parents=True)
        for split in ("train", *splits):
            (tmp_path / "glue" / name / f"{split}.tsv").write_text(head + ROWS)
    return tmp_path / "glue"


def test_the_whole_of_glue_as_one_command(folder, tmp_path, capsys):
    command = ["glue", "--data", str(folder), "--out", str(tmp_path / "out"), "--preset", "tiny", "--steps", "2"]
    command += ["--batch", "4", "--vocab-size", "258", "--device", "cpu", "--quiet"]
    assert main(command) == 0
    text, found = capsys.readouterr().out, json.loads((tmp_path / "out" / "glue.json").read_text())
    assert list(found) == ["SST-2", "STS-B", "MNLI", "average"]
    assert found["average"] == pytest.approx(sum(found[name] for name in ("SST-2", "STS-B", "MNLI")) / 3)
    assert re.search(rf"^average +{found['average']:.1f}$", text, re.M)
    scores = json.loads((tmp_path / "out" / "MNLI" / "scores.json").read_text())
    each = [scores[f"accuracy (dev_{name})"] for name in ("matched", "mismatched")]
    assert found["MNLI"] == pytest.approx(50 * sum(each))
    log = tmp_path / "out" / "SST-2" / "log.jsonl"
    before = log.stat().st_mtime_ns
    assert main(command) == 0 and log.stat().st_mtime_ns == before  # nothing is done again


def test_wnli_is_not_in_the_average():
    assert GlueOutcome({"RTE": 60.0, "WNLI": 20.0}).average == 60.0
    assert GlueOutcome({"RTE": 60.0}, signal=2).average is None


def test_a_folder_without_tasks(tmp_path):
    with pytest.raises(DataError, match=f"no folder of a task of GLUE: {', '.join(GLUE)}"):
        find_glue(tmp_path / "none")
