"""Every code block of the README runs: Python as it stands, commands as a newcomer types them."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}  # conftest.py sets it
COMMANDS = [line.split(" #")[0].strip() for kind, block in BLOCKS if kind == "bash" for line in block.splitlines()]


def test_only_known_kinds_of_blocks():
    assert {kind for kind, _ in BLOCKS} == {"python", "bash"}


def test_python_blocks(capsys):
    namespace: dict = {}
    for kind, block in BLOCKS:
        if kind == "python":
            exec(compile(block, "README.md", "exec"), namespace)
            for printed in re.findall(r"print\(.*\)  # (.*)$", block, flags=re.MULTILINE):
                assert printed in capsys.readouterr().out


def test_make_targets_exist():
    targets = [shlex.split(command)[1] for command in COMMANDS if command.startswith("make ")]
    assert {"demo", "test"} <= set(targets)
    for target in targets:
        subprocess.run(["make", "--dry-run", target], cwd=ROOT, check=True, capture_output=True)


def test_plain_lines_are_those_of_the_makefile():
    """The pip lines under the two make commands are what these run, but for variables and pip's news of itself."""
    recipes = (ROOT / "Makefile").read_text()
    for name, value in (("PYTHON", "python3"), ("VENV", ".venv"), ("BIN", ".venv/bin"), ("JOBS", "2")):
        recipes = recipes.replace(f"$({name})", value)
    recipes = recipes.replace("$(VENV)", ".venv").replace(" --disable-pip-version-check", "")
    plain = [command for command in COMMANDS if ".venv" in command]
    assert len(plain) == 4
    for command in plain:
        assert command in recipes, command


@pytest.mark.slow
def test_commands(tmp_path):
    """The fastattn commands, one after the other in one folder."""
    commands = [command for command in COMMANDS if command.startswith("fastattn ")]
    assert len(commands) >= 4
    for command in commands:
        argv = [sys.executable, "-m", "fastattn", *shlex.split(command)[1:]]
        done = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True, timeout=600, env=ENVIRONMENT)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"


@pytest.mark.slow
def test_benchmark_commands(tmp_path):
    """The benchmark commands, each in its quick form."""
    commands = [command for command in COMMANDS if command.startswith("python -m benchmarks")]
    assert commands
    for command in commands:
        argv = [sys.executable, *shlex.split(command)[1:], "--quick", "--out", str(tmp_path / "record.json")]
        done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=600, env=ENVIRONMENT)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
