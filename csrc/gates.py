"""Compile every CUDA kernel and check its machine code, with no GPU: ``python csrc/gates.py [--build DIR] [NAME ...]``.

A kernel fails if registers are touched while a wgmma uses them (sass.py), if it spills or touches local memory, if
ptxas warns that it serialised a wgmma (C75xx; C7519, an inserted fence, is harmless), if the number of tensor-core
instructions is unexpected, or if exponentials do not overlap the P V product that should hide them. ``--options``
passes flags on to nvcc, such as -DFA_EXP_OVERLAP=0.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from sass import functions, hazards

from fastattn.backends.cuda import nvrtc
from fastattn.backends.cuda.build import BuildError, build, find_nvcc
from fastattn.backends.cuda.instances import (
    DecodeConfig,
    DkdvConfig,
    DqConfig,
    ForwardConfig,
    GatheredConfig,
    Instance,
    backward_instances,
    decode_instances,
    forward_instances,
)

CSRC = Path(__file__).parent
HARMLESS = {"C7519"}
INSTRUCTION = re.compile(r"\s+/\*[0-9a-f]{4,5}\*/\s+(?:@!?U?P[0-9T]+ )?([A-Z0-9_.]+)(.*)")


@dataclass(frozen=True)
class Facts:
    """Figures of a compiled kernel. ``exponentials`` counts those of its loop: under the P V product, and after it."""

    registers: int
    spilled: int
    local: int
    products: int
    warnings: tuple[str, ...]
    exponentials: tuple[int, int]
    hazards: tuple[str, ...] = ()


def facts_of(log: str, sass: str) -> Facts:
    """Read the output of ptxas (-v) and the disassembly."""
    instructions = [match.groups() for line in sass.splitlines() if (match := INSTRUCTION.match(line))]
    names = [name for name, _ in instructions]
    return Facts(
        registers=max((int(number) for number in re.findall(r"\bR(\d+)\b", sass)), default=0) + 1,
        spilled=sum(map(int, re.findall(r"(\d+) bytes spill (?:stores|loads)", log))),
        local=sum(name.startswith(("LDL", "STL")) for name in names),
        products=sum(name.startswith("HGMMA") for name in names),
        warnings=tuple(sorted(set(re.findall(r"C75\d\d", log)) - HARMLESS)),
        exponentials=exponentials(instructions),
        hazards=tuple(hazard for _, code in functions(sass) for hazard in hazards(code)),
    )


def exponentials(instructions: Sequence[tuple[str, str]]) -> tuple[int, int]:
    """Exponentials between the wait for the scores and that for P V, and those after it, in the loop over keys.

    The wait that leaves one group in flight (DEPBAR 1) begins the stretch, the next wait ends it, and the issue of the
    next product (ARRIVE) ends the iteration.
    """
    under = after = 0
    stretch = None
    for name, operands in instructions:
        if name.startswith("WARPGROUP.DEPBAR"):
            if re.search(r",\s*0x1\b", operands):
                stretch = "under"
            elif stretch == "under":
                stretch = "after"
        elif name.startswith("WARPGROUP.ARRIVE"):
            stretch = None
        elif name.startswith("MUFU.EX2") and stretch:
            under, after = under + (stretch == "under"), after + (stretch == "after")
    return under, after


def expected_products(instance: Instance) -> int:
    """The expected number of tensor-core instructions.

    Both products of a forward pass and of decoding occur in the loop, and once more before or after it. Those of a
    backward pass occur in its loop only, and twice if one consumer sums dv and the other dk.
    """
    config = instance.config
    if isinstance(config, DkdvConfig):
        scores, dp, sums = config.d_qk // 16, config.d_v // 16, 2 * config.block_m // 16
        of_dq = (
            config.block_n + (64 if config.d_qk > 128 else 0)
        ) // 16  # a third chunk of columns from half of the keys
        return scores * (2 if config.is_split else 1) + dp + sums + (of_dq if config.fused else 0)
    assert isinstance(config, (ForwardConfig, DqConfig, DecodeConfig, GatheredConfig))
    if isinstance(config, DqConfig):
        return (config.d_qk + config.d_v + config.block_n) // 16
    return 2 * (config.d_qk // 16 + config.block_n // 16)


def expected_exponentials(instance: Instance) -> int:
    """The least number a thread computes under a product: one for each score, not counting softcap's tanh."""
    config = instance.config
    if isinstance(config, (ForwardConfig, DecodeConfig, GatheredConfig)):
        return config.block_n // 2
    # dk/dv needs no exp/PV overlap barrier, since its next product waits for the weights; dq with softcap has none.
    return (
        config.block_n // 2 if isinstance(config, DqConfig) and not config.softcap else 0
    )  # kernels with terms have it


