"""The library built with the package, through ctypes."""

from __future__ import annotations

import ctypes
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from fastattn import compiled
from fastattn.backends import driver, native
from fastattn.backends.cuda import abi, build
from fastattn.backends.cuda.instances import library_instances

PATH = Path(__file__).with_name(build.LIBRARY)
ERROR_BYTES = 512
Function = Callable[[bytes, ctypes.Array[ctypes.c_char], int], int]


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
        self._functions = {struct.name: self._function(struct) for struct in (abi.FORWARD, abi.BACKWARD, abi.DECODE)}

    def _function(self, struct: abi.Abi) -> Function:
        try:
            launch, version, size = (
                getattr(self._library, f"fa_{struct.name}{suffix}") for suffix in ("", "_version", "_bytes")
            )
        except AttributeError:
            raise OSError(f"{self._path} has no fa_{struct.name}; build it again") from None
        launch.argtypes, launch.restype = (ctypes.c_char_p, ctypes.c_char_p, ctypes.c_longlong), ctypes.c_int
        version.restype = size.restype = ctypes.c_longlong
        if (version(), size()) != (struct.version, struct.size):
            raise OSError(f"{self._path} is of another version of fastattn; build it again")
        return launch

    def launch(self, struct: abi.Abi, fields: abi.Fields) -> None:
        """Launch the kernels of a pass, those that its fields ask for.

        Raises:
            RuntimeError: CUDA refused; the message says why.
        """
        self._launch(struct, struct.pack(fields))

    def prepared(self, struct: abi.Abi, fields: abi.Fields) -> driver.Launch:
        """``launch`` for other tensors of the same kind, on any stream."""
        template = struct.template(fields)

        def launch(addresses: Sequence[int], stream: int) -> None:
            self._launch(struct, template(addresses, stream))

        return launch

    def _launch(self, struct: abi.Abi, packed: bytes) -> None:
        error = ctypes.create_string_buffer(ERROR_BYTES)
        if self._functions[struct.name](packed, error, ERROR_BYTES):
            raise RuntimeError(f"fastattn's CUDA kernel was not launched: {error.value.decode()}")
