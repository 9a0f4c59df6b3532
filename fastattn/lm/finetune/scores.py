"""Scores of predictions. They need ``pip install 'fastattn[eval]'``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch


def label_scores(predicted: Sequence[int], expected: Sequence[int], num_labels: int) -> dict[str, float]:
    """Accuracy, and precision, recall and F1 in the mean over labels (macro) and over examples (micro), in [0, 1].

    Labels that are neither expected nor predicted are left out of the macro means. With one label to each example the
    three micro scores are the accuracy; they are given because people look for them.

    Example:
        >>> from fastattn.lm.finetune.scores import label_scores
        >>> label_scores([0, 1, 1], [0, 1, 0], num_labels=2)["recall (macro)"]
        0.75
    """
    from torchmetrics.functional.classification import (
        multiclass_accuracy,
        multiclass_f1_score,
        multiclass_precision,
        multiclass_recall,
    )

    pair = torch.tensor(predicted), torch.tensor(expected)
    count = max(num_labels, 2)  # the library refuses one label; a second that never occurs changes nothing
    found = {"accuracy": float(multiclass_accuracy(*pair, num_classes=count, average="micro"))}
    scores = {"precision": multiclass_precision, "recall": multiclass_recall, "F1": multiclass_f1_score}
    for average in ("macro", "micro"):
        for name, score in scores.items():
            found[f"{name} ({average})"] = float(score(*pair, num_classes=count, average=average))
    return found


def is_bio(labels: Iterable[str]) -> bool:
    """Whether the labels are those of entities: "O", and "B-..." or "I-...", or bare "B" and "I"."""
    marks = {label.partition("-")[0] for label in labels}
    return bool(marks & {"B", "I"}) and marks <= {"B", "I", "O"}


def entities(labels: Iterable[str]) -> set[tuple[str, int, int]]:
    """Kind, first word and the word after the last of each entity that BIO labels mark.

    "B-x" begins an entity, and so does "I-x" after anything but an "x" (as in CoNLL's older files, IOB1).

    Example:
        >>> from fastattn.lm.finetune.scores import entities
        >>> sorted(entities(["B-person", "I-person", "O", "B-place"]))
        [('person', 0, 2), ('place', 3, 4)]
    """
    found = set()
    begin, kind = 0, None
    for place, label in enumerate([*labels, "O"]):
        mark, _, name = label.partition("-")
        if mark == "I" and name == kind:
            continue
        if kind is not None:
            found.add((kind, begin, place))
        begin, kind = place, None if mark == "O" else name
    return found


def entity_scores(predicted: Sequence[Sequence[str]], expected: Sequence[Sequence[str]]) -> dict[str, float]:
    """Precision, recall and F1 of whole entities, each right if kind, begin and end are, in [0, 1].

    Args:
        predicted: BIO labels of each text.
        expected: as many for each.

    Source:
        Tjong Kim Sang and De Meulder, "Introduction to the CoNLL-2003 shared task", 2003.
    """
    given, wanted = (
        {(text, *entity) for text, labels in enumerate(texts) for entity in entities(labels)}
        for texts in (predicted, expected)
    )
    right = len(given & wanted)
    return {
        "entity precision": right / max(len(given), 1),
        "entity recall": right / max(len(wanted), 1),
        "entity F1": 2 * right / max(len(given) + len(wanted), 1),
    }


def text_scores(predicted: Sequence[str], expected: Sequence[str]) -> dict[str, float]:
    """Exact match in [0, 1], and BLEU, chrF and the F-measures of ROUGE-1, -2 and -L in [0, 100].

    Source:
        Papineni et al., 2002; Popović, 2015 (both as in sacrebleu); Lin, 2004 (as in torchmetrics).
    """
    from sacrebleu import corpus_bleu, corpus_chrf
    from torchmetrics.functional.text.rouge import rouge_score

    references = list(expected)
    hits = sum(p.strip() == e.strip() for p, e in zip(predicted, references, strict=True))
    rouge = rouge_score(list(predicted), references, rouge_keys=("rouge1", "rouge2", "rougeL"))
    return {
        "exact match": hits / max(len(references), 1),
        "BLEU": corpus_bleu(list(predicted), [references]).score,
        "chrF": corpus_chrf(list(predicted), [references]).score,
        **{f"ROUGE-{kind}": 100 * float(rouge[f"rouge{kind}_fmeasure"]) for kind in ("1", "2", "L")},
    }


def answer_scores(predicted: Sequence[str], expected: Sequence[str]) -> dict[str, float]:
    """SQuAD's exact match and token F1 of answers, in [0, 1]; case, articles and punctuation do not count.

    Source:
        Rajpurkar et al., "SQuAD", 2016.
    """
    from torchmetrics.functional.text.squad import squad

    given: list[Any] = [{"id": str(n), "prediction_text": text} for n, text in enumerate(predicted)]
    wanted: list[Any] = [
        {"id": str(n), "answers": {"text": [text], "answer_start": [0]}} for n, text in enumerate(expected)
    ]
    found = squad(given, wanted)
    return {"exact match": float(found["exact_match"]) / 100, "F1": float(found["f1"]) / 100}
