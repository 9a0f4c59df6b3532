"""The code of docs/ and of this package's docstrings, as it stands; what a comment says is printed is printed."""

from __future__ import annotations

import doctest
import importlib
import importlib.util
import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"
PAGES = ["decoding.md", "flash_attn.md", "long_context.md", "models.md", "torch_mha.md", "transformers.md"]
MODULES = [
    "fastattn.inspection",
    "fastattn.integrations.context_parallel",
    "fastattn.integrations.flash_attn",
    "fastattn.integrations.tensor_parallel",
    "fastattn.integrations.torch",
    "fastattn.integrations.transformers",
]
needs_transformers = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None,
    reason="transformers is not installed: pip install 'fastattn[hf]'",
)


def marked(names):
    return [pytest.param(name, marks=needs_transformers if "transformers" in name else ()) for name in names]


@pytest.mark.parametrize("page", marked(PAGES))
def test_pages(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```", (DOCS / page).read_text(), flags=re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 3
    namespace: dict = {}
    for block in blocks:
        exec(compile(block, page, "exec"), namespace)
        promised = re.findall(r"^print\(.*\)  # (.*)$", block, flags=re.MULTILINE)
        assert capsys.readouterr().out.splitlines() == promised


@pytest.mark.parametrize("name", marked(MODULES))
def test_docstrings(name):
    module = importlib.import_module(name)
    result = doctest.testmod(module, optionflags=doctest.ELLIPSIS)
    assert result.attempted > 0 and result.failed == 0
