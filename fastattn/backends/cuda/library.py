"""The library built with the package, through ctypes."""

from __future__ import annotations

import ctypes
from pathlib import Path

from fastattn.backends.cuda import abi

PATH = Path(__file__).with_name("libfastattn.so")
ERROR_BYTES = 512


class Library:
    """A loaded library whose struct is the one that ``abi`` packs.

    Raises:
        OSError: it cannot be loaded, or was built from other sources.
    """

    def __init__(self, path: Path = PATH) -> None:
        self._library = ctypes.CDLL(str(path))
        self._forward = self._library.fa_forward
        self._forward.argtypes = (ctypes.c_char_p, ctypes.c_char_p, ctypes.c_longlong)
        self._forward.restype = ctypes.c_int
        for function in (self._library.fa_forward_version, self._library.fa_forward_bytes):
            function.restype = ctypes.c_longlong
        built_for = (self._library.fa_forward_version(), self._library.fa_forward_bytes())
        if built_for != (abi.VERSION, abi.SIZE):
            raise OSError(f"{path} is of another version of fastattn; build it again")

    def forward(self, fields: dict[str, int | float]) -> None:
        """Launch the forward pass.

        Raises:
            RuntimeError: CUDA refused; the message says why.
        """
        error = ctypes.create_string_buffer(ERROR_BYTES)
        if self._forward(abi.pack(fields), error, ERROR_BYTES):
            raise RuntimeError(f"fastattn's CUDA kernel was not launched: {error.value.decode()}")
