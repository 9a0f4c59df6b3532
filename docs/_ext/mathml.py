"""Formulas as MathML, which browsers draw themselves: docutils converts LaTeX while the site is built."""

from __future__ import annotations

from typing import Any

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx

LONG = 60  # characters of LaTeX, from which on a formula scrolls on a phone


def inline(translator: Any, node: nodes.math) -> None:
    formula = tex2mathml(node.astext())
    is_long = len(node.astext()) > LONG
    translator.body.append(f'<span class="formula-inline" tabindex="0">{formula}</span>' if is_long else formula)
    raise nodes.SkipNode


def block(translator: Any, node: nodes.math_block) -> None:
    formula = tex2mathml(node.astext(), as_block=True)
    translator.body.append(f'<div class="formula" tabindex="0">{formula}</div>\n')
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_html_math_renderer("mathml", inline_renderers=(inline, None), block_renderers=(block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
