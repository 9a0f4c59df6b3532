"""``python -m fastattn`` is the ``fastattn`` command."""

import sys

from fastattn.cli import main

if __name__ == "__main__":
    sys.exit(main())
