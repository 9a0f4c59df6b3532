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
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from fastattn import compiled
from fastattn.backends import driver, native
from fastattn.backends.cuda import abi
from fastattn.backends.cuda.instances import (
    APPEND,
    COMBINE,
    DSINKS,
    DTYPES,
    PADDED_ROWS,
    PREPARE_BACKWARD,
    PREPARE_FORWARD,
    PREPROCESS,
    AnyConfig,
    CombineConfig,
    Instance,
    PrepareConfig,
    RowwiseConfig,
    decode_configs,
    dkdv_configs,
    dq_configs,
    forward_configs,
    gathered_configs,
    select,
    select_decode,
    select_dkdv,
    select_dq,
    select_gathered,
)
from fastattn.backends.cuda.terms import SEGMENT_ROWS

ARCHITECTURE = "sm_90a"
OPTIONS = ("--std=c++17", f"--gpu-architecture={ARCHITECTURE}")
MORE_OPTIONS = "FASTATTN_NVRTC_OPTIONS"  # for comparing: -DFA_STAGED=1
WATCHDOG = "FASTATTN_CUDA_WATCHDOG"  # 1: every wait is bounded, and ends in a sentence instead of a hang
WATCHDOG_MS = 2000
KERNEL = "fastattn_kernel"
# All that a block can have: one block runs on each multiprocessor in any case.
SHARED_BYTES = 232448
PREPARE_SHARED_BYTES = 16 * PREPARE_FORWARD.threads  # kPrepareBytes
ROW_SHARED_BYTES = 128  # of the small kernels: 16 for each of their warps
MAJORS: tuple[int, ...] = (13, 12)  # of NVRTC


class NvrtcError(Exception):
    """NVRTC is missing, or refused the source."""


@functools.cache
def load() -> ctypes.CDLL:
    """NVRTC from the libraries beside torch, or from the system: the newest whose kernels the driver knows."""
    known = driver.supported_major()
    for major in (major for major in MAJORS if major <= known):
        for path in _wheel_libraries(major):
            # NVRTC asks for its builtins by name alone: loaded first, they are found wherever they lie.
            for builtins in path.parent.glob(f"libnvrtc-builtins.so.{major}*"):
                ctypes.CDLL(str(builtins))
            return ctypes.CDLL(str(path))
        try:
            return ctypes.CDLL(f"libnvrtc.so.{major}")
        except OSError:
            continue
    limit = "" if known >= MAJORS[0] else f", none newer than {known}, which is what the driver knows"
    raise NvrtcError(f"NVRTC was not found (it comes with CUDA builds of torch){limit}")


def _wheel_libraries(major: int) -> list[Path]:
    nvidia = find_spec("nvidia")
    roots = list(nvidia.submodule_search_locations or []) if nvidia else []
    return [path for root in roots for path in Path(root).glob(f"*/lib/libnvrtc.so.{major}")]


def options() -> tuple[str, ...]:
    """The compiler's, and those that the environment adds."""
    watchdog = (f"-DFA_WATCHDOG={WATCHDOG_MS}",) if is_watched() else ()
    return (*OPTIONS, *watchdog, *os.environ.get(MORE_OPTIONS, "").split())


def is_watched() -> bool:
    """Whether the environment asks for kernels with a watchdog (csrc/sm90/watchdog.cuh)."""
    return os.environ.get(WATCHDOG, "0") not in ("", "0")


def version() -> str:
    major, minor = ctypes.c_int(), ctypes.c_int()
    load().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    return f"{major.value}.{minor.value}"


def source_of(instance: Instance) -> str:
    """A translation unit with one kernel of a plain name."""
    config = instance.config
    namespace = "fa" if config.arguments.endswith("Params") else "fa::sm90"  # a struct of params.h, or one with maps
    call = "fa::sm90::backward_dsinks" if config == DSINKS else f"fa::sm90::{config.function}<Traits>"
    return (
        f'#include "{config.header}"\n'
        f"using Traits = {instance.traits};\n"
        f'extern "C" FA_GLOBAL({config.threads}) {KERNEL}(FA_KERNEL_ARGUMENT {namespace}::{config.arguments} args) {{\n'
        f"  {call}(args);\n"
        "}\n"
    )


@functools.cache
def headers() -> dict[str, str]:
    """The device headers, by the path under ``csrc/`` by which they are included."""
    folder = native.source_folder()
    found = [path for name in ("common", "sm90") for path in (folder / name).glob("*.*h")]
    found = [path for path in found if path.stem not in ("launch", "maps")]  # host code
    return {path.relative_to(folder).as_posix(): path.read_text() for path in sorted(found)}


