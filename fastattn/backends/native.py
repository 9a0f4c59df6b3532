"""Where the C++ sources lie, and how what is compiled from them at first use is kept."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path


def source_folder() -> Path:
    """``csrc/``: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).parents[1]
    installed = package / "csrc"
    return installed if installed.is_dir() else package.parent / "csrc"


def write_whole(path: Path, content: bytes) -> None:
    """Make ``path`` hold ``content``, at once: nobody ever sees a part of it. OSError where it cannot be written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.replace(name, path)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise
