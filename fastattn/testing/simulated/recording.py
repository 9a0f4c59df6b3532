"""A recording CUDA driver: the calls of the hosts, held to the documented rules, with nothing behind them."""

from __future__ import annotations

import ctypes
import hashlib
import subprocess
from pathlib import Path

from filelock import FileLock

from fastattn.files import cache_root, replaced_file

SOURCE = Path(__file__).with_name("driver.c")
DEVICES = 2


class RecordedLaunch(ctypes.Structure):
    """One launch; ``params`` are the bytes of its first argument."""

    _fields_ = (
        ("kernel", ctypes.c_char * 128), ("grid", ctypes.c_uint * 3), ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint), ("param_bytes", ctypes.c_uint), ("stream", ctypes.c_uint64),
        ("device", ctypes.c_int), ("params", ctypes.c_ubyte * 4096),
    )  # fmt: skip


class RecordedMap(ctypes.Structure):
    """One tensor map."""

    _fields_ = (
        ("address", ctypes.c_uint64), ("sizes", ctypes.c_uint64 * 5), ("strides", ctypes.c_uint64 * 4),
        ("rank", ctypes.c_uint), ("type", ctypes.c_uint), ("box", ctypes.c_uint * 5),
    )  # fmt: skip


class RecordingDriver:
    """The fake ``libcuda``.

    Attributes:
        library: to be used in the place of ``libcuda.so.1``.
        path: of that library.
    """

    def __init__(self) -> None:
        self.path = _built()
        self.library = ctypes.CDLL(str(self.path), mode=ctypes.RTLD_GLOBAL)
        self.library.rec_launch.restype = ctypes.POINTER(RecordedLaunch)
        self.library.rec_map.restype = ctypes.POINTER(RecordedMap)
        self.library.rec_broken.restype = ctypes.c_char_p
        self.library.rec_reset()

    @property
    def launches(self) -> list[RecordedLaunch]:
        return [self.library.rec_launch(i).contents for i in range(self.library.rec_launches())]

    @property
    def maps(self) -> list[RecordedMap]:
        return [self.library.rec_map(i).contents for i in range(self.library.rec_maps())]

    @property
    def broken_rule(self) -> str:
        """The rule that was broken last; "" if none was."""
        return self.library.rec_broken().decode()

    def bind(self, device: int | None) -> None:
        """Make a context current on this thread, or none."""
        self.library.rec_bind(-1 if device is None else device)


def _built() -> Path:
    text = SOURCE.read_text(encoding="utf-8")
    folder = cache_root() / f"recording-{hashlib.sha256(text.encode()).hexdigest()[:24]}"
    path = folder / "libcuda.so.1"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "lock"):
        if not path.exists():
            with replaced_file(path) as temporary:
                command = ["gcc", "-O1", "-w", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", str(SOURCE)]
                subprocess.run([*command, "-o", str(temporary)], check=True, timeout=60)
    return path