def compile_kernel(instance: Instance) -> bytes:
    """The cubin of a kernel, compiled now."""
    nvrtc, program = load(), ctypes.c_void_p()
    with tempfile.TemporaryDirectory() as folder:
        for name, text in headers().items():
            path = Path(folder, name)
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
        words = [option.encode() for option in (*options(), f"--include-path={folder}")]
        source = source_of(instance).encode()
        nvrtc.nvrtcCreateProgram(ctypes.byref(program), source, f"{instance.name}.cu".encode(), 0, None, None)
        code = nvrtc.nvrtcCompileProgram(program, len(words), (ctypes.c_char_p * len(words))(*words))
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


def cache_name(instance: Instance) -> str:
    parts = [*(part for item in headers().items() for part in item), source_of(instance), *options(), version()]
    text = "\0".join(parts)
    return f"{instance.name}-{hashlib.sha256(text.encode()).hexdigest()[:24]}.cubin"


def cached_kernel(instance: Instance) -> bytes:
    """The cubin of a kernel, from the disk cache if it is there. Without one it is compiled each time."""

    def write(path: Path) -> None:
        path.write_bytes(compile_kernel(instance))

    try:
        return compiled.unsealed(compiled.kept(cache_name(instance), write))
    except OSError:  # slower, not wrong
        return compile_kernel(instance)


