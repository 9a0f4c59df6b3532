"""Counts of kept and dropped documents by file and by rule, as a table and as JSON."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from fastattn.lm.data.sources import Skipped

_EXAMPLES = 3
_SHOWN = 12


@dataclass
class FileCounts:
    """Documents of one file: read, kept, and dropped by the name of the rule."""

    read: int = 0
    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)


@dataclass
class Report:
    """Counts of a cleaning, as it grows.

    Attributes:
        settings: of the cleaning.
        read: documents read.
        kept: documents kept.
        characters: in the documents kept.
        dropped: documents by the rule that dropped them.
        changed: documents kept that each cleaning step changed.
        masked: places masked, by kind of personal data.
        examples: names of the first documents that each rule dropped.
        files: counts of each file.
        skipped: files that could not be used, or not wholly.
    """

    settings: dict[str, Any] = field(default_factory=dict)
    read: int = 0
    kept: int = 0
    characters: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    changed: Counter[str] = field(default_factory=Counter)
    masked: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)
    files: dict[str, FileCounts] = field(default_factory=dict)
    skipped: list[Skipped] = field(default_factory=list)

    def drop(self, name: str, source: str, rule: str) -> None:
        self._count(source).dropped[rule] += 1
        self.dropped[rule] += 1
        examples = self.examples.setdefault(rule, [])
        if len(examples) < _EXAMPLES:
            examples.append(name)

    def keep(self, source: str, characters: int, changed: tuple[str, ...], masked: Mapping[str, int]) -> None:
        self._count(source).kept += 1
        self.kept += 1
        self.characters += characters
        self.changed.update(changed)
        self.masked.update(masked)

    def _count(self, source: str) -> FileCounts:
        self.read += 1
        counts = self.files.setdefault(source, FileCounts())
        counts.read += 1
        return counts

    def to_dict(self) -> dict[str, Any]:
        content = {item.name: getattr(self, item.name) for item in fields(self)}
        content |= {name: dict(content[name]) for name in ("dropped", "changed", "masked")}
        content["files"] = {
            name: {"read": counts.read, "kept": counts.kept, "dropped": dict(counts.dropped)}
            for name, counts in self.files.items()
        }
        return content | {"skipped": [asdict(skip) for skip in self.skipped]}

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> Report:
        """The inverse of ``to_dict``; keys of others are left alone."""
        own = {item.name: content[item.name] for item in fields(cls)}
        counts = {name: Counter(own[name]) for name in ("dropped", "changed", "masked")}
        files = {name: FileCounts(x["read"], x["kept"], Counter(x["dropped"])) for name, x in content["files"].items()}
        skipped = [Skipped(**skip) for skip in content["skipped"]]
        return cls(**(own | counts | {"files": files, "skipped": skipped}))

    def table(self) -> str:
        """The totals, each rule, step and kind, the files that lost most, and those that were skipped."""
        rows = [("documents read", self.read), ("documents kept", self.kept), ("characters kept", self.characters)]
        rows += [(f"dropped: {rule}", count) for rule, count in self.dropped.most_common()]
        rows += [(f"changed: {step}", count) for step, count in self.changed.most_common()]
        rows += [(f"masked: {kind}", count) for kind, count in self.masked.most_common()]
        width = max(len(name) for name, _ in rows)
        lines = [f"{name:<{width}}  {count:>14,}{self._share(name, count)}" for name, count in rows]
        return "\n".join(lines + self._losers() + self._skips() + self._hint())

    def _share(self, name: str, count: int) -> str:
        return f"  {count / self.read:6.1%}" if name.startswith("dropped") and self.read else ""

    def _losers(self) -> list[str]:
        lost = [(counts.read - counts.kept, name, counts) for name, counts in self.files.items()]
        lost = sorted((item for item in lost if item[0]), key=lambda item: (-item[0], item[1]))
        lines = ["", "files that lost most"] if lost else []
        for count, name, counts in lost[:_SHOWN]:
            rules = ", ".join(f"{rule} {n}" for rule, n in counts.dropped.most_common(3))
            lines.append(f"  {name}: {count} of {counts.read} ({rules})")
        return lines + [f"  ... and {len(lost) - _SHOWN} more"] * (len(lost) > _SHOWN)

    def _skips(self) -> list[str]:
        lines = ["", "files skipped"] if self.skipped else []
        lines += [f"  {skip.name}: {skip.reason}" for skip in self.skipped[:_SHOWN]]
        return lines + [f"  ... and {len(self.skipped) - _SHOWN} more"] * (len(self.skipped) > _SHOWN)

    def _hint(self) -> list[str]:
        """A rule that drops most documents was made for other text."""
        rule, count = next(iter(self.dropped.most_common(1)), ("", 0))
        if 2 * count <= self.read:
            return []
        return ["", f"The rule {rule!r} dropped most documents: if it does not suit this text, --without {rule}."]
