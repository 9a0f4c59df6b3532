"""Write fastattn in the format of Hugging Face's kernels: ``build/torch-universal``, one folder for every device.

    python release/hub_kernel.py [--out build]

The folder holds the package with the sources of its kernels, which are compiled where they are used, and an
``__init__.py`` with flash-attn's functions. ``kernels.get_local_kernel(path)`` loads it; uploaded to a repository,
``attn_implementation="org/repo"`` of transformers does.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
VARIANT = "torch-universal"
METADATA = {
    "id": "fastattn_universal",
    "name": "fastattn",
    "version": 1,
    "license": "Apache-2.0",
    "python-depends": [],
    "backend": {"type": "cpu"},  # a name of theirs that every machine has; none means all of them
}
ENTRY = '''"""flash-attn's functions by fastattn, on CPUs and GPUs, as Hugging Face's kernels loads them."""

import sys
from pathlib import Path

if "fastattn" not in sys.modules:  # a process holds one copy: operators have one definition
    sys.path.insert(0, str(Path(__file__).parent))
    try:
        import fastattn
    finally:
        sys.path.pop(0)

from fastattn.integrations.flash_attn import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    flash_attn_with_kvcache,
)

__all__ = [
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
]
'''


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "build", help="the folder gets a folder torch-universal")
    print(write(parser.parse_args().out))


def write(out: Path) -> Path:
    """The folder, made anew."""
    folder = out.resolve() / VARIANT
    shutil.rmtree(folder, ignore_errors=True)
    command = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True)
    (folder / "metadata.json").write_text(json.dumps(METADATA, indent=2) + "\n", encoding="utf-8")
    (folder / "__init__.py").write_text(ENTRY, encoding="utf-8")
    shutil.copy(ROOT / "LICENSE", folder)
    return folder


if __name__ == "__main__":
    main()
