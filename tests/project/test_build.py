"""Build and delivery of the CUDA kernels: the structs, the table of kernels, the build and its errors, the cache."""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastattn import compiled
from fastattn.backends import cuda
from fastattn.backends.cuda import abi, backward, build, decode, library, nvrtc
from fastattn.backends.cuda.instances import (
    DTYPES,
    PADDED_ROWS,
    Instance,
    decode_configs,
    dkdv_configs,
    dq_configs,
    forward_configs,
    gathered_configs,
    library_instances,
    select,
    select_decode,
    select_dkdv,
    select_dq,
    select_gathered,
)
from fastattn.errors import InputError
from fastattn.kv_cache import CacheInputs
from fastattn.problem import Grads, Inputs, Problem
from fastattn.spec import AttentionSpec

ROOT = Path(__file__).parents[2]
CSRC = ROOT / "csrc"
BROKEN_NVCC = "#!/bin/sh\necho 'nvcc fatal: no host compiler' >&2\nexit 1\n"


# --- the struct ---------------------------------------------------------------------------------------------------


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++ to compile csrc/params.h")
@pytest.mark.parametrize("name", ["Forward", "Backward", "Decode"])
def test_struct_is_the_one_that_python_packs(tmp_path: Path, name: str) -> None:
    struct = {"Forward": abi.FORWARD, "Backward": abi.BACKWARD, "Decode": abi.DECODE}[name]
    members = [
        re.sub(r"^(q|k|v|dout|new_k|new_v)_(batch|row|head)_stride$", r"\1_strides.\2", field) for field in struct.names
    ]
    offsets = "\n".join(f'  printf("%zu ", offsetof(fa::{name}Params, {member}));' for member in members)
    source = tmp_path / "offsets.cpp"
    source.write_text(
        '#include <cstddef>\n#include <cstdio>\n#include "common/params.h"\nint main() {\n'
        f'{offsets}\n  printf("%zu %lld", sizeof(fa::{name}Params), fa::k{name}Version);\n'
        '  printf(" %d %d", fa::kUnbounded, fa::kPaddedRows);\n}\n'
    )
    program = tmp_path / "offsets"
    subprocess.run(["g++", "-std=c++17", "-w", f"-I{CSRC}", source, "-o", program], check=True)
    printed = subprocess.run([program], capture_output=True, text=True, check=True).stdout
    expected = [*range(0, 8 * len(struct.names), 8), struct.size, struct.version, abi.UNBOUNDED, PADDED_ROWS]
    assert [int(number) for number in printed.split()] == expected


def inputs_of(q: torch.Tensor, k: torch.Tensor, **others: object) -> Inputs:
    return Inputs(q, k, k, max_seqlen_q=q.shape[1], max_seqlen_kv=k.shape[1]).replace(**others)


def cache_of(x: torch.Tensor) -> CacheInputs:
    return CacheInputs(x, x, x, torch.ones(x.shape[0], dtype=torch.int32), max_seqlen_q=x.shape[1])


def fields_of(inputs: Inputs, spec: AttentionSpec) -> dict[str, int | float]:
    out, lse = torch.empty(inputs.out_shape(), dtype=inputs.q.dtype), torch.empty(inputs.lse_shape())
    return abi.forward_fields(inputs, spec, (out, lse, torch.empty_like(lse)), stream=0)


def test_a_softcap_that_one_float_has_no_room_for_is_refused() -> None:
    q = torch.zeros(1, 5, 2, 16, dtype=torch.float16)
    with pytest.raises(InputError, match=r"softcap.*at most 4096"):
        fields_of(inputs_of(q, q), AttentionSpec(0.25, softcap=4097.0))


def test_fields_say_what_the_spec_says() -> None:
    q, k = torch.zeros(2, 5, 6, 16, dtype=torch.float16), torch.zeros(2, 9, 3, 16, dtype=torch.float16)
    fields = fields_of(inputs_of(q, k), AttentionSpec(0.25, softcap=5.0, left=3, right=0, anchor="upper_left"))
    assert set(fields) == set(abi.FORWARD.names)
    assert len(abi.FORWARD.pack(fields)) == abi.FORWARD.size
    assert (fields["key_begin"], fields["key_end"]) == (0, 5)  # no query sees the last four keys
    assert (fields["left"], fields["right"], fields["lower_right"], fields["dtype"]) == (3, 0, 0, 1)
    assert fields["score_scale"] == 5.0 and fields["cap_scale"] == pytest.approx(0.05)
    assert (fields["q_batch_stride"], fields["q_row_stride"], fields["q_head_stride"]) == q.stride()[:3]
    plain = fields_of(inputs_of(q, k), AttentionSpec(0.25))
    assert (plain["left"], plain["right"], plain["has_band"], plain["has_softcap"]) == (1 << 29, 1 << 29, 0, 0)
    assert plain["heads_per_pass"] == 12, "short keys: all heads in one pass"
    long = inputs_of(q, k).replace(max_seqlen_kv=1 << 18)  # 16 MB for the keys and values of a head
    assert abi.heads_per_pass(long) == 4, "whole groups of two"


