"""The cleaning of documents: repair, quality, duplicates, personal data. One pass, in the order of the sources.

``examine`` inspects one document by itself, so several processes can share the work. Duplicates depend on the documents
before, so ``keep_documents`` finds them in one process.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal, get_args

from fastattn.errors import input_error
from fastattn.lm.data.clean import STEPS, clean, usable_steps
from fastattn.lm.data.duplicates import Keys, Table, exact_key, near_keys
from fastattn.lm.data.personal import KINDS, mask
from fastattn.lm.data.quality import RULES, Lengths, broken_rule, is_code
from fastattn.lm.data.report import Report
from fastattn.lm.data.sources import Document, Skipped

Kind = Literal["auto", "prose", "code"]
Masking = Literal["auto", "all", "none"]
Duplicates = Literal["near", "exact", "keep"]
Found = Document | Skipped
VERSION = 2  # of what becomes of a document under the same settings
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
    masked: Mapping[str, int] = field(default_factory=dict)
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


def examined(
    documents: Iterable[Found], cleaning: Cleaning, pool: Executor | None = None, ahead: int = 0
) -> Iterator[Examined | Skipped]:
    """``examine`` of each document in order, between them what was skipped.

    Args:
        documents: from ``read_sources``.
        cleaning: what to do.
        pool: processes that examine; None does it here.
        ahead: batches of documents that they are given before the first result is taken.
    """
    if pool is None:
        yield from (_examine(found, cleaning) for found in documents)
        return
    source, results = iter(documents), deque[Future[list[Examined | Skipped]]]()
    try:
        while True:
            while len(results) < ahead and (batch := list(islice(source, _BATCH))):
                results.append(pool.submit(_examine_all, batch, cleaning))
            if not results:
                return
            yield from results.popleft().result()
    finally:
        for future in results:
            future.cancel()


def _examine(found: Found, cleaning: Cleaning) -> Examined | Skipped:
    return found if isinstance(found, Skipped) else examine(found, cleaning)


def _examine_all(batch: list[Found], cleaning: Cleaning) -> list[Examined | Skipped]:
    return [_examine(found, cleaning) for found in batch]


def keep_documents(found: Iterable[Examined | Skipped], report: Report, folder: Path) -> Iterator[Document]:
    """The documents that break no rule and are no duplicates of earlier ones, in their order.

    Args:
        found: from ``examined``.
        report: receives the counts.
        folder: an empty one for tables of what has been seen; its owner removes it.

    Memory does not grow with the corpus.
    """
    exact, near = Table(folder / "exact"), Table(folder / "near")
    for item in found:
        if isinstance(item, Skipped):
            report.skipped.append(item)
            continue
        rule = item.rule
        if rule is None and item.exact is not None and exact.add(item.exact).any():
            rule = "exact-duplicate"
        if rule is None and item.near is not None and near.add(item.near).any():
            rule = "near-duplicate"
        if rule is not None:
            report.drop(item.name, item.source, rule)
            continue
        report.keep(item.source, len(item.text), item.changed, item.masked)
        yield Document(item.name, item.text, item.source)


def clean_documents(
    documents: Iterable[Found], cleaning: Cleaning, report: Report, folder: Path, *, workers: int = 1
) -> Iterator[Document]:
    """The cleaned documents that are kept, in their order.

    Args:
        documents: from ``read_documents``.
        cleaning: what to do.
        report: receives the counts.
        folder: as in ``keep_documents``.
        workers: processes that examine documents.
    """
    cleaning = cleaning.here()
    report.settings = cleaning.to_dict()
    with ProcessPoolExecutor(workers) if workers > 1 else contextlib.nullcontext() as pool:
        yield from keep_documents(examined(documents, cleaning, pool, 2 * workers), report, folder)
