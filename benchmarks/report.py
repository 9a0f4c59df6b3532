"""``python -m benchmarks report``: Markdown and plots from records, and the tables of pages from committed ones."""

from __future__ import annotations

import argparse
import json
import os
import re
from pathlib import Path

from benchmarks import highlights, plots, tables
from benchmarks.record import read
from benchmarks.tables import Record
from fastattn.errors import DataError, InputError
from fastattn.files import write_text

RESULTS = Path(__file__).resolve().parent / "results"
UNMEASURED = (
    "derivatives",
    "finetune",
    "layers",
    "speculative",
    "swap",
)  # records that a page has a place for before they are made
_REGION = re.compile(r"<!-- results:(?P<name>[\w.-]+) -->\n(?P<body>.*?)<!-- /results:(?P=name) -->", re.DOTALL)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("records", nargs="*", type=Path, metavar="JSON", help="records to report on")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write report.md and the plots there (default: print)")
    parser.add_argument("--mixed", action="store_true", help="accept records of different devices or code, and say so")
    parser.add_argument("--pages", nargs="+", type=Path, metavar="FILE", help="rewrite their results regions instead")
    parser.add_argument(
        "--results", type=Path, default=RESULTS, metavar="DIR", help="the committed records, for --pages"
    )


def run(args: argparse.Namespace) -> int:
    if args.pages is not None:
        for page in args.pages:
            _write_page(page, args.results)
        return 0
    if not args.records:
        raise InputError("report: no record given. Name JSON files, or --pages FILE.")
    paths = {path.stem: path for path in args.records}
    if len(paths) < len(args.records):
        raise InputError("report: two records have one file name; their plots would overwrite each other. Rename one.")
    text = report({stem: read(path) for stem, path in paths.items()}, mixed=args.mixed, out=args.out)
    if args.out is None:
        print(text)
    else:
        write_text(args.out / "report.md", text + "\n")
        print(f"report: {args.out / 'report.md'}")
    return 0


def report(records: dict[str, Record], *, mixed: bool = False, out: Path | None = None) -> str:
    """The Markdown of several records; with ``out`` their plots are drawn there and shown.

    Raises:
        InputError: they come from different devices or different code, and ``mixed`` does not accept that.
    """
    warning = _mixture(records)
    if warning and not mixed:
        raise InputError(f"report: {warning} Report them one by one, or pass --mixed.")
    parts = ["# Benchmarks of fastattn", f"**Not comparable line by line**: {warning}" if warning else ""]
    for stem, record in records.items():
        parts += [f"## {stem}", tables.conditions(record), tables.table(record)]
        if out is not None:
            parts += [f"![{path.stem}]({path.name})" for path in draw(record, out, stem)]
    return "\n\n".join(part for part in parts if part)


def draw(record: Record, folder: Path, stem: str) -> list[Path]:
    """The plots of a record; none without matplotlib, or for a command that has none."""
    if record["kind"] != "ops":
        return []
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        print("no plots: matplotlib is missing, pip install 'fastattn[bench]'")
        return []
    return plots.draw(record, folder, stem)


def _mixture(records: dict[str, Record]) -> str | None:
    """A sentence that says how the device or code of the records differs; None if they do not."""
    devices = {stem: record["environment"]["device"] for stem, record in records.items()}
    codes = {stem: tables.code(record) for stem, record in records.items()}
    for what, values in (("devices", devices), ("code", codes)):
        if len(set(values.values())) > 1:
            listed = "; ".join(f"{stem}: {value}" for stem, value in values.items())
            return f"the records come from different {what} ({listed})."
    return None


# Pages: README.md and docs/


def _write_page(path: Path, results: Path) -> None:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}. Give README.md or a page of docs/.") from None
    names = list(bodies(text))
    if not names:
        raise DataError(
            f"{path}: no region to fill. Add <!-- results:NAME --> and <!-- /results:NAME --> on two lines."
        )
    for name in names:
        if (results / f"{name}.json").exists():
            draw(read(results / f"{name}.json"), results, name)
    write_text(path, rendered(text, results, path.resolve().parent))
    print(f"{path}: {', '.join(names)}")


def rendered(text: str, results: Path, root: Path) -> str:
    """The text of a page with each region ``<!-- results:NAME -->`` made from ``results/NAME.json``.

    Args:
        text: the page as it stands.
        results: the folder of the records and their plots.
        root: the folder of the page, from which its links count.
    """

    def region(found: re.Match[str]) -> str:
        name = found["name"]
        return f"<!-- results:{name} -->\n{body(name, results, root)}<!-- /results:{name} -->"

    return _REGION.sub(region, text)


def body(name: str, results: Path, root: Path) -> str:
    """The content of a region: that of one record, or a table of several."""
    if name == "highlights":
        records = {stem: read(results / f"{stem}.json") for stem in highlights.RECORDS}
        return f"{highlights.table(records)}\n\n{highlights.conditions(records)}\n"
    if name == "examples":
        found = sorted((results / "examples").glob("*.json"))
        return highlights.examples([json.loads(path.read_text(encoding="utf-8")) for path in found]) + "\n"
    path = results / f"{name}.json"
    if name in UNMEASURED and not path.exists():
        command = f"python -m benchmarks {name} --threads 2 --quiet --out benchmarks/results/{name}.json"
        return f"Not measured yet: `{command}`.\n"
    record = read(path)
    return "\n\n".join([tables.conditions(record), tables.summary(record), *_links(results, name, root)]) + "\n"


def bodies(text: str) -> dict[str, str]:
    """The regions of a page: the content of each."""
    return {found["name"]: found["body"] for found in _REGION.finditer(text)}


def _links(results: Path, name: str, root: Path) -> list[str]:
    found = [results.resolve() / f"{name}-{plot}.png" for plot in ("speed", "memory", "ratio")]
    return [f"![{path.stem}]({Path(os.path.relpath(path, root)).as_posix()})" for path in found if path.exists()]
