"""Data sets for fine-tuning: from files and folders to checked examples and a report of their content."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

from fastattn.errors import DataError
from fastattn.lm.data.images import is_image
from fastattn.lm.finetune.columns import UNLABELLED, Columns, find_columns, taken
from fastattn.lm.finetune.examples import FIELDS, Example, checked, located
from fastattn.lm.finetune.image_folders import is_image_set
from fastattn.lm.finetune.records import Records, parallel_records, read_records

_TRAIN, _EVAL = ("train",), ("dev", "validation", "valid", "val")  # what the names of splits begin with
_SHARD = re.compile(r"-\d+-of-(\d+)")
_SUFFIXES = (".tsv", ".csv", ".jsonl", ".json", ".parquet", ".conll", ".iob2", ".bio", ".txt")


@dataclass
class Dataset:
    """Examples of a task, and how they were read.

    Attributes:
        name: of the file or files.
        task: a key of ``FIELDS``.
        examples: all of them.
        columns: that were taken, by field.
        skipped: how many examples had no label.
    """

    name: str
    task: str
    examples: list[Example] = field(default_factory=list)
    columns: Columns = field(default_factory=dict)
    skipped: int = 0

    def classes(self) -> Counter[str]:
        """How often each label occurs; empty for a task without labels."""
        field_of = {"classify": "label", "image": "label", "multilabel": "labels", "tag": "labels"}.get(self.task)
        if field_of is None:
            return Counter()
        values = (example.fields[field_of] for example in self.examples)
        return Counter(name for value in values for name in ([value] if isinstance(value, str) else value))

    def summary(self) -> str:
        """The columns taken, the classes with their counts, and the accuracy of the most frequent class."""
        columns = ", ".join(f"{name} = {column}" for name, column in self.columns.items())
        lines = [f"{self.name}: {len(self.examples):,} examples; {columns}"]
        if self.skipped:
            lines.append(f"  {self.skipped:,} examples without a label were left out")
        classes = self.classes()
        if classes:
            shown = ", ".join(f"{name} ({count:,})" for name, count in classes.most_common(10))
            more = f", and {len(classes) - 10:,} more" if len(classes) > 10 else ""
            noun = "class" if len(classes) == 1 else "classes"
            lines.append(f"  {len(classes)} {noun}: {shown}{more}")
        if self.task in ("classify", "image", "tag"):
            share = classes.most_common(1)[0][1] / classes.total()
            lines.append(f"  baseline: always {classes.most_common(1)[0][0]!r} has an accuracy of {share:.4f}")
        if self.task == "regression":
            values = [example.fields["label"] for example in self.examples]
            lines.append(f"  labels from {min(values):g} to {max(values):g}, mean {sum(values) / len(values):g}")
        return "\n".join(lines)


def read_dataset(
    paths: Path | Sequence[Path],
    task: str,
    columns: Mapping[str, str] | None = None,
    *,
    labelled: bool = True,
) -> Dataset:
    """Read one file or folder, or the shards of one; for "seq2seq" two files, whose lines belong together.

    Args:
        paths: a .jsonl, .json, .csv, .tsv, .parquet or CoNLL file, or a folder of ``datasets.Dataset.save_to_disk`` or
            of images (``image_folders``); or images.
        task: a key of ``FIELDS``.
        columns: the column of a field, where its name is not one of the usual.
        labelled: the examples must have the targets of the task.

    Raises:
        DataError: a file is missing or damaged, or holds something that is not an example of the task.
        InputError: ``columns`` names a field that the task does not have.

    Example:
        >>> import pathlib, tempfile
        >>> from fastattn.lm.finetune.datasets import read_dataset
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "train.tsv"
        >>> _ = path.write_text("sentence\\tlabel\\na good film\\t1\\n")
        >>> read_dataset(path, "classify").examples[0].fields
        {'text': 'a good film', 'label': '1'}
    """
    given = [paths] if isinstance(paths, Path) else list(paths)
    is_one = len({_split_of(path) for path in given}) == 1  # a file, or the shards of a split
    of_images = "image" in FIELDS[task].inputs
    if is_one or (of_images and all(map(is_image, given))):
        parts = [read_records(path, of_images=of_images) for path in given]
        records = Records(chain.from_iterable(part.items for part in parts), parts[0].class_names, parts[0].folder)
    elif len(given) == 2 and task == "seq2seq":
        records = parallel_records(*given)
    else:
        raise DataError(f"{len(given)} files for {task}: give one, or for seq2seq two whose lines belong together.")
    found = Dataset(" and ".join(dict.fromkeys(str(_split_of(path)) for path in given)), task)
    for place, record in records.items:
        if not found.columns:
            found.columns = find_columns(record, task, columns or {}, labelled=labelled)
        example = taken(place, record, found.columns, records.class_names, task)
        if labelled and str(example.fields.get("label")) in UNLABELLED and task == "classify":
            found.skipped += 1
            continue
        found.examples.append(checked(located(example, records.folder), task, labelled=labelled))
    if not found.examples:
        if found.skipped:
            raise DataError(f"{found.name} has no labels (all are -1 or -): it is a test set; take one with labels.")
        raise DataError(f"{found.name} holds no examples: each has the fields {FIELDS[task]}.")
    return found


def read_examples(path: Path, task: str) -> list[Example]:
    """The examples of a file; see ``read_dataset``."""
    return read_dataset(path, task).examples


def find_splits(path: Path) -> tuple[list[Path], list[list[Path]]]:
    """The files to learn from, and those of each split to evaluate on: of a folder with splits, as GLUE's are.

    Args:
        path: a file, which has no further splits; a folder with ``train.tsv``, ``dev.tsv`` and the like, or with shards
            of each as on the Hugging Face hub (``train-00000-of-00002.parquet``), in it or in its folder ``data``; one
            of ``datasets.DatasetDict.save_to_disk``; or one of images, with or without folders for the splits.

    Raises:
        DataError: the folder has no training split, or several that are no shards of one, or a shard is missing.
    """
    if not path.is_dir() or (path / "state.json").is_file():
        return [path], []
    inside = sorted(path.iterdir()) + (sorted((path / "data").iterdir()) if (path / "data").is_dir() else [])
    inside = [x for x in inside if x.suffix.lower() in _SUFFIXES or (x / "state.json").is_file() or _is_split(x)]
    splits: dict[Path, list[Path]] = {}
    for file in inside:
        splits.setdefault(_split_of(file), []).append(file)
    train = [split for split in splits if split.name.lower().startswith(_TRAIN)]
    held_out = [files for split, files in splits.items() if split.name.lower().startswith(_EVAL)]
    if not train and is_image_set(path):
        return [path], []
    if len(train) != 1:
        names = ", ".join(split.name for split in train) or "none"
        raise DataError(f"{path} should hold one training file, train.tsv or the like; it holds {names}.")
    for files in (splits[train[0]], *held_out):
        _check_shards(files)
    return splits[train[0]], held_out


def _is_split(path: Path) -> bool:
    """Whether a folder holds the images of a split, and not those of a class that is called like one."""
    return path.name.lower().startswith(_TRAIN + _EVAL) and is_image_set(path)


def _split_of(path: Path) -> Path:
    """The path without the number of a shard."""
    return path.with_name(_SHARD.sub("", path.name))


def _check_shards(files: Sequence[Path]) -> None:
    """Raise DataError unless all shards of a split are there, once."""
    match = _SHARD.search(files[0].name)
    count = int(match[1]) if match else 1
    if len(files) != count:
        raise DataError(f"{files[0].parent} holds {len(files)} of the {count} shards of {_split_of(files[0]).name}.")