def test_more_rows_than_positions_count_are_refused() -> None:
    q = torch.zeros(1, 1, 1, 8, dtype=torch.float16)
    k = q.expand(-1, abi.UNBOUNDED, -1, -1)
    with pytest.raises(InputError, match="fewer than 536870912 rows"):
        fields_of(inputs_of(q, k), AttentionSpec(1.0))


def test_prepared_copies_only_what_tma_cannot_read() -> None:
    q = torch.zeros(1, 5, 2, 16, dtype=torch.float16)
    inputs, spec = inputs_of(q, q.transpose(1, 2).contiguous().transpose(1, 2)), AttentionSpec(0.5)
    same, _ = abi.prepared(inputs, spec)
    assert same.q is inputs.q and same.k is inputs.k
    expanded = torch.zeros(1, 5, 1, 16, dtype=torch.float16).expand(-1, -1, 2, -1)
    odd = torch.zeros(1, 5, 2, 17, dtype=torch.float16)[..., :16]
    for x in (expanded, odd):
        copied, _ = abi.prepared(inputs.replace(q=x), spec)
        assert copied.q.is_contiguous() and copied.k is inputs.k


@pytest.mark.parametrize("scale", [-0.5, 0.0, 1e-40])
def test_prepared_leaves_a_positive_scale(scale: float) -> None:
    q = torch.randn(1, 3, 1, 8, dtype=torch.float64).half()
    inputs, spec = abi.prepared(inputs_of(q, q), AttentionSpec(scale))
    assert spec.scale > 0
    torch.testing.assert_close(inputs.q * spec.scale, q * scale)


# --- the backward pass's fields and tensors -----------------------------------------------------------------------


def gradients_of(
    q: torch.Tensor, launch: Callable[[abi.Fields], None], needs: str, sinks: torch.Tensor | None = None, **spec: object
) -> Grads:
    inputs = inputs_of(q, q, sinks=sinks)
    out, lse = torch.zeros(inputs.out_shape(), dtype=q.dtype), torch.zeros(inputs.lse_shape())
    names = (*needs, *(("sinks",) if sinks is not None else ()))
    scalars = AttentionSpec(0.125, **spec)  # type: ignore[arg-type]
    return backward.backward(
        backward.BackwardProblem(out, None, out, lse, lse, inputs, scalars, names),
        launch,
        multiprocessors=132,
        stream=0,
    )


def launched(q: torch.Tensor, needs: str = "qkv", **more: Any) -> abi.Fields:
    """The fields with which the backward pass would be launched."""
    found: list[abi.Fields] = []
    gradients_of(q, found.append, needs, **more)
    (fields,) = found
    assert set(fields) == set(abi.BACKWARD.names)
    return fields


def test_one_kernel_or_two(monkeypatch: pytest.MonkeyPatch) -> None:
    q = torch.zeros(2, 130, 4, 96, dtype=torch.float16)
    fused = launched(q, softcap=2.0)
    assert fused["dq_sums"] and fused["sum_columns"] == 96 and fused["dq"] and fused["dk"]
    assert (fused["padded_q"], fused["padded_kv"]) == (256, 256)
    only_keys, only_queries = launched(q, "v"), launched(q, "q")
    assert not only_keys["dq_sums"] and not only_keys["dq"] and only_keys["dk"] and only_keys["dv"]
    assert not only_queries["dq_sums"] and not only_queries["dk"] and only_queries["dq"]
    wide = launched(torch.zeros(1, 3, 1, 192, dtype=torch.float16))
    assert not wide["dq_sums"] and wide["dq"] and wide["dk"], "no fused kernel holds this head dim"
    assert not wide["dk_parts"] and not wide["dv_parts"], "every query head has keys of its own"
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    twin = launched(q)
    assert not twin["dq_sums"] and twin["sum_columns"] == 0 and twin["dq"] and twin["dk"]


