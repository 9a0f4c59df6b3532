"""The library through ctypes: built with the package, or compiled at first use and kept; and the struct it takes."""

from __future__ import annotations

import ctypes
import functools
import logging
import struct
from pathlib import Path

from fastattn.backends import native
from fastattn.backends.cpu import build
from fastattn.backends.cpu.build import BuildError
from fastattn.files import cache_root, replaced_file

PATH = Path(__file__).with_name(build.LIBRARY)
VERSION = 1  # kVersion of csrc/cpu/params.h
# fa::cpu::Params: its fields in order, those that change from call to call first.
VARIABLE = (
    "version", "threads", "machine", "q", "k_cache", "v_cache", "out", "lse", "cache_lengths", "block_table",
    "cu_seqlens_q", "k_scale", "v_scale", "bias", "slopes", "sinks", "new_keys", "new_values",
)  # fmt: skip
FIXED = (
    "q_batch", "q_row", "q_head", "k_batch", "k_row", "k_head", "v_batch", "v_row", "v_head", "new_keys_batch",
    "new_keys_row", "new_keys_head", "new_values_batch", "new_values_row", "new_values_head", "table_stride",
    "k_scale_stride", "v_scale_stride", "bias_batch", "bias_head", "bias_row", "bias_key", "slopes_stride",
    "sinks_stride", "dtype", "cache_dtype", "batch", "heads_q", "heads_kv", "head_dim_qk", "head_dim_v", "rows_q",
    "rows_new", "longest_q", "pages", "page_size", "capacity", "left", "right", "scale", "softcap",
)  # fmt: skip
DOUBLES = ("scale", "softcap")
VARIABLE_PART = struct.Struct(f"<{len(VARIABLE)}q")
FIXED_PART = struct.Struct("<" + "".join("d" if name in DOUBLES else "q" for name in FIXED))
WRONG_VALUES = 1  # Outcome of csrc/cpu/params.h
FAILURES = {2: "this machine does not have the instructions asked for", 3: "there is no memory left"}
log = logging.getLogger("fastattn")


class Library:
    """A loaded library of these sources.

    Raises:
        OSError: it cannot be loaded, or was built from other sources.
    """

    def __init__(self, path: Path) -> None:
        self._library = ctypes.CDLL(str(path))
        for name, argument, result in (
            ("fa_cpu_version", [], ctypes.c_longlong),
            ("fa_cpu_bytes", [], ctypes.c_longlong),
            ("fa_cpu_sources", [], ctypes.c_char_p),
            ("fa_cpu_has_threads", [], ctypes.c_int),
            ("fa_cpu_machine", [ctypes.c_longlong, ctypes.POINTER(ctypes.c_int)], ctypes.c_char_p),
            ("fa_cpu_decode", [ctypes.c_char_p], ctypes.c_longlong),
        ):
            function = getattr(self._library, name, None)
            if function is None:
                raise OSError(f"{path} has no {name}")
            function.argtypes, function.restype = argument, result
        layout = (self._library.fa_cpu_version(), self._library.fa_cpu_bytes())
        sources = self._library.fa_cpu_sources().decode()
        if layout != (VERSION, VARIABLE_PART.size + FIXED_PART.size) or sources != build.fingerprint(
            native.source_folder()
        ):
            raise OSError(f"{path} was built from other sources")
        self._decode = self._library.fa_cpu_decode

    def machines(self) -> dict[str, bool]:
        """The instruction sets it was compiled for, the best first, and whether this machine has them."""
        found: dict[str, bool] = {}
        runs = ctypes.c_int()
        while (name := self._library.fa_cpu_machine(len(found), ctypes.byref(runs))) is not None:
            found[name.decode()] = bool(runs.value)
        return found

    def __str__(self) -> str:
        best = next(name for name, runs in self.machines().items() if runs)
        return (
            f"{best}, {'threads of torch' if self._library.fa_cpu_has_threads() else 'one thread: no OpenMP runtime'}"
        )

    def decode(self, packed: bytes) -> bool:
        """Attention to a cache, given both parts of the struct. False, and nothing done, if lengths or pages are wrong.

        Raises:
            RuntimeError: it was not computed for another reason, which the message gives.
        """
        outcome = self._decode(packed)
        if outcome > WRONG_VALUES:
            raise RuntimeError(f"fastattn's CPU kernel did not run: {FAILURES[outcome]}")
        return outcome == 0


@functools.cache
def delivered() -> tuple[Library | None, str]:
    """The library and how it came to be, or None and why there is none. Compiles it, if it was not before."""
    try:
        if PATH.exists():
            return Library(PATH), "built with the package"
        not_built = "not built with the package"
    except OSError as error:
        not_built = str(error)
    try:
        return _compiled(), f"{not_built}; compiled at first use by {build.find_compiler()}"
    except (BuildError, OSError) as error:
        return None, f"unavailable: {not_built}, and {error}"


def _compiled() -> Library:
    """The library from the cache folder, compiled if it is not there."""
    source = native.source_folder()
    path = cache_root() / f"{build.fingerprint(source)}-{build.LIBRARY}"
    if not path.exists():
        log.warning("fastattn: compiling the CPU kernels, once; this takes some seconds")
        with replaced_file(path) as temporary:
            build.build_library(temporary, source)
    return Library(path)
