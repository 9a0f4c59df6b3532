"""The library built with the package, through ctypes."""

from __future__ import annotations

import ctypes
import tempfile
from collections.abc import Callable
from pathlib import Path

from fastattn import compiled
from fastattn.backends import native
from fastattn.backends.cuda import abi, build, driver
from fastattn.backends.cuda.instances import library_instances

PATH = Path(__file__).with_name(build.LIBRARY)
ERROR_BYTES = 512


def kept_name() -> str:
    """The name among compiled code of the library of these sources."""
    return f"{build.fingerprint(native.source_folder())}-{build.LIBRARY}"


def build_kept() -> Path:
    """Build the library with nvcc into the folder of compiled code, where every process of this user finds it.

    Raises:
        BuildError: nvcc or ninja is missing, or the sources do not compile.
        OSError: there is no folder for it.
    """
    source = native.source_folder()

    def write(path: Path) -> None:
        with tempfile.TemporaryDirectory() as folder:
            build.build_library(Path(folder), path, source, library_instances(source))

    return compiled.kept(kept_name(), write)


def find() -> Path | None:
    """The library that came with the package or was built by ``fastattn build --cuda``, if there is one."""
    return PATH if PATH.exists() else compiled.find(kept_name())


class Library:
    """A loaded library whose structs are those that ``abi`` packs.

    Raises:
        OSError: it cannot be loaded, was built from other sources, or with a CUDA that the driver does not know.
    """

    def __init__(self, path: Path = PATH) -> None:
        self._library = compiled.load(path)
        self._path = path
        made_with = getattr(self._library, "fa_cuda_version", lambda: 0)()
        if made_with // 1000 > driver.supported_major():
            raise OSError(
                f"{path} was built with CUDA {made_with // 1000}, the driver knows CUDA {driver.supported_major()}; "
                "update the driver, or build with an older CUDA"
            )
        self._forward = self._function("forward", abi.FORWARD)
        self._backward = self._function("backward", abi.BACKWARD)
        self._decode = self._function("decode", abi.DECODE)

    def _function(self, name: str, struct: abi.Abi) -> Callable[[bytes, ctypes.Array[ctypes.c_char], int], int]:
        try:
            launch, version, size = (
                getattr(self._library, f"fa_{name}{suffix}") for suffix in ("", "_version", "_bytes")
            )
        except AttributeError:
            raise OSError(f"{self._path} has no fa_{name}; build it again") from None
        launch.argtypes, launch.restype = (ctypes.c_char_p, ctypes.c_char_p, ctypes.c_longlong), ctypes.c_int
        version.restype = size.restype = ctypes.c_longlong
        if (version(), size()) != (struct.version, struct.size):
            raise OSError(f"{self._path} is of another version of fastattn; build it again")
        return launch

    def forward(self, fields: abi.Fields) -> None:
        """Launch the forward pass.

        Raises:
            RuntimeError: CUDA refused; the message says why.
        """
        self._launch(self._forward, abi.FORWARD.pack(fields))

    def backward(self, fields: abi.Fields) -> None:
        """Launch the kernels of the backward pass, those that its fields ask for. Raises as ``forward`` does."""
        self._launch(self._backward, abi.BACKWARD.pack(fields))

    def decode(self, fields: abi.Fields) -> None:
        """Launch attention to a cache, and the combination of its splits. Raises as ``forward`` does."""
        self._launch(self._decode, abi.DECODE.pack(fields))

    def _launch(self, function: Callable[[bytes, ctypes.Array[ctypes.c_char], int], int], packed: bytes) -> None:
        error = ctypes.create_string_buffer(ERROR_BYTES)
        if function(packed, error, ERROR_BYTES):
            raise RuntimeError(f"fastattn's CUDA kernel was not launched: {error.value.decode()}")
