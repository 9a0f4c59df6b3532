"""Proofs about the CUDA kernels that share no mistake with the emulator, in their short forms."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import emulate
import pytest
from fault import Fault
from proofs import cute, protocol

from fastattn.backends.cuda.build import BuildError

# One for each kind of statement: a kernel's descriptor, the machine's addresses, its fragments.
MISREADINGS = {
    "scores, A, descriptor": Fault("steps", "sm90/ptx.cuh", "k % kChunkColumns * 2) >> 4", "k % kChunkColumns) >> 4"),
    "output, B, address": Fault("pieces", "emulator/tensor_core.cpp", "k / 8 * 1024 + k % 8 * 128", "k * 64"),
    "accumulator of 128": Fault("rows", "emulator/tensor_core.cpp", "lane / 4 + i / 2 % 2 * 8", "lane / 2 + i / 2 % 2"),
}


def witness(folder: Path, csrc: Path = emulate.CSRC) -> subprocess.CompletedProcess[str]:
    try:
        program = cute.build(cute.find_headers(), folder, csrc)
    except BuildError as error:
        pytest.skip(str(error))
    return subprocess.run([str(program)], capture_output=True, text=True)


def test_layouts_are_those_of_cute(tmp_path: Path) -> None:
    result = witness(tmp_path)
    assert result.returncode == 0 and result.stdout.startswith("0 of 14"), result.stdout  # of 14 million


def test_misread_layouts_differ_from_cute(tmp_path: Path) -> None:
    for fault in MISREADINGS.values():
        emulate.plant(fault, tmp_path / "csrc", tmp_path / "csrc" if (tmp_path / "csrc").exists() else emulate.CSRC)
    result = witness(tmp_path, tmp_path / "csrc")
    assert result.returncode == 1
    for what in MISREADINGS:
        assert any(what in line for line in result.stdout.splitlines()), (what, result.stdout)


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++ to build the emulator")
def test_protocol_of_the_forward_kernel_holds_in_every_order(tmp_path: Path) -> None:
    (line, *_) = protocol.KERNELS
    emulator = emulate.Emulator(tmp_path, jobs=1)
    is_right, text = protocol.check(emulator, protocol.build_explorer(tmp_path), line)
    assert is_right and "26 of 26 planted" in text, text
