"""Packaging entry point: builds ``csrc/`` where a CUDA compiler is. Imports no torch, and needs no compiler.

``FASTATTN_BUILD_CUDA`` decides: ``auto`` (the default) builds if it can and says so if it cannot, ``1`` fails if it
cannot, ``0`` does not try. Everything else about the package stands in pyproject.toml.
"""

import importlib.util
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
BACKEND = "fastattn.backends.cuda"
HEADERS = ("*.h", "instances.inc", "sm90/*.h", "sm90/*.cuh")  # what NVRTC compiles at first use


def load(name: str) -> ModuleType:
    """A file of the CUDA backend, without importing the package, which imports torch."""
    path = ROOT.joinpath(*BACKEND.split("."), f"{name}.py")
    spec = importlib.util.spec_from_file_location(f"fastattn_setup_{name}", path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


build, instances = load("build"), load("instances")


def say(text: str) -> None:
    print(f"fastattn: {text}", file=sys.stderr, flush=True)


def wants_cuda() -> bool:
    """Whether to build the library: what was asked for, and what is possible."""
    wish = os.environ.get("FASTATTN_BUILD_CUDA", "auto")
    if wish not in ("auto", "0", "1"):
        sys.exit(f"FASTATTN_BUILD_CUDA: got {wish!r}; allowed: auto, 0, 1.")
    if wish == "0":
        say("the CUDA library is not built (FASTATTN_BUILD_CUDA=0)")
        return False
    try:
        build.find_nvcc()
        build.find_ninja()
    except build.BuildError as error:
        if wish == "1":
            sys.exit(f"fastattn: the CUDA library cannot be built: {error}")
        say(f"the CUDA library is not built: {error}. Without it NVRTC compiles the kernels at first use.")
        return False
    return True


class BuildCuda(build_ext):
    """Builds the library with nvcc; no Python header is involved, so its name carries no Python tag."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split(".")).with_name(build.LIBRARY))

    def get_export_symbols(self, ext: Extension) -> list[str]:
        return []

    def build_extension(self, ext: Extension) -> None:
        say("building the CUDA library for sm_90a with nvcc")
        try:
            folder = Path(self.build_temp, "cuda")
            target = Path(self.get_ext_fullpath(ext.name))
            build.build_library(folder, target, CSRC, instances.library_instances(CSRC))
        except build.BuildError as error:
            if os.environ.get("FASTATTN_BUILD_CUDA") == "1":
                sys.exit(f"fastattn: {error}")
            say(f"the CUDA library is not built: {error}")


class BuildPython(build_py):
    """Puts the sources of the kernels into the package, where NVRTC finds them; a checkout has them beside it."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        for pattern in HEADERS:
            for source in CSRC.glob(pattern):
                target = Path(self.build_lib, "fastattn", "csrc", source.relative_to(CSRC))
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, target)


class Wheel(bdist_wheel):
    """One wheel for every Python: with the library it belongs to a platform, without it to none."""

    def get_tag(self) -> tuple[str, str, str]:
        return ("py3", "none", super().get_tag()[2])


setup(
    # optional: an editable install does not stop where the library was not built
    ext_modules=[Extension(f"{BACKEND}.library_of_kernels", [], optional=True)] if wants_cuda() else [],
    cmdclass={"build_ext": BuildCuda, "build_py": BuildPython, "bdist_wheel": Wheel},
)
