"""Compiled code on disk: whole and synced, checked before it is loaded, in folders that nobody else may write.

A file ends in a seal, which holds the size and the SHA-256 of what stands before it. Loaders ignore what follows the
sections of an ELF file, so code and seal are one file and appear together. A file whose seal is missing or wrong is
built again: to load a truncated library would kill the process.

Only the standard library is imported at first, since ``setup.py`` builds with this module, too.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import logging
import os
import signal
import struct
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from fastattn.files import cache_root, replaced_file

TIME_LIMIT = 900.0  # seconds for one command: CUDA's kernels take minutes on two cores
_MAGIC = b"fastattn's seal "
_SEAL = struct.Struct("<Q32s16s")  # the magic comes last, so that nothing after it passes
_WRITABLE_BY_OTHERS = 0o022
log = logging.getLogger("fastattn")
_said: set[str] = set()


class BuildError(Exception):
    """Why something cannot be compiled here."""


# --- seals --------------------------------------------------------------------------------------------------------


def seal(path: Path) -> None:
    """Append the seal to a file that is written whole."""
    content = path.read_bytes()
    with path.open("ab") as file:
        file.write(_SEAL.pack(len(content), hashlib.sha256(content).digest(), _MAGIC))
        file.flush()
        os.fsync(file.fileno())


def unsealed(path: Path) -> bytes:
    """What was sealed.

    Raises:
        OSError: the file is missing, damaged, or may be written by others.
    """
    with path.open("rb") as file:
        if (why := _why_shared(os.fstat(file.fileno()))) is not None:
            raise OSError(f"{path} {why}")
        text = file.read()
    if len(text) < _SEAL.size:
        raise OSError(f"{path} is damaged")
    content, (size, digest, magic) = text[: -_SEAL.size], _SEAL.unpack(text[-_SEAL.size :])
    if magic != _MAGIC or size != len(content) or digest != hashlib.sha256(content).digest():
        raise OSError(f"{path} is damaged")
    return content


def load(path: Path) -> ctypes.CDLL:
    """A sealed shared library.

    Raises:
        OSError: it is missing or damaged, or the system cannot load it.
    """
    unsealed(path)
    return ctypes.CDLL(str(path))


# --- folders ------------------------------------------------------------------------------------------------------


def refusals() -> list[str]:
    """What was said of folders and files that are not used: for `fastattn doctor`."""
    return sorted(_said)


def folders() -> Iterator[Path]:
    """Where compiled code may lie: in the folder of all caches, and in one of this user among temporary files.

    A folder is made if it is missing. One that others may write is left out, and a warning says so once: they could
    put code there that this process would run.
    """
    user = os.getuid() if hasattr(os, "getuid") else os.environ.get("USERNAME", "user")
    for root in (cache_root, lambda: Path(tempfile.gettempdir()) / f"fastattn-{user}"):
        try:
            folder = root()
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            why = _why_shared(folder.stat())
        except OSError as error:
            why, folder = str(error), Path()
        if why is None:
            yield folder
        elif folder.name:
            _warn_once(f"{folder} {why}, so compiled code is not kept there: chmod go-w it, or set FASTATTN_CACHE")


def _why_shared(found: os.stat_result) -> str | None:
    """Why somebody else may have written there; None if nobody may."""
    if not hasattr(os, "getuid"):
        return None
    if found.st_uid not in (os.getuid(), 0):
        return f"belongs to user {found.st_uid}"
    return "may be written by others" if found.st_mode & _WRITABLE_BY_OTHERS else None


def _warn_once(text: str) -> None:
    if text not in _said:
        _said.add(text)
        log.warning("fastattn: %s", text)


def kept(name: str, build: Callable[[Path], None]) -> Path:
    """The sealed file of this name, which ``build`` writes where it is missing or damaged; once for all processes.

    Raises:
        OSError: there is no folder to keep it in.
        BuildError: by ``build``.
    """
    if (found := find(name)) is not None:
        return found
    for folder in folders():
        if os.access(folder, os.W_OK | os.X_OK):
            path = folder / name
            with _only_one(path):
                if not _is_sound(path):
                    _build(path, build)
            return path
    raise OSError("there is no folder for compiled code that can be written; set FASTATTN_CACHE to a folder of yours")


def find(name: str) -> Path | None:
    """The sealed file of this name, if there is a sound one."""
    return next((folder / name for folder in folders() if _is_sound(folder / name)), None)


def _is_sound(path: Path) -> bool:
    try:
        unsealed(path)
    except FileNotFoundError:
        return False
    except OSError as error:
        _warn_once(f"{error}; it is built again")
        return False
    return True


def _build(path: Path, build: Callable[[Path], None]) -> None:
    with replaced_file(path) as temporary:
        build(temporary)
        seal(temporary)
        temporary.chmod(temporary.stat().st_mode & ~_WRITABLE_BY_OTHERS)


@contextlib.contextmanager
def _only_one(path: Path) -> Iterator[None]:
    """Others wait while one process builds. On a file system without locks each builds for itself."""
    from filelock import FileLock, Timeout

    lock = FileLock(path.with_name(f".{path.name}.lock"), timeout=2 * TIME_LIMIT)
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError, Timeout, NotImplementedError):
            stack.enter_context(lock)
        yield


# --- compilers ----------------------------------------------------------------------------------------------------


def run(command: Sequence[str], limit: float | None = None) -> tuple[int, str]:
    """The exit code of a compiler and all that it said. It ends, with all that it started, after ``limit`` seconds.

    Raises:
        BuildError: it did not start, or did not end in time.
    """
    limit = TIME_LIMIT if limit is None else limit
    try:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            errors="replace", start_new_session=True,
        )  # fmt: skip
    except OSError as error:
        raise BuildError(str(error)) from None
    try:
        said, _ = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        _end(process)
        raise BuildError(f"{command[0]} did not end within {limit:g} s") from None
    except BaseException:
        _end(process)
        raise
    return process.returncode, said


def _end(process: subprocess.Popen[str]) -> None:
    """End a process and its children, which may hold its output open."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        if hasattr(os, "killpg"):
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
    process.communicate()
