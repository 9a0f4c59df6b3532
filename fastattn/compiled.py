"""Compiled code on disk: written atomically, checked before it is loaded, in folders that no other user may write to.

A file ends in a seal, which holds the size and the SHA-256 of the bytes before it. Loaders ignore bytes after the
sections of an ELF file, so code and seal are one file and appear together. A file whose seal is missing or wrong is
built again: loading a truncated library would kill the process.

At import only the standard library is needed, since ``setup.py`` also builds with this module.
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

TIME_LIMIT = 900.0  # seconds in which a command has to end or say something; ninja names each kernel that is done
_MAGIC = b"fastattn's seal "
_SEAL = struct.Struct("<Q32s16s")  # the magic comes last, so that nothing after it passes
_WRITABLE_BY_OTHERS = 0o022
log = logging.getLogger("fastattn")
_said: set[str] = set()


class BuildError(Exception):
    """Something cannot be compiled on this machine; the message says why."""


# --- seals --------------------------------------------------------------------------------------------------------


def seal(path: Path) -> None:
    """Append the seal to a complete file."""
    content = path.read_bytes()
    with path.open("ab") as file:
        file.write(_SEAL.pack(len(content), hashlib.sha256(content).digest(), _MAGIC))
        file.flush()
        os.fsync(file.fileno())


def unsealed(path: Path) -> bytes:
    """The content of a sealed file, without its seal.

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
    """Check the seal of a shared library and load it.

    Raises:
        OSError: it is missing or damaged, or the system cannot load it.
    """
    unsealed(path)
    return ctypes.CDLL(str(path))


# --- folders ------------------------------------------------------------------------------------------------------


def refusals() -> list[str]:
    """The warnings given about folders and files that are not used, for `fastattn doctor`."""
    return sorted(_said)


def folders() -> Iterator[Path]:
    """The folders for compiled code: the cache folder, then one of this user among the temporary files.

    A missing folder is created. One that other users may write to is skipped with one warning: they could put code
    there that this process would run.
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
    """The reason why other users may have written there; None if they cannot."""
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
    """The path of the sealed file of this name. If it is missing or damaged, one process calls ``build`` to write it.

    Raises:
        OSError: there is no folder to keep it in.
        BuildError: raised by ``build``.
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
    """The path of the sealed file of this name; None if it is missing or damaged."""
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
    """A lock under which one process builds while others wait. On a file system without locks each one builds."""
    from filelock import FileLock, Timeout

    lock = FileLock(path.with_name(f".{path.name}.lock"), timeout=2 * TIME_LIMIT)
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError, Timeout, NotImplementedError):
            stack.enter_context(lock)
        yield


# --- compilers ----------------------------------------------------------------------------------------------------


def run(command: Sequence[str], limit: float | None = None) -> tuple[int, str]:
    """Run a compiler: its exit code and output. After ``limit`` silent seconds it and its children are killed.

    The limit is not one of the whole: ninja compiles all of CUDA's kernels, which took over 900 s on busy cores.

    Raises:
        BuildError: it did not start, or hung.
    """
    limit = TIME_LIMIT if limit is None else limit
    try:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            errors="replace", start_new_session=True,
        )  # fmt: skip
    except OSError as error:
        raise BuildError(str(error)) from None
    heard = None
    try:
        while True:
            try:
                said, _ = process.communicate(timeout=limit)
                return process.returncode, said
            except subprocess.TimeoutExpired as late:
                if late.output == heard:
                    raise BuildError(f"{command[0]} did not end, and said nothing for {limit:g} s") from None
                heard = late.output
    except BaseException:
        _end(process)
        raise


def _end(process: subprocess.Popen[str]) -> None:
    """Kill a process and its children, which may hold its output open."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        if hasattr(os, "killpg"):
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
    process.communicate()
