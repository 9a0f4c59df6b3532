"""The documentation builds without a warning, contains every public name, and has no broken or external link."""

from __future__ import annotations

import importlib.util
import inspect
import pkgutil
import re
import subprocess
import sys
import zlib
from pathlib import Path
from urllib.parse import unquote

import pytest

import fastattn

pytest.importorskip("sphinx", reason="sphinx is not installed: pip install 'fastattn[docs]'")
pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
# Modules whose names are public without a list of them.
OPEN = (
    "fastattn.inspection", "fastattn.integrations.", "fastattn.lm.load", "fastattn.measure.", "fastattn.spec",
    "fastattn.testing.fuzz", "fastattn.testing.verify",
)  # fmt: skip
# parts of a module that has the public names
INNER = ("fastattn.integrations.transformers_", "fastattn.integrations.context_parallel_")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the pages, built as ``make docs`` builds them."""
    (recipe,) = re.findall(r"-m (sphinx .*) docs \S+$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", *recipe.split(), "docs", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def public_names() -> dict[str, object]:
    """Every function and class that a user may import, by its names: those that packages list, and in OPEN all."""
    found: dict[str, object] = {f"fastattn.{name}": getattr(fastattn, name) for name in fastattn.__all__}
    for info in pkgutil.walk_packages(fastattn.__path__, "fastattn."):
        if info.name.startswith(INNER) or info.name.endswith("__main__"):
            continue
        is_open, is_inner = info.name.startswith(OPEN), info.name.count(".") > 2
        if not is_open and (is_inner or not info.ispkg):
            continue
        if info.name.endswith(".opacus") and importlib.util.find_spec("opacus") is None:
            continue
        module = importlib.import_module(info.name)
        own = [name for name, value in vars(module).items() if getattr(value, "__module__", "") == info.name]
        for name in getattr(module, "__all__", own if is_open else ()):
            if name[0] != "_":
                found[f"{info.name}.{name}"] = getattr(module, name)
    return {name: value for name, value in found.items() if inspect.isfunction(value) or inspect.isclass(value)}


def documented(site: Path) -> set[str]:
    """The names in the site's inventory: four lines of header, then compressed lines that begin with a name."""
    text = zlib.decompress((site / "objects.inv").read_bytes().split(b"\n", 4)[4]).decode()
    return {line.split()[0] for line in text.splitlines() if " py:" in line}


def test_every_public_name_is_in_the_reference(site: Path) -> None:
    names, public = documented(site), public_names()
    shown = {value for name, value in public.items() if name in names}  # under any of its names
    assert len(shown) > 100
    assert sorted(name for name, value in public.items() if value not in shown) == []


def test_no_link_leads_nowhere(site: Path) -> None:
    ids = {page: set(re.findall(r'\bid="([^"]+)"', page.read_text(encoding="utf-8"))) for page in site.rglob("*.html")}
    assert len(ids) > 30
    for page, own in ids.items():
        for link in re.findall(r'\b(?:href|src)="([^"]+)"', page.read_text(encoding="utf-8")):
            if link.startswith(("https:", "data:", "mailto:", "javascript:")):
                continue
            path, _, anchor = link.partition("#")
            target = (page.parent / unquote(path.partition("?")[0])).resolve() if path else page
            assert target.exists(), f"{page.relative_to(site)}: {link}"
            anchors = own if target == page else ids.get(target)
            assert not anchor or anchors is None or unquote(anchor) in anchors, f"{page.relative_to(site)}: {link}"


def test_pages_load_nothing_from_elsewhere(site: Path) -> None:
    for page in site.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        loaded = re.findall(r'<(?:script|img|iframe)[^>]*\bsrc="([^"]+)"', text)
        loaded += re.findall(r'<link[^>]*rel="(?:stylesheet|preload|icon)"[^>]*href="([^"]+)"', text)
        assert loaded and not [link for link in loaded if link.startswith(("http:", "https:", "//"))]
    for sheet in site.rglob("*.css"):
        assert not re.search(r"url\(['\"]?(https?:)?//", sheet.read_text(encoding="utf-8")), sheet.name


def test_formulas_are_mathematics(site: Path) -> None:
    text = (site / "reference" / "attention.html").read_text(encoding="utf-8")
    assert text.count("<math ") > 5 and "softmax(cap(" not in text
    assert "$$" not in text and "cdn" not in text.lower()
