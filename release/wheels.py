"""Build the release in dist/: the sdist and, from it, a manylinux wheel for each kind of machine.

    python release/wheels.py [--machines x86_64 aarch64] [--no-cuda] [--out dist]

A wheel holds the library for CPUs and, for x86_64, the library for CUDA, unless --no-cuda; one wheel serves every
Python and every torch. aarch64 is compiled by a cross compiler. auditwheel decides the tag and changes no byte of a
library, as their seals are checked afterwards. Needs the extra [release], nvcc for CUDA, and both compilers.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[1]
package = sys.modules["fastattn"] = ModuleType("fastattn")  # without its __init__, which imports torch
package.__path__ = [str(ROOT / "fastattn")]

from fastattn.compiled import unsealed  # noqa: E402

LIBRARIES = {"x86_64": ("cpu/libfastattn_cpu.so", "cuda/libfastattn.so"), "aarch64": ("cpu/libfastattn_cpu.so",)}
ELF_MACHINES = {"x86_64": 62, "aarch64": 183}  # e_machine


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--machines", nargs="+", choices=list(LIBRARIES), default=list(LIBRARIES))
    parser.add_argument("--no-cuda", action="store_true", help="leave out the library for CUDA, which takes minutes")
    parser.add_argument("--out", type=Path, default=ROOT / "dist")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run("-m", "build", "--sdist", "--no-isolation", "--outdir", folder, ROOT)
        (sdist,) = folder.glob("*.tar.gz")
        shutil.copy(sdist, args.out)
        for machine in args.machines:
            wheel = build_wheel(sdist, machine, folder / machine, has_cuda=not args.no_cuda)
            check(wheel, machine, has_cuda=not args.no_cuda)
            print(shutil.copy(wheel, args.out))


def run(*command: object, **environment: str) -> None:
    subprocess.run([sys.executable, *map(str, command)], check=True, env=os.environ | environment)


def build_wheel(sdist: Path, machine: str, folder: Path, *, has_cuda: bool) -> Path:
    """A wheel built from the sdist alone, under the tag that auditwheel finds for it."""
    shutil.unpack_archive(sdist, folder)
    (source,) = folder.iterdir()
    environment = {"FASTATTN_BUILD_CPU": "1", "FASTATTN_BUILD_CUDA": "1" if has_cuda and machine == "x86_64" else "0"}
    if machine != platform.machine():
        environment |= {"FASTATTN_MACHINE": machine, "CXX": f"{machine}-linux-gnu-g++"}
    run("-m", "build", "--wheel", "--no-isolation", "--outdir", folder / "built", source, **environment)
    (wheel,) = (folder / "built").glob("*.whl")
    run("-m", "auditwheel", "repair", "--wheel-dir", folder / "tagged", wheel)
    (tagged,) = (folder / "tagged").glob("*manylinux*.whl")
    return tagged


def check(wheel: Path, machine: str, *, has_cuda: bool) -> None:
    """Raise AssertionError unless the libraries are there, sealed, and of the right machine."""
    wanted = [name for name in LIBRARIES[machine] if has_cuda or not name.startswith("cuda")]
    assert "-py3-none-manylinux" in wheel.name and machine in wheel.name, wheel.name
    with zipfile.ZipFile(wheel) as archive, tempfile.TemporaryDirectory() as folder:
        libraries = [name for name in archive.namelist() if ".so" in name]
        assert sorted(libraries) == sorted(f"fastattn/backends/{name}" for name in wanted), libraries
        for name in libraries:
            code = unsealed(Path(archive.extract(name, folder)))
            assert code[:4] == b"\x7fELF" and int.from_bytes(code[18:20], "little") == ELF_MACHINES[machine], name


if __name__ == "__main__":
    main()
