"""``python -m benchmarks predict``: the time of the CUDA kernels on an H200 by a model, without a GPU.

A prediction is a range, from counts alone (``fastattn/backends/cuda/tools/model.py``): it is written down before the
first run, so that a miss is noticed and explained. ``--page`` writes the table of docs/measured.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks import tables
from benchmarks.suites import SUITES
from fastattn.backends.cuda.tools import model
from fastattn.backends.cuda.tools.makespan import Shape
from fastattn.errors import InputError
from fastattn.files import write_text
from fastattn.measure.workload import Workload

SUITES_OF_A_GPU = ("paper", "llm", "features", "small", "telling")
REFUSED = ("intervals", "grid")  # by the cuda backend, in words of Workload
TERMS = {"alibi": "alibi", "bias": "bias", "mask": "mask", "dropout_p": "dropout"}  # words of Workload, of the model
COLUMNS = ["case", "pass", "longest kernel", "limit", "longest block", "ms", "TFLOP/s"]
MARKS = ("<!-- predictions -->\n", "<!-- /predictions -->")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    names = ", ".join(SUITES)
    parser.add_argument(
        "--suite", nargs="+", metavar="NAME", default=list(SUITES_OF_A_GPU), choices=SUITES, help=f"of {names}"
    )
    parser.add_argument("--case", metavar="TEXT", default="", help="only cases whose line contains TEXT")
    parser.add_argument("--page", type=Path, metavar="FILE", help="rewrite the predictions of this page instead")


def run(args: argparse.Namespace) -> int:
    if args.page is not None:
        write_text(args.page, with_predictions(args.page.read_text(encoding="utf-8")))
        return 0
    cases = list(dict.fromkeys(w for name in args.suite for w in SUITES[name].cases if args.case in w.id))
    if not cases:
        raise InputError(f"--case: no case of {', '.join(args.suite)} contains {args.case!r}.")
    print(table(cases))
    return 0


def table(cases: Sequence[Workload]) -> str:
    """A line for each pass of each case; a case that the backend refuses has one that says so."""
    rows: list[Sequence[str]] = []
    asked = [(case, name) for case in cases if not refusals(case) for name in case.passes if name != "both"]
    found = iter(model.predict([_kernels(case, name) for case, name in asked]))
    for case in cases:
        if reasons := refusals(case):
            rows.append([case.id, "", f"not served: {', '.join(reasons)}", "", "", "", ""])
            continue
        for name in (name for name in case.passes if name != "both"):
            rows.append([case.id, name, *_cells(next(found), case.flops()[name])])
    return tables.markdown(COLUMNS, rows)


def refusals(case: Workload) -> list[str]:
    """The features for which the cuda backend does not serve a case."""
    found = [name for name in REFUSED if getattr(case, name)]
    return found + ([case.dtype] if case.dtype == "fp32" else [])


def shape_of(case: Workload) -> Shape:
    """Its sizes, as the model knows them."""
    spec = case.spec
    # Blocks of other documents are left out, so that segments have the work of as many packed sequences.
    has_segments = case.documents > 1 and not case.packed
    lengths = tuple((n, n) for n in case.lengths) if case.packed or has_segments else None
    terms = [term for name, term in TERMS.items() if getattr(case, name)] + ["segments"] * has_segments
    terms += ["bias gradient"] if case.bias and case.bias_grad else []
    sizes = (case.batch, case.s_q, case.s_kv, case.heads_q, case.heads_kv, case.d_qk, case.d_v)
    return Shape(*sizes, spec.left, spec.right, spec.softcap is not None, lengths, tuple(terms))


def _kernels(case: Workload, name: str) -> list[model.Kernel]:
    return model.forward_kernels(shape_of(case)) if name == "forward" else model.backward_kernels(shape_of(case))


def _cells(x: model.Prediction, flops: int) -> list[str]:
    fast, slow = x.seconds
    rate = f"{flops / slow / 1e12:.0f} - {flops / fast / 1e12:.0f}"
    return [x.kernel, x.limit, f"{x.imbalance:.2f}", f"{1e3 * fast:.3g} - {1e3 * slow:.3g}", rate]


def _page_cases() -> Iterator[Workload]:
    """The rows of docs/measured.md: head dims, masks and lengths, 2048 columns of queries and 16k tokens in a batch."""
    for d_qk, d_v, causal, s in (
        (64, 64, False, 16384), (64, 64, True, 16384), (96, 96, False, 16384), (128, 128, False, 2048),
        (128, 128, False, 16384), (128, 128, True, 2048), (128, 128, True, 16384), (192, 128, True, 8192),
        (256, 256, False, 16384),
    ):  # fmt: skip
        yield Workload(s, s, 2048 // d_v, 2048 // d_v, d_qk, d_v, batch=max(1, 16384 // s), causal=causal)
    yield Workload(16384, 16384, 16, 16, 128, 128, causal=True, documents=8, packed=True)
    yield Workload(2048, 2048, 32, 8, 128, 128, causal=True)
    for terms in (
        {"alibi": True},
        {"documents": 8},
        {"dropout_p": 0.1},
        {"mask": True},
        {"bias": True, "bias_grad": False},
    ):
        yield Workload(16384, 16384, 16, 16, 128, 128, causal=True, **terms)


def with_predictions(page: str) -> str:
    """The text of docs/measured.md with the table between its two marks."""
    before, _, rest = page.partition(MARKS[0])
    after = rest.partition(MARKS[1])[2]
    return f"{before}{MARKS[0]}{table(list(_page_cases()))}\n{MARKS[1]}{after}"