def test_gradients_have_the_shapes_of_their_inputs() -> None:
    q = torch.zeros(2, 5, 4, 64, dtype=torch.bfloat16)
    for sinks in (torch.zeros(1, 4, dtype=torch.bfloat16), torch.zeros(2, 4)):
        grads = gradients_of(q, lambda fields: None, "k", sinks=sinks)
        assert grads.dq is None and grads.dv is None and grads.dk is not None and grads.dsinks is not None
        assert grads.dk.shape == q.shape and (grads.dsinks.shape, grads.dsinks.dtype) == (sinks.shape, sinks.dtype)


def test_without_a_side_the_gradients_are_zero() -> None:
    q = torch.zeros(1, 3, 2, 64, dtype=torch.float16)
    empty = q[:, :0]
    seen: list[abi.Fields] = []
    for rows_q, rows_kv in ((q, empty), (empty, q)):
        inputs = inputs_of(rows_q, rows_kv, sinks=torch.zeros(1, 2))
        out, lse = torch.zeros(inputs.out_shape()).half(), torch.zeros(inputs.lse_shape())
        scalars, needs = AttentionSpec(1.0), ("q", "k", "v", "sinks")
        problem = backward.BackwardProblem(out, None, out, lse, lse, inputs, scalars, needs)
        grads = backward.backward(problem, seen.append, multiprocessors=132, stream=0)
        for grad, like in ((grads.dq, rows_q), (grads.dk, rows_kv), (grads.dv, rows_kv)):
            assert grad is not None and grad.shape == like.shape and not grad.any()
    (fields,) = seen  # the sinks of queries without keys still have a gradient
    assert fields["dsinks"] and not fields["dq"] and not fields["dk"]


# --- the table of kernels, and the backend ------------------------------------------------------------------------


def test_every_head_dim_has_the_smallest_kernel_that_holds_it() -> None:
    configs = forward_configs(CSRC)
    for d_qk in range(8, 257, 8):
        for d_v in range(8, 257, 8):
            for band, softcap in ((False, False), (True, False), (False, True), (True, True)):
                config = select(configs, d_qk, d_v, band, softcap)
                can = [t for t in configs if t.serves(d_qk, d_v, band, softcap)]
                assert config.d_qk + config.d_v == min(t.d_qk + t.d_v for t in can)
    assert len({Instance(config, dtype).name for config in configs for dtype in DTYPES}) == 2 * len(configs)


def test_every_head_dim_has_a_kernel_for_each_gradient_and_for_decoding() -> None:
    keys, queries, of_cache = dkdv_configs(CSRC), dq_configs(CSRC), decode_configs(CSRC)
    gathered = gathered_configs(CSRC)
    for d_qk in range(8, 257, 8):
        for d_v in range(8, 257, 8):
            for softcap in (False, True):
                alone, of_queries = (
                    select_dkdv(keys, d_qk, d_v, softcap, False),
                    select_dq(queries, d_qk, d_v, softcap),
                )
                assert alone is not None and not alone.fused
                assert (alone.d_qk, alone.d_v) == (of_queries.d_qk, of_queries.d_v)
                fused = select_dkdv(keys, d_qk, d_v, softcap, True)
                assert (fused is not None) == (d_qk <= 192 and d_v <= 128)
                by_tma, by_rows = (
                    select_decode(of_cache, d_qk, d_v, softcap),
                    select_gathered(gathered, d_qk, d_v, softcap),
                )
                assert by_tma.softcap == softcap and (by_rows.slots > 0) == softcap
                assert (by_tma.d_qk, by_tma.d_v) == (by_rows.d_qk, by_rows.d_v)
    names = [instance.name for instance in library_instances(CSRC)]
    assert len(set(names)) == len(names)


def problem_on_hopper(head_dim: int = 128, dtype: torch.dtype = torch.bfloat16, **changes: object) -> Problem:
    facts = {"device": "cuda", "arch": 90, "features": frozenset({"band", "packed"}), **changes}
    return Problem(dtype=dtype, head_dim_qk=head_dim, head_dim_v=head_dim, group=1, **facts)


