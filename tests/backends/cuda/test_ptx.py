"""The CUDA kernels run from the PTX that nvcc emits; and faults planted in it, each of which has to be found."""

from __future__ import annotations

import dataclasses
import posixpath
import re
import shutil

import pytest
import torch

from fastattn.backends.cuda import nvrtc
from fastattn.backends.cuda.instances import (
    APPEND,
    COMBINE,
    DSINKS,
    PREPROCESS,
    Instance,
    RowwiseConfig,
    backward_instances,
    decode_instances,
    dkdv_configs,
    forward_instances,
)  # fmt: skip
from fastattn.backends.triton.tools.ptx.memory import Fault
from fastattn.testing.caches import CacheCase, make_cache_sample, measure_cache
from fastattn.testing.cases import Case
from fastattn.testing.inputs import make
from fastattn.testing.nvcc.launch import InterpretedKernels, interpreted_cuda, split
from fastattn.testing.tolerance import assert_within, measure

needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
CASE = Case("causal", B=1, S_q=200, S_kv=330, H_kv=1, D_qk=64, D_v=64, dtype=torch.bfloat16, right=0, dlse=True)
PACKED = Case(
    "packed", lengths=((70, 70), (133, 180)), nan_rows=True, D_qk=64, D_v=64, dtype=torch.bfloat16, right=0, needs=()
)
EXPECT = r"arrive\.expect_tx(\S* _, \[%r\d+\]), %r\d+;"
WAIT = r"mbarrier\.try_wait[^;]*;"
# Of the forward kernel: which instruction is left out or replaced, counted from 0, and what is said.
FAULTS = {
    "K is not waited for": (WAIT, 1, "setp.eq.u32 p, 0, 0;", "has not arrived"),
    "V is not waited for": (WAIT, 4, "setp.eq.u32 p, 0, 0;", "no barrier orders|has not arrived"),
    "no expected bytes": (EXPECT, 1, r"arrive\1;", "no barrier orders|has not arrived"),
    "K is not released": (r"mbarrier\.arrive\.shared\S* _, \[%r\d+\];", 1, "", "waits for ever"),
    "the other consumer is not let in": (r"barrier\.cta\.arrive[^;]*;", 1, "", "waits for ever"),
    "no group": (r"wgmma\.commit_group\S*;", 0, "", "may still read"),
    "the product is not waited for": (r"wgmma\.wait_group\S* 0;", 0, "", "may still read|off|before its products"),
    "registers without a fence": (r"wgmma\.fence\S*;", 1, "", "wgmma.fence"),
    "out without a fence": (r"fence\.proxy\.async\S*;", 2, "", "without fence.proxy.async"),
    "out before all have staged it": (r"barrier\.cta\.sync[^;]*;", 4, "", "no barrier orders"),
    "Q again before out has been read": (r"cp\.async\.bulk\.wait_group\.read 0;", 0, "", "may still read"),
    "another swizzle": ("0x40000040", 0, "0x80000040", "off"),
}  # fmt: skip
OF_PACKED = {
    "cleared rows without a fence": (r"fence\.proxy\.async\S*;", 0, "", "without fence.proxy.async"),
    "cleared rows without a barrier": (r"barrier\.cta\.sync[^;]*;", 0, "", "no barrier orders"),
}


def test_every_kernel_finds_its_traits_and_arguments_from_its_own_header() -> None:
    """NVRTC compiles each kernel from that header. Two backward kernels lacked an include, one a namespace."""
    after = [RowwiseConfig(name, dkdv_configs()[0]) for name in ("backward_postprocess", "backward_sum_heads")]
    instances = [Instance(config, "bfloat16") for config in (*after, PREPROCESS, DSINKS, APPEND, COMBINE)]
    for instance in [*instances, *forward_instances(), *backward_instances(), *decode_instances()]:
        structs = re.findall(r"fa::sm90::(\w+)", instance.traits)
        reached = "".join(nvrtc.headers()[path] for path in included(instance.config.header))
        space = "fa" if f"struct {instance.config.arguments} {{" in nvrtc.headers()["common/params.h"] else "fa::sm90"
        assert f" {space}::{instance.config.arguments} args" in nvrtc.source_of(instance), instance.name
        assert structs and all(f"struct {name}" in reached for name in structs), f"{instance.name}: {structs}"


def included(path: str, found: frozenset[str] = frozenset()) -> frozenset[str]:
    """The headers that a header includes, and itself."""
    found |= {path}
    for name in re.findall(r'(?m)^#include "(.*)"', nvrtc.headers()[path]):
        inner = posixpath.normpath(posixpath.join(posixpath.dirname(path), name))
        if inner not in found and not inner.startswith("emulator/"):  # which takes the place of the hardware there
            found = included(inner, found)
    return found


@needs_nvcc
def test_forward_and_backward_are_right() -> None:
    executed: dict[str, int] = {}
    with interpreted_cuda(InterpretedKernels(executed)):
        assert_within(measure("cuda", make(CASE)))
    assert {"_".join(name.split("_")[:2]) for name in executed if executed[name] > 1000} == {
        "forward_bfloat16", "rowwise_bfloat16", "backward_dkdv",
    }  # fmt: skip


@needs_nvcc
def test_attention_to_a_cache_is_right() -> None:
    """In pages of one row, which threads copy, with new rows, keys in two parts."""
    executed: dict[str, int] = {}
    case = CacheCase("pages of 1", before=(150, 0, 40), page_size=1, D_qk=64, D_v=64, dtype=torch.bfloat16)
    with interpreted_cuda(InterpretedKernels(executed)), split(2):
        assert_within(measure_cache("cuda", make_cache_sample(case)))
    assert {name.split("_")[0] for name in executed} == {"append", "decode", "combine"}


@needs_nvcc
@pytest.mark.parametrize("name", [*FAULTS, *OF_PACKED])
def test_a_planted_fault_is_found(name: str) -> None:
    pattern, which, new, said = (FAULTS | OF_PACKED)[name]

    def changed(kernel: str, ptx: str) -> str:
        if not kernel.startswith("forward"):
            return ptx
        found = [*re.finditer(pattern, ptx)]
        assert len(found) > which, f"{kernel}: {len(found)} times {pattern}"
        at = found[which]
        return ptx[: at.start()] + at.expand(new) + ptx[at.end() :]

    case = PACKED if name in OF_PACKED else dataclasses.replace(CASE, dlse=False, needs=())
    with interpreted_cuda(InterpretedKernels(changed=changed)):
        try:
            rows = measure("cuda", make(case))
            found = "off" if not all(row.ok for row in rows) else "nothing"
        except Fault as fault:
            found = str(fault)
    assert re.search(said, found), found
