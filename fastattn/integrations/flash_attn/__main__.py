"""``python -m fastattn.integrations.flash_attn script.py ...``: run a script that imports ``flash_attn``."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

from fastattn.integrations.flash_attn import install


def main() -> None:
    if len(sys.argv) < 2:
        sys.exit(f"usage: python -m fastattn.integrations.flash_attn script.py [arguments]\n\n{install.__doc__}")
    install()
    sys.argv = sys.argv[1:]
    sys.path[0] = str(Path(sys.argv[0]).resolve().parent)
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
