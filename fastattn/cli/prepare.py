"""``fastattn prepare``: turn raw files into a corpus for ``fastattn train --corpus``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from fastattn.cli.flags import Flag, add_flags, given

FLAGS = (
    Flag("--encoding", "encoding", str, None, "of the files; UTF-8 or their byte order mark if not given"),
    Flag("--kind", "kind", str, "auto", "what the text is; auto: by the suffix", ("auto", "prose", "code")),
    Flag("--quality", "quality", bool, True, "drop documents that break a quality rule (default on)"),
    Flag("--min-words", "min_words", int, 50, "fewest words of a document of prose"),
    Flag("--max-words", "max_words", int, 100_000, "most words of a document"),
    Flag("--duplicates", "duplicates", str, "near", "which duplicates to drop", ("near", "exact", "keep")),
    Flag(
        "--mask-personal-data", "personal", str, "auto",
        "replace e-mail, phone, IP, card and id numbers by <EMAIL> ...; auto: in code e-mail only",
        ("auto", "all", "none"),
    ),
    Flag("--vocab-size", "vocab_size", int, 4096, "size of the tokenizer learned from the text"),
    Flag("--algorithm", "algorithm", str, "bpe", "how it is learned; unigram is SentencePiece's", ("bpe", "unigram")),
    Flag("--tokenizer", "tokenizer", Path, None, "use this tokenizer.json, that of a folder, or a tiktoken file"),
    Flag("--held-out", "held_out", float, 0.05, "part of the documents kept for the held-out loss"),
    Flag("--max-documents", "max_documents", int, None, "stop reading after this many"),
)  # fmt: skip
_CLEANING = ("kind", "quality", "min_words", "max_words", "duplicates", "personal")


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    from fastattn.lm.data.quality import RULES

    text = (
        "Read text, JSON lines, CSV, TSV, each also as .gz or .zst, Parquet, folders, patterns and "
        "hf:NAME[:CONFIG][:SPLIT]; "
        "repair encodings, drop bad and duplicate documents, mask personal data, train a tokenizer and write "
        "token files. The documents dropped and the reasons are printed and written to report.json."
    )
    parser = commands.add_parser("prepare", help="make a corpus from raw text", description=text)
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder of the corpus")
    parser.add_argument(
        "--data", nargs="+", default=(), metavar="PATH",
        help="files, folders, patterns, hf:NAME (default: the source of Python's standard library)",
    )  # fmt: skip
    parser.add_argument(
        "--field", nargs="+", default=["text"], metavar="NAME",
        help="fields of JSON objects or columns of tables that are the text; numbers are columns without a header",
    )  # fmt: skip
    parser.add_argument(
        "--without", nargs="+", default=[], metavar="RULE", help=f"quality rules to turn off: {', '.join(RULES)}"
    )
    parser.add_argument("--raw", action="store_true", help="no cleaning at all: documents as they are")
    parser.add_argument("--workers", type=int, metavar="N", help="processes that clean (default: all cores)")
    parser.add_argument(
        "--engine", default="processes", choices=("processes", "dask"), help="what cleans (default processes)"
    )
    parser.add_argument(
        "--cluster", metavar="ADDRESS", help="scheduler of a running Dask cluster, tcp://HOST:8786, with shared files"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    add_flags(parser, FLAGS)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from fastattn.errors import input_error
    from fastattn.lm.data import Cleaning, find_sources
    from fastattn.lm.data.engines import check_engine, started
    from fastattn.lm.data.formats import ReadOptions
    from fastattn.lm.train.prepare import PrepareConfig, prepare_at

    flags = given(args, FLAGS)
    cleaning = {name: flags.pop(name) for name in _CLEANING if name in flags}
    if args.raw and (cleaning or args.without):
        name = next(iter(cleaning), "without")
        raise input_error("--raw", f"together with --{name.replace('_', '-')}", "one of them", "--raw cleans nothing.")
    check_engine(args.engine, args.workers, args.cluster)
    config = PrepareConfig(
        read=ReadOptions(tuple(args.field), flags.pop("encoding", None)),
        cleaning=Cleaning.none() if args.raw else Cleaning(without=tuple(args.without), **cleaning),
        **flags,
    )
    sources = find_sources(args.data)
    with started(args.engine, args.workers, args.cluster) as pool:
        corpus = prepare_at(sources, args.out, config, pool=pool, progress=not args.quiet)
    print(_told(args.out, corpus.facts.documents, corpus.facts.tokens, corpus.facts.vocab_size))
    return 0


def _told(folder: Path, documents: dict[str, int], tokens: dict[str, int], vocab_size: int) -> str:
    from fastattn.lm.data.report import Report

    content = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    report, made = Report.from_dict(content), content["made"]
    packed = sum(documents.values())
    parts = "documents" if packed == report.kept else "pieces of documents"
    sizes = [f"{name.replace('_', ' ')}: {documents[name]:,} {parts}, {tokens[name]:,} tokens" for name in documents]
    if packed != report.kept:
        sizes.append(f"long documents were cut at line ends: {report.kept:,} kept are {packed:,} pieces")
    lines = [report.table(), "", *sizes, f"vocabulary: {vocab_size:,}"]
    if made["tokenizer"] is None and vocab_size < made["vocab_size"]:
        lines[-1] += f" of {made['vocab_size']:,}, as the text has no more pieces that occur twice"
    if report.settings["steps"] and "mojibake" not in report.settings["steps"]:
        lines.append("mojibake was not repaired: the package 'ftfy' is missing, pip install 'fastattn[data]'")
    lines += [f"corpus: {folder} (report: {folder / 'report.json'})", f"next: fastattn train --corpus {folder}"]
    return "\n".join(lines)
