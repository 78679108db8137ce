"""POPE: does the model say yes to objects that are not there? (arXiv 2305.10355)"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from vlmeff.evaluation.metrics.base import gold_yes, mean, metrics, value
from vlmeff.evaluation.samples import Sample, SampleRow

FIGURES = ("f1", "accuracy", "precision", "recall", "yes_ratio", "accuracy_strict", "unparsed")


def official(prediction: str) -> str:
    """ "yes" or "no" as the authors' ``evaluate.py`` reads it: cut at the first full stop, delete commas, split on
    spaces; one word that is exactly "No", "no" or "not" means no, everything else yes ("NO", "Nope" and "" too).

    Differs from the script in stripping first, so that a line feed at the end does not hide a "no".
    """
    words = prediction.strip().partition(".")[0].replace(",", "").split(" ")
    return "no" if any(word in ("No", "no", "not") for word in words) else "yes"


def strict(prediction: str) -> str | None:
    """lmms-eval's reading: only exactly "yes" or "no" counts."""
    text = prediction.strip().lower()
    return text if text in ("yes", "no") else None


@metrics.register("pope")
class Pope:
    """Positive class: yes. Scores ``right`` and ``right_strict`` by the two readings, ``doc_yes`` the gold label.

    With several splits (random, popular, adversarial) each has figures of its own, "f1/random", and the plain names
    are their means. ``yes_ratio`` is the share of answers read as yes (lmms-eval's counts the gold labels); a model
    that loses too many tokens drifts towards one answer, and shows it there first. Any denominator of 0 gives 0.
    """

    headline, per_document, binary = "f1", "right", True

    def score(self, sample: Sample, prediction: str) -> dict[str, Any]:
        gold = "yes" if gold_yes(sample) else "no"
        parsed = official(prediction)
        scores = {
            "right": float(parsed == gold),
            "right_strict": float(strict(prediction) == gold),
            "doc_yes": float(gold == "yes"),
        }
        # The official reading never fails, so whether anything was said is asked apart.
        unparsed = re.search(r"\b(yes|no)\b", prediction, re.IGNORECASE) is None
        return {"parsed": parsed, "unparsed": unparsed, "scores": scores}

    def aggregate(self, rows: Sequence[SampleRow]) -> dict[str, float]:
        if not rows:
            return {}
        splits = {row.split for row in rows}
        parts = {split: _figures([row for row in rows if row.split == split]) for split in splits}
        out = {name: mean(part[name] for part in parts.values()) for name in FIGURES}
        for split in sorted(split for split in splits if split):
            out |= {f"{name}/{split}": parts[split][name] for name in FIGURES}
        return out


def _figures(rows: Sequence[SampleRow]) -> dict[str, float]:
    pairs = [(value(row, "doc_yes") > 0, value(row, "right") > 0) for row in rows]
    tp, tn = pairs.count((True, True)), pairs.count((False, True))
    fp, fn = pairs.count((False, False)), pairs.count((True, False))
    return {
        "f1": _ratio(2 * tp, 2 * tp + fp + fn),
        "accuracy": _ratio(tp + tn, len(rows)),
        "precision": _ratio(tp, tp + fp),
        "recall": _ratio(tp, tp + fn),
        "yes_ratio": _ratio(tp + fp, len(rows)),
        "accuracy_strict": mean(value(row, "right_strict") for row in rows),
        "unparsed": mean(float(row.unparsed) for row in rows),
    }


def _ratio(part: int, whole: int) -> float:
    return part / whole if whole else 0.0
