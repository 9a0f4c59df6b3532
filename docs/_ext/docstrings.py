"""Turns drawings in docstrings into code blocks and formulas into mathematics; the docstrings are written as plain
text.

A paragraph indented by four spaces or more below the text above it is a drawing, kept unchanged, or a formula. Formulas
are the texts in ``formulas.FORMULAS``, alone or in double backticks, and are set in LaTeX. An entry of that list which
occurs in no docstring of the site is an error.
"""

from __future__ import annotations

import re
from typing import Any

from formulas import FORMULAS
from sphinx.application import Sphinx
from sphinx.util import logging

INDENT = 4
log = logging.getLogger(__name__)


def paragraphs(lines: list[str]) -> list[list[str]]:
    """The lines in groups between empty lines; each empty line is a group of its own."""
    groups: list[list[str]] = []
    for line in lines:
        if not line.strip():
            groups.append([""])
        elif groups and groups[-1] != [""]:
            groups[-1].append(line)
        else:
            groups.append([line])
    return groups


def indent_of(line: str) -> int:
    return len(line) - len(line.lstrip())


def with_drawings(lines: list[str], seen: set[str]) -> list[str]:
    """The lines with a directive before each drawing or formula that stands alone."""
    done: list[str] = []
    margin = 0  # of the text before an empty line
    is_drawing = False
    for group in paragraphs(lines):
        if group == [""]:
            done.append("")
            continue
        indent = indent_of(group[0])
        if is_drawing and indent >= margin + INDENT:  # its next paragraph
            done += group
            continue
        is_drawing = bool(done) and indent >= margin + INDENT
        if is_drawing:
            formula = " ".join(" ".join(group).split())
            at = " " * (indent - INDENT)
            if formula in FORMULAS:
                seen.add(formula)
                done += [f"{at}.. math::", "", f"{' ' * indent}{FORMULAS[formula]}"]
                is_drawing = False
                continue
            done += [f"{at}.. code-block:: text", ""]
        else:
            margin = indent_of(group[-1])
        done += group
    return done


def with_formulas(text: str, seen: set[str]) -> str:
    """The text with each listed formula in mathematics."""

    def typeset(found: re.Match[str]) -> str:
        formula = " ".join(found[1].split())
        if formula not in FORMULAS:
            return found[0]
        seen.add(formula)
        return f":math:`{FORMULAS[formula]}`"

    return re.sub(r"``([^`]+)``", typeset, text)


SEEN: set[str] = set()  # formulas of the docstrings that this build has read


def on_docstring(app: Sphinx, what: str, name: str, value: Any, options: Any, lines: list[str]) -> None:
    lines[:] = with_formulas("\n".join(with_drawings(lines, SEEN)), SEEN).split("\n")


def on_end(app: Sphinx, exception: Exception | None) -> None:
    unused = set(FORMULAS) - SEEN
    if exception is None and unused:
        log.warning("docs/_ext/formulas.py: no docstring on the site has %s", sorted(unused))


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("autodoc-process-docstring", on_docstring, priority=400)  # before napoleon reads the sections
    app.connect("build-finished", on_end)
    return {"parallel_read_safe": False, "parallel_write_safe": True}
