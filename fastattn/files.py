"""Atomic files and folders: after a kill or with a full disk, a path holds its old content or all of the new one.

Everything is written under a temporary name, synced and renamed. ``cache_root`` is the folder of all caches.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from fastattn.errors import DataError

_TEMPORARY = ".unfinished-"


@contextlib.contextmanager
def new_folder(path: Path, *, alone: bool = True) -> Iterator[Path]:
    """A temporary folder that becomes ``path``, which must not exist, when the block ends without an error.

    Args:
        path: of the folder.
        alone: no other process writes in the parent folder, so all temporary files that killed writers left there are
            removed; False removes those of ``path`` only.

    Raises:
        DataError: the disk is full or cannot be written; ``path`` does not exist then.
    """
    with saying_why(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        own = f"{_TEMPORARY}{path.name}-"
        _remove(path.parent, _TEMPORARY if alone else own)
        folder = path.with_name(own + secrets.token_hex(4))
        folder.mkdir()  # with the permissions of the umask, unlike a folder of tempfile
        try:
            yield folder
            for file in folder.iterdir():
                _sync(file)
            _sync(folder)
            os.replace(folder, path)
            _sync(path.parent)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise


@contextlib.contextmanager
def only_writer(path: Path) -> Iterator[None]:
    """Lock ``path`` during the block, so that one process at a time creates it.

    The lock is on an empty hidden file beside ``path``, which is removed at the end of the block. The system releases
    the lock of a killed process; the file it leaves has no effect.

    Raises:
        DataError: another process is making ``path``, or the folder cannot be written.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(path.with_name(f".{path.name}.lock"), blocking=False)
    with saying_why(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire()
        except Timeout:
            todo = "wait until it is done, or choose another folder"
            raise DataError(f"Another process is writing {path}: {todo}.") from None
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # Windows refuses to remove an open file
            os.unlink(lock.lock_file)  # while it is held: a process that waits for a removed file then opens a new one
        lock.release()


@contextlib.contextmanager
def replaced_file(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path``; write to it. It replaces ``path`` when the block ends without an error.

    Raises:
        OSError: the disk is full or cannot be written; the old file is intact then.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{_TEMPORARY}{path.name}-{secrets.token_hex(4)}")
    try:
        yield temporary
        _sync(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Replace the file at ``path`` with ``text``.

    Raises:
        DataError: the disk is full or cannot be written; the old file is intact then.
    """
    with saying_why(path), replaced_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def cache_root() -> Path:
    """The folder of everything that is kept between processes.

    ``$FASTATTN_CACHE``, else ``$XDG_CACHE_HOME/fastattn``, else ``~/.cache/fastattn``.

    Raises:
        OSError: the user has no home folder.
    """
    given = os.environ.get("FASTATTN_CACHE")
    if given:
        return Path(given)
    caches = os.environ.get("XDG_CACHE_HOME")
    try:
        return Path(caches or Path.home() / ".cache") / "fastattn"
    except RuntimeError as error:
        raise OSError("there is no home folder to keep caches in; set FASTATTN_CACHE to a folder of yours") from error


def check_regular(path: Path) -> None:
    """Raise DataError if something is at ``path`` that is neither a file nor a folder: a pipe, a socket, a device."""
    if path.exists() and not path.is_file() and not path.is_dir():
        raise DataError(f"{path} is a pipe, a socket or a device: give a regular file.")


def read_lines(path: Path, longest: int = 1 << 26) -> Iterator[str]:
    """The lines of a UTF-8 file without their ends.

    Args:
        path: of a regular file.
        longest: bytes in a line.

    Raises:
        OSError: it cannot be read.
        UnicodeDecodeError: a line is not UTF-8.
        DataError: it is not a regular file, or a line is longer than ``longest``.
    """
    check_regular(path)
    with path.open("rb") as file:
        number = 0
        while line := file.readline(longest + 1):
            number += 1
            if len(line) > longest:
                raise DataError(f"{path}, line {number}: longer than {longest >> 20} MiB, the limit of a line.")
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            yield text.removesuffix("\n").removesuffix("\r")


def read_limited(path: Path, most: int = 1 << 27) -> str:
    """The text of a UTF-8 file that is read as a whole.

    Args:
        path: of a regular file.
        most: bytes in it.

    Raises:
        OSError: it cannot be read.
        UnicodeDecodeError: it is not UTF-8.
        DataError: it is not a regular file, or larger than ``most``.
    """
    check_regular(path)
    with path.open("rb") as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise DataError(f"{path} is larger than {most >> 20} MiB, the limit of a file that is read as a whole.")
    return content.decode("utf-8-sig")


def remove_folder(path: Path) -> None:
    """Rename a folder, then remove it: a kill leaves it complete, or under a name that ``new_folder`` cleans up."""
    with contextlib.suppress(OSError):
        gone = path.with_name(f"{_TEMPORARY}{path.name}-{os.getpid()}")
        os.replace(path, gone)
        shutil.rmtree(gone, ignore_errors=True)


def _remove(parent: Path, prefix: str) -> None:
    for leftover in parent.glob(glob.escape(prefix) + "*"):
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)


@contextlib.contextmanager
def saying_why(path: Path) -> Iterator[None]:
    """Turn an OSError of the block into a DataError that says what to do."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        todo = "free some space, or choose another folder" if full else "check the folder and its permissions"
        what = "the disk is full" if full else error.strerror or str(error)
        raise DataError(f"Could not write {path}: {what}; what was saved before is intact. Please {todo}.") from error


def _sync(path: Path) -> None:
    if path.is_dir() and os.name == "nt":
        return  # Windows cannot open a folder
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
