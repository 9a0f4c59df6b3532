"""Engines that examine shards: the processes of this machine, or the workers of a Dask cluster.

Both are executors in the sense of ``concurrent.futures``, so both run the same code.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from concurrent.futures import BrokenExecutor, Executor, ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal, get_args

from fastattn.errors import DataError, UnsupportedError, input_error

Engine = Literal["processes", "dask"]


class Unfinished(DataError):
    """Workers failed, not the text: the same command may continue with the shards that are done."""


@dataclass(frozen=True)
class Pool:
    """Processes that examine documents.

    Attributes:
        executor: gives them work; None is this process alone.
        workers: their number.
        is_remote: they may be on other machines, so they read files themselves.
    """

    executor: Executor | None = None
    workers: int = 1
    is_remote: bool = False


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def check_engine(engine: str, workers: int | None, cluster: str | None) -> None:
    """Raise InputError unless the three arguments of ``started`` fit together."""
    if engine not in get_args(Engine):
        raise input_error("engine", repr(engine), ", ".join(get_args(Engine)), "processes are those of this machine.")
    if workers is not None and workers < 1:
        raise input_error("workers", workers, "at least 1, or None", "None is the number of cores.")
    if cluster is not None and engine != "dask":
        raise input_error("cluster", cluster, "None", "It is the address of a scheduler of --engine dask.")
    if cluster is not None and workers is not None:
        raise input_error("workers", workers, "None with --cluster", "The cluster has the workers that it has.")


@contextlib.contextmanager
def started(engine: Engine, workers: int | None, cluster: str | None = None) -> Iterator[Pool]:
    """Processes to examine documents with, during the block.

    Args:
        engine: "processes" of this machine, or "dask".
        workers: their number; None is the number of cores.
        cluster: address of a running Dask scheduler, as in ``tcp://10.0.0.1:8786``; None starts one on this machine.

    Raises:
        InputError: see ``check_engine``.
        UnsupportedError: Dask is not installed.
        Unfinished: the scheduler does not answer, or processes died; of Dask's workers several with one shard.
    """
    check_engine(engine, workers, cluster)
    number = workers or available_cores()
    if engine == "dask":
        with _dask(number, cluster) as pool:
            yield pool
        return
    if number == 1:
        yield Pool()
        return
    with ProcessPoolExecutor(number) as executor:
        try:
            yield Pool(executor, number)
        except BrokenExecutor as error:
            todo = "Fewer --workers need less memory; the same command continues with the shards that are done."
            raise Unfinished(f"A process that cleans documents was killed. {todo}") from error


@contextlib.contextmanager
def _dask(workers: int, cluster: str | None) -> Iterator[Pool]:
    try:
        import distributed
    except ModuleNotFoundError as error:
        raise UnsupportedError("--engine dask needs the package 'distributed': pip install 'fastattn[dask]'") from error
    with contextlib.ExitStack() as stack:
        if cluster is None:  # one thread each: Python's lock would make the others wait
            local = distributed.LocalCluster(n_workers=workers, threads_per_worker=1, dashboard_address=None)
            cluster = stack.enter_context(local).scheduler_address
        client = stack.enter_context(_client(distributed, cluster))
        threads = sum(client.nthreads().values())
        if not threads:
            raise Unfinished(f"The Dask scheduler at {cluster} has no workers: start some with dask worker {cluster}.")
        try:
            yield Pool(client.get_executor(pure=False, retries=3), threads, is_remote=True)
        except distributed.KilledWorker as error:
            todo = "See the logs of the workers; the same command continues with the shards that are done."
            raise Unfinished(f"Dask gave up on a shard, since several workers died with it. {todo}") from error


def _client(distributed: Any, cluster: str) -> Any:
    try:
        return distributed.Client(cluster, timeout=10)
    except (OSError, ValueError) as error:
        raise Unfinished(f"The Dask scheduler at {cluster!r} does not answer ({error}): check --cluster.") from error
