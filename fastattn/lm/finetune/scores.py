"""Scores of predictions. They need ``pip install 'fastattn[eval]'``."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

# To a full stop and the like before a space, to one of Chinese or Japanese, or to the end of a line.
_SENTENCE = re.compile(r".*?(?:[.!?…][\"'”’)\]]*(?=\s|$)|[。！？]|$)", re.MULTILINE)


@dataclass(frozen=True)
class Baseline:
    """Scores of answers that no model is needed for.

    Attributes:
        what: it does.
        scores: of its answers, by name.
    """

    what: str
    scores: dict[str, float]


def score_table(model: Mapping[str, float], baselines: Sequence[Baseline] = (), counts: Collection[str] = ()) -> str:
    """The scores of a model beside those of baselines, as text to read; those that ``counts`` names are marked."""
    names = ["baseline"] if len(baselines) == 1 else [f"baseline {n}" for n in range(1, len(baselines) + 1)]
    width = max(map(len, model))
    lines = [f"{name}: {baseline.what}" for name, baseline in zip(names, baselines, strict=True)]
    lines += [""] * bool(lines) + [f"{'score':<{width}}" + "".join(f"  {name:>10}" for name in (*names, "model"))]
    for name, value in model.items():
        row = [*(baseline.scores.get(name) for baseline in baselines), value]
        cells = "".join(f"  {'' if x is None else f'{x:.4f}':>10}" for x in row)
        lines.append(f"{name:<{width}}{cells}" + ("  <- counts" if name in counts else ""))
    return "\n".join(lines)


def first_sentence(text: str) -> str:
    """The first sentence, or line if that ends earlier: the summary to beat, since many texts begin with their point.

    Source:
        The lead baseline of See et al., "Get To The Point: Summarization with Pointer-Generator Networks", 2017.

    Example:
        >>> from fastattn.lm.finetune.scores import first_sentence
        >>> first_sentence("It fell 3.5 % today. Nobody knows why.")
        'It fell 3.5 % today.'
    """
    found = _SENTENCE.match(text.strip())
    return found[0].strip() if found else ""


def label_scores(predicted: Sequence[int], expected: Sequence[int], num_labels: int) -> dict[str, float]:
    """Accuracy; precision, recall and F1 in the mean over labels (macro); and Matthews' correlation, in [-1, 1].

    Labels that are neither expected nor predicted are left out of the means. The means over examples (micro) are the
    accuracy, and not repeated. With two labels there is the F1 of the second one, too, as MRPC and QQP report it.

    Source:
        Matthews, "Comparison of the predicted and observed secondary structure of T4 phage lysozyme", 1975.

    Example:
        >>> from fastattn.lm.finetune.scores import label_scores
        >>> label_scores([0, 1, 1], [0, 1, 0], num_labels=2)["recall (macro)"]
        0.75
    """
    from torchmetrics.functional.classification import (
        multiclass_accuracy,
        multiclass_f1_score,
        multiclass_matthews_corrcoef,
        multiclass_precision,
        multiclass_recall,
    )

    pair = torch.tensor(predicted), torch.tensor(expected)
    count = max(num_labels, 2)  # the library refuses one label; a second that never occurs changes nothing
    found = {"accuracy": float(multiclass_accuracy(*pair, num_classes=count, average="micro"))}
    scores = {"precision": multiclass_precision, "recall": multiclass_recall, "F1": multiclass_f1_score}
    found |= {
        f"{name} (macro)": float(score(*pair, num_classes=count, average="macro")) for name, score in scores.items()
    }
    if num_labels == 2:
        found["F1 (second label)"] = float(multiclass_f1_score(*pair, num_classes=2, average="none")[1])
    return found | {"Matthews": float(multiclass_matthews_corrcoef(*pair, num_classes=count))}


def multilabel_scores(predicted: Sequence[Sequence[bool]], expected: Sequence[Sequence[bool]]) -> dict[str, float]:
    """Exact match of all labels of an example; precision, recall and F1 over all pairs (micro); F1 over labels (macro).

    Args:
        predicted: for each example whether each label was given, in one order.
        expected: likewise.

    Example:
        >>> from fastattn.lm.finetune.scores import multilabel_scores
        >>> multilabel_scores([[True, False], [True, True]], [[True, False], [False, True]])["exact match"]
        0.5
    """
    given, wanted = torch.tensor(predicted), torch.tensor(expected)
    right = (given & wanted).sum(0).double()
    each = 2 * right / (given.sum(0) + wanted.sum(0)).clamp(min=1)
    hits, found, there = float(right.sum()), float(given.sum()), float(wanted.sum())
    return {
        "exact match": float((given == wanted).all(dim=1).double().mean()),
        "precision (micro)": hits / max(found, 1),
        "recall (micro)": hits / max(there, 1),
        "F1 (micro)": 2 * hits / max(found + there, 1),
        "F1 (macro)": float(each.mean()),
    }


def regression_scores(predicted: Sequence[float], expected: Sequence[float]) -> dict[str, float]:
    """Pearson's and Spearman's correlation, in [-1, 1], 0 if either side is constant; mean squared and absolute error.

    Example:
        >>> from fastattn.lm.finetune.scores import regression_scores
        >>> round(regression_scores([1.0, 2.0, 4.0], [1.0, 2.0, 3.0])["Spearman"], 3)
        1.0
    """
    from torchmetrics.functional.regression import pearson_corrcoef, spearman_corrcoef

    pair = torch.tensor(predicted, dtype=torch.float64), torch.tensor(expected, dtype=torch.float64)
    differs = all(len(x) > 1 and float(x.std()) > 0 for x in pair)
    error = pair[0] - pair[1]
    return {
        "Pearson": float(pearson_corrcoef(*pair)) if differs else 0.0,
        "Spearman": float(spearman_corrcoef(*pair)) if differs else 0.0,
        "mean squared error": float((error**2).mean()),
        "mean absolute error": float(error.abs().mean()),
    }


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
        # Without "effective order" answers that are all shorter than 4 words have a BLEU of 0, even if all are right.
        "BLEU": corpus_bleu(list(predicted), [references], use_effective_order=True).score,
        "chrF": corpus_chrf(list(predicted), [references]).score,
        **{f"ROUGE-{kind}": 100 * float(rouge[f"rouge{kind}_fmeasure"]) for kind in ("1", "2", "L")},
    }


def answer_scores(predicted: Sequence[str], expected: Sequence[Sequence[str]]) -> dict[str, float]:
    """SQuAD's exact match and token F1 of answers, in [0, 1]; case, articles and punctuation do not count.

    Args:
        predicted: an answer to each question, "" for none.
        expected: the answers to each that are right, of which the best match counts; [""] if there is none.

    Source:
        Rajpurkar et al., "SQuAD", 2016.
    """
    from torchmetrics.functional.text.squad import squad

    given: list[Any] = [{"id": str(n), "prediction_text": text} for n, text in enumerate(predicted)]
    wanted: list[Any] = [
        {"id": str(n), "answers": {"text": list(texts), "answer_start": [0] * len(texts)}}
        for n, texts in enumerate(expected)
    ]
    found = squad(given, wanted)
    return {"exact match": float(found["exact_match"]) / 100, "F1": float(found["f1"]) / 100}
