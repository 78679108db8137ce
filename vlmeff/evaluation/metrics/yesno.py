"""Yes/no questions, read as MME reads them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vlmeff.evaluation.metrics.base import gold_yes, mean, mean_by_category, metrics, scored, value
from vlmeff.evaluation.samples import Sample, SampleRow


def read_yes_no(prediction: str) -> str | None:
    """ "yes", "no" or None: lower case, stripped, full stops deleted; the whole answer, or "y"/"n", or what the first
    four characters contain ("None" and "Not sure" are no, "**Yes**" is neither)."""
    text = prediction.lower().strip().replace(".", "")
    if text in ("y", "n"):
        return "yes" if text == "y" else "no"
    return next((word for word in ("yes", "no") if word in text[:4]), None)


@metrics.register("yesno")
class YesNo:
    """Share of right answers; one in which neither yes nor no was read is wrong."""

    headline, per_document, binary = "accuracy", "right", True

    def score(self, sample: Sample, prediction: str) -> dict[str, Any]:
        gold, parsed = gold_yes(sample), read_yes_no(prediction)
        right = parsed == ("yes" if gold else "no")
        return scored(parsed, {"right": float(right), "said_yes": float(parsed == "yes"), "doc_yes": float(gold)})

    def aggregate(self, rows: Sequence[SampleRow]) -> dict[str, float]:
        ratio = {"yes_ratio": mean(value(row, "said_yes") for row in rows)} if rows else {}
        return mean_by_category(rows, "accuracy", "right") | ratio
