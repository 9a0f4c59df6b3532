"""Every code block of the README and of docs/ runs, in the order of its page.

Python blocks run unchanged and must print what their comments state: ``print(x)  # 3``. Commands run or are checked as
``COMMANDS`` defines. All blocks of a page share a folder and a namespace.
"""

from __future__ import annotations

import importlib.util
import re
import shlex
import subprocess
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.__main__ import parser as benchmarks
from fastattn.cli import main as fastattn

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "benchmarks" / "README.md"]
PAGES += sorted((ROOT / "docs").rglob("*.md"))
FENCE = re.compile(r"^(`{3,})([^\n`]*)\n(.*?)^\1$", flags=re.MULTILINE | re.DOTALL)


def blocks_of(page: Path) -> list[tuple[str, str]]:
    """(language, text) of the fenced blocks of a page; those in braces are directives of Sphinx."""
    found = ((kind.strip(), text) for _, kind, text in FENCE.findall(page.read_text(encoding="utf-8")))
    return [(kind, text) for kind, text in found if not kind.startswith("{")]


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def commands_of(block: str) -> list[str]:
    lines = (line.split(" #")[0].strip() for line in block.replace("\\\n", " ").splitlines())
    return [line for line in lines if line]


# Packages that the pages with a word in their name need, and how to install them.
NEEDED = {
    "transformers": ("transformers", "pip install 'fastattn[hf]'"),
    "lightning": ("lightning", "pip install lightning"),
    "flower": ("flwr", "pip install 'flwr[simulation]'"),
}


def parameters() -> list[object]:
    """Pages with something to run; those about a package need it."""
    found = []
    for page in PAGES:
        if any(kind in ("python", "bash") for kind, _ in blocks_of(page)):
            missing = [
                f"{module} is not installed: {command}"
                for word, (module, command) in NEEDED.items()
                if word in page.name and importlib.util.find_spec(module) is None
            ]
            marks = [pytest.mark.skip(reason=why) for why in missing]
            found.append(pytest.param(page, id=name_of(page), marks=[*marks, pytest.mark.slow]))
    return found


@pytest.mark.parametrize("page", parameters())
def test_blocks_run(
    page: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    without_interpreter: None,
) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {}
    for kind, block in blocks_of(page):
        capsys.readouterr()
        if kind == "python":
            exec(compile(block, page.name, "exec"), namespace)
            check_printed(block, capsys.readouterr().out.splitlines())
        elif kind == "bash":
            for command in commands_of(block):
                run(command)


def check_printed(block: str, printed: list[str]) -> None:
    """All that a block prints is promised; a ``print`` without a comment may print anything."""
    promised = re.findall(r"^print\(.*\)  # (.*)$", block, flags=re.MULTILINE)
    if len(promised) == len(re.findall(r"^print\(", block, flags=re.MULTILINE)):
        assert printed == promised
    else:
        assert [line for line in printed if line in promised] == promised


def run(command: str) -> None:
    for beginning, how in COMMANDS.items():
        if command.startswith(beginning):
            return how(shlex.split(command))
    raise AssertionError(f"no test knows how to run {command!r}; it knows {list(COMMANDS)}")


def run_fastattn(words: list[str]) -> None:
    assert fastattn(words[1:]) == 0, words


def check_benchmarks(words: list[str]) -> None:
    """Its arguments are accepted; ``tests/benchmarks/`` runs each command in its quick form."""
    benchmarks().parse_args(words[3:])
    if words[3] == "report":
        assert all(Path(ROOT, word).exists() for word in words if word.endswith(".json"))


def run_make(words: list[str]) -> None:
    subprocess.run(["make", "--dry-run", *words[1:]], cwd=ROOT, check=True, capture_output=True)


def check_plain(words: list[str]) -> None:
    """A line that creates or uses .venv is a line of the Makefile."""
    recipes = (ROOT / "Makefile").read_text(encoding="utf-8")
    for name, value in (("PYTHON", "python3"), ("VENV", ".venv"), ("BIN", ".venv/bin"), ("JOBS", "2")):
        recipes = recipes.replace(f"$({name})", value)
    recipes = recipes.replace("$(VENV)", ".venv").replace(" --disable-pip-version-check", "")
    assert shlex.join(words) in recipes, words


def check_pip(words: list[str]) -> None:
    """The extras that a line installs exist."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    for word in words:
        for named in re.findall(r"^(?:fastattn|\.)\[(.*)\]", word):
            assert set(named.split(",")) <= set(extras), words


def check_pytest(words: list[str]) -> None:
    """The tests that a line runs exist."""
    assert all((ROOT / word).exists() for word in words if word.startswith("tests/")), words


COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "fastattn ": run_fastattn,
    "make ": run_make,
    "python -m benchmarks ": check_benchmarks,
    "python -m pytest ": check_pytest,
    "python3 -m venv .venv": check_plain,
    ".venv/bin/": check_plain,
    "pip install ": check_pip,
}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_only_known_kinds_of_blocks(page: Path) -> None:
    assert {kind for kind, _ in blocks_of(page)} <= {"python", "bash", "text"}


def test_the_first_page_begins_with_the_commands_of_a_contributor() -> None:
    blocks = [block for kind, block in blocks_of(ROOT / "README.md") if kind == "bash"]
    commands = [command for block in blocks for command in commands_of(block)]
    assert {"make demo", "make test", "make lint"} <= set(commands)
    assert len([command for command in commands if ".venv" in command]) == 4


def test_the_first_page_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) < 150
