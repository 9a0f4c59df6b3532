"""Shards of a corpus: consecutive sources that one process examines and whose results form one file.

A shard's file is written in one piece and depends on nothing outside the shard. So shards are examined in any order, by
any number of processes on any number of machines, and a run that was killed keeps those that it had finished. The
process that reads the files in order decides about duplicates, which depend on earlier documents.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from fastattn.errors import DataError
from fastattn.files import replaced_file, saying_why, write_text
from fastattn.lm.data.duplicates import Keys
from fastattn.lm.data.engines import Pool, Unfinished
from fastattn.lm.data.formats import ReadOptions
from fastattn.lm.data.pipeline import Cleaning, Examined, examined
from fastattn.lm.data.sources import Skipped, Source, read_sources

SHARD_BYTES = 1 << 25  # of files; a larger file is a shard by itself
_WORTH_SHARING = 1 << 19  # bytes that take about as long as starting processes


@dataclass(frozen=True)
class Shard:
    """Sources that are examined together.

    Attributes:
        number: its place in the corpus.
        sources: in their order.
        size: bytes of their files.
    """

    number: int
    sources: tuple[Source, ...]
    size: int


@dataclass(frozen=True)
class Work:
    """All that decides the content of a shard's file.

    Attributes:
        root: the folder that relative paths start from.
        read: fields and encoding.
        cleaning: what is done to documents.
        most: read at most so many documents of a shard; None reads all.
    """

    root: Path
    read: ReadOptions
    cleaning: Cleaning
    most: int | None = None


def find_shards(sources: Sequence[Source]) -> list[Shard]:
    """The sources in shards of about ``SHARD_BYTES``; a data set of the hub is one by itself."""
    shards: list[Shard] = []
    held: list[Source] = []
    size = 0
    for source in sources:
        bytes_of = size_of([source]) if isinstance(source, Path) else SHARD_BYTES
        if held and size + bytes_of > SHARD_BYTES:
            shards.append(Shard(len(shards), tuple(held), size_of(held)))
            held, size = [], 0
        held.append(source)
        size += bytes_of
    return [*shards, Shard(len(shards), tuple(held), size_of(held))] if held else shards


def size_of(sources: Iterable[Source], root: Path = Path()) -> int:
    """Bytes of the files."""
    paths = (root / path for path in sources if isinstance(path, Path))
    return sum(path.stat().st_size for path in paths if path.is_file())


@contextlib.contextmanager
def shard_folder(path: Path, key: str) -> Iterator[Path]:
    """A hidden folder beside ``path`` for the shards of the corpus ``key``: with those that an earlier run finished.

    It is removed when the block ends, or fails with a DataError, which is about the text itself. After any other end it
    is there for the next run.
    """
    folder = path.with_name(f".{path.name}.shards")
    with saying_why(folder):
        if not (folder / "key").is_file() or (folder / "key").read_text(encoding="utf-8") != key:
            shutil.rmtree(folder, ignore_errors=True)
            write_text(folder / "key", key)
    try:
        yield folder
    except DataError as error:
        if not isinstance(error, Unfinished):
            shutil.rmtree(folder, ignore_errors=True)
        raise
    shutil.rmtree(folder, ignore_errors=True)


def examined_shards(
    shards: Sequence[Shard], work: Work, folder: Path, pool: Pool, advance: Callable[[int], object]
) -> Iterator[Examined | Skipped]:
    """The documents of all shards in order, examined, and between them what was skipped.

    Args:
        shards: from ``find_shards``.
        work: what to do.
        folder: of the shards' files; those that are there are not made again.
        pool: where to do it. With fewer shards than processes, the processes of this machine share those of a shard.
        advance: told how many bytes of the sources have been examined.
    """
    paths = [folder / f"{shard.number:06d}" for shard in shards]
    missing = [(shard, path) for shard, path in zip(shards, paths, strict=True) if not path.exists()]
    advance(sum(shard.size for shard in shards) - sum(shard.size for shard, _ in missing))
    if not pool.is_remote and sum(shard.size for shard, _ in missing) < _WORTH_SHARING:
        pool = Pool()
    if pool.executor is not None and (pool.is_remote or len(missing) >= pool.workers):
        made = _made_in_parallel(missing, work, pool, advance)
    else:
        made = _made_here(missing, work, pool, advance)
    awaited = {path for _, path in missing}
    for path in paths:
        if path in awaited:
            next(made)
        yield from read_shard(path)


def _made_here(
    missing: Sequence[tuple[Shard, Path]], work: Work, pool: Pool, advance: Callable[[int], object]
) -> Iterator[None]:
    """Write the files of the shards in order, each when it is asked for."""
    for shard, path in missing:
        _make(shard, path, work, pool, advance)
        yield


def _made_in_parallel(
    missing: Sequence[tuple[Shard, Path]], work: Work, pool: Pool, advance: Callable[[int], object]
) -> Iterator[None]:
    """Have the files of whole shards written in order, a few ahead of the one that is waited for."""
    assert pool.executor is not None
    waiting, ahead = deque(missing), deque[tuple[Shard, Future[None]]]()
    try:
        while waiting or ahead:
            while waiting and len(ahead) < 2 * pool.workers:
                shard, path = waiting.popleft()
                ahead.append((shard, pool.executor.submit(make_shard, shard, path.absolute(), work)))
            shard, future = ahead.popleft()
            future.result()
            advance(shard.size)
            yield
    finally:
        for _, future in ahead:
            future.cancel()


def make_shard(shard: Shard, path: Path, work: Work) -> None:
    """Examine a shard in this process, and write its file.

    Raises:
        Unfinished: the files are not those that the process that reads the shards sees.
    """
    if (size := size_of(shard.sources, work.root)) != shard.size:
        todo = "every worker needs the same files under the same paths"
        raise Unfinished(f"A worker sees {size:,} bytes of {shard.sources[0]} ..., not {shard.size:,}: {todo}.")
    if not path.exists():  # another worker may have been taken for dead
        _make(shard, path, work, Pool())


def _make(
    shard: Shard, path: Path, work: Work, pool: Pool, advance: Callable[[int], object] = lambda count: None
) -> None:
    found = first_documents(read_sources(shard.sources, work.read, advance, work.root), work.most)
    with replaced_file(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        for item in examined(found, work.cleaning, pool.executor, 2 * pool.workers):
            file.write(json.dumps(_to_json(item), ensure_ascii=False) + "\n")


def first_documents(found: Iterable[Any], most: int | None) -> Iterator[Any]:
    """The first so many documents, and what was skipped between them."""
    documents = count(1)
    for item in found:
        yield item
        if not isinstance(item, Skipped) and next(documents) == most:
            return


def read_shard(path: Path) -> Iterator[Examined | Skipped]:
    """The content of a shard's file."""
    with path.open(encoding="utf-8", newline="\n") as file:
        for line in file:
            yield _of_json(json.loads(line))


def _to_json(item: Examined | Skipped) -> list[Any]:
    if isinstance(item, Skipped):
        return [item.name, item.reason]
    keys = [None if keys is None else keys.tobytes().hex() for keys in (item.exact, item.near)]
    return [item.name, item.source, item.text, item.rule, item.changed, item.masked, *keys]


def _of_json(item: list[Any]) -> Examined | Skipped:
    if len(item) == 2:
        return Skipped(*item)
    name, source, text, rule, changed, masked, exact, near = item
    return Examined(name, source, text, rule, tuple(changed), masked, _keys(exact), _keys(near))


def _keys(text: str | None) -> Keys | None:
    return None if text is None else np.frombuffer(bytes.fromhex(text), np.uint64)
