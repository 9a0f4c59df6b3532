"""The CUDA backend's attention to a cache, from torch tensors to the kernels' own source on the emulated machine.

The package packs the struct, the emulator takes it as the GPU would, and the result is judged as every backend's is.
"""

from __future__ import annotations

import ctypes
import dataclasses
import shutil
import subprocess
from pathlib import Path

import emulate
import pytest
import torch
from torch import Tensor

from fastattn.backends import cuda
from fastattn.backends.cuda import abi, decode
from fastattn.backends.cuda.instances import decode_tiles
from fastattn.cache import CacheInputs, cache_problem
from fastattn.spec import AttentionSpec
from fastattn.testing import assert_within, make_cache_sample, measure_cache
from fastattn.testing.caches import CacheCase, cache_grid

CSRC = Path(__file__).parents[2] / "csrc"
SOURCES = ("machine", "tensor_core", "problem", "decode_case", "decode_library")
ERROR_BYTES = 1000

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++ to build the emulator")


class EmulatedBackend(cuda.CudaBackend):
    """The backend on CPU tensors, its kernels on the emulated machine."""

    multiprocessors = 132

    def __init__(self, library: Path) -> None:
        self.function = ctypes.CDLL(str(library)).fa_decode
        self.launched: list[abi.Fields] = []

    def unavailable_reason(self) -> str | None:
        return None

    def attend_to_cache(self, inputs: CacheInputs, spec: AttentionSpec) -> tuple[Tensor, Tensor]:
        return decode.attend(self.launch, inputs, spec, self.multiprocessors, stream=0)

    def launch(self, fields: abi.Fields) -> None:
        self.launched.append(fields)
        if not (fields["batch"] and fields["seqlen_q"]):  # as the host code does
            return
        error = ctypes.create_string_buffer(ERROR_BYTES)
        failed = self.function(abi.DECODE.pack(fields), error, ctypes.c_longlong(ERROR_BYTES))
        assert not failed, error.value.decode()


@pytest.fixture(scope="session")
def backend(tmp_path_factory: pytest.TempPathFactory) -> EmulatedBackend:
    folder = tmp_path_factory.mktemp("decode")
    options = ("-O1", "-fPIC")
    objects = [
        emulate.compile_object(CSRC / "emulator" / f"{name}.cpp", folder / f"{name}.o", *options) for name in SOURCES
    ]
    for tile in decode_tiles(CSRC)[:2]:  # without softcap and with it
        objects.append(emulate.compile_instance(tile, CSRC, folder / f"{tile.label}.o", *options))
    subprocess.run(["g++", "-shared", *map(str, objects), "-o", str(folder / "decode.so")], check=True)
    return EmulatedBackend(folder / "decode.so")


def cases() -> list[CacheCase]:
    """Those of the grid that the kernels take, in 16 bits, and some that need several splits."""
    grid = [
        dataclasses.replace(case, dtype=dtype, id=f"{case.id}, {str(dtype).removeprefix('torch.')}")
        for i, case in enumerate(cache_grid((torch.float32,)))
        for dtype in [(torch.bfloat16, torch.float16)[i % 2]]
        if not (case.fp8 or case.alibi or case.bias or case.D_qk % 8 or case.D_v % 8)
    ]
    long = CacheCase("splits", before=(1200, 0, 700), s_q=(2, 2, 2), dtype=torch.bfloat16, sinks=True)
    changes = ({"page_size": 1}, {"page_size": 24, "softcap": 3.0}, {"left": 600}, {"packed": True, "s_q": (1, 7, 0)})
    return [*grid, *(dataclasses.replace(long, id=f"splits, {change}", **change) for change in changes)]


@needs_compiler
@pytest.mark.parametrize("case", cases(), ids=lambda case: case.id)
def test_every_case_on_the_emulated_machine(backend: EmulatedBackend, case: CacheCase) -> None:
    sample = make_cache_sample(case)
    problem = dataclasses.replace(cache_problem(sample.inputs, sample.spec), device="cuda", arch=90)
    assert not backend.unsupported_reasons(problem)
    backend.launched.clear()
    assert_within(measure_cache(backend, sample))
    assert [fields["splits"] > 1 for fields in backend.launched] in ([], [case.id.startswith("splits")])


# --- what the host decides ----------------------------------------------------------------------------------------


def inputs_of(
    batch: int = 2, s_q: int = 1, heads: tuple[int, int] = (8, 2), pages: int = 4, **more: object
) -> CacheInputs:
    cache = torch.zeros(batch * pages, 16, heads[1], 64, dtype=torch.bfloat16)
    table = torch.arange(batch * pages, dtype=torch.int32).view(batch, pages)
    q = torch.zeros(batch, s_q, heads[0], 64, dtype=torch.bfloat16)
    lengths = torch.ones(batch, dtype=torch.int32)
    return CacheInputs(q, cache, cache, lengths, block_table=table, max_seqlen_q=s_q).replace(**more)


