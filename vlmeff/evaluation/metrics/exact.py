"""Exact match with any reference after normalising both sides."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vlmeff.evaluation import normalize
from vlmeff.evaluation.metrics.base import mean_by_category, metrics, scored
from vlmeff.evaluation.samples import Sample, SampleRow


@metrics.register("exact")
class Exact:
    """Equal to a reference in lower case, stripped, without one trailing full stop."""

    headline, per_document, binary = "accuracy", "right", True
    normalize = staticmethod(normalize.plain)

    def score(self, sample: Sample, prediction: str) -> dict[str, Any]:
        given = self.normalize(prediction)
        right = any(self.normalize(answer) == given for answer in sample.answers)
        return scored(given or None, {"right": float(right)})

    def aggregate(self, rows: Sequence[SampleRow]) -> dict[str, float]:
        return mean_by_category(rows, "accuracy", "right")


@metrics.register("exact_nopunct")
class ExactWithoutPunctuation(Exact):
    """GQA: equal in lower case without punctuation; articles and spaces count ("a dog" is not "dog")."""

    normalize = staticmethod(normalize.no_punctuation)
