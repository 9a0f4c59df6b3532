"""Checkpoints come back exactly, are whole or absent, and say what is wrong with them when they are not ours."""

import errno
import json
import os
from pathlib import Path

import pytest
import torch

from fastattn import files
from fastattn.errors import DataError
from fastattn.files import new_folder, write_text
from fastattn.lm.train.checkpoint import Checkpoint, find_checkpoint, sorted_steps


@pytest.fixture
def run(make_trainer, tmp_path):
    """A run of four steps, saved at 2 and 4."""
    trainer = make_trainer(tmp_path / "run", steps=4, save_every=2)
    trainer.run()
    return trainer


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_everything_comes_back(run, make_trainer, tmp_path):
    checkpoint = find_checkpoint(run.folder)
    model = checkpoint.load_pretrained()
    assert not model.training and model.config == run.model.config
    for name, tensor in run.model.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    other = make_trainer(tmp_path / "other")
    checkpoint.load_weights(other.model)
    checkpoint.load_optimizer(other.optimizer, other.model)
    for ours, theirs in zip(run.model.parameters(), other.model.parameters(), strict=True):
        for key, value in run.optimizer.state[ours].items():
            assert torch.equal(other.optimizer.state[theirs][key], value), key
    assert checkpoint.tokenizer().to_str() == run.tokenizer.to_str()
    assert checkpoint.load_pretrained(attention="eager").config.attention == "eager"


def test_the_newest_are_kept_and_found(run):
    folder = run.folder / "checkpoints"
    assert [path.name for path in sorted_steps(folder)] == ["step-00000002", "step-00000004"]
    for given in (run.folder, folder, folder / "step-00000004"):
        assert find_checkpoint(given).folder == folder / "step-00000004"
    assert find_checkpoint(folder / "step-00000002").trainer_state()["step"] == 2


def fail_on(monkeypatch, name, code):
    """Make writing the file of this name fail half way."""
    real = Path.write_bytes

    def write_bytes(self, data):
        if self.name != name:
            return real(self, data)
        real(self, data[: len(data) // 2])
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(Path, "write_bytes", write_bytes)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors"])
def test_a_full_disk_leaves_the_previous_checkpoint(run, monkeypatch, name):
    folder = run.folder / "checkpoints"
    before = contents(folder)
    fail_on(monkeypatch, name, errno.ENOSPC)
    run.progress.step = 6
    with pytest.raises(
        DataError, match=r"step-00000006: the disk is full; what was saved before is intact\. Please free"
    ):
        run._save()
    assert contents(folder) == before  # no half-written folder, nothing lost
    monkeypatch.undo()
    run._save()
    assert find_checkpoint(run.folder).trainer_state()["step"] == 6


def test_a_disk_that_cannot_be_written(run, monkeypatch):
    fail_on(monkeypatch, "model.safetensors", errno.EACCES)
    run.progress.step = 6
    with pytest.raises(DataError, match=r"Permission denied.*check the folder and its permissions"):
        run._save()


def test_a_crash_before_the_renaming_leaves_nothing_that_looks_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(files.os, "replace", lambda *_: os._exit(9))
    if os.fork() == 0:
        with new_folder(tmp_path / "step-00000001") as folder:
            (folder / "file").write_text("x")
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.wait()[1]) == 9
    monkeypatch.undo()
    assert not sorted_steps(tmp_path) and len(list(tmp_path.iterdir())) == 1
    with new_folder(tmp_path / "step-00000002") as folder:
        (folder / "file").write_text("y")
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000002"]  # the leftover is gone


def test_write_text_replaces_or_leaves(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_text(path, "old")
    monkeypatch.setattr(files.os, "fsync", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
    with pytest.raises(DataError, match="the disk is full"):
        write_text(path, "new")
    assert path.read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def truncate(path):
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


DAMAGES = {
    "model cut": (lambda f: truncate(f / "model.safetensors"), r"model\.safetensors is missing, truncated or not"),
    "model gone": (lambda f: (f / "model.safetensors").unlink(), r"model\.safetensors is missing"),
    "model foreign": (lambda f: (f / "model.safetensors").write_bytes(b"PK" * 99), "not a safetensors file"),
    "config cut": (lambda f: truncate(f / "config.json"), r"config\.json is missing or not readable as JSON"),
    "config foreign": (lambda f: edit(f / "config.json", colour=1), "does not describe a model of fastattn"),
    "other size": (lambda f: edit(f / "config.json", width=32), r"does not fit config\.json beside it"),
    "other layers": (lambda f: edit(f / "config.json", layers=2), "tensors differ, the first 'blocks.1"),
    "not ours": (lambda f: edit(f / "trainer.json", format="x"), r"not a checkpoint of fastattn \(format 'x'\)"),
    "a list": (lambda f: (f / "trainer.json").write_text("[]"), "does not hold what fastattn writes there"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_said_in_a_sentence(run, damage):
    checkpoint = find_checkpoint(run.folder)
    do_damage, words = DAMAGES[damage]
    do_damage(checkpoint.folder)
    with pytest.raises(DataError, match=words):
        checkpoint.load_pretrained()


def test_a_damaged_optimizer_or_state_stops_resuming(run, make_trainer, tmp_path):
    folder = find_checkpoint(run.folder).folder
    trainer = make_trainer(tmp_path / "other")
    edit(folder / "trainer.json", progress={"unknown": 1})
    with pytest.raises(DataError, match=r"trainer\.json does not hold"):
        trainer.resume(Checkpoint(folder))
    (folder / "optimizer.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    with pytest.raises(DataError, match="does not belong to this model"):
        trainer.resume(Checkpoint(folder))


def test_no_checkpoint(tmp_path):
    with pytest.raises(DataError, match="does not exist: give the --out folder"):
        find_checkpoint(tmp_path / "nowhere")
    with pytest.raises(DataError, match="holds no checkpoint of fastattn"):
        find_checkpoint(tmp_path)


def zero(path, count=100):
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        file.write(bytes(count))


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "trainer.json", "tokenizer.json"])
def test_the_newest_sound_checkpoint_is_taken_and_a_damaged_one_is_written_again(run, caplog, name):
    newest = run.folder / "checkpoints" / "step-00000004"
    zero(newest / name)
    assert find_checkpoint(run.folder).folder.name == "step-00000002"
    assert f"step-00000004 is damaged ({name} has changed since it was written) and is not used" in caplog.text
    with pytest.raises(DataError, match=r"is damaged.*Give the folder of the run"):
        find_checkpoint(newest)
    run._save()
    assert find_checkpoint(run.folder).folder == newest


def test_when_every_checkpoint_is_damaged_nothing_is_loaded(run):
    for number, folder in enumerate(sorted_steps(run.folder / "checkpoints")):
        if number:
            (folder / "config.json").unlink()
        else:
            (folder / "checksums.json").write_text('{"model.safetensors": 3}')
    with pytest.raises(DataError, match=r"Every checkpoint in .* is damaged; the newest: checksums\.json cannot"):
        find_checkpoint(run.folder)


def test_a_damaged_later_checkpoint_does_not_displace_sound_ones(run, make_trainer):
    zero(run.folder / "checkpoints" / "step-00000004" / "model.safetensors")
    again = make_trainer(run.folder, steps=3, save_every=2, keep=1)
    again.resume(find_checkpoint(run.folder))
    again.run()
    assert find_checkpoint(run.folder).folder.name == "step-00000003"
