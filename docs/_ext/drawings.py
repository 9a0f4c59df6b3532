"""What the site draws from the code: ``{mask}``, which query sees which key, and ``{commands}``, the command line.

Masks come from ``spec.keep`` as SVG that follows the colours of the page, commands from their parsers.
"""

from __future__ import annotations

import os
from typing import Any, ClassVar

from docutils import nodes
from docutils.parsers.rst import directives
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from fastattn.cli import make_parser
from fastattn.spec import ANCHORS, AttentionSpec, keep

CELL, MARGIN = 18, 46


def side(text: str) -> int | None:
    """An option that is a number of keys, or None for no bound."""
    return None if text == "None" else int(text)


def numbers(text: str) -> list[int]:
    return [int(word) for word in text.split()]


class Mask(SphinxDirective):
    """A grid of S_q rows and S_kv columns. ``:segments:`` are the documents of the tokens, S_q = S_kv of them."""

    option_spec: ClassVar = {
        "s_q": directives.positive_int,
        "s_kv": directives.positive_int,
        "left": side,
        "right": side,
        "anchor": lambda text: directives.choice(text, ANCHORS),
        "segments": numbers,
    }
    required_arguments, final_argument_whitespace = 1, True

    def run(self) -> list[nodes.Node]:
        o = self.options
        segments = o.get("segments")
        s_q, s_kv = (len(segments), len(segments)) if segments else (o["s_q"], o["s_kv"])
        spec = AttentionSpec(1.0, None, o.get("left"), o.get("right"), o.get("anchor", "lower_right"))
        kept = [[bool(keep(spec, i, j, s_q, s_kv)) for j in range(s_kv)] for i in range(s_q)]
        if segments:
            kept = [[cell and segments[i] == segments[j] for j, cell in enumerate(row)] for i, row in enumerate(kept)]
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
    app.add_directive("commands", Commands)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
