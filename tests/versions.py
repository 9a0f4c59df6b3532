"""The tests that depend on versions, in an environment for each set of them: ``python tests/versions.py``.

An environment is made once, below ``.venv-versions/`` or ``--folder``, by pip, with the packages that pip installs for
that torch: on Linux its CUDA build, several gigabytes. The results replace the table in docs/guides/versions.md.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "guides" / "versions.md"
BEGIN, END = "<!-- table: versions -->", "<!-- end -->"
TOOLS = ("pytest>=8", "pytest-xdist>=3.6", "hypothesis>=6.100", "filelock", "ninja", "tqdm", "peft", "pillow")
ONNX = ("onnx", "onnxscript", "onnxruntime")
SETS = {
    "2.11.0": ("torch==2.11.0", "triton==3.6.0", "numpy<2.4", "transformers==5.17.0"),
    "2.13.0": ("torch==2.13.0", "triton==3.7.1", "numpy==2.4.6", "transformers==5.23.0"),
    "2.14.1": ("torch==2.14.1", "numpy==2.4.6", "transformers==5.23.0"),
}
CORE, LAYERS, INTEGRATIONS = "tests/core/test_{}.py", "tests/nn/test_{}.py", "tests/integrations/test_{}.py"
MODELS = "tests/lm/models/test_{}.py"
PARTS = {
    "torch's contracts": tuple(map(CORE.format, ("torch_integration", "compile_corners", "plan"))),
    "derivatives": tuple(map(CORE.format, ("derivatives", "inspection"))),
    "layers": tuple(map(LAYERS.format, ("module", "layers", "transformer", "replace", "lazy", "nested"))),
    "context parallel": (INTEGRATIONS.format("parallel"),),
    "integrations": tuple(map(INTEGRATIONS.format, ("torch", "flash_attn", "export", "transformers"))),
    "families of transformers": (INTEGRATIONS.format("transformers_families"),),
    "exports to Hugging Face": tuple(map(MODELS.format, ("presets", "parity", "convert", "heads"))),
    "Triton's interpreter": ("tests/backends/triton/test_exact_normaliser.py", "tests/backends/triton/test_plans.py"),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("versions", nargs="*", default=list(SETS), help=f"of torch: {', '.join(SETS)}")
    parser.add_argument("--folder", type=Path, default=ROOT / ".venv-versions", help="where the environments lie")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), help=f"columns of the table: {', '.join(PARTS)}")
    parser.add_argument("--jobs", default="2")
    arguments = parser.parse_args()
    cells = []
    for version in arguments.versions:
        python = environment(arguments.folder, version)
        found = {"build": build(python)}
        for part in arguments.parts:
            found[part] = outcome(python, PARTS[part], arguments.jobs)
            print(version, part, found[part], sep=" | ", flush=True)
            write(version, found)
        cells += found.values()
    return int(any("failed" in cell or "error" in cell for cell in cells))


def environment(below: Path, version: str) -> Path:
    folder = below / version
    python = folder / "bin" / "python"
    if not (folder / ".installed").exists():
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *SETS[version], *TOOLS, *ONNX], check=True)
        (folder / ".installed").touch()
    return python


def build(python: Path) -> str:
    """The versions with their build tags, as the environment itself says them."""
    code = "import torch, transformers, numpy; print(torch.__version__, transformers.__version__, numpy.__version__)"
    found = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True, env=clean()).stdout.split()
    return f"{found[0]}, transformers {found[1]}, numpy {found[2]}"


def outcome(python: Path, paths: tuple[str, ...], jobs: str) -> str:
    """pytest's last line: how many passed, failed and were skipped."""
    present = [path for path in paths if (ROOT / path).exists()]
    command = [python, "-m", "pytest", "-q", "-n", jobs, "-p", "no:cacheprovider", *present]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=clean())
    print(*re.findall(r"^(?:FAILED|ERROR) .*", done.stdout, re.MULTILINE), sep="\n", file=sys.stderr, flush=True)
    last = done.stdout.strip().splitlines()[-1] if done.stdout.strip() else done.stderr.strip()[-200:]
    counts = re.findall(r"\d+ (?:passed|failed|skipped|errors?)", last)
    return ", ".join(counts) or f"error: {last[-100:]}"


def clean() -> dict[str, str]:
    """The environment without settings of this machine that change what is imported."""
    dropped = ("PYTHONPATH", "TRITON_INTERPRET", "FASTATTN_BACKEND")
    return {name: value for name, value in os.environ.items() if name not in dropped} | {"PYTHONPATH": str(ROOT)}


def write(version: str, found: dict[str, str]) -> None:
    """Put cells into a row of the page's table; those of other versions and parts stay."""
    text = PAGE.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    table, after = rest.split(END)
    columns = ["build", *PARTS]
    lines = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith(("| torch", "| 2."))]
    unknown = dict.fromkeys(columns, "not yet run")
    rows = {name: unknown | dict(zip(lines[0][1:], cells, strict=True)) for name, *cells in lines[1:]}
    rows[version] = rows.get(version, unknown) | found
    head = f"| torch | {' | '.join(columns)} |\n|{' --- |' * (1 + len(columns))}"
    body = "\n".join(f"| {name} | {' | '.join(rows[name][c] for c in columns)} |" for name in sorted(rows))
    PAGE.write_text(f"{before}{BEGIN}\n\n{head}\n{body}\n\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