def test_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "_delivered", lambda: (object(), "for this test"))
    assert cuda._sees_gpu() or cuda.BACKEND.unsupported_reasons(problem_on_hopper()) == ["no GPU that torch sees"]
    monkeypatch.setattr(cuda, "_sees_gpu", lambda: True)
    terms = frozenset({"alibi", "segments", "dropout", "mask", "bias"})
    cache = {"features": frozenset({"cache", "alibi", "bias"})}
    for facts in ({}, {"needs_grad": True}, {"needs_grad": True, "deterministic": True, "features": terms}, cache):
        assert cuda.BACKEND.unsupported_reasons(problem_on_hopper(**facts)) == []
    for problem, reason in (
        (problem_on_hopper(device="cpu", arch=0), "device cpu"),
        (problem_on_hopper(arch=80), "compute capability 8.0 (needs 9.0)"),
        (problem_on_hopper(arch=100), "compute capability 10.0 (made for 9.0 alone)"),
        (problem_on_hopper(dtype=torch.float32), "dtype torch.float32"),
        (problem_on_hopper(head_dim=264), "head dim 264"),
        (problem_on_hopper(head_dim=60), "multiples of 8"),
        (problem_on_hopper(features=frozenset({"intervals"})), "no intervals"),
    ):
        assert any(reason in found for found in cuda.BACKEND.unsupported_reasons(problem)), reason


def test_it_never_serves_unasked_before_it_ran_on_a_gpu() -> None:
    assert cuda.BACKEND.automatic_reasons(problem_on_hopper()) == ["not yet run on a GPU"]


def test_delivery_says_what_happened() -> None:
    text = cuda.delivery()
    assert ("built" in text) or ("NVRTC" in text)
    is_there = cuda._sees_gpu() and not text.startswith("unavailable")
    assert (cuda.BACKEND.unavailable_reason() is None) == is_there


# --- building -----------------------------------------------------------------------------------------------------


def run_setup(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "setup.py", *arguments, "--dist-dir", str(folder / "dist")]
    command[2:2] = ["egg_info", "--egg-base", str(folder), "build", "--build-base", str(folder / "build")]
    env = {**os.environ, "FASTATTN_BUILD_CUDA": "0", "FASTATTN_BUILD_CPU": "0", **environment}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)


def broken_cuda_home(folder: Path) -> str:
    nvcc = folder / "cuda" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(BROKEN_NVCC)
    nvcc.chmod(0o755)
    return str(folder / "cuda")


def test_setup_without_a_compiler_builds_a_wheel_for_every_machine(tmp_path: Path) -> None:
    result = run_setup(tmp_path, "bdist_wheel", FASTATTN_BUILD_CUDA="auto", CUDA_HOME=broken_cuda_home(tmp_path))
    assert result.returncode == 0, result.stderr
    assert "the library for cuda is not built" in result.stderr and "no host compiler" in result.stderr
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    names = zipfile.ZipFile(wheel).namelist()
    sources = ("sm90/instances.inc", "common/mask.h", "sm90/forward.cuh", "cpu/decode.cpp", "cpu/vector.h")
    assert {"fastattn/py.typed", *(f"fastattn/csrc/{name}" for name in sources)} <= set(names)
    assert not any(name.endswith(".so") for name in names)


def test_setup_fails_where_the_library_is_demanded(tmp_path: Path) -> None:
    result = run_setup(tmp_path, "bdist_wheel", FASTATTN_BUILD_CUDA="1", CUDA_HOME=broken_cuda_home(tmp_path))
    assert result.returncode != 0
    assert "the library for cuda cannot be built" in result.stderr and "no host compiler" in result.stderr


@pytest.mark.parametrize("switch", ["FASTATTN_BUILD_CUDA", "FASTATTN_BUILD_CPU"])
def test_setup_refuses_an_unknown_wish(tmp_path: Path, switch: str) -> None:
    result = run_setup(tmp_path, "bdist_wheel", **{switch: "maybe"})
    assert result.returncode != 0 and f"{switch}: got 'maybe'; allowed: auto, 0, 1" in result.stderr


def test_setup_without_a_cpp_compiler(tmp_path: Path) -> None:
    said = "the library for cpu {} built: no C++ compiler was found (CXX=nothing-of-this-name)"
    result = run_setup(tmp_path, "bdist_wheel", FASTATTN_BUILD_CPU="auto", CXX="nothing-of-this-name")
    assert result.returncode == 0 and said.format("is not") in result.stderr
    result = run_setup(tmp_path, "bdist_wheel", FASTATTN_BUILD_CPU="1", CXX="nothing-of-this-name")
    assert result.returncode != 0 and said.format("cannot be") in result.stderr


@pytest.mark.parametrize("name", ["setup.py", "release/wheels.py"])
def test_what_builds_imports_no_torch(name: str) -> None:
    """Continuous integration builds wheels without it."""
    code = "import runpy, sys; sys.modules['torch'] = None; sys.argv[1:] = ['--version']; runpy.run_path({path!r})"
    subprocess.run([sys.executable, "-c", code.format(path=str(ROOT / name))], check=True, cwd=ROOT)


