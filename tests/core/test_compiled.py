"""Compiled code on disk: sealed, checked before loading, built once, in folders of this user; compilers that hang."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fastattn import compiled
from fastattn.backends.cpu import build, library

posix = pytest.mark.skipif(not hasattr(os, "getuid"), reason="permissions are those of POSIX")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The folder of all caches, and another for temporary files; nothing said yet."""
    monkeypatch.setenv("FASTATTN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(compiled.tempfile, "gettempdir", lambda: str(tmp_path / "tmp"))
    monkeypatch.setattr(compiled, "_said", set())
    return tmp_path / "cache"


class Compiler:
    """Writes a file, and counts how often."""

    def __init__(self, text=b"\x7fELF code"):
        self.runs, self.text = 0, text

    def __call__(self, path):
        self.runs += 1
        path.write_bytes(self.text)


def test_a_file_is_built_once_and_read_after(cache):
    compiler = Compiler()
    for _ in range(3):
        path = compiled.kept("kernel", compiler)
        assert compiled.unsealed(path) == compiler.text
    assert compiler.runs == 1 and path.parent == cache


DAMAGE = {
    "empty": lambda text: b"",
    "truncated": lambda text: text[: len(text) // 2],
    "without its last byte": lambda text: text[:-1],
    "longer": lambda text: text + b"\0",
    "zeros inside": lambda text: b"\x7f" + b"\0" * 4 + text[5:],
    "never sealed": lambda text: b"\x7fELF code",
    "a seal of another": lambda text: b"other" + text[-56:],
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_file_is_built_again(cache, damage, caplog):
    compiler = Compiler()
    path = compiled.kept("kernel", compiler)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(OSError, match="damaged"):
        compiled.unsealed(path)
    with pytest.raises(OSError, match="damaged"):
        compiled.load(path)
    assert compiled.unsealed(compiled.kept("kernel", compiler)) == compiler.text
    assert compiler.runs == 2 and "is damaged; it is built again" in caplog.text


def test_what_is_not_built_is_not_left_behind(cache):
    def breaks(path):
        path.write_bytes(b"half")
        raise compiled.BuildError("no")

    with pytest.raises(compiled.BuildError):
        compiled.kept("kernel", breaks)
    assert [path.name for path in cache.iterdir() if not path.name.endswith(".lock")] == []


@posix
@pytest.mark.parametrize("mode", [0o777, 0o775, 0o1777])
def test_a_folder_that_others_may_write_is_refused(cache, mode, caplog):
    cache.mkdir()
    cache.chmod(mode)
    for _ in range(2):
        path = compiled.kept("kernel", Compiler())
        assert path.parent.name == f"fastattn-{os.getuid()}" and path.parent.stat().st_mode & 0o777 == 0o700
    assert caplog.text.count("may be written by others, so compiled code is not kept there") == 1


@posix
def test_a_file_that_others_may_write_is_built_again(cache):
    compiler = Compiler()
    before = os.umask(0)
    try:
        path = compiled.kept("kernel", compiler)
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o022 == 0 and path.parent.stat().st_mode & 0o777 == 0o700
    path.chmod(0o666)
    compiled.kept("kernel", compiler)
    assert compiler.runs == 2


@posix
def test_a_folder_of_another_user_is_refused(cache, monkeypatch):
    cache.mkdir()
    found = list(cache.stat())
    found[4] = os.getuid() + 1  # st_uid
    stat = compiled.Path.stat
    monkeypatch.setattr(compiled.Path, "stat", lambda path: os.stat_result(found) if path == cache else stat(path))
    assert [folder.name for folder in compiled.folders()] == [f"fastattn-{os.getuid()}"]


def test_without_a_home(cache, monkeypatch):
    monkeypatch.delenv("FASTATTN_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)

    def home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(compiled.Path, "home", home)
    assert compiled.kept("kernel", Compiler()).parent.parent == cache.parent / "tmp"


def test_without_any_place(cache, monkeypatch):
    for folder in (cache, cache.parent / "tmp"):
        folder.write_text("a file, where a folder should be")
    with pytest.raises(OSError, match="set FASTATTN_CACHE to a folder of yours"):
        compiled.kept("kernel", Compiler())


BUILDERS = """
import sys, time, types
package = sys.modules["fastattn"] = types.ModuleType("fastattn")  # without its __init__, which imports torch
package.__path__ = [sys.argv[2]]
from fastattn import compiled
def build(path):
    with open(sys.argv[1], "a") as file:
        file.write("built\\n")
    time.sleep(1)
    path.write_bytes(b"code")
assert compiled.unsealed(compiled.kept("kernel", build)) == b"code"
"""


def test_several_processes_build_once(cache, tmp_path):
    log = tmp_path / "log"
    command = [sys.executable, "-c", BUILDERS, str(log), str(Path(compiled.__file__).parent)]
    running = [subprocess.Popen(command) for _ in range(3)]
    assert [process.wait(120) for process in running] == [0, 0, 0]
    assert log.read_text() == "built\n"


# --- compilers ----------------------------------------------------------------------------------------------------


def script(path, text):
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def test_a_compiler_that_hangs(tmp_path, monkeypatch):
    """It is ended with its children, which hold its output open."""
    compiler = script(tmp_path / "c++", f"sleep 1000 & echo $! > {tmp_path}/child; wait")
    monkeypatch.setenv("CXX", compiler)
    monkeypatch.setattr(compiled, "TIME_LIMIT", 0.5)
    begin = time.monotonic()
    with pytest.raises(compiled.BuildError, match=r"c\+\+ did not end, and said nothing for 0\.5 s"):
        build.build_library(tmp_path / "library.so", Path(compiled.__file__).parents[1] / "csrc")
    assert time.monotonic() - begin < 60 and not (tmp_path / "library.so").exists()
    child = Path("/proc", (tmp_path / "child").read_text().strip(), "stat")

    def is_gone():
        return not child.exists() or child.read_text().rpartition(")")[2].split()[0] == "Z"

    while not is_gone() and time.monotonic() - begin < 60:  # a killed process takes a moment to end
        time.sleep(0.01)
    assert is_gone()


def test_a_compiler_that_takes_long_and_says_so(tmp_path):
    """As ninja does, which names each kernel that is done: the limit is one of silence."""
    slow = script(tmp_path / "ninja", "for step in 1 2 3 4 5 6; do sleep 0.4; echo $step; done")
    assert compiled.run([slow], 1.5) == (0, "1\n2\n3\n4\n5\n6\n")


def test_what_was_built_from_these_sources_is_not_built_again(tmp_path):
    csrc = Path(compiled.__file__).parents[1] / "csrc"
    path = tmp_path / build.LIBRARY
    assert not build.is_current(path, csrc)
    path.write_text(f"code of {build.fingerprint(csrc)}")
    assert not build.is_current(path, csrc)
    compiled.seal(path)
    assert build.is_current(path, csrc)
    path.write_text(f"code of {'0' * 24}")
    compiled.seal(path)
    assert not build.is_current(path, csrc)


def test_what_a_compiler_says_is_no_utf8(tmp_path):
    code, said = compiled.run([script(tmp_path / "c++", r"printf 'caf\351'; exit 3")])
    assert code == 3 and said.startswith("caf")
    with pytest.raises(compiled.BuildError, match="nothing-of-this-name"):
        compiled.run([str(tmp_path / "nothing-of-this-name")])


TRUNCATED = """
import fastattn, torch
from fastattn.backends.cpu import library
library.PATH = library.Path({path!r})
print(library.delivered()[1])
"""


def test_a_truncated_library_of_the_package_kills_no_process(tmp_path):
    found, why = library.delivered()
    if found is None:
        pytest.skip(why)
    text = found.path.read_bytes()
    path = tmp_path / build.LIBRARY
    path.write_bytes(text[: len(text) // 3])
    done = subprocess.run(
        [sys.executable, "-c", TRUNCATED.format(path=str(path))],
        env=os.environ | {"CXX": "no-such-compiler", "FASTATTN_CACHE": str(tmp_path / "cache")}, capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == 0 and "is damaged, and no C++ compiler was found" in done.stdout, done.stderr
