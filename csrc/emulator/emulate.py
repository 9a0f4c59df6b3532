"""Run the CUDA kernels on a CPU: ``python csrc/emulator/emulate.py [--cases N] [--seed S] [--faults] [--build DIR]``.

Compiles the kernels' own source with g++ against the emulated machine (machine.h) and runs every line of
``instances.inc`` on random problems. ``--faults`` also plants the faults of faults.py and of its siblings, one at a
time, each of which has to be reported. Exits with 1 if a kernel is wrong or a fault goes unnoticed.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from fault import Fault
from faults import FAULTS
from faults_backward import BACKWARD_FAULTS
from faults_decode import DECODE_FAULTS
from faults_terms import TERM_FAULTS
from sites import KERNELS, is_without_effect

from fastattn import compiled
from fastattn.backends.cuda.instances import (
    DecodeConfig,
    DkdvConfig,
    DqConfig,
    ForwardConfig,
    GatheredConfig,
    decode_configs,
    dkdv_configs,
    dq_configs,
    forward_configs,
    gathered_configs,
)

CSRC = Path(__file__).parents[1]
COMMON = (
    "machine",
    "global",
    "copies",
    "races",
    "sites",
    "tma",
    "tensor_core",
    "problem",
    "forward_case",
    "backward_case",
    "decode_case",
    "decode_random",
)
DIRECTIONS = {
    ForwardConfig: "forward",
    DkdvConfig: "backward",
    DqConfig: "backward",
    DecodeConfig: "decode",
    GatheredConfig: "decode",
}
PLANTABLE, SOURCES = ("common", "sm90", "emulator", "proofs"), {".h", ".cuh", ".cpp", ".inc"}
COMPILE = ("g++", "-std=c++17", "-DFA_EMULATE", "-DFA_LEAST_KEYS=64", "-U_FORTIFY_SOURCE", "-Wall", "-Wextra", "-c")
SHARED = ("-O3", "-fPIC", "-fvisibility=hidden")  # of what programs and libraries have in common
LEVELS = CHECKED, PLANTED_IN = "-O1", "-O0"  # of instances: a planted one runs for less time than compiling takes
ALL_FAULTS = [*FAULTS, *BACKWARD_FAULTS, *DECODE_FAULTS, *TERM_FAULTS]
FAULT_CASES = 40  # at most: the first that goes wrong reports the fault
SITE_CASES = 12  # problems that come to every call that orders something
TableConfig = ForwardConfig | DkdvConfig | DqConfig | DecodeConfig | GatheredConfig
TIMEOUT = 600  # seconds for one program; the machine reports deadlocks itself


def newest_source() -> float:
    return max(path.stat().st_mtime for path in CSRC.rglob("*") if path.suffix in (".h", ".cuh", ".cpp"))


def compile_object(source: Path, target: Path, *options: str) -> Path:
    """``target``, compiled again if any source is newer."""
    if not target.exists() or target.stat().st_mtime < newest_source():
        target.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run([*COMPILE, *options, str(source), "-o", str(target)], check=True)
    return target


def emulated_configs(csrc: Path) -> list[TableConfig]:
    """Every line of the table."""
    return [
        *forward_configs(csrc),
        *dkdv_configs(csrc),
        *dq_configs(csrc),
        *decode_configs(csrc),
        *gathered_configs(csrc),
    ]


def config_of(line: tuple[str | int, ...]) -> TableConfig:
    """The first line of the table that begins with ``line``."""
    return next(c for c in emulated_configs(CSRC) if (c.macro, *c.numbers)[: len(line)] == line)


def emulated_kernels(csrc: Path) -> list[tuple[TableConfig, tuple[str, ...]]]:
    """Every line, and the variants that docs/measured.md compares with it: dq staged in shared memory."""
    lines = emulated_configs(csrc)
    fused = [config for config in lines if isinstance(config, DkdvConfig) and config.fused and not config.softcap]
    staged = [config for config in fused if config.d_qk <= 128]
    return [*((config, ()) for config in lines), *((config, ("-DFA_STAGED=1",)) for config in staged)]


def compile_instance(config: TableConfig, csrc: Path, target: Path, *options: str) -> Path:
    line = f"-DFA_{config.macro}={','.join(map(str, config.numbers))}"
    return compile_object(csrc / "emulator" / f"{DIRECTIONS[type(config)]}_instance.cpp", target, line, *options)


def link(objects: Sequence[Path], target: Path, *options: str) -> Path:
    subprocess.run(["g++", *options, *map(str, objects), "-o", str(target)], check=True)
    return target


def run(program: Path, cases: int, seed: int, *site: str) -> subprocess.CompletedProcess[str]:
    command = [str(program), str(cases), str(seed), *site]
    return subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT)


def without_sites(printed: str) -> str:
    return "".join(line for line in printed.splitlines(keepends=True) if not line.startswith("site "))


class Emulator:
    """The programs, built in a folder by as many processes as there are jobs."""

    def __init__(self, build: Path, jobs: int) -> None:
        self.build = build
        self.jobs = jobs

    @functools.cached_property
    def common(self) -> list[Path]:
        """What every program is linked with."""
        return [compile_object(CSRC / "emulator" / "main.cpp", self.build / "main.o", "-O2"), kept_common(self.jobs)]

    @functools.cached_property
    def standard(self) -> tuple[str, ...]:
        """Options that bring the standard library's headers, compiled before: parsing them is half of an instance."""
        header = self.build / "standard.h"
        header.parent.mkdir(parents=True, exist_ok=True)
        header.write_text((CSRC / "emulator" / header.name).read_text())
        for level in LEVELS:  # g++ takes the one of a folder that fits
            compile_object(header, header.with_suffix(".h.gch") / level.strip("-"), level)
        return "-include", str(header)

    def map(self, function: Callable, items: Sequence) -> Iterator:
        """The results in order, each as soon as it is there."""
        _ = self.common, self.standard  # built before there are threads
        with ThreadPoolExecutor(self.jobs) as pool:
            yield from pool.map(function, items)

    def check_instance(self, config: TableConfig, cases: int, seed: int, *options: str) -> tuple[bool, str]:
        """Whether both kernels of a line compute ``cases`` random problems rightly, and what they printed."""
        name = "_".join([config.macro.lower(), *map(str, config.numbers), *options])
        instance = compile_instance(config, CSRC, self.build / f"{name}.o", CHECKED, *self.standard, *options)
        result = run(link([instance, *self.common], self.build / name), cases, seed)
        return result.returncode == 0, without_sites(result.stdout) + result.stderr

    def check_sites(self, line: tuple[str | int, ...], options: tuple[str, ...]) -> tuple[int, list[str]]:
        """How many calls of a kernel order something, and which of them the machine does not miss when left out."""
        config = config_of(line)
        name = "sites_" + "_".join(map(str, (*line, *options)))
        flags = (PLANTED_IN, *self.standard, "-DFA_BFLOAT16_ONLY", *options)
        instance = compile_instance(config, CSRC, self.build / f"{name}.o", *flags)
        program = link([instance, *self.common], self.build / name)
        printed = run(program, SITE_CASES, 0).stdout.splitlines()
        sites = [line.removeprefix("site ") for line in printed if line.startswith("site ")]
        codes = self.map(lambda site: run(program, FAULT_CASES, 0, site).returncode, sites)
        missed = [site for site, code in zip(sites, codes, strict=True) if code != 1]
        return len(sites), [site for site in missed if not is_without_effect(site)]

    def build_library(self, configs: Sequence[TableConfig], target: Path) -> Path:
        """The C interface of these lines on the emulated machine (library.cpp): a shared library for host memory."""
        folder = self.build / "library"
        lines = [
            compile_instance(config, CSRC, folder / f"{number}.o", "-O1", "-fPIC")
            for number, config in enumerate(configs)
        ]
        interface = compile_object(CSRC / "emulator" / "library.cpp", folder / "library.o", "-O2", "-fPIC")
        return link([*lines, interface, kept_common(self.jobs)], target, "-shared")

    def check_fault(self, fault: Fault) -> tuple[bool, str]:
        """Whether the machine reports ``fault``, and how."""
        folder = self.build / "faults" / "".join(c if c.isalnum() else "_" for c in fault.what)
        plant(fault, folder)
        config = config_of(fault.kernel)
        # The instance comes first: where a function stands in several objects, the linker takes the planted one.
        flags = (PLANTED_IN, *self.standard, "-w", "-DFA_BFLOAT16_ONLY", *fault.options)
        instance = compile_instance(config, folder, folder / "instance.o", *flags)
        result = run(link([instance, *self.common], folder / "program"), FAULT_CASES, fault.seed)
        is_reported = result.returncode == 1 and "FAILED" in result.stdout
        lines = (result.stdout + result.stderr).splitlines()
        return is_reported, lines[1] if is_reported and len(lines) > 1 else "\n".join(lines)


