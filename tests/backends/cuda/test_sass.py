"""Hazards of asynchronous products: each rule on made-up machine code, and faults planted in that of a real kernel."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import gates
import pytest
import sass

from fastattn.backends.cuda.build import BuildError, build, find_ninja
from fastattn.backends.cuda.instances import Instance, forward_configs, select

CSRC = Path(__file__).parents[3] / "csrc"
CAUSAL_128 = Instance(select(forward_configs(CSRC), 128, 128, True, False), "bfloat16")
# Scores into R24 .. R87, and P V with P in R88 .. R91 added to R100 .. R163; a role of 240 registers.
SOUND = """
USETMAXREG.TRY_ALLOC.CTAPOOL UP0, 0xf0
WARPGROUP.ARRIVE
HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], RZ, !UPT, gsb0
FADD R88, R92, R93
WARPGROUP.ARRIVE
HGMMA.64x128x16.F32.BF16 R100, R88, gdesc[UR8], R100, gsb0
WARPGROUP.DEPBAR.LE gsb0, 0x1
FMUL R92, R24, R93
WARPGROUP.DEPBAR.LE gsb0, 0x0
FADD R88, R92, R93
@!P0 BRA 0x10
FMUL R92, R100, R93
EXIT
""".strip().splitlines()


def code_of(lines: list[str]) -> list[sass.Instruction]:
    listing = [f"        /*{16 * i:04x}*/                   {line} ;" for i, line in enumerate(lines)]
    ((name, code),) = sass.functions("\n".join(["\t\tFunction : kernel", *listing]))
    assert name == "kernel" and len(code) == len(lines)
    return code


def hazards(*changes: tuple[int, str]) -> str:
    lines = list(SOUND)
    for line, text in changes:
        lines[line] = text
    return "; ".join(sass.hazards(code_of(lines)))


def test_sound_code_has_no_hazards() -> None:
    assert hazards() == ""
    assert hazards((7, "LDS.64 R92, [R99+0x10]")) == "", "an address is one register, though the numbers loaded are two"
    factor = (7, "IMAD.WIDE.U32 R92, R99, UR14, R94")
    assert hazards(factor) == "", "a factor is one register, though the product has two"
    assert sass.hazards(code_of(["FADD R1, R2, R3", "EXIT"])) == [], "a kernel without products"


@pytest.mark.parametrize(
    ("line", "text", "complaint"),
    [
        (6, "NOP", "FMUL touches an accumulator of a product in flight"),
        (7, "FMUL R92, R163, R93", "FMUL touches an accumulator of a product in flight"),
        (7, "IMAD.WIDE.U32 R92, P1, R90, UR14, R99", "IMAD.WIDE.U32 touches an accumulator of a product in flight"),
        (7, "LDS.64 R99, [R93]", "LDS.64 touches an accumulator of a product in flight"),
        (7, "LDS.64 R92, [R100]", "LDS.64 touches an accumulator of a product in flight"),
        (7, "LDS.128 R88, [R93]", "LDS.128 writes an operand of a product in flight"),
        (7, "STG.E.64 [R98.64], R162", "STG.E.64 touches an accumulator of a product in flight"),
        (8, "NOP", "FMUL touches an accumulator of a product in flight"),
        (8, "WARPGROUP.DEPBAR.LE gsb0, 0x1", "FADD writes an operand of a product in flight"),
        (1, "NOP", "follows no ARRIVE"),
        (4, "NOP", "reads a register written since ARRIVE"),
        (
            5,
            "HGMMA.64x128x16.F32.BF16 R100, R84, gdesc[UR8], R100, gsb0",
            "reads an accumulator of a product in flight",
        ),
        (0, "USETMAXREG.DEALLOC.CTAPOOL 0xa0", "a role of 160 registers names R163"),
    ],
)
def test_each_hazard_is_reported(line: int, text: str, complaint: str) -> None:
    assert complaint in hazards((line, text))


def test_a_kernel_that_ends_with_a_product_in_flight_is_reported() -> None:
    assert "EXIT ends the kernel with a product in flight" in hazards((8, "NOP"), (9, "NOP"), (10, "NOP"), (11, "NOP"))


def test_a_hazard_on_one_path_alone_is_reported() -> None:
    """The branch back may go to before ARRIVE, not past it."""
    assert hazards((10, "@!P0 BRA 0x30")) == "" and "follows no ARRIVE" in hazards((10, "@!P0 BRA 0x50"))


@pytest.fixture(scope="module")
def listing(tmp_path_factory: pytest.TempPathFactory) -> str:
    try:
        find_ninja()
        cuobjdump = gates.find_cuobjdump()
    except BuildError as error:
        pytest.skip(str(error))
    folder = tmp_path_factory.mktemp("sass")
    build(folder, "objects", CSRC, [CAUSAL_128], jobs=1)
    command = [cuobjdump, "--dump-sass", str(folder / f"{CAUSAL_128.name}.o")]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _of_kernel(listing: str) -> list[str]:
    return [text for _, code in sass.functions(listing) for text in sass.hazards(code)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("old", "new"),
    [
        (r"WARPGROUP\.ARRIVE ;", "NOP ;"),
        (r"(WARPGROUP\.DEPBAR\.LE gsb0,) 0x0", r"\1 0x1"),
        (r"(WARPGROUP\.DEPBAR\.LE gsb0,) 0x1", r"\1 0x2"),
        (r"(USETMAXREG\.TRY_ALLOC\.CTAPOOL UP0,) 0xf0", r"\1 0xa0"),
    ],
)
def test_faults_in_a_real_kernel_are_reported(listing: str, old: str, new: str) -> None:
    """Each place by itself. An ARRIVE is not needed where nothing was written since the one before."""
    assert _of_kernel(listing) == []
    reported = {}
    for place in re.finditer(old, listing):
        planted = listing[: place.start()] + place.expand(new) + listing[place.end() :]
        reported[place.start()] = bool(_of_kernel(planted))
    assert reported and (any if "ARRIVE" in old else all)(reported.values()), reported
