"""Packaging entry point: builds ``csrc/`` if there are compilers. Imports no torch, and needs no compiler.

``FASTATTN_BUILD_CPU`` and ``FASTATTN_BUILD_CUDA`` control the two libraries: ``auto`` builds if possible and prints why
not otherwise, ``1`` fails if it is not possible, ``0`` does not build. The library for CPUs takes seconds, and ``auto``
is its default; that for CUDA takes minutes, and its default is ``0``: see docs/decisions/wheels.md.
``FASTATTN_MACHINE`` names the kind of machine that ``CXX`` compiles for, if it is not this one. All other settings are
in pyproject.toml.
"""

import importlib
import os
import shutil
import sys
from pathlib import Path
from types import ModuleType

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent.resolve()
CSRC = ROOT / "csrc"
# Sources that are compiled at first use if they were not built: by NVRTC for a GPU, by a C++ compiler for a CPU.
SOURCES = ("common/*.h", "sm90/*.h", "sm90/*.cuh", "sm90/instances.inc", "cpu/*.h", "cpu/*.cpp")


PARTS = ("fastattn", "fastattn.backends", "fastattn.backends.cpu", "fastattn.backends.cuda")


def load(*names: str) -> list[ModuleType]:
    """Modules of the package, without running its ``__init__`` files, which import torch."""
    for name in PARTS:
        package = sys.modules[name] = ModuleType(name)
        package.__path__ = [str(ROOT.joinpath(*name.split(".")))]
    try:
        return [importlib.import_module(name) for name in names]
    finally:
        for name in PARTS:
            del sys.modules[name]


compiled, cuda, instances, cpu = load(
    "fastattn.compiled",
    "fastattn.backends.cuda.build",
    "fastattn.backends.cuda.instances",
    "fastattn.backends.cpu.build",
)


def say(text: str) -> None:
    print(f"fastattn: {text}", file=sys.stderr, flush=True)


class NativeLibrary(Extension):
    """A library for ctypes in the folder of its backend: without Python's headers, and no Python tag in its name."""

    def __init__(self, backend: str, module: ModuleType, default: str, otherwise: str) -> None:
        # optional: an editable install does not stop where the library was not built
        super().__init__(f"fastattn.backends.{backend}.kernels_for_{backend}", [], optional=True)
        self.backend, self.module, self.default, self.otherwise = backend, module, default, otherwise

    @property
    def switch(self) -> str:
        return f"FASTATTN_BUILD_{self.backend.upper()}"

    def check(self) -> None:
        """Raise BuildError if a tool that builds it is missing."""
        if self.module is cuda:
            cuda.find_nvcc()
            cuda.find_ninja()
        else:
            cpu.find_compiler()

    def build(self, folder: Path, target: Path) -> None:
        """Write the library to ``target``, sealed. Raises BuildError."""
        if self.module is cuda:
            cuda.build_library(folder, target, CSRC, instances.library_instances(CSRC))
            compiled.seal(target)
            return
        built = ROOT / "fastattn" / "backends" / "cpu" / cpu.LIBRARY
        if cpu.is_current(built, CSRC):
            say("it was built from these sources before")
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(built, target)
            return
        cpu.build_library(target, CSRC)
        compiled.seal(target)

    def is_wanted(self) -> bool:
        """Whether to build it, by its switch and the tools there are."""
        wish = os.environ.get(self.switch, self.default)
        if wish not in ("auto", "0", "1"):
            sys.exit(f"{self.switch}: got {wish!r}; allowed: auto, 0, 1.")
        if wish == "0":
            say(f"the library for {self.backend} is not built ({self.switch}=0). {self.otherwise}")
            return False
        try:
            self.check()
        except compiled.BuildError as error:
            self.cannot(error)
            return False
        return True

    def cannot(self, error: Exception) -> None:
        """Exit if it was asked for, else print what serves in its place."""
        if os.environ.get(self.switch) == "1":
            sys.exit(f"fastattn: the library for {self.backend} cannot be built: {error}")
        say(f"the library for {self.backend} is not built: {error}. {self.otherwise}")


LIBRARIES = (
    NativeLibrary("cuda", cuda, "0", "Its kernels are compiled at first use, or by `fastattn build --cuda`."),
    NativeLibrary("cpu", cpu, "auto", "Its kernels are compiled at first use, or torch ops serve."),
)


class BuildLibraries(build_ext):
    def get_ext_filename(self, fullname: str) -> str:
        ext = next(ext for ext in LIBRARIES if ext.name.endswith(fullname.rpartition(".")[2]))
        return str(Path(*fullname.split(".")).with_name(ext.module.LIBRARY))

    def get_export_symbols(self, ext: Extension) -> list[str]:
        return []

    def build_extension(self, ext: NativeLibrary) -> None:
        say(f"building the library for {ext.backend}")
        try:
            ext.build(Path(self.build_temp, ext.backend), Path(self.get_ext_fullpath(ext.name)))
        except compiled.BuildError as error:
            ext.cannot(error)


class BuildPython(build_py):
    """Copies the sources of the kernels into the package, where compilers find them; a checkout has them beside it."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        for pattern in SOURCES:
            for source in CSRC.glob(pattern):
                target = Path(self.build_lib, "fastattn", "csrc", source.relative_to(CSRC))
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, target)


class Wheel(bdist_wheel):
    """One wheel for every Python, for one platform if it contains a library."""

    def get_tag(self) -> tuple[str, str, str]:
        platform = super().get_tag()[2]
        kind = os.environ.get("FASTATTN_MACHINE")
        return ("py3", "none", f"linux_{kind}" if kind and platform != "any" else platform)


setup(
    ext_modules=[library for library in LIBRARIES if library.is_wanted()],
    cmdclass={"build_ext": BuildLibraries, "build_py": BuildPython, "bdist_wheel": Wheel},
)