@pytest.mark.slow
def test_library_with_one_kernel_loads_and_reports_errors_as_text(tmp_path: Path) -> None:
    try:
        build.find_nvcc(), build.find_ninja()
    except build.BuildError as error:
        pytest.skip(str(error))
    csrc = tmp_path / "csrc"
    shutil.copytree(CSRC, csrc)
    table = (csrc / "sm90" / "instances.inc").read_text().splitlines(keepends=True)
    kept = (
        "FORWARD(64, 64, 0, 0",
        "BACKWARD_DKDV(64, 64, 0, 128, 128, 2, 0",
        "BACKWARD_DQ(64, 64, 0",
        "DECODE(64, 64, 0",
    )
    assert all(any(line.startswith(name) for line in table) for name in kept)
    (csrc / "sm90" / "instances.inc").write_text("".join(x for x in table if not x[0].isupper() or x.startswith(kept)))
    build.build_library(tmp_path / "build", tmp_path / "libfastattn.so", csrc, library_instances(csrc))
    with pytest.raises(OSError, match="damaged"):
        library.Library(tmp_path / "libfastattn.so")
    compiled.seal(tmp_path / "libfastattn.so")
    loaded = library.Library(tmp_path / "libfastattn.so")
    q = torch.zeros(1, 4, 1, 64, dtype=torch.bfloat16)
    fields = fields_of(inputs_of(q, q), AttentionSpec(0.125))
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="was not launched"):
            loaded.launch(abi.FORWARD, fields)
        with pytest.raises(RuntimeError, match="was not launched"):
            gradients_of(q, functools.partial(loaded.launch, abi.BACKWARD), "qkv")
        with pytest.raises(RuntimeError, match="was not launched"):
            decode.attend(
                functools.partial(loaded.launch, abi.DECODE), cache_of(q), AttentionSpec(0.125), 132, stream=0
            )
    with pytest.raises(RuntimeError, match="another version"):
        loaded.launch(abi.FORWARD, {**fields, "version": abi.FORWARD.version + 1})


# --- NVRTC --------------------------------------------------------------------------------------------------------


@pytest.fixture
def nvrtc_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FASTATTN_CACHE", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "no folder"))  # where a cache would be looked for, too
    monkeypatch.setattr(nvrtc, "version", lambda: "13.0")
    monkeypatch.setattr(nvrtc, "compile_kernel", lambda instance: b"cubin of " + instance.name.encode())
    return tmp_path


def test_cache_is_read_the_second_time(nvrtc_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    instance = Instance(forward_configs(CSRC)[0], "bfloat16")
    first = nvrtc.cached_kernel(instance)
    assert [path.name for path in nvrtc_cache.glob("*.cubin")] == [nvrtc.cache_name(instance)]
    monkeypatch.setattr(nvrtc, "compile_kernel", lambda instance: pytest.fail("compiled again"))
    assert nvrtc.cached_kernel(instance) == first == b"cubin of " + instance.name.encode()


def test_cache_key_holds_source_options_and_version(nvrtc_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    instance = Instance(forward_configs(CSRC)[0], "bfloat16")
    names = {nvrtc.cache_name(instance), nvrtc.cache_name(Instance(instance.config, "float16"))}
    changed = {**nvrtc.headers(), "common/mask.h": "another"}
    for name, value in (("version", lambda: "13.1"), ("OPTIONS", ("--std=c++20",)), ("headers", lambda: changed)):
        monkeypatch.setattr(nvrtc, name, value)
        names.add(nvrtc.cache_name(instance))
    assert len(names) == 5


def test_a_cache_that_cannot_be_written_costs_time_only(nvrtc_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (nvrtc_cache / "file").write_text("")
    monkeypatch.setenv("FASTATTN_CACHE", str(nvrtc_cache / "file" / "folder"))
    assert nvrtc.cached_kernel(Instance(forward_configs(CSRC)[0], "bfloat16")).startswith(b"cubin of")


def test_kernels_compile_with_nvrtc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        nvrtc.load()
    except nvrtc.NvrtcError as error:
        pytest.skip(str(error))
    monkeypatch.setenv("FASTATTN_CACHE", str(tmp_path))
    assert nvrtc.cached_kernel(Instance(forward_configs(CSRC)[0], "bfloat16"))[:4] == b"\x7fELF"


def test_device_headers_include_no_standard_header() -> None:
    for name, text in nvrtc.headers().items():
        assert "#include <" not in text, name
