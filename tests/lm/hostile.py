"""Reads hostile files and prints for each how it ended, its seconds of CPU time and the growth of memory in MiB.

A program of its own, so that the peak is that of these files alone: ``python hostile.py FOLDER``.
"""

import gzip
import json
import os
import resource
import sys
import time
from pathlib import Path

import zstandard

from fastattn.cli import config as toml
from fastattn.cli import make_parser
from fastattn.errors import DataError, InputError
from fastattn.lm.data.formats import Reading, ReadOptions, Unreadable, read_file
from fastattn.lm.data.sources import find_files
from fastattn.lm.finetune.config import saved_config
from fastattn.lm.finetune.datasets import read_dataset
from fastattn.lm.generate.prompts import read_prompts
from fastattn.lm.models import from_pretrained
from fastattn.lm.train import find_checkpoint, resumed_config
from fastattn.lm.train.tokens import Corpus, load_tokenizer

DEEP = "[" * 200_000
BOMB = b"a" * (1 << 22)
GOOD = {"kind": "decoder", "vocab_size": 300, "width": 16, "layers": 1, "heads": 2, "max_length": 16}
BERT = {"model_type": "bert", "vocab_size": 300, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
BERT |= {"intermediate_size": 32, "max_position_embeddings": 16, "type_vocab_size": 2}
RUN = {"format": "fastattn-checkpoint-1", "step": 1, "settings": {}}


def bomb(path, size=1 << 5):
    """Some kilobytes that expand to 128 MiB."""
    if path.suffix == ".gz":
        with gzip.open(path, "wb", compresslevel=9) as file:
            for _ in range(size):
                file.write(BOMB)
        return
    with zstandard.ZstdCompressor(level=3).stream_writer(path.open("wb")) as file:
        for _ in range(size):
            file.write(BOMB)


def documents(path):
    """Read all of a file; the first of what it leaves out, if it ends well."""
    reading = Reading()
    for _ in read_file(path, ReadOptions(), reading):
        pass
    if reading.problems:
        raise Unreadable(reading.first_problem)


def sparse(path, size=1 << 31, begin=b""):
    """Gigabytes without a line end, that take no place on the disk."""
    path.write_bytes(begin)
    os.truncate(path, size)


def checkpoint(folder, config=GOOD, state=RUN):
    folder.mkdir(exist_ok=True)
    for name, content in (("config", config), ("trainer", state)):
        (folder / f"{name}.json").write_text(content if isinstance(content, str) else json.dumps(content))
    (folder / "model.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    return folder


def hugging_face(folder, config):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    (folder / "model.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    from_pretrained(folder)


def read(path, content, use):
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(content, encoding="utf-8")
    use(path)


def toml_file(path):
    toml.expand(["train", "--config", str(path)], make_parser()[1])


def cases(folder):
    """Names, and what reads the file."""
    classify = lambda path: read_dataset(path, "classify")  # noqa: E731
    for suffix in (".txt.zst", ".jsonl.zst", ".csv.zst", ".json.zst", ".txt.gz", ".jsonl.gz"):
        path = folder / f"bomb{suffix}"
        bomb(path)
        yield f"bomb {suffix}", lambda path=path: documents(path)
    for suffix in (".jsonl", ".csv", ".tsv", ".json"):
        path = folder / f"line{suffix}"
        sparse(path, begin=b"[" if suffix == ".json" else b"a")
        yield f"endless line of text, {suffix}", lambda path=path: documents(path)
    for suffix in (".jsonl", ".json", ".conll"):
        path = folder / f"line{suffix}"
        sparse(path, begin=b"[" if suffix == ".json" else b"a")
        yield f"endless line of examples, {suffix}", lambda path=path: classify(path)
    for name, use in (("text", documents), ("examples", classify), ("prompts", read_prompts)):
        for content in (DEEP, '{"a": ' * 100_000, '"\\ud800', b"\xff" * 99, b"\0" * 99):
            yield f"{name} {content[:4]!r}", lambda c=content, use=use: read(folder / "x.jsonl", c, use)
    for content in (DEEP, '{"data": 3}', '{"data": [{"paragraphs": 3}]}', '{"data": [{"paragraphs": [{"qas": [1]}]}]}'):
        yield f"json {content[:20]!r}", lambda c=content: read(folder / "x.json", c, classify)
    yield "parquet", lambda: read(folder / "x.parquet", b"PAR1" * 99, classify)
    pipe = folder / "pipe.jsonl"
    os.mkfifo(pipe)
    for name, use in (("text", documents), ("examples", classify), ("files", lambda path: find_files([str(path)]))):
        yield f"pipe of {name}", lambda use=use: use(pipe)
    yield "device", lambda: documents(Path("/dev/zero"))
    wrong = [("layers", 10**9), ("vocab_size", 10**12), ("width", 10**9), ("layers", "many"), ("heads", None)]
    wrong += [("dropout", "x"), ("kind", ["decoder"]), ("vocab_size", 1 << 24), ("window", {})]
    for name, value in wrong:
        path = folder / "checkpoint"
        yield (
            f"config {name}={value}",
            lambda n=name, v=value, p=path: find_checkpoint(checkpoint(p, GOOD | {n: v})).load_pretrained(),
        )
    for name, value in (("num_hidden_layers", 10**9), ("vocab_size", "x"), ("hidden_size", None), ("model_type", [1]),
                        ("num_attention_heads", 0), ("hidden_act", {})):  # fmt: skip
        yield f"bert {name}={value}", lambda n=name, v=value: hugging_face(folder / "bert", BERT | {n: v})
    yield "bert nested", lambda: hugging_face(folder / "bert", DEEP)
    for state in (DEEP, "3", RUN | {"step": "x"}, RUN | {"settings": []}, RUN | {"step": -1}):
        yield (
            f"trainer {str(state)[:30]}",
            lambda s=state: find_checkpoint(checkpoint(folder / "checkpoint", state=s)).trainer_state(),
        )
    for settings in ({"run": 3}, {"run": {"train": "x"}}, {"run": {"train": {"optim": {"betas": 3}}}}):
        yield (
            f"settings {settings}",
            lambda s=settings: resumed_config(
                find_checkpoint(checkpoint(folder / "checkpoint", state=RUN | {"settings": s})), {}
            ),
        )
    yield (
        "fine-tuning",
        lambda: saved_config(
            find_checkpoint(checkpoint(folder / "checkpoint", state=RUN | {"settings": {"finetune": {"train": []}}}))
        ),
    )
    yield "tokenizer", lambda: read(folder / "tokenizer.json", DEEP, load_tokenizer)
    yield "corpus", lambda: read(folder / "corpus.json", DEEP, lambda path: Corpus.open(path.parent))
    for content in ("a = " + DEEP, "steps = 'x'", "steps = [1]", "steps = true", "\x00", "[nowhere]\na = 1"):
        yield f"toml {content[:20]!r}", lambda c=content: read(folder / "x.toml", c, toml_file)


def main(folder):
    # What any process has, before the files
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for name, run in cases(folder):
        began, ended = time.process_time(), "accepted"
        try:
            run()
        except (DataError, InputError, Unreadable) as error:
            ended = "refused" if "\n" not in str(error) and str(error) else f"several lines: {error}"
        except BaseException as error:
            ended = repr(error)
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024
        print(json.dumps([name, ended, round(time.process_time() - began, 2), grown]), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
