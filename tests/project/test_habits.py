"""The files around the code agree with it: continuous integration, hooks, citation, the marker for type checkers."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from fastattn.version import __version__
from tests import quick

yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")
ROOT = Path(__file__).parents[2]
YAML = sorted([*(ROOT / ".github").rglob("*.yml"), ROOT / ".pre-commit-config.yaml", ROOT / "CITATION.cff"])


@pytest.mark.parametrize("path", YAML, ids=lambda path: path.name)
def test_yaml_is_valid(path: Path) -> None:
    assert yaml.safe_load(path.read_text(encoding="utf-8"))


def commands_of(workflow: str) -> list[str]:
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / workflow).read_text(encoding="utf-8"))["jobs"]
    return [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]


def test_continuous_integration_is_what_a_contributor_runs() -> None:
    assert commands_of("ci.yml") == [".ci/run"]
    lines = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if line.startswith("make ")] == ["make lint", "make test"]
    assert "make docs" in commands_of("release.yml")


def test_hooks_run_the_tools_of_lint_and_format() -> None:
    (repository,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"]
    recipes = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert repository["repo"] == "local", "hooks of other repositories need a network"
    for hook in repository["hooks"]:
        assert hook["entry"].replace(".venv/bin", "$(BIN)") in recipes, hook["id"]


def test_the_citation_names_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == __version__ and citation["license"] == "Apache-2.0"


def test_type_checkers_see_the_types() -> None:
    data = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["package-data"]
    assert (ROOT / "fastattn" / "py.typed").exists() and data["fastattn"] == ["py.typed"]


def test_the_quick_run_chooses_the_tests_beside_a_change() -> None:
    for name, tests in (
        ("fastattn/spec.py", "tests/core/test_spec.py"),
        ("fastattn/rotary.py", "tests/nn/test_rotary.py"),
        ("fastattn/problem.py", "tests/core"),
        ("fastattn/lm/generate/sampling.py", "tests/lm/generate/test_sampling.py"),
        ("fastattn/lm/generate/drafts.py", "tests/lm/generate"),
        ("csrc/cpu/forward.h", "tests/backends/cpu"),
        ("tests/nn/test_cache.py", "tests/nn/test_cache.py"),
        ("README.md", None),
    ):
        assert quick.tests_beside(name) == tests, name
        assert tests is None or (ROOT / tests).exists()