class NvrtcKernels:
    """All passes, as csrc/sm90/host.cu has them, through kernels compiled here, each when it is first needed."""

    def __init__(self) -> None:
        self._find_compiler()
        self._forward, self._dkdv, self._dq = forward_configs(), dkdv_configs(), dq_configs()
        self._decode, self._gathered = decode_configs(), gathered_configs()
        self._functions: dict[tuple[int, Instance], int] = {}

    @staticmethod
    def _find_compiler() -> None:
        load()

    def steps(self, struct: abi.Abi, given: dict[str, int]) -> list[Step]:
        """The kernels of a pass, in order, for its fields as integers."""
        return getattr(self, f"_{struct.name}_steps")(given) if given["batch"] and given["seqlen_q"] else []

    def launch(self, struct: abi.Abi, fields: abi.Fields) -> None:
        """Launch the kernels of a pass, those that its fields ask for, in the current context.

        Raises:
            NvrtcError: a kernel could not be compiled.
            RuntimeError: CUDA refused; the message says why.
        """
        self.prepared(struct, fields)(tuple(int(fields[name]) for name in struct.addresses), int(fields["stream"]))

    def prepared(self, struct: abi.Abi, fields: abi.Fields) -> driver.Launch:
        """``launch`` for other tensors of the same kind, on any stream: kernels loaded, tensor maps encoded."""
        given = {name: int(value) for name, value in fields.items()}
        device = given["device"]
        steps = self.steps(struct, given)
        if steps:
            driver.use_device(device)
        return _launcher(struct, struct.pack(fields), device, [self._kernel(struct, step, given) for step in steps])

    def _forward_steps(self, given: dict[str, int]) -> list[Step]:
        dims = given["head_dim_qk"], given["head_dim_v"]
        flags = bool(given["has_band"]), bool(given["has_softcap"]), bool(given["numbers.has_terms"])
        config = select(self._forward, *dims, *flags)
        blocks = given["blocks"] or driver.multiprocessors(given["device"])
        views = [*input_views(given, config.block_m, config.block_n), result_view(given, "out", "q", "head_dim_v")]
        return [*prepare_steps(given, PREPARE_FORWARD), Step(config, blocks, views)]

    def _backward_steps(self, given: dict[str, int]) -> list[Step]:
        problem = given["head_dim_qk"], given["head_dim_v"], bool(given["has_softcap"])
        row_blocks = tiles_of(given, "q", PADDED_ROWS)
        terms = bool(given["numbers.has_terms"])
        steps = [Step(PREPROCESS, row_blocks)]
        if given["dsinks"]:
            steps.append(Step(DSINKS, given["batch"] * given["heads_q"]))
        steps += prepare_steps(given, PREPARE_BACKWARD)
        if given["dk"]:
            dkdv = select_dkdv(self._dkdv, *problem, fused=bool(given["dq_sums"]), terms=terms)
            assert dkdv is not None, "sums for dq are given only where a fused kernel holds the problem"
            views = backward_views(given, dkdv.block_m, dkdv.block_n)
            group = given["heads_q"] // given["heads_kv"] if given["dk_parts"] else 1
            steps.append(Step(dkdv, tiles_of(given, "kv", dkdv.block_n) * group, views))
            if dkdv.fused:
                steps.append(Step(RowwiseConfig("backward_postprocess", dkdv), row_blocks))
            if given["dk_parts"]:
                steps.append(Step(RowwiseConfig("backward_sum_heads", dkdv), tiles_of(given, "kv", PADDED_ROWS)))
        if given["dq"] and not given["dq_sums"]:
            dq = select_dq(self._dq, *problem, terms=terms)
            steps.append(Step(dq, tiles_of(given, "q", dq.block_m), backward_views(given, dq.block_m, dq.block_n)))
        return steps

    def _decode_steps(self, given: dict[str, int]) -> list[Step]:
        config: AnyConfig
        dims, blocks = (given["head_dim_qk"], given["head_dim_v"]), given["tiles"] * given["splits"] * given["heads_kv"]
        if given["is_gathered"]:
            config, views = select_gathered(self._gathered, *dims, bool(given["is_e4m3"])), []
        else:
            config = select_decode(self._decode, *dims, bool(given["has_softcap"]))
            views = [cache_view(given, "k", "head_dim_qk"), cache_view(given, "v", "head_dim_v")]
        steps = [Step(config, blocks, views, follows=bool(given["new_k"]))]
        if given["new_k"]:
            rows = given["seqlen_q"] if given["new_keys"] < 0 else given["batch"] * given["new_keys"]
            steps.insert(0, Step(APPEND, -(-rows * given["heads_kv"] // (APPEND.threads // 32))))
        if given["splits"] > 1:
            outputs = given["seqlen_q"] * _batch(given) * given["heads_q"]  # one for each warp
            steps.append(Step(COMBINE, -(-outputs // (COMBINE.threads // 32)), follows=True))
        return steps

    def _kernel(self, struct: abi.Abi, step: Step, given: dict[str, int]) -> Kernel:
        function = self._function(given["device"], Instance(step.config, DTYPES[given["dtype"]]))
        maps, address = driver.aligned_buffer(len(step.views) * driver.MAP_BYTES)
        for n, view in enumerate(step.views):
            to, data = address + n * driver.MAP_BYTES, given[view.name] + view.skipped
            driver.encode_map(to, data, given["dtype"], view.sizes, view.strides, view.box_rows)
        encoded = ctypes.string_at(address, len(step.views) * driver.MAP_BYTES)
        places = tuple((struct.addresses.index(view.name), view.skipped) for view in step.views)
        del maps
        shape = step.blocks, step.config.threads, shared_bytes(step.config)
        return Kernel(function, encoded, places, *shape, step.follows)

    def _function(self, device: int, instance: Instance) -> int:
        key = (device, instance)
        if key not in self._functions:
            self._functions[key] = driver.load_function(cached_kernel(instance), KERNEL, shared_bytes(instance.config))
        return self._functions[key]


@dataclass(frozen=True)
class View:
    """A (head dim, row, head, batch) tensor for a tensor map.

    It begins ``skipped`` bytes behind the address ``name``; strides, in bytes, are those of rows, heads and batch.
    """

    name: str
    skipped: int
    sizes: tuple[int, int, int, int]
    strides: tuple[int, int, int]
    box_rows: int


@dataclass(frozen=True)
class Step:
    """A kernel of a pass, the number of its blocks, what its tensor maps show, and ``driver.Placed.follows``."""

    config: AnyConfig
    blocks: int
    views: Sequence[View] = ()
    follows: bool = False


@dataclass(frozen=True)
class Kernel:
    """A loaded kernel with its tensor maps. ``places`` says which address each map shows, and how far behind it."""

    function: int
    maps: bytes
    places: tuple[tuple[int, int], ...]
    blocks: int
    threads: int
    shared_bytes: int
    follows: bool


def _launcher(struct: abi.Abi, packed: bytes, device: int, kernels: Sequence[Kernel]) -> driver.Launch:
    """Launches of kernels whose parameter is their maps and the struct; those with equal maps share one."""
    image, begins, places, structs = b"", {}, [], []
    for kernel in kernels:
        if (key := (kernel.maps, kernel.places)) in begins:
            continue
        begins[key] = begin = len(image)
        places += [(begin + n * driver.MAP_BYTES, *place) for n, place in enumerate(kernel.places)]
        structs.append(begin + len(kernel.maps) + 8)  # the version comes first
        image += kernel.maps + packed
        image += bytes(-len(image) % driver.MAP_ALIGNMENT)
    pack_into = struct.address_part.pack_into

    def write(block: driver.Block, addresses: tuple[int, ...], held: Sequence[int] | None) -> None:
        for at in structs:
            pack_into(block.buffer, block.begin + at, *addresses)
        for at, which, skipped in places:
            if held is None or held[which] != addresses[which]:
                driver.move_map(block.at + at, addresses[which] + skipped)

    placed = [
        driver.Placed(x.function, (x.blocks, 1, 1), x.threads, x.shared_bytes, (begins[x.maps, x.places],), x.follows)
        for x in kernels
    ]
    return driver.launcher(device, image, placed, write, [at - 16 + len(packed) for at in structs])


def shared_bytes(config: AnyConfig) -> int:
    """Shared memory of a block. Large kernels get all of it, since one block runs on each multiprocessor anyway."""
    if isinstance(config, CombineConfig):
        return 0
    if isinstance(config, PrepareConfig):
        return PREPARE_SHARED_BYTES
    return ROW_SHARED_BYTES if isinstance(config, RowwiseConfig) else SHARED_BYTES


def prepare_steps(given: dict[str, int], config: PrepareConfig) -> list[Step]:
    """The kernel before the large ones, if terms need it: prepare_blocks of csrc/sm90/prepare_terms.cuh."""
    entries = {side: -(-given[f"seqlen_{side}"] // SEGMENT_ROWS) for side in ("q", "kv")}
    blocks = given["batch"] * given["heads_kv"] * entries["kv"] if given["terms.given_k"] else 0
    if given["terms.ranges_q"]:
        strides = (given[f"numbers.ids_{side}_batch_stride"] for side in entries)
        blocks += sum(entries.values()) * (given["batch"] if any(strides) else 1)
    return [Step(config, blocks)] if blocks else []


def tiles_of(given: dict[str, int], side: str, block: int) -> int:
    """Blocks of ``block`` padded rows of all heads: tile_count of csrc/sm90/backward.h."""
    return given[f"padded_{side}"] // block * given[f"heads_{side}"] * _batch(given)


def _batch(given: dict[str, int]) -> int:
    """The batch size of the tensors: 1 if packed."""
    return 1 if given["cu_seqlens_q"] else given["batch"]


def row_view(given: dict[str, int], name: str, side: str, columns: str, box_rows: int) -> View:
    """The view of a tensor that kernels read, without the keys that no query keeps."""
    row, head, batch = (2 * given[f"{name}_{which}_stride"] for which in ("row", "head", "batch"))
    is_of_keys = side == "kv"
    rows = given["key_end"] - given["key_begin"] if is_of_keys else given["seqlen_q"]
    skipped = given["key_begin"] * row if is_of_keys else 0
    sizes = (given[columns], rows, given[f"heads_{side}"], _batch(given))
    return View(name, skipped, sizes, (row, head, batch), box_rows)


def result_view(given: dict[str, int], name: str, side: str, columns: str) -> View:
    """A contiguous tensor that kernels write, 64 rows at a time."""
    width, rows, heads = given[columns], given[f"seqlen_{side}"], given[f"heads_{side}"]
    strides = (2 * heads * width, 2 * width, 2 * rows * heads * width)
    return View(name, 0, (width, rows, heads, _batch(given)), strides, 64)


def cache_view(given: dict[str, int], name: str, columns: str) -> View:
    """The view of a cache, with pages in place of the batch, so that a box lies in one page."""
    row, head, page = (2 * given[f"{name}_{which}_stride"] for which in ("row", "head", "batch"))
    sizes = (given[columns], given["page_size"], given["heads_kv"], given["pages"])
    return View(f"{name}_cache", 0, sizes, (row, head, page), given["box_rows"])


def input_views(given: dict[str, int], block_m: int, block_n: int) -> list[View]:
    """The views of q, k and v. If no key is kept nothing is loaded, and the view of q is repeated."""
    q = row_view(given, "q", "q", "head_dim_qk", block_m)
    if given["key_begin"] == given["key_end"]:
        return [q, q, q]
    return [
        q,
        row_view(given, "k", "kv", "head_dim_qk", block_n),
        row_view(given, "v", "kv", "head_dim_v", block_n),
    ]


def backward_views(given: dict[str, int], block_m: int, block_n: int) -> list[View]:
    """The maps of BackwardArgs in csrc/sm90/backward.h, in order; q stands for gradients that are not wanted."""
    inputs = input_views(given, block_m, block_n)
    results = (("dq", "q", "head_dim_qk"), ("dk", "kv", "head_dim_qk"), ("dv", "kv", "head_dim_v"))
    written = [result_view(given, *result) if given[result[0]] else inputs[0] for result in results]
    return [*inputs, row_view(given, "dout", "q", "head_dim_v", block_m), *written]
