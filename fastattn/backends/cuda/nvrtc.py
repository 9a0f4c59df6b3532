"""Kernels compiled at first use by NVRTC, which comes with CUDA builds of torch: no nvcc and no host compiler needed.

A compiled kernel is kept on disk, in ``FASTATTN_CACHE`` (default: ``~/.cache/fastattn``), under a name that hashes its
sources, options, architecture and the version of NVRTC. A file appears there complete or not at all.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import tempfile
from importlib.util import find_spec
from pathlib import Path

from fastattn.backends.cuda import abi, driver
from fastattn.backends.cuda.instances import DTYPES, Instance, Tile, forward_tiles, select, source_folder

ARCHITECTURE = "sm_90a"
OPTIONS = ("--std=c++17", f"--gpu-architecture={ARCHITECTURE}")
KERNEL = "fastattn_forward"
# All that a block can have: one block runs on each multiprocessor in any case.
SHARED_BYTES = 232448
MAJORS = (13, 12)  # of NVRTC


class NvrtcError(Exception):
    """NVRTC is missing, or refused the source."""


@functools.cache
def load() -> ctypes.CDLL:
    """NVRTC from the libraries beside torch, or from the system."""
    for major in MAJORS:
        for path in _wheel_libraries(major):
            # NVRTC asks for its builtins by name alone: loaded first, they are found wherever they lie.
            for builtins in path.parent.glob(f"libnvrtc-builtins.so.{major}*"):
                ctypes.CDLL(str(builtins))
            return ctypes.CDLL(str(path))
        try:
            return ctypes.CDLL(f"libnvrtc.so.{major}")
        except OSError:
            continue
    raise NvrtcError("NVRTC was not found (it comes with CUDA builds of torch)")


def _wheel_libraries(major: int) -> list[Path]:
    nvidia = find_spec("nvidia")
    roots = list(nvidia.submodule_search_locations or []) if nvidia else []
    return [path for root in roots for path in Path(root).glob(f"*/lib/libnvrtc.so.{major}")]


def version() -> str:
    major, minor = ctypes.c_int(), ctypes.c_int()
    load().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    return f"{major.value}.{minor.value}"


def source_of(instance: Instance) -> str:
    """A translation unit with one kernel of a plain name."""
    return (
        '#include "sm90/forward.cuh"\n'
        f"using Traits = {instance.traits};\n"
        f'extern "C" FA_GLOBAL(Traits::THREADS) {KERNEL}(FA_KERNEL_ARGUMENT fa::sm90::ForwardArgs args) {{\n'
        "  fa::sm90::forward<Traits>(args);\n"
        "}\n"
    )


@functools.cache
def headers() -> dict[str, str]:
    """The device headers, by the path under ``csrc/`` by which they are included."""
    folder = source_folder()
    found = [*folder.glob("*.h"), *(folder / "sm90").glob("*.h"), *(folder / "sm90").glob("*.cuh")]
    found.remove(folder / "launch.h")  # host code
    return {path.relative_to(folder).as_posix(): path.read_text() for path in sorted(found)}


def compile_kernel(instance: Instance) -> bytes:
    """The cubin of a kernel, compiled now."""
    nvrtc, program = load(), ctypes.c_void_p()
    with tempfile.TemporaryDirectory() as folder:
        for name, text in headers().items():
            path = Path(folder, name)
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
        options = [option.encode() for option in (*OPTIONS, f"--include-path={folder}")]
        source = source_of(instance).encode()
        nvrtc.nvrtcCreateProgram(ctypes.byref(program), source, f"{instance.name}.cu".encode(), 0, None, None)
        code = nvrtc.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options))
    size = ctypes.c_size_t()
    if code:
        nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
        log = ctypes.create_string_buffer(size.value)
        nvrtc.nvrtcGetProgramLog(program, log)
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
        raise NvrtcError(f"NVRTC {version()} refused {instance.name}:\n{log.value.decode()}")
    nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(size))
    cubin = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetCUBIN(program, cubin)
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    return cubin.raw


def cache_folder() -> Path:
    given = os.environ.get("FASTATTN_CACHE")
    return Path(given) if given else Path.home() / ".cache" / "fastattn"


def cache_path(instance: Instance) -> Path:
    text = "\0".join([*(part for item in headers().items() for part in item), source_of(instance), *OPTIONS, version()])
    return cache_folder() / f"{instance.name}-{hashlib.sha256(text.encode()).hexdigest()[:24]}.cubin"


def cached_kernel(instance: Instance) -> bytes:
    """The cubin of a kernel, from the disk cache if it is there. Without a writable cache it is compiled each time."""
    path = cache_path(instance)
    if path.exists():
        return path.read_bytes()
    cubin = compile_kernel(instance)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as unfinished:
            unfinished.write(cubin)
        os.replace(unfinished.name, path)
    except OSError:
        pass  # a read-only home: slower, not wrong
    return cubin


class NvrtcKernels:
    """The forward pass through kernels compiled here, each when it is first needed."""

    def __init__(self) -> None:
        load()
        self._tiles = forward_tiles()
        self._functions: dict[tuple[int, Instance], ctypes.c_void_p] = {}

    def forward(self, fields: dict[str, int | float]) -> None:
        """Launch the forward pass in the current context.

        Raises:
            NvrtcError: the kernel could not be compiled.
            RuntimeError: CUDA refused; the message says why.
        """
        if not (fields["batch"] and fields["seqlen_q"]):
            return
        given = {name: int(value) for name, value in fields.items()}
        tile = select(
            self._tiles, given["head_dim_qk"], given["head_dim_v"], bool(given["has_band"]), bool(given["has_softcap"])
        )
        function = self._function(given["device"], Instance(tile, DTYPES[given["dtype"]]))
        buffer, address = aligned_arguments(fields, given, tile)
        blocks = given["blocks"] or driver.multiprocessors(given["device"])
        driver.launch(function, address, blocks, tile.threads, SHARED_BYTES, given["stream"])
        del buffer  # held until the launch has copied it

    def _function(self, device: int, instance: Instance) -> ctypes.c_void_p:
        key = (device, instance)
        if key not in self._functions:
            self._functions[key] = driver.load_function(cached_kernel(instance), KERNEL, SHARED_BYTES)
        return self._functions[key]


def aligned_arguments(
    fields: dict[str, int | float], given: dict[str, int], tile: Tile
) -> tuple[ctypes.Array[ctypes.c_char], int]:
    """ForwardArgs of csrc/sm90/shared.h: the maps of q, k, v and out, then the struct."""
    buffer, address = driver.aligned_buffer(4 * driver.MAP_BYTES + abi.SIZE)
    batch = 1 if given["cu_seqlens_q"] else given["batch"]
    keys = given["key_end"] - given["key_begin"]
    views = [("q", "q", given["seqlen_q"], "heads_q", "head_dim_qk", tile.block_m)]
    if keys:
        views += [
            ("k", "k", keys, "heads_kv", "head_dim_qk", tile.block_n),
            ("v", "v", keys, "heads_kv", "head_dim_v", tile.block_n),
        ]
    else:  # nothing is loaded
        views += 2 * views
    for i, (name, strides, rows, heads, columns, box_rows) in enumerate(views):
        steps = tuple(2 * given[f"{strides}_{which}_stride"] for which in ("row", "head", "batch"))
        skipped = given["key_begin"] * steps[0] if name != "q" else 0
        sizes = (given[columns], rows, given[heads], batch)
        driver.encode_map(address + i * driver.MAP_BYTES, given[name] + skipped, given["dtype"], sizes, steps, box_rows)
    d_v, heads_q, seqlen_q = given["head_dim_v"], given["heads_q"], given["seqlen_q"]
    steps = (2 * heads_q * d_v, 2 * d_v, 2 * seqlen_q * heads_q * d_v)
    sizes = (d_v, seqlen_q, heads_q, batch)
    driver.encode_map(address + 3 * driver.MAP_BYTES, given["out"], given["dtype"], sizes, steps, 64)
    ctypes.memmove(address + 4 * driver.MAP_BYTES, abi.pack(fields), abi.SIZE)
    return buffer, address