@pytest.mark.parametrize(
    ("tiles", "keys", "splits"),
    [
        (1, 100, 1),  # too short to divide
        (1, 512, 1),  # not worth combining
        (1, 1024, 4),
        (8, 1 << 17, 33),  # two full waves
        (8, 1 << 14, 16),  # one that is almost full
        (1, 1 << 20, 128),
        (128, 1 << 17, 1),
        (132, 1 << 17, 1),
        (133, 1 << 13, 7),  # eight waves of a seventh, and not two of everything
        (10_000, 1 << 17, 1),
    ],
)
def test_splits_take_the_least_time(tiles: int, keys: int, splits: int) -> None:
    assert decode.split_count(tiles, keys, 132) == splits


def test_heads_and_positions_share_tiles() -> None:
    assert decode.Tiling.of(inputs_of()) == decode.Tiling(heads=4, positions=16, tiles=2)
    assert decode.Tiling.of(inputs_of(s_q=17)) == decode.Tiling(heads=4, positions=16, tiles=4)
    assert decode.Tiling.of(inputs_of(heads=(142, 2))) == decode.Tiling(heads=64, positions=1, tiles=4)
    packed = inputs_of(batch=3, q=torch.zeros(40, 8, 64), cu_seqlens_q=torch.tensor([0, 40, 40, 40], dtype=torch.int32))
    assert decode.Tiling.of(packed).tiles == 5, "any lengths that sum up to 40"


def test_a_window_bounds_the_keys_of_a_tile() -> None:
    inputs = inputs_of(pages=1000)
    tiling = decode.Tiling.of(inputs)
    for left, right, keys in ((None, 0, 16000), (100, None, 16000), (100, 0, 116), (15990, 0, 16000)):
        assert decode.most_keys(inputs, AttentionSpec(1.0, left=left, right=right), tiling) == keys


def launched(inputs: CacheInputs, **spec: object) -> abi.Fields:
    found: list[abi.Fields] = []
    decode.attend(found.append, inputs, AttentionSpec(0.125, **spec), 132, stream=7)  # type: ignore[arg-type]
    (fields,) = found
    assert set(fields) == set(abi.DECODE.names) and len(abi.DECODE.pack(fields)) == abi.DECODE.size
    return fields


def test_fields_say_what_the_call_says() -> None:
    inputs = inputs_of()
    fields = launched(inputs, right=0, softcap=5.0)
    assert (fields["pages"], fields["page_size"], fields["box_rows"], fields["table_stride"]) == (8, 16, 16, 4)
    assert (fields["left"], fields["right"], fields["has_softcap"], fields["new_keys"]) == (abi.UNBOUNDED, 0, 1, 0)
    assert (fields["splits"], fields["partial_out"], fields["stream"]) == (1, 0, 7)
    assert (fields["k_batch_stride"], fields["k_row_stride"], fields["k_head_stride"]) == inputs.k_cache.stride()[:3]
    new = torch.zeros(2, 3, 2, 64, dtype=torch.bfloat16)
    assert launched(inputs.replace(k=new, v=new))["new_keys"] == 3
    contiguous = inputs.replace(block_table=None, k_cache=inputs.k_cache[:2], v_cache=inputs.v_cache[:2])
    assert (launched(contiguous)["block_table"], launched(contiguous)["box_rows"]) == (0, 64)
    long = launched(inputs_of(pages=100), left=5000)
    assert long["splits"] > 1 and long["partial_out"] and long["partial_lse"]


@pytest.mark.parametrize(("page_size", "rows"), [(1, 1), (6, 2), (8, 8), (24, 8), (64, 64), (100, 4), (256, 64)])
def test_boxes_never_leave_a_page(page_size: int, rows: int) -> None:
    cache = torch.zeros(8, page_size, 2, 64, dtype=torch.bfloat16)
    assert launched(inputs_of(k_cache=cache, v_cache=cache))["box_rows"] == rows


def test_caches_are_not_copied_unless_tma_cannot_read_them() -> None:
    inputs = inputs_of()
    assert launched(inputs)["k_cache"] == inputs.k_cache.data_ptr()
    odd = torch.zeros(8, 16, 2, 65, dtype=torch.bfloat16)[..., :64]
    assert launched(inputs.replace(k_cache=odd))["k_cache"] != odd.data_ptr()
