"""ChartQA: numbers may be off by 5 % (arXiv 2203.10244)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vlmeff.evaluation.metrics.base import by_category, mean, metrics, scored, value
from vlmeff.evaluation.samples import Sample, SampleRow

TOLERANCE = 0.05


def to_float(text: str) -> float | None:
    """ "12%" -> 0.12, else what ``float`` reads, else None ("3,000" and "$5" are no numbers)."""
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def relaxed_match(prediction: str, target: str) -> bool:
    """|p - t| <= 5 % of |t| where both are numbers and t is not 0, else equal up to upper and lower case."""
    p, t = to_float(prediction), to_float(target)
    if p is not None and t:  # a target of 0 has no relative error
        return abs(p - t) / abs(t) <= TOLERANCE
    return prediction.lower() == target.lower()


@metrics.register("relaxed")
class Relaxed:
    """``overall``: share of right answers; per category "overall/human" and "overall/augmented" on ChartQA."""

    headline, per_document, binary = "overall", "right", True

    def score(self, sample: Sample, prediction: str) -> dict[str, Any]:
        right = any(relaxed_match(prediction, answer) for answer in sample.answers)
        return scored(prediction.strip().lower() or None, {"right": float(right)})

    def aggregate(self, rows: Sequence[SampleRow]) -> dict[str, float]:
        return by_category(rows, "overall", lambda part: mean(value(row, "right") for row in part))
