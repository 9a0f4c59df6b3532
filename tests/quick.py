"""The tests of ``make quick``: the house rules, and as many tests beside the changed files as fit in the time.

A changed ``fastattn/a/b.py`` selects ``tests/a/test_b.py``, or all of ``tests/a/`` if there is none; ``fastattn/b.py``
selects ``tests/core/test_b.py``, or the only ``test_b.py`` elsewhere. A changed test selects itself, ``csrc/`` its
backend. Without changes those of the last commit count. Tests marked slow run in ``make test`` only.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ALWAYS = ("tests/project/test_house_rules.py", "tests/core/test_spec.py", "tests/core/test_dispatch.py")
FOLDERS = {
    "csrc/cpu/": "tests/backends/cpu",
    "csrc/": "tests/backends/cuda/test_mask.py",
    "benchmarks/": "tests/benchmarks",
    "setup.py": "tests/project/test_build.py",
}


def changed() -> list[str]:
    """The files that differ from the last commit, new ones included; without any, those of the last commit."""
    found = git("diff", "--name-only", "HEAD") + git("ls-files", "--others", "--exclude-standard")
    return found or git("diff", "--name-only", "HEAD~1", "HEAD")


def git(*words: str) -> list[str]:
    done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.split()


def tests_beside(name: str) -> str | None:
    """The test file or folder of a changed file, as a path from the root; None if it has none."""
    path = Path(name)
    if path.parts[0] == "tests":
        is_test = path.name.startswith("test_") and (ROOT / path).exists()
        return name if is_test else None
    if path.parts[0] == "fastattn" and path.suffix == ".py":
        inside = Path(*path.parts[1:-1]) if len(path.parts) > 2 else Path("core")
        own = Path("tests", inside, f"test_{path.stem}.py")
        elsewhere = (
            [found.relative_to(ROOT) for found in (ROOT / "tests").rglob(own.name)] if len(path.parts) == 2 else []
        )
        candidates = [
            own,
            *(elsewhere if len(elsewhere) == 1 else ()),
            *(Path("tests", *inside.parts[:n]) for n in range(len(inside.parts), 0, -1)),
        ]
        return next((str(found) for found in candidates if (ROOT / found).exists()), None)
    return next((tests for beginning, tests in FOLDERS.items() if name.startswith(beginning)), None)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", default="2")
    parser.add_argument("--budget", default="25", help="seconds after which no further test is started")
    args = parser.parse_args()
    beside = sorted({tests for name in changed() if (tests := tests_beside(name))})
    print("quick:", *beside, *ALWAYS)
    words = ["-n", args.jobs, "--dist", "worksteal", "-q", "-m", "not slow", "-r", "fE", "--budget", args.budget]
    return subprocess.call([sys.executable, "-m", "pytest", *words, *dict.fromkeys([*beside, *ALWAYS])], cwd=ROOT)


if __name__ == "__main__":
    sys.exit(main())
