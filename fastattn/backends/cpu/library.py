"""The library through ctypes: built with the package, or compiled at first use and kept; and the struct it takes."""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import struct
from pathlib import Path

from fastattn import compiled
from fastattn.backends import native
from fastattn.backends.cpu import build
from fastattn.compiled import BuildError
from fastattn.errors import input_error

PATH = Path(__file__).with_name(build.LIBRARY)
VERSION = 2  # kVersion of csrc/cpu/params.h
# fa::cpu::Params: its fields in order, those that change from call to call first.
VARIABLE = (
    "version", "threads", "machine", "q", "k_cache", "v_cache", "out", "lse", "cache_lengths", "block_table",
    "cu_seqlens_q", "k_scale", "v_scale", "bias", "slopes", "sinks", "new_keys", "new_values", "tree", "depths",
)  # fmt: skip
FIXED = (
    "q_batch", "q_row", "q_head", "k_batch", "k_row", "k_head", "v_batch", "v_row", "v_head", "new_keys_batch",
    "new_keys_row", "new_keys_head", "new_values_batch", "new_values_row", "new_values_head", "table_stride",
    "k_scale_stride", "v_scale_stride", "bias_batch", "bias_head", "bias_row", "bias_key", "slopes_stride",
    "sinks_stride", "tree_batch", "tree_row", "depths_batch", "invariant",
    "dtype", "cache_dtype", "batch", "heads_q", "heads_kv", "head_dim_qk", "head_dim_v", "rows_q",
    "rows_new", "longest_q", "pages", "page_size", "capacity", "left", "right", "scale", "softcap",
)  # fmt: skip
DOUBLES = ("scale", "softcap")
VARIABLE_PART = struct.Struct(f"<{len(VARIABLE)}q")
FIXED_PART = struct.Struct("<" + "".join("d" if name in DOUBLES else "q" for name in FIXED))
WRONG_VALUES = 1  # Outcome of csrc/cpu/params.h
FAILURES = {
    1: "cu_seqlens changed while it was called",
    2: "this machine does not have the instructions asked for",
    3: "there is no memory left",
}
BEST = -1  # of the instruction sets that this machine has
log = logging.getLogger("fastattn")


def asked_for(machines: dict[str, bool]) -> int:
    """The index of the instruction set that ``FASTATTN_CPU_ISA`` names, or BEST.

    Raises:
        InputError: there is none of that name, or this machine does not have it.
    """
    wish = os.environ.get("FASTATTN_CPU_ISA")
    if not wish:
        return BEST
    allowed = ", ".join(name for name, runs in machines.items() if runs)
    if wish not in machines:
        raise input_error("FASTATTN_CPU_ISA", repr(wish), allowed, "Unset it: the best one is used.")
    if not machines[wish]:
        todo = "Unset it: the best one is used."
        raise input_error("FASTATTN_CPU_ISA", f"{wish!r}, which this machine does not have", allowed, todo)
    return list(machines).index(wish)


class Library:
    """A loaded library of these sources.

    Raises:
        OSError: it cannot be loaded, or was built from other sources.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._library = compiled.load(path)
        for name, argument, result in (
            ("fa_cpu_version", [], ctypes.c_longlong),
            ("fa_cpu_bytes", [], ctypes.c_longlong),
            ("fa_cpu_sources", [], ctypes.c_char_p),
            ("fa_cpu_has_threads", [], ctypes.c_int),
            ("fa_cpu_machine", [ctypes.c_longlong, ctypes.POINTER(ctypes.c_int)], ctypes.c_char_p),
            ("fa_cpu_decode", [ctypes.c_char_p], ctypes.c_longlong),
            ("fa_cpu_attention_version", [], ctypes.c_longlong),
            ("fa_cpu_attention_bytes", [], ctypes.c_longlong),
            ("fa_cpu_forward", [ctypes.c_char_p], ctypes.c_longlong),
            ("fa_cpu_backward", [ctypes.c_char_p], ctypes.c_longlong),
            ("fa_cpu_jvp", [ctypes.c_char_p, ctypes.c_char_p], ctypes.c_longlong),
            ("fa_cpu_backward_jvp", [ctypes.c_char_p, ctypes.c_char_p], ctypes.c_longlong),
            ("fa_cpu_statistics", [ctypes.c_char_p, ctypes.c_char_p], ctypes.c_longlong),
            ("fa_cpu_statistics_backward", [ctypes.c_char_p, ctypes.c_char_p], ctypes.c_longlong),
            ("fa_cpu_weights", [ctypes.c_char_p, ctypes.c_char_p], ctypes.c_longlong),
            ("fa_cpu_weights_backward", [ctypes.c_char_p, ctypes.c_char_p], ctypes.c_longlong),
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
        self.machine = asked_for(self.machines())
        self.passes = {"forward": self._library.fa_cpu_forward, "backward": self._library.fa_cpu_backward}
        names = ("jvp", "backward_jvp", "statistics", "statistics_backward", "weights", "weights_backward")
        self.with_more = {name: getattr(self._library, f"fa_cpu_{name}") for name in names}

    def machines(self) -> dict[str, bool]:
        """The instruction sets it was compiled for, the best first, and whether this machine has them."""
        found: dict[str, bool] = {}
        runs = ctypes.c_int()
        while (name := self._library.fa_cpu_machine(len(found), ctypes.byref(runs))) is not None:
            found[name.decode()] = bool(runs.value)
        return found

    def __str__(self) -> str:
        names = list(self.machines())
        used = names[self.machine] if self.machine != BEST else next(n for n, runs in self.machines().items() if runs)
        return (
            f"{used}, {'threads of torch' if self._library.fa_cpu_has_threads() else 'one thread: no OpenMP runtime'}"
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

    def attend(self, which: str, packed: bytes) -> None:
        """One pass of attention, "forward" or "backward", given both parts of its struct.

        Raises:
            RuntimeError: it was not computed, for the reason that the message gives.
        """
        if outcome := self.passes[which](packed):
            self.explain(outcome)

    def run(self, which: str, packed: bytes, more: bytes) -> None:
        """A pass that takes a second struct.

        Args:
            which: "jvp" or "backward_jvp", whose second struct is of the tangents; or "statistics",
                "statistics_backward", "weights" or "weights_backward".
            packed: the struct of the inputs.
            more: the second one.

        Raises:
            RuntimeError: it was not computed, for the reason that the message gives.
        """
        if outcome := self.with_more[which](packed, more):
            self.explain(outcome)

    def explain(self, outcome: int) -> None:
        """Raise RuntimeError for a pass that was not computed."""
        raise RuntimeError(f"fastattn's CPU kernel did not run: {FAILURES[outcome]}")


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
        return _compiled(), f"{not_built}; compiled at first use"  # the compiler may be gone since
    except (BuildError, OSError) as error:
        return None, f"unavailable: {not_built}, and {error}"


def _compiled() -> Library:
    """The library from the folder of compiled code, built if it is not there."""
    source = native.source_folder()

    def write(path: Path) -> None:
        log.warning("fastattn: compiling the CPU kernels, once; this takes some seconds")
        build.build_library(path, source)

    return Library(compiled.kept(f"{build.fingerprint(source)}-{build.LIBRARY}", write))
