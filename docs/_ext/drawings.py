"""Directives that draw SVG in the colours of the page, and one that prints the help of the command line.

``{mask}`` draws a mask from ``spec.keep`` and ``fastattn.intervals``; ``{layers}`` draws the parts of the package in
rows; ``{commands}`` prints help texts from the parsers of the command line.
"""

from __future__ import annotations

import ast
import os
from collections.abc import Sequence
from typing import Any, ClassVar

from docutils import nodes
from docutils.parsers.rst import directives
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from fastattn import intervals
from fastattn.cli import make_parser
from fastattn.spec import ANCHORS, AttentionSpec, keep

CELL, MARGIN = 18, 46


def side(text: str) -> int | None:
    """An option that is a number of keys, or None for no bound."""
    return None if text == "None" else int(text)


def numbers(text: str) -> list[int]:
    return [int(word) for word in text.split()]


def built(text: str) -> Any:
    """Intervals by a call of their builder with literals, as ``prefix_lm(8, 3)``."""
    call = ast.parse(text, mode="eval").body
    if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name):
        raise ValueError(f"{text!r} is no call of a function of fastattn.intervals")
    named = {word.arg: ast.literal_eval(word.value) for word in call.keywords if word.arg}
    return getattr(intervals, call.func.id)(*map(ast.literal_eval, call.args), **named)


class Mask(SphinxDirective):
    """A grid of S_q rows and S_kv columns.

    ``:segments:`` are the documents of the tokens, S_q = S_kv of them; ``:intervals:`` is a call of a builder, whose
    rows are the queries and, without ``:s_kv:``, as many keys.
    """

    option_spec: ClassVar = {
        "s_q": directives.positive_int,
        "s_kv": directives.positive_int,
        "left": side,
        "right": side,
        "anchor": lambda text: directives.choice(text, ANCHORS),
        "segments": numbers,
        "intervals": built,
    }
    required_arguments, final_argument_whitespace = 1, True

    def run(self) -> list[nodes.Node]:
        o = self.options
        segments, ranges = o.get("segments"), o.get("intervals")
        rows = len(segments) if segments else o["s_q"] if ranges is None else ranges.shape[0]
        s_q, s_kv = rows, o.get("s_kv", rows)
        spec = AttentionSpec(1.0, None, o.get("left"), o.get("right"), o.get("anchor", "lower_right"))
        kept = [[bool(keep(spec, i, j, s_q, s_kv)) for j in range(s_kv)] for i in range(s_q)]
        if segments:
            kept = [[cell and segments[i] == segments[j] for j, cell in enumerate(row)] for i, row in enumerate(kept)]
        if ranges is not None:
            held = intervals.to_mask(ranges, s_kv).tolist()
            kept = [[cell and held[i][j] for j, cell in enumerate(row)] for i, row in enumerate(kept)]
        return [nodes.raw("", figure(self.arguments[0], kept), format="html")]


def figure(title: str, kept: list[list[bool]]) -> str:
    """SVG of a mask with its caption."""
    rows, columns = len(kept), len(kept[0])
    width, height = MARGIN + columns * CELL + 2, MARGIN // 2 + rows * CELL + 2
    cells = "".join(
        f'<rect class="{"kept" if cell else "left-out"}" x="{MARGIN + j * CELL}" y="{MARGIN // 2 + i * CELL}" '
        f'width="{CELL - 2}" height="{CELL - 2}" rx="2"/>'
        for i, row in enumerate(kept)
        for j, cell in enumerate(row)
    )
    text = "; ".join("".join("1" if cell else "0" for cell in row) for row in kept)
    labels = (
        f'<text x="{MARGIN}" y="{MARGIN // 2 - 8}">keys →</text>'
        f'<text x="0" y="{MARGIN // 2 + CELL - 6}">query 0</text>'
        f'<text x="0" y="{MARGIN // 2 + rows * CELL - 6}">{f"query {rows - 1}" if rows > 1 else ""}</text>'
    )
    return (
        f'<figure class="mask"><svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" '
        f'aria-label="{title}: {text}">{labels}{cells}</svg><figcaption>{title}</figcaption></figure>'
    )


class Layers(SphinxDirective):
    """Rows of boxes, a line for each: ``label: name = remark; name = remark``. Arrows lead from row to row."""

    has_content = True
    required_arguments, final_argument_whitespace = 1, True

    def run(self) -> list[nodes.Node]:
        rows = []
        for line in self.content:
            label, _, boxes = line.partition(":")
            pairs = (box.partition("=") for box in boxes.split(";"))
            rows.append((label.strip(), [(name.strip(), remark.strip()) for name, _, remark in pairs]))
        return [nodes.raw("", layers(self.arguments[0], rows), format="html")]


def layers(title: str, rows: Sequence[tuple[str, Sequence[tuple[str, str]]]]) -> str:
    """SVG of the rows: (label, boxes), each box (name, remark)."""
    width, left, height, gap = 860, 130, 54, 34
    shapes = []
    for n, (label, boxes) in enumerate(rows):
        y = 10 + n * (height + gap)
        step = (width - left + 10) / len(boxes)
        shapes.append(f'<text x="0" y="{y + height / 2 + 4}">{label}</text>')
        for m, (name, remark) in enumerate(boxes):
            x, middle = left + m * step, left + (m + 0.5) * step - 5
            shapes.append(f'<rect x="{x:.0f}" y="{y}" width="{step - 10:.0f}" height="{height}" rx="6"/>')
            shapes.append(f'<text x="{middle:.0f}" y="{y + (24 if remark else 31)}" text-anchor="middle">{name}</text>')
            shapes.append(f'<text class="small" x="{middle:.0f}" y="{y + 41}" text-anchor="middle">{remark}</text>')
        if n < len(rows) - 1:
            shapes.append(f'<path d="M{(width + left) / 2:.0f} {y + height + 4} v22 m-5 -6 l5 6 l5 -6"/>')
    box = f"0 0 {width + 4} {len(rows) * (height + gap) - gap + 20}"
    return f'<div class="layers"><svg viewBox="{box}" role="img" aria-label="{title}">{"".join(shapes)}</svg></div>'


class Commands(SphinxDirective):
    """A section with the help text of each command."""

    def run(self) -> list[nodes.Node]:
        os.environ["COLUMNS"] = "92"  # argparse wraps its help to the terminal
        _, commands = make_parser()
        sections: list[nodes.Node] = []
        for name, parser in commands.items():
            section = nodes.section("", nodes.title("", f"fastattn {name}"), ids=[f"fastattn-{name}"])
            section += nodes.literal_block(parser.format_help(), parser.format_help(), language="text")
            sections.append(section)
        return sections


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_directive("mask", Mask)
    app.add_directive("layers", Layers)
    app.add_directive("commands", Commands)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
