"""Training data of the example ``summarise``: functions with their summaries, and two easier tasks before them.

A small model that sees nothing but functions and summaries learns phrases, and not to name what a function names. So it
first repeats pieces of text, and then makes sentences of docstrings and comments from some of their words.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Sequence

from fastattn.lm.examples.stdlib import Sentence, Summary, words

Record = dict[str, str]
_WORDS = 16  # of a function that are read
_FREQUENT = 40  # words that are not given: "the", "of", "return"
_GIVEN = 9  # words of a sentence, at most


def first_words(item: Summary, count: int) -> str:
    """The first words of a function from its name on."""
    return " ".join(_body(item)[:count])


def first_line(item: Summary) -> str:
    """The words of a function's name and arguments: the sentence that it begins with."""
    every = words(item.source.partition("\n")[0])
    return " ".join(every[every.index("def") + 1 :])


def summary_rows(items: Iterable[Summary], variants: int = 1, seed: int = 0) -> list[Record]:
    """Functions, by their first words from the name on and where they are defined, with their summaries.

    Args:
        items: the functions.
        variants: rows of each; those after the first lack some of the words that follow the name.
        seed: of what they lack.
    """
    draw = random.Random(seed)
    rows = []
    for item in items:
        body = _body(item)
        name = len(words(item.source.partition("(")[0])) - (len(words(item.source)) - len(body))
        where = [*words(item.owner), *_place(item.module)]
        for variant in range(variants):
            kept = [word for n, word in enumerate(body) if n < name or variant == 0 or draw.random() > 0.3]
            rows.append({"source": " ".join([*kept[:_WORDS], "in", *where]), "target": item.summary})
    return rows


def copied_rows(texts: Iterable[str], seed: int = 0) -> list[Record]:
    """A piece of 3 to 10 words of each text, to be repeated."""
    draw = random.Random(seed)
    rows = []
    for text in texts:
        parts = text.split()
        count = draw.randint(3, 10)
        begin = draw.randrange(max(1, len(parts) - count))
        piece = " ".join(parts[begin : begin + count])
        rows.append({"source": piece, "target": piece})
    return rows


def sentence_rows(sentences: Sequence[Sentence], functions: Sequence[Summary], seed: int = 0) -> list[Record]:
    """Sentences to be made from most of their rarer words, which words of a function may follow.

    Args:
        sentences: what is to be made.
        functions: any, whose words do not help.
        seed: of what is left out and put in.
    """
    draw = random.Random(seed)
    counts = Counter(word for sentence in sentences for word in words(sentence.text))
    frequent = {word for word, _ in counts.most_common(_FREQUENT)}
    rows = []
    for sentence in sentences:
        every = words(sentence.text)
        left_out = draw.choice((0.0, 0.0, 0.3))
        given = [word for word in every if word not in frequent and draw.random() >= left_out][:_GIVEN] or every[:2]
        others = _body(draw.choice(functions))
        begin = draw.randrange(max(1, len(others)))
        others = others[begin : begin + draw.choice((0, 4, 8))]
        source = " ".join([*given, *others, "in", *_place(sentence.module)])
        rows.append({"source": source, "target": sentence.text})
    return rows


def _body(item: Summary) -> tuple[str, ...]:
    """The words of a function from its name on."""
    every = words(item.source)
    return every[every.index("def") + 1 :]


def _place(module: str) -> tuple[str, ...]:
    return words(module.removesuffix(".py"))