def kept_library(head_dim: int = 64) -> Path:
    """The library of the lines for a head dim, which hold every mask: built once, for all tests and processes."""
    lines = [config for config in emulated_configs(CSRC) if config.d_qk == head_dim and getattr(config, "band", True)]

    def write(target: Path) -> None:
        with tempfile.TemporaryDirectory() as folder:
            Emulator(Path(folder), jobs=1).build_library(lines, target)

    return compiled.kept(f"emulated-{digest_of(lines)}.so", write)


def kept_common(jobs: int) -> Path:
    """The machine and the problems as one object, for programs and libraries: built once, as ``kept_library`` is."""

    def write(target: Path) -> None:
        with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(jobs) as pool:
            folder = Path(name)
            sources = [CSRC / "emulator" / f"{part}.cpp" for part in COMMON]
            objects = list(pool.map(lambda path: compile_object(path, folder / f"{path.stem}.o", *SHARED), sources))
            link(objects, target, "-r", "-nostdlib")

    return compiled.kept(f"machine-{digest_of((COMMON, SHARED))}.o", write)


def digest_of(what: object) -> str:
    """A hash of the sources and of ``what`` is built from them, 24 digits."""
    digest = hashlib.sha256(repr((what, COMPILE)).encode())
    for path in sorted(path for path in CSRC.rglob("*") if path.suffix in (".h", ".cuh", ".cpp")):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:24]


