"""Files are complete or absent, and all caches are below one folder."""

import os
from pathlib import Path

import pytest

from fastattn.errors import DataError
from fastattn.files import cache_root, replaced_file, write_text


def test_a_file_is_replaced_in_one_piece_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "figures.json"
    write_text(path, "one")
    with pytest.raises(ZeroDivisionError), replaced_file(path) as temporary:
        temporary.write_text(f"two {1 // 0}")
    assert path.read_text() == "one" and os.listdir(path.parent) == [path.name]
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="Could not write"):
        write_text(tmp_path / "file" / "below", "")


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"FASTATTN_CACHE": "given", "XDG_CACHE_HOME": "caches", "HOME": "home"}, "given"),
        ({"XDG_CACHE_HOME": "caches", "HOME": "home"}, "caches/fastattn"),
        ({"HOME": "home"}, "home/.cache/fastattn"),
    ],
)
def test_the_folder_of_caches(variables, expected, monkeypatch):
    for name in ("FASTATTN_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert cache_root() == Path(expected)


def test_without_a_home_the_cache_says_what_to_set(monkeypatch):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("FASTATTN_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    with pytest.raises(OSError, match="set FASTATTN_CACHE to a folder of yours"):
        cache_root()
