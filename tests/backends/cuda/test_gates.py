"""The compile gates of the CUDA kernels refuse faults, in made-up and in real machine code."""

from __future__ import annotations

from pathlib import Path

import gates
import pytest

from fastattn.backends.cuda.build import BuildError, build, find_ninja
from fastattn.backends.cuda.instances import (
    Instance,
    dkdv_configs,
    dq_configs,
    forward_configs,
    select,
    select_dq,
)

CSRC = Path(__file__).parents[3] / "csrc"
CAUSAL_128 = Instance(select(forward_configs(CSRC), 128, 128, True, False), "bfloat16")
FUSED_128 = Instance(next(config for config in dkdv_configs(CSRC) if config.d_qk == 128 and config.fused), "bfloat16")
SPLIT_192 = Instance(next(config for config in dkdv_configs(CSRC) if config.d_v == 192), "bfloat16")
DQ_128 = Instance(select_dq(dq_configs(CSRC), 128, 128, False), "bfloat16")
CLEAN_LOG = "ptxas info    : 0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads"


def sass(under: int, after: int, products: int, extra: str = "") -> str:
    """A listing like that of cuobjdump, with this many exponentials under the P V product and after it."""
    wait = "WARPGROUP.DEPBAR.LE gsb0, {} ;"
    lines = ["HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], RZ ;"] * products
    lines += [wait.format("0x1"), *["MUFU.EX2 R3, R4 ;"] * under]
    lines += [wait.format("0x0"), *["MUFU.EX2 R3, R4 ;"] * after, "WARPGROUP.ARRIVE ;", extra]
    return "\n".join(f"        /*{16 * i:04x}*/                   {line}" for i, line in enumerate(lines) if line)


def faults(log: str, listing: str) -> str:
    return "; ".join(gates.faults(CAUSAL_128, gates.facts_of(log, listing)))


def test_a_clean_kernel_passes() -> None:
    assert faults(CLEAN_LOG, sass(66, 0, 32)) == ""
    assert faults(CLEAN_LOG + "\nptxas info : (C7519) Potential Performance Loss", sass(66, 0, 32)) == ""


@pytest.mark.parametrize(
    ("log", "listing", "complaint"),
    [
        (CLEAN_LOG.replace("0 bytes spill stores", "8 bytes spill stores"), sass(66, 0, 32), "spills 8 bytes"),
        (CLEAN_LOG, sass(66, 0, 32, "LDL R2, [R1] ;"), "1 accesses to local memory"),
        (CLEAN_LOG + "\nptxas info : (C7510) Potential Performance Loss", sass(66, 0, 32), "ptxas warns: C7510"),
        (CLEAN_LOG, sass(66, 0, 31), "31 HGMMA instead of 32"),
        (CLEAN_LOG, sass(13, 53, 32), "53 exponentials after P V"),
        (CLEAN_LOG, sass(0, 0, 32), "0 under it"),
    ],
)
def test_each_fault_is_refused(log: str, listing: str, complaint: str) -> None:
    assert complaint in faults(log, listing)


@pytest.mark.parametrize(
    ("instance", "products", "hidden"),
    [
        (CAUSAL_128, 2 * (8 + 8), 64),
        (FUSED_128, 8 + 8 + 4 + 4 + 8, 0),
        (SPLIT_192, 2 * 12 + 12 + 8, 0),
        (DQ_128, 24, 64),
    ],
    ids=lambda x: x.name if isinstance(x, Instance) else str(x),
)
def test_what_is_expected_of_each_kind(instance: Instance, products: int, hidden: int) -> None:
    assert gates.expected_products(instance) == products
    assert gates.expected_exponentials(instance) == hidden
    assert gates.faults(instance, gates.facts_of(CLEAN_LOG, sass(64, 0, products))) == []
    assert gates.faults(instance, gates.facts_of(CLEAN_LOG, sass(64, 0, products - 1)))


@pytest.fixture(scope="module")
def cuobjdump() -> str:
    try:
        find_ninja()
        return gates.find_cuobjdump()
    except BuildError as error:
        pytest.skip(str(error))


@pytest.mark.slow
@pytest.mark.parametrize(("options", "complaint"), [((), ""), (("-DFA_EXP_OVERLAP=0",), "exponentials after P V")])
def test_the_compiler_keeps_the_overlap_only_with_its_barrier(
    tmp_path: Path, cuobjdump: str, options: tuple[str, ...], complaint: str
) -> None:
    build(tmp_path, "objects", CSRC, [CAUSAL_128], options, jobs=1)
    _, found = gates.check(CAUSAL_128, tmp_path, cuobjdump)
    assert complaint in "; ".join(found) if complaint else not found
