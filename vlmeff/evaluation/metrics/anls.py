"""DocVQA: average normalised Levenshtein similarity (arXiv 1905.13648)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vlmeff.errors import MissingExtraError
from vlmeff.evaluation.metrics.base import mean_by_category, metrics, scored
from vlmeff.evaluation.samples import Sample, SampleRow

THRESHOLD = 0.5


def anls(prediction: str, references: Sequence[str]) -> float:
    """s = 1 - min_g Levenshtein(g', p') / max(len(g), len(p)), and 0 where s < 0.5.

    g' and p' are in lower case with single spaces; the lengths are those *before* that. The paper sends s = 0.5 to 0,
    the scripts in use keep it, and so does this.

    Raises:
        MissingExtraError: rapidfuzz is not installed.
    """
    try:
        from rapidfuzz.distance import Levenshtein
    except ImportError as error:
        raise MissingExtraError("rapidfuzz", "eval", "edit distances (DocVQA, metric anls)") from error
    given, best = _fold(prediction), 0.0
    for reference in references:
        length = max(len(reference), len(prediction))
        distance = Levenshtein.distance(_fold(reference), given) / length if length else 0.0
        best = max(best, 1.0 - distance)
    return best if best >= THRESHOLD else 0.0


def _fold(text: str) -> str:
    return " ".join(text.lower().split())


@metrics.register("anls")
class Anls:
    """Mean of ``anls`` over documents."""

    headline, per_document, binary = "anls", "anls", False

    def score(self, sample: Sample, prediction: str) -> dict[str, Any]:
        return scored(_fold(prediction) or None, {"anls": anls(prediction, sample.answers)})

    def aggregate(self, rows: Sequence[SampleRow]) -> dict[str, float]:
        return mean_by_category(rows, "anls", "anls")
