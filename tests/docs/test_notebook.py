"""Every cell of the notebooks in docs/ runs, in order, and prints what is stored beside it."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "docs").rglob("*.ipynb"))


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_cells_print_what_is_stored(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, without_interpreter: None
) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {}
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    codes = [cell for cell in cells if cell["cell_type"] == "code"]
    assert codes
    for cell in codes:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile("".join(cell["source"]), path.name, "exec"), namespace)
        stored = "".join(text for output in cell["outputs"] for text in output["text"])
        assert printed.getvalue() == stored, cell["source"]
