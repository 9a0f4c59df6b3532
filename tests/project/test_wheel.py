"""The wheel in an environment of its own, without a compiler: it installs in seconds, and verify passes."""

import os
import subprocess
import sys
import sysconfig
import time
import venv
from pathlib import Path

import pytest

from fastattn.backends.cpu import build

ROOT = Path(__file__).parents[2]
MOST_SECONDS = 60  # a limit against compiling during installation, which takes minutes; no measure of speed
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built with the library for CPUs."""
    try:
        build.find_compiler()
    except build.BuildError as error:
        pytest.skip(str(error))
    folder = tmp_path_factory.mktemp("wheel")
    steps = f"egg_info --egg-base {folder} build --build-base {folder}/build bdist_wheel --dist-dir {folder}/dist"
    environment = os.environ | {"FASTATTN_BUILD_CUDA": "0", "FASTATTN_BUILD_CPU": "1"}
    subprocess.run(
        [sys.executable, "setup.py", *steps.split()], cwd=ROOT, check=True, capture_output=True, env=environment
    )
    (found,) = (folder / "dist").glob("*.whl")
    return found


@pytest.fixture(scope="module")
def clean(wheel, tmp_path_factory):
    """Python with the wheel and what it needs, and an environment with no compiler and no home."""
    folder = tmp_path_factory.mktemp("clean")
    venv.create(folder / "venv", with_pip=False)
    python = folder / "venv" / "bin" / "python"
    (site,) = (folder / "venv" / "lib").glob("python*/site-packages")
    begin = time.monotonic()
    install = ["-m", "pip", "--python", str(python), "install", "--no-deps", "--no-index", "--quiet", str(wheel)]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}  # pip reads it, too
    subprocess.run([sys.executable, *install], check=True, env=environment, cwd="/")
    assert time.monotonic() - begin < MOST_SECONDS
    (site / "torch.pth").write_text(sysconfig.get_path("purelib") + "\n")  # now, so that pip does not see the rest
    (folder / "empty").mkdir()
    environment = {"PATH": str(folder / "empty"), "OMP_NUM_THREADS": "1", "TMPDIR": str(folder / "empty")}
    return python, environment


def run(clean, *arguments):
    python, environment = clean
    command = [python, "-P", *arguments]
    return subprocess.run(command, env=environment, cwd="/", capture_output=True, text=True)


def test_it_is_the_installed_package_that_runs(clean):
    done = run(clean, "-c", "import fastattn; print(fastattn.__file__)")
    assert str(clean[0].parents[1]) in done.stdout, done.stderr


def test_the_kernels_came_with_it(clean):
    done = run(clean, "-m", "fastattn", "doctor")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "CPU kernels      built with the package" in done.stdout and "nvcc             not found" in done.stdout


def test_it_is_right(clean):
    done = run(clean, "-m", "fastattn", "verify", "--quick")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all within the tolerance" in done.stdout
