"""The way of a document: repair, quality, duplicates, personal data. One pass, in the order of the sources.

What can be said of a document by itself is said by ``examine``, in several processes if wanted; what depends on those
before it (duplicates) is decided in the one that reads.
"""

from __future__ import annotations

import contextlib
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal, get_args

from fastattn.errors import input_error
from fastattn.lm.data.clean import STEPS, clean, usable_steps
from fastattn.lm.data.duplicates import Keys, Table, exact_key, near_keys
from fastattn.lm.data.personal import KINDS, mask
from fastattn.lm.data.quality import RULES, Lengths, broken_rule, is_code
from fastattn.lm.data.report import Report
from fastattn.lm.data.sources import Document

Kind = Literal["auto", "prose", "code"]
Masking = Literal["auto", "all", "none"]
Duplicates = Literal["near", "exact", "keep"]
_BATCH = 64  # documents sent to a process at a time


@dataclass(frozen=True)
class Cleaning:
    """Settings of cleaning.

    Attributes:
        steps: repairs, by their names in ``fastattn.lm.data.clean.STEPS``.
        kind: judge documents as "prose" or "code"; "auto" goes by the suffix of the file.
        quality: apply the rules of ``fastattn.lm.data.quality``.
        without: rules that are turned off.
        min_words: fewest words of prose.
        max_words: most words.
        duplicates: "near" drops near and exact ones, "exact" only those, "keep" none.
        personal: "all" masks every kind of personal data, "none" nothing; "auto" masks all of it in prose, and in
            source code, where other numbers look like it, e-mail addresses.
    """

    steps: tuple[str, ...] = tuple(STEPS)
    kind: Kind = "auto"
    quality: bool = True
    without: tuple[str, ...] = ()
    min_words: int = Lengths.min_words
    max_words: int = Lengths.max_words
    duplicates: Duplicates = "near"
    personal: Masking = "auto"

    def __post_init__(self) -> None:
        for name, allowed in (("kind", Kind), ("duplicates", Duplicates), ("personal", Masking)):
            if getattr(self, name) not in get_args(allowed):
                raise input_error(name, repr(getattr(self, name)), ", ".join(get_args(allowed)), "Choose one of them.")
        for rule in self.without:
            if rule not in RULES:
                raise input_error("without", repr(rule), ", ".join(RULES), "These are the rules.")
        if not 0 <= self.min_words <= self.max_words:
            given = f"{self.min_words} and {self.max_words}"
            raise input_error(
                "min_words and max_words", given, "0 <= min_words <= max_words", "50 and 100000 are usual."
            )

    @classmethod
    def none(cls) -> Cleaning:
        """Leave every document as it is."""
        return cls(steps=(), quality=False, duplicates="keep", personal="none")

    def here(self) -> Cleaning:
        """Without the steps whose package is missing."""
        return replace(self, steps=usable_steps(self.steps))

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def is_code(self, source: str) -> bool:
        return is_code(source) if self.kind == "auto" else self.kind == "code"

    def masked_kinds(self, code: bool) -> tuple[str, ...]:
        if self.personal == "none":
            return ()
        return ("email",) if self.personal == "auto" and code else tuple(KINDS)


@dataclass(frozen=True)
class Examined:
    """The result of inspecting one document; ``rule`` is the quality rule that it breaks."""

    name: str
    source: str
    text: str
    rule: str | None
    changed: tuple[str, ...] = ()
    masked: Counter[str] | None = None
    exact: Keys | None = None
    near: Keys | None = None


def examine(document: Document, cleaning: Cleaning) -> Examined:
    """Repair, judge and mask one document, and hash it for the search for duplicates."""
    text, changed = clean(document.text, cleaning.steps)
    if document.repaired:
        changed = ("bytes", *changed)
    code = cleaning.is_code(document.source)
    rule = None if text.strip() else "empty"
    if cleaning.quality and rule is None:
        lengths = Lengths(cleaning.min_words, cleaning.max_words)
        rule = broken_rule(text, code, lengths, frozenset(cleaning.without))
    if rule is not None:
        return Examined(document.name, document.source, "", rule)
    text, masked = mask(text, cleaning.masked_kinds(code))
    return Examined(
        document.name,
        document.source,
        text,
        None,
        changed,
        masked,
        exact_key(text) if cleaning.duplicates != "keep" else None,
        near_keys(text) if cleaning.duplicates == "near" else None,
    )


def clean_documents(
    documents: Iterable[Document], cleaning: Cleaning, report: Report, folder: Path, *, workers: int = 1
) -> Iterator[Document]:
    """The documents that are kept, as they are kept, in their order.

    Args:
        documents: from ``read_documents``.
        cleaning: what to do.
        report: receives the counts.
        folder: an empty one for tables of what has been seen; its owner removes it.
        workers: processes that examine documents.

    Memory holds a few batches of documents, whatever the size of the corpus.
    """
    cleaning = cleaning.here()
    report.settings = cleaning.to_dict()
    exact, near = Table(folder / "exact"), Table(folder / "near")
    for found in _examined(documents, cleaning, workers):
        rule = found.rule
        if rule is None and found.exact is not None and exact.add(found.exact).any():
            rule = "exact-duplicate"
        if rule is None and found.near is not None and near.add(found.near).any():
            rule = "near-duplicate"
        if rule is not None:
            report.drop(found.name, found.source, rule)
            continue
        report.keep(found.source, len(found.text), found.changed, found.masked or Counter())
        yield Document(found.name, found.text, found.source)


def _examined(documents: Iterable[Document], cleaning: Cleaning, workers: int) -> Iterator[Examined]:
    """``examine`` of each in order; with processes, a few batches ahead of whoever takes the results."""
    if workers <= 1:
        for document in documents:
            yield examine(document, cleaning)
        return
    source = iter(documents)
    with ProcessPoolExecutor(workers) as pool, contextlib.ExitStack() as stack:
        ahead: deque[Future[list[Examined]]] = deque()
        stack.callback(lambda: [future.cancel() for future in ahead])
        while True:
            while len(ahead) < 2 * workers and _submit(pool, ahead, source, cleaning):
                pass
            if not ahead:
                return
            yield from ahead.popleft().result()


def _submit(
    pool: Executor, ahead: deque[Future[list[Examined]]], source: Iterator[Document], cleaning: Cleaning
) -> bool:
    batch = list(islice(source, _BATCH))
    if batch:
        ahead.append(pool.submit(_examine_all, batch, cleaning))
    return bool(batch)


def _examine_all(batch: list[Document], cleaning: Cleaning) -> list[Examined]:
    return [examine(document, cleaning) for document in batch]
