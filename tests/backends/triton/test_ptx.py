"""What Triton compiles for GPUs, run by the interpreter of its PTX; and faults that the interpreter has to find."""

import re

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from benchmarks import ptx as command
from fastattn.backends.triton.tools.figures import narrow_products_in
from fastattn.backends.triton.tools.ptx import block, matrices, operations
from fastattn.backends.triton.tools.ptx.block import Block
from fastattn.backends.triton.tools.ptx.memory import Fault, Global, Shared
from fastattn.backends.triton.tools.ptx.text import Address, Number, Register, Vector, parse

MASKED = "mask, dropout, D 64 [bfloat16]"


@pytest.mark.parametrize(("arch", "more"), [(80, []), (90, ["e4m3, causal, D 64 [bfloat16]"])], ids=["sm_80", "sm_90"])
def test_compiled_kernels_are_right(arch, more):
    """Forward and backward; Triton multiplied a masked operand wrongly on sm_80."""
    found = list(command.judged(arch, ["causal, D 64 [bfloat16]", MASKED, *more], quick=True))
    assert [said for _, said, _ in found] == [[]] * len(found), found
    assert all(executed > 1000 for *_, executed in found), "nothing ran"


def test_an_operand_that_triton_would_multiply_wrongly_is_seen():
    line = "tensor<128x16xbf16, #ttg.dot_op<{opIdx = 0, parent = #mma, kWidth = %d}>> * tensor<16x64xbf16"
    assert narrow_products_in(line % 4) == [] and narrow_products_in(line % 8) == ["16 elements, kWidth 8"]


def program(body, threads=64):
    lines = f".visible .entry k(\n.param .u64 .ptr .global .align 1 k_param_0\n)\n.reqntid {threads}\n{{\n{body}\n}}"
    return parse(lines)


def run(body, x, shared=1024, threads=64):
    parameters = [np.full(threads, x.data_ptr(), np.uint64)]
    Block(program(body, threads), parameters, Global([x]), shared, (0, 0, 0), (1, 1, 1)).run()


WRITE = """
mov.u32 %r1, %tid.x;
shl.b32 %r2, %r1, 2;
mov.b32 %r3, global_smem;
add.s32 %r4, %r3, %r2;
st.shared.b32 [ %r4 + 0 ], %r1;
"""
READ_OTHERS = "xor.b32 %r5, %r4, 128;\nld.shared.b32 %r6, [%r5];\n"
STORE = """
ld.param.b64 %rd1, [k_param_0];
cvt.u64.u32 %rd2, %r2;
add.s64 %rd3, %rd1, %rd2;
@%p1 st.global.b32 [ %rd3 + 0 ], { %r6 };
"""


def test_a_small_program():
    x = torch.full((64,), -1, dtype=torch.int32)
    run(f"{WRITE}bar.sync 0;\n{READ_OTHERS}setp.lt.s32 %p1, %r1, 50;\n{STORE}\nret;", x)
    assert x.tolist() == [i ^ 32 if i < 50 else -1 for i in range(64)]


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (WRITE + READ_OTHERS, "without a barrier"),
        ("mov.u32 %r1, %tid.x;\nld.shared.b32 %r2, [%r1+0];", "no multiple of 4"),
        ("mov.b32 %r3, global_smem;\nld.shared.b32 %r6, [%r3];", "nothing wrote"),
        ("mov.b32 %r3, global_smem;\nmov.u32 %r1, %tid.x;\nst.shared.b32 [ %r3 + 4096 ], %r1;", "outside its 1024"),
        ("ld.param.b64 %rd1, [k_param_0];\nld.global.b32 { %r1 }, [ %rd1 + 256 ];", "outside every tensor"),
        ("mov.u32 %r1, %tid.x;\nsetp.eq.s32 %p1, %r1, 3;\n@%p1 bra $L;\n$L:\nret;", "different places"),
        ("add.s32 %r1, %r2, 1;", "read before it is written"),
        ("frob.b32 %r1, 1;", "not known here"),
        (
            "mov.b32 %r3, global_smem;\nld.param.b64 %rd1, [k_param_0];\nmov.u32 %r1, %tid.x;\nshl.b32 %r2, %r1, 2;\n"
            "add.s32 %r4, %r3, %r2;\ncp.async.ca.shared.global [ %r4 + 0 ], [ %rd1 + 0 ], 0x4;\n"
            "cp.async.commit_group;\nld.shared.b32 %r6, [%r4];",
            "copy was not waited for",
        ),
        ("mov.u32 %r1, 0;\n$L:\nsetp.eq.s32 %p1, %r1, 0;\n@%p1 bra $L;\nret;", "does not end"),
    ],
)  # fmt: skip
def test_what_a_gpu_would_not_do_is_a_fault(body, said, monkeypatch):
    monkeypatch.setattr(block, "FOREVER", 1000)
    with pytest.raises(Fault, match=re.escape(said)):
        run(body, torch.zeros(64, dtype=torch.int32))