def plant(fault: Fault, folder: Path, csrc: Path = CSRC) -> None:
    """A copy of the kernels, the machine and its witness in ``folder``, with the fault."""
    for path in [path for part in PLANTABLE for path in (csrc / part).iterdir() if path.suffix in SOURCES]:
        text = path.read_text()
        name = path.relative_to(csrc).as_posix()
        if name == fault.file:
            if text.count(fault.old) != 1:
                raise ValueError(
                    f"fault {fault.what!r}: {name} holds its source {text.count(fault.old)} times, not once"
                )
            text = text.replace(fault.old, fault.new)
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)


def main() -> int:
    parser = argparse.ArgumentParser(description="Run the CUDA kernels on a CPU.")
    parser.add_argument("--cases", type=int, default=3, help="random problems for each kernel (default: 3)")
    parser.add_argument("--seed", type=int, default=0, help="of the first problem (default: 0)")
    parser.add_argument("--faults", action="store_true", help="also plant the faults of faults.py")
    parser.add_argument("--only", default="", help="plant only faults whose description holds this")
    parser.add_argument("--build", type=Path, default=CSRC.parent / "build" / "emulator", help="where to build")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes at a time")
    options = parser.parse_args()
    emulator = Emulator(options.build, options.jobs)
    numbered = list(enumerate(emulated_kernels(CSRC)))  # every kernel has its own problems
    results = emulator.map(
        lambda line: emulator.check_instance(line[1][0], options.cases, options.seed + 1000 * line[0], *line[1][1]),
        numbered,
    )
    is_good = True
    for ok, text in results:
        print(text, end="", flush=True)
        is_good = is_good and ok
    if options.faults and not options.only:
        for line, flags in KERNELS:
            count, missed = emulator.check_sites(line, flags)
            print(f"{' '.join(map(str, (*line, *flags)))}: {count - len(missed)} of {count} calls are missed", *missed)
            is_good = is_good and not missed
    if options.faults:
        planted = [fault for fault in ALL_FAULTS if options.only in fault.what]
        reported = 0
        for fault, (ok, how) in zip(planted, emulator.map(emulator.check_fault, planted), strict=True):
            print(f"{'reported' if ok else 'MISSED  '}  {fault.what}: {how[:150]}", flush=True)
            reported += ok
        print(f"{reported} of {len(planted)} planted faults reported")
        is_good = is_good and reported == len(planted)
    return 0 if is_good else 1


if __name__ == "__main__":
    sys.exit(main())
