"""Shards: the corpus is the same however it is cut, whoever examines it and whoever is killed meanwhile."""

import gzip
import json
import os
import random
import signal
import threading
import time

import pytest
import zstandard

from fastattn.cli import main
from fastattn.errors import DataError, InputError
from fastattn.lm.data import Cleaning, engines, find_sources, pipeline, shards
from fastattn.lm.train.prepare import PrepareConfig, prepare_at

CONFIG = PrepareConfig(cleaning=Cleaning(), vocab_size=300, held_out=0.1)
WORDS = ["river", "stone", "bridge", "water", "market", "village", "garden", "window", "the", "and", "with", "of", "to"]


def prose(number):
    source = random.Random(number)
    return f"Story {number}. " + ". ".join(" ".join(source.choices(WORDS, k=12)).capitalize() for _ in range(8))


@pytest.fixture
def raw(tmp_path):
    """Six shards in three formats, with a duplicate across shards, one too short, and a damaged record."""
    from pyarrow import Table, parquet

    folder = tmp_path / "raw"
    folder.mkdir()
    for shard in range(6):
        records = [{"text": prose(20 * shard + n), "url": None} for n in range(20)] + [{"text": prose(0), "url": "x"}]
        lines = "".join(json.dumps(record) + "\n" for record in records) + '{"text": "short"}\n{"url": 1}\n'
        if shard % 3 == 0:
            (folder / f"{shard}.json.gz").write_bytes(gzip.compress(lines.encode()))
        elif shard % 3 == 1:
            (folder / f"{shard}.jsonl.zst").write_bytes(zstandard.compress(lines.encode()))
        else:
            parquet.write_table(Table.from_pylist(records), folder / f"{shard}.parquet", row_group_size=7)
    return folder


def made(raw, out, pool=None, config=CONFIG):
    return prepare_at(find_sources([str(raw)]), out, config, pool=pool, progress=False)


def content(corpus):
    assert not corpus.folder.with_name(f".{corpus.folder.name}.shards").exists()
    return {path.name: path.read_bytes() for path in corpus.folder.iterdir()}


@pytest.fixture
def whole(raw, tmp_path):
    """The corpus that one process makes of one shard."""
    corpus = made(raw, tmp_path / "whole")
    report = json.loads((corpus.folder / "report.json").read_text())
    assert report["kept"] == 120 and report["dropped"] == {"exact-duplicate": 6, "too-short": 4}
    assert len(corpus.facts.skipped) == 4 and "no field 'text' among url" in corpus.facts.skipped[0]["reason"]
    return content(corpus)


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(shards, "SHARD_BYTES", 1)
    monkeypatch.setattr(shards, "_WORTH_SHARING", 0)


@pytest.mark.parametrize("workers", [1, 2, 8])  # 8 are more than the shards, so each shard is shared
def test_shards_and_processes_change_nothing(raw, whole, tmp_path, small_shards, workers):
    assert len(shards.find_shards(find_sources([str(raw)]))) == 6
    with engines.started("processes", workers) as pool:
        assert content(made(raw, tmp_path / "again", pool)) == whole


def test_a_limit_cuts_at_the_same_document(raw, tmp_path, small_shards, monkeypatch):
    config = PrepareConfig(cleaning=Cleaning(), vocab_size=300, max_documents=30)
    first = content(made(raw, tmp_path / "first", config=config))
    monkeypatch.setattr(shards, "SHARD_BYTES", 1 << 25)
    assert content(made(raw, tmp_path / "second", config=config)) == first
    report = json.loads(first["report.json"])
    assert report["read"] == 30 and len(report["skipped"]) == 1


def test_a_killed_run_continues_with_the_shards_that_are_done(raw, whole, tmp_path, small_shards, monkeypatch):
    read, real, killer = [], pipeline.examine, os.getpid()

    def examine(document, cleaning):
        read.append(document.source)
        if os.getpid() != killer and document.name.endswith("3.json.gz#5"):
            os.kill(os.getpid(), signal.SIGKILL)
        return real(document, cleaning)

    monkeypatch.setattr(pipeline, "examine", examine)
    if not (child := os.fork()):
        made(raw, tmp_path / "killed")
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    left = tmp_path / ".killed.shards"
    assert sorted(path.name for path in left.iterdir() if path.name.isdigit()) == ["000000", "000001", "000002"]
    assert content(made(raw, tmp_path / "killed")) == whole
    assert {os.path.basename(source)[0] for source in read} == {"3", "4", "5"}


def test_other_settings_begin_anew(raw, tmp_path, small_shards):
    folder = tmp_path / ".out.shards"
    folder.mkdir()
    (folder / "key").write_text("of other settings")
    (folder / "000000").write_text("[]")
    assert len(content(made(raw, tmp_path / "out"))) == 7


def test_a_dead_process_is_one_sentence(raw, tmp_path, small_shards, monkeypatch):
    monkeypatch.setattr(pipeline, "examine", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(DataError, match=r"A process that cleans documents was killed\. Fewer --workers"):  # noqa: SIM117
        with engines.started("processes", 2) as pool:
            made(raw, tmp_path / "out", pool)
    assert (tmp_path / ".out.shards" / "key").exists() and not (tmp_path / "out").exists()


def test_dask_with_a_worker_killed_midway(raw, whole, tmp_path, small_shards):
    pytest.importorskip("distributed", reason="needs pip install 'fastattn[dask]'")
    with engines.started("dask", 2) as pool:
        client = pool.executor._client
        processes = client.run(os.getpid)
        assert len(processes) == pool.workers == 2
        victim = next(iter(processes.values()))

        def kill():
            while not list(tmp_path.glob(".by-dask.shards/0*")):
                time.sleep(0.001)
            os.kill(victim, signal.SIGKILL)

        killer = threading.Thread(target=kill)
        killer.start()
        corpus = made(raw, tmp_path / "by-dask", pool)
        killer.join()
        assert content(corpus) == whole
        client.wait_for_workers(2, timeout=30)
        assert victim not in client.run(os.getpid).values()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("ray", None, None), "engine: got 'ray'; allowed: processes, dask"),
        (("processes", 0, None), "workers: got 0"),
        (("processes", None, "tcp://a:1"), "cluster: got tcp://a:1"),
        (("dask", 2, "tcp://a:1"), "workers: got 2; allowed: None with --cluster"),
    ],
)
def test_refusals(arguments, words):
    with pytest.raises(InputError, match=words):
        engines.check_engine(*arguments)


def test_files_that_a_worker_does_not_see(raw, tmp_path):
    (shard,) = shards.find_shards(find_sources([str(raw)]))
    elsewhere = shards.Shard(0, shard.sources, shard.size + 1)
    work = shards.Work(tmp_path, CONFIG.read, CONFIG.cleaning)
    with pytest.raises(DataError, match="every worker needs the same files under the same paths"):
        shards.make_shard(elsewhere, tmp_path / "0", work)


def test_a_scheduler_that_does_not_answer(raw, tmp_path, capsys, monkeypatch):
    distributed = pytest.importorskip("distributed", reason="needs pip install 'fastattn[dask]'")
    monkeypatch.setattr(distributed, "Client", lambda *_, **__: (_ for _ in ()).throw(OSError("timed out")))
    command = ["prepare", "--data", str(raw), "--out", str(tmp_path / "out"), "--engine", "dask", "--quiet"]
    assert main([*command, "--cluster", "tcp://127.0.0.1:1"]) == 2
    assert "The Dask scheduler at 'tcp://127.0.0.1:1' does not answer (timed out)" in capsys.readouterr().err
