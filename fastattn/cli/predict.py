"""``fastattn predict``: apply a fine-tuned model to inputs without labels, and write JSON lines."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from fastattn.cli import device
from fastattn.cli.flags import add_columns, add_model, columns_of
from fastattn.errors import input_error


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    text = (
        "Predict with a model of fastattn finetune: classes with probabilities, numbers, tags with spans, answers with "
        "scores, generated text. One JSON object for each input, in their order."
    )
    parser = commands.add_parser("predict", help="apply a fine-tuned model", description=text)
    add_model(parser)
    parser.add_argument(
        "--data", nargs="+", default=["-"], metavar="FILE",
        help="inputs, in any format of finetune; - (default) reads lines of text or of JSON from stdin",
    )  # fmt: skip
    parser.add_argument("--out", default="-", metavar="FILE", help="of JSON lines; - (default) is stdout")
    add_columns(parser)
    parser.add_argument("--batch", type=int, default=32, metavar="N", help="inputs at a time (default 32)")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N inputs")
    parser.add_argument("--attention", choices=("fastattn", "eager"), help="instead of what the run used")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    device.add_flag(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    for name in ("batch", "limit"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise input_error(f"--{name}", value, "a positive int", "Give at least 1.")
    if "-" in args.data and len(args.data) > 1:
        raise input_error("--data", args.data, "- alone, or files", "- is standard input.")
    from fastattn.files import replaced_file, saying_why
    from fastattn.lm.finetune import load_finetuned
    from fastattn.lm.train import find_model

    columns = columns_of(args)
    model = load_finetuned(find_model(args.checkpoint, best=True), device.choose(args.device), args.attention)
    lines = _predictions(args, model, columns)
    if args.out == "-":
        for line in lines:
            print(line, flush=True)
        return 0
    path = Path(args.out)
    with saying_why(path), replaced_file(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        for line in lines:
            file.write(line + "\n")
    return 0


def _predictions(args: argparse.Namespace, model: Any, columns: dict[str, str]) -> Iterator[str]:
    """Yield a line of JSON for each input."""
    from tqdm import tqdm

    inputs: Iterable[dict[str, Any]]
    if args.data == ["-"]:
        inputs, total = _from_stdin(model.task.name, columns), None
    else:
        from fastattn.lm.finetune.datasets import read_dataset

        found = read_dataset([Path(path) for path in args.data], model.task.name, columns, labelled=False)
        inputs, total = (example.fields for example in found.examples), len(found.examples)
    remaining = islice(inputs, args.limit)
    if total is not None and args.limit is not None:
        total = min(total, args.limit)
    with tqdm(total=total, desc="predict", unit="input", disable=args.quiet or total is None) as bar:
        while batch := list(islice(remaining, args.batch)):
            for fields, prediction in zip(batch, model.predict(batch, batch=args.batch), strict=True):
                yield json.dumps({"input": fields, "prediction": prediction}, ensure_ascii=False)
            bar.update(len(batch))


def _from_stdin(task: str, columns: dict[str, str]) -> Iterator[dict[str, Any]]:
    """The inputs in standard input: objects of JSON, or texts, in lines that are not empty."""
    from fastattn.lm.finetune.columns import find_columns, taken
    from fastattn.lm.finetune.examples import FIELDS, checked
    from fastattn.lm.finetune.records import parse_json

    for number, line in enumerate(sys.stdin, 1):
        if not line.strip():
            continue
        place = f"stdin, line {number}"
        record = parse_json(place, line) if line.lstrip().startswith("{") else {FIELDS[task].inputs[0]: line.strip()}
        found = find_columns(record, task, columns, labelled=False)
        yield checked(taken(place, record, found, {}, task), task, labelled=False).fields
