"""The C++ sources of the kernels."""

from __future__ import annotations

from pathlib import Path


def source_folder() -> Path:
    """``csrc/``: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).parents[1]
    installed = package / "csrc"
    return installed if installed.is_dir() else package.parent / "csrc"