def faults(instance: Instance, facts: Facts) -> list[str]:
    """Reasons why a kernel fails its gates; [] if it passes."""
    under, after = facts.exponentials
    found = []
    if facts.spilled or facts.local:
        found.append(f"spills {facts.spilled} bytes, {facts.local} accesses to local memory")
    found += facts.hazards
    if facts.warnings:
        found.append(f"ptxas warns: {', '.join(facts.warnings)}")
    if facts.products != expected_products(instance):
        found.append(f"{facts.products} HGMMA instead of {expected_products(instance)}")
    expected = expected_exponentials(instance)
    if expected and (after or under < expected):
        found.append(f"{after} exponentials after P V, {under} under it")
    return found


def find_cuobjdump() -> str:
    """The disassembler: beside nvcc, on PATH, or the one that Triton brings."""
    beside = Path(find_nvcc()).resolve().parent / "cuobjdump"
    triton = find_spec("triton")
    bundled = (
        [Path(root, "backends/nvidia/bin/cuobjdump") for root in (triton.submodule_search_locations or [])]
        if triton
        else []
    )
    found = next((str(path) for path in (beside, "cuobjdump", *bundled) if shutil.which(path)), None)
    if found is None:
        raise BuildError("cuobjdump was not found (it comes with the CUDA toolkit, and with Triton)")
    return found


def check(instance: Instance, folder: Path, cuobjdump: str) -> tuple[Facts, list[str]]:
    facts = facts_of(
        (folder / f"{instance.name}.o.log").read_text(), listing_of(folder / f"{instance.name}.o", cuobjdump)
    )
    return facts, faults(instance, facts)


def check_with_nvrtc(instance: Instance, folder: Path, cuobjdump: str) -> tuple[Facts, list[str]]:
    """``check`` for the kernel that NVRTC makes of the same source; spills show as accesses to local memory."""
    target = folder / f"{instance.name}.cubin"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(nvrtc.compile_kernel(instance))
    facts = facts_of("", listing_of(target, cuobjdump))
    return facts, faults(instance, facts)


def listing_of(path: Path, cuobjdump: str) -> str:
    command = [cuobjdump, "--dump-sass", str(path)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def main() -> int:
    parser = argparse.ArgumentParser(description="Compile every CUDA kernel and check its machine code.")
    parser.add_argument("names", nargs="*", help="parts of kernel names (default: every kernel)")
    parser.add_argument("--build", type=Path, default=CSRC.parent / "build" / "cuda", help="where to build")
    parser.add_argument("--options", nargs="*", default=[], help="further flags for nvcc")
    parser.add_argument("--jobs", type=int, help="processes at a time")
    parser.add_argument("--nvrtc", type=int, metavar="MAJOR", help="compile with this version of NVRTC, not with nvcc")
    options = parser.parse_args()
    instances = [
        instance
        for instance in [*forward_instances(CSRC), *backward_instances(CSRC), *decode_instances(CSRC)]
        if not options.names or any(name in instance.name for name in options.names)
    ]
    try:
        cuobjdump = find_cuobjdump()
        if options.nvrtc:
            nvrtc.MAJORS = (options.nvrtc,)
            print(f"NVRTC {nvrtc.version()}")
        else:
            build(options.build, "objects", CSRC, instances, options.options, options.jobs)
    except (BuildError, nvrtc.NvrtcError) as error:
        print(f"The gates need a CUDA compiler: {error}", file=sys.stderr)
        return 2
    print(f"{'kernel':<44} registers  HGMMA  exp under/after P V  verdict")
    is_good = True
    judge = check_with_nvrtc if options.nvrtc else check
    with ThreadPoolExecutor(options.jobs or os.cpu_count()) as pool:
        checked = pool.map(lambda instance: judge(instance, options.build, cuobjdump), instances)
        for instance, (facts, found) in zip(instances, checked, strict=True):
            is_good = is_good and not found
            under, after = facts.exponentials
            figures = f"{facts.registers:>9}  {facts.products:>5}  {under:>9} / {after:<7}"
            print(f"{instance.name:<44} {figures}  {'; '.join(found) or 'ok'}", flush=True)
    return 0 if is_good else 1


if __name__ == "__main__":
    sys.exit(main())
