"""The CUDA kernels' own source on the emulated machine: right on random problems, and every fault is reported."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import emulate
import pytest
from fault import Fault

from fastattn.backends.cuda.instances import DecodeConfig, DkdvConfig, DqConfig, ForwardConfig, GatheredConfig

CSRC = Path(__file__).parents[3] / "csrc"
CASES = 2  # for each kernel and dtype; `make emulate` runs more
# One line of each form of the backward pass, every sixth fault, and one of the kernels without each of its barriers:
# `make emulate` runs and plants all. test_proofs.py leaves out those of the forward pass, and test_emulated_backend.py
# runs the lines for a head dim of 64 that hold every mask, on every feature.
BACKWARD_DIMS = ((96, 96), (192, 128), (256, 256))
BOTH_DTYPES = 128  # the d_v of the lines that are run in fp16, too: a dtype changes no tile and no barrier
CONFIGS = [
    config
    for config in emulate.emulated_configs(CSRC)
    if (isinstance(config, ForwardConfig) and not (config.d_qk == 64 and config.band))
    or (isinstance(config, DecodeConfig) and config.d_qk != 64)
    or (isinstance(config, GatheredConfig) and config.d_qk in (128, 256))
    or (
        isinstance(config, (DkdvConfig, DqConfig))
        and config.softcap == (config.d_qk != 96)
        and (config.d_qk, config.d_v) in BACKWARD_DIMS
    )
]
PLANTED = emulate.ALL_FAULTS[::6]

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++ to build the emulator")


@pytest.fixture(scope="session")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> emulate.Emulator:
    return emulate.Emulator(tmp_path_factory.mktemp("emulator"), jobs=1)


@pytest.mark.parametrize(
    "config", CONFIGS, ids=lambda config: "_".join([config.macro.lower(), *map(str, config.numbers)])
)
def test_kernel_is_right_on_random_problems(emulator: emulate.Emulator, config: emulate.TableConfig) -> None:
    has_both = config.d_v == BOTH_DTYPES
    options = () if has_both else ("-DFA_BFLOAT16_ONLY",)
    is_right, printed = emulator.check_instance(config, CASES, 1000 * CONFIGS.index(config), *options)
    assert is_right, printed
    assert printed.count("ok ") == 1 + has_both, "each dtype ran"


@pytest.mark.parametrize("fault", PLANTED, ids=lambda fault: fault.what)
def test_planted_fault_is_reported(emulator: emulate.Emulator, fault: Fault) -> None:
    is_reported, printed = emulator.check_fault(fault)
    assert is_reported, printed


@pytest.mark.parametrize(("line", "options"), emulate.KERNELS[3:4], ids=str)
def test_every_call_that_orders_something_is_missed(
    emulator: emulate.Emulator, line: tuple[str | int, ...], options: tuple[str, ...]
) -> None:
    count, unnoticed = emulator.check_sites(line, options)
    assert count >= 25 and not unnoticed


def test_watchdog_says_who_waits_for_what(emulator: emulate.Emulator) -> None:
    """Kernels of the watchdog build compute the same, and a planted deadlock ends in its sentence."""
    config = emulate.config_of(("FORWARD", 64, 64, 1, 0))
    options = ("-O1", "-DFA_BFLOAT16_ONLY", "-DFA_WATCHDOG=20000")
    instance = emulate.compile_instance(config, CSRC, emulator.build / "watched.o", *options)
    program = emulate.link([instance, *emulator.common], emulator.build / "watched")
    printed = emulate.run(program, CASES, 0).stdout
    assert "ok " in printed
    sites = {name.split()[-1]: name.removeprefix("site ") for name in printed.splitlines() if "fragment.cuh" in name}
    # The barriers of Q come first, then two of each kind for K: full, empty.
    waits = {"mbarrier_arrive": r"producer 0 of block \d+ waits in vain for barrier 4 \(parity 0\)",
             "mbarrier_expect": r"consumer [012] of block \d+ waits in vain for barrier [02] \(parity 0\)"}  # fmt: skip
    for name, sentence in waits.items():
        said = emulate.run(program, CASES, 0, sites[name]).stdout
        assert re.search(f"fastattn's watchdog: {sentence}", said), said


def test_there_are_enough_faults() -> None:
    assert len(emulate.FAULTS) >= 40 and len(emulate.BACKWARD_FAULTS) >= 30 and len(emulate.DECODE_FAULTS) >= 40
    assert len({fault.what for fault in emulate.ALL_FAULTS}) == len(emulate.ALL_FAULTS)


def test_a_fault_that_changes_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="0 times, not once"):
        emulate.plant(Fault("no such source", "common/mask.h", "no such text", ""), tmp_path)