def test_a_product_needs_the_fence_and_its_bytes_until_it_ends():
    memory, warps = Shared(256), np.zeros(1, np.int16)
    memory.store(np.array([0]), np.ones((1, 16), np.uint8), warps)
    where = np.arange(16)[None]
    memory.barrier()
    with pytest.raises(Fault, match="fence"):
        memory.product_begins(where)
    memory.fence_for_products()
    memory.product_begins(where)
    with pytest.raises(Fault, match="may still read"):
        memory.store(np.array([0]), np.ones((1, 16), np.uint8), warps)
    memory.product_ends(where)


def test_operands():
    (it,) = program("@!%p1 ld.global.v2.b32 { %r1, %r2 }, [ %rd1 + 16 ];").instructions
    assert it.guard == "%p1" and it.negated and it.opcode == ("ld", "global", "v2", "b32")
    assert it.operands == (Vector((Register("%r1"), Register("%r2"))), Address(Register("%rd1"), 16))
    (it,) = program("mov.b32 %r1, 0f3F800000;").instructions
    assert it.operands[1] == Number(0x3F800000, True)


def test_numbers():
    """Against torch, and the corners that it does not have."""
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 3, 1000)
    as_e4m3 = x.clamp(-448, 448).to(torch.float8_e4m3fn)
    assert operations.to_e4m3(x.numpy()).tolist() == as_e4m3.view(torch.uint8).tolist()
    assert operations.from_e4m3(as_e4m3.view(torch.uint8).numpy()).tolist() == as_e4m3.float().tolist()
    assert operations.to_bf16(x.numpy()).tolist() == x.bfloat16().view(torch.uint16).tolist()
    a, b = np.array([7, 2**32 - 7], np.uint32), np.array([2, 2], np.uint32)
    assert operations.compute(("div", "s32"), [a, b]).view(np.int32).tolist() == [3, -3]
    assert operations.compute(("rem", "s32"), [a, b]).view(np.int32).tolist() == [1, -1]
    assert operations.compute(("mul", "hi", "u32"), [a, a]).tolist() == [0, (2**32 - 7) ** 2 >> 32]
    assert operations.compute(("shl", "b32"), [a, np.array([40, 1], np.uint32)]).tolist() == [0, 2**32 - 14]
    field = operations.compute(("bfe", "s32"), [a, np.array([0, 0], np.uint32), np.array([3, 4], np.uint32)])
    assert field.view(np.int32).tolist() == [-1, -7]


def test_fragments_are_inverses_and_products_are_products():
    rows = torch.randn(2, 16, 8, generator=torch.Generator().manual_seed(0)).numpy()
    assert np.array_equal(matrices.sums_of_registers(matrices.registers_of_sums(rows)), rows)
    tiles = np.random.default_rng(0).integers(0, 255, (64, 16)).astype(np.uint8)
    for transposed in (False, True):
        registers = matrices.matrices_of_rows(tiles, 4, transposed)
        assert np.array_equal(matrices.rows_of_matrices(registers, transposed).reshape(64, 16), tiles)


@pytest.mark.parametrize(("width", "bits"), [(128, 1), (64, 2), (32, 3)])
def test_a_swizzled_matrix_covers_its_bytes_once(width, bits):
    descriptor = (1024 >> 4) | (8 * width >> 4 << 32) | (bits << 62)
    found = np.concatenate(
        [matrices.addresses(descriptor + (k * 32 >> 4), 64, 2, False) for k in range(width // 32)], 1
    )
    assert sorted(found.ravel().tolist()) == list(range(1024, 1024 + 64 * width, 2))
