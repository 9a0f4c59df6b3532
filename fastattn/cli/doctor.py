"""``fastattn doctor``: one page for a bug report. It changes and downloads nothing, and an error does not stop it."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path

from fastattn.cli import info

TRITON_CACHE = ("TRITON_CACHE_DIR", "TRITON_HOME")
SHOWN_VERDICTS = 8
# Environment variables that change the behaviour of fastattn or torch. Their values are paths or numbers, not secrets.
VARIABLES = (
    "CUDA_HOME", "CUDA_VISIBLE_DEVICES", "CXX", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "TRITON_CACHE_DIR",
    "TRITON_INTERPRET", "XDG_CACHE_HOME",
)  # fmt: skip


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    text = (
        "One page for a bug report: versions, devices, every backend with the reason if it cannot run, caches, "
        "self-checks, a small call on each backend, and all errors. Exit code 1 if there are any."
    )
    parser = commands.add_parser("doctor", help="one page for a bug report", description=text)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    errors: dict[str, str] = {}
    sections = _guarded(errors, "versions, devices and backends", info.facts) or {}
    for title, find in (
        ("caches", _caches), ("self-checks", _self_checks), ("a small call", _calls), ("environment", _environment),
    ):  # fmt: skip
        sections[title] = _guarded(errors, title, find) or {"none": ""}
    for number, text in enumerate(_refusals()):
        errors[f"refused {number + 1}"] = text
    errors |= {f"a small call, {name}": text for name, text in sections["a small call"].items() if text[:3] != "ok "}
    sections["errors"] = errors or {"none": ""}
    print(info.as_text(sections))
    return 1 if errors else 0


def _guarded(errors: dict[str, str], title: str, find: Callable[[], dict]) -> dict | None:
    """The result of ``find``; if it raises, the error is added to ``errors`` and the result is None."""
    try:
        return find()
    except Exception as error:
        errors[title] = _one_line(error)
        return None


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


def _caches() -> dict[str, str]:
    from fastattn import compiled

    found = {}
    for number, folder in enumerate(compiled.folders()):
        files = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock"]
        size = sum(path.stat().st_size for path in files) / 2**20
        found[f"compiled code {number + 1}"] = f"{folder}: {len(files)} files, {size:.1f} MiB"
    return found | {"Triton's": str(_triton_cache())}


def _triton_cache() -> Path:
    folder, home = (os.environ.get(name) for name in TRITON_CACHE)
    return Path(folder) if folder else Path(home or Path.home()) / ".triton" / "cache"


def _self_checks() -> dict[str, str]:
    """The text of the stored verdicts, newest first, even if a file is damaged."""
    from fastattn import compiled

    paths = [path for folder in compiled.folders() for path in (folder / "self-check").glob("*.json")]
    paths.sort(key=lambda path: path.stat().st_mtime, reverse=True)
    return {path.stem: " ".join(path.read_text("utf-8", "replace").split())[:200] for path in paths[:SHOWN_VERDICTS]}


def _calls() -> dict[str, str]:
    """The error against fp64 of one small problem on each backend that can run here."""
    import torch

    import fastattn

    q, k, v = torch.randn(3, 1, 33, 2, 32, generator=torch.Generator().manual_seed(0)).unbind()
    exact = fastattn.attention(q.double(), k.double(), v.double(), causal=True, backend="eager")
    found = {}
    for name, reason in fastattn.backends().items():
        if reason is None:
            found[name] = _call(name, q, k, v, exact)
    return found


def _call(name, q, k, v, exact) -> str:  # type: ignore[no-untyped-def]
    import fastattn

    try:
        out = fastattn.attention(q, k, v, causal=True, backend=name)
    except fastattn.UnsupportedError:
        return "ok  serves other problems"
    except Exception as error:
        return _one_line(error)
    wrong = float((out - exact).abs().max())
    return f"ok  largest error {wrong:.1e}" if wrong < 1e-5 else f"wrong by {wrong:.1e}"


def _environment() -> dict[str, str]:
    names = sorted({name for name in os.environ if name.startswith("FASTATTN_")} | set(VARIABLES) & set(os.environ))
    return {name: os.environ[name] for name in names}


def _refusals() -> list[str]:
    from fastattn import compiled

    return compiled.refusals()
