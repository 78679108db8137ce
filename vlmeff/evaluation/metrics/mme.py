"""MME: two yes/no questions for each picture, in points (arXiv 2306.13394)."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from vlmeff.errors import DataError
from vlmeff.evaluation.metrics.base import gold_yes, mean, metrics, scored, value
from vlmeff.evaluation.metrics.yesno import read_yes_no
from vlmeff.evaluation.samples import Sample, SampleRow

PERCEPTION = tuple("existence count position color posters celebrity scene landmark artwork OCR".split())
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")


@metrics.register("mme")
class Mme:
    """Of each category: ``acc``, the share of right questions, plus ``acc_plus``, the share of pictures with both
    questions right, each times 100. ``perception`` and ``cognition`` add up their categories; ``total`` adds up all.

    There is no number per document whose mean is the score: pairs are compared by ``right``, intervals resample
    pictures (``group``).
    """

    headline, per_document, binary = "total", "right", True

    def score(self, sample: Sample, prediction: str) -> dict[str, Any]:
        parsed = read_yes_no(prediction)
        return scored(parsed, {"right": float(parsed == ("yes" if gold_yes(sample) else "no"))})

    def aggregate(self, rows: Sequence[SampleRow]) -> dict[str, float]:
        """Raises:
        DataError: a picture has another number of questions than two (E-DATA-07)."""
        categories: dict[str, dict[str | None, list[float]]] = defaultdict(lambda: defaultdict(list))
        for row in rows:
            categories[row.category or "none"][row.group].append(value(row, "right"))
        out: dict[str, float] = {}
        for category in sorted(categories):
            pictures = categories[category]
            for picture, right in pictures.items():
                if len(right) != 2:
                    raise DataError(
                        f"E-DATA-07: MME's picture {picture!r} ({category}) has {len(right)} questions instead of 2; "
                        "evaluate whole pictures."
                    )
            acc = 100 * mean(x for right in pictures.values() for x in right)
            acc_plus = 100 * mean(float(min(right)) for right in pictures.values())
            out |= {f"acc/{category}": acc, f"acc_plus/{category}": acc_plus, f"score/{category}": acc + acc_plus}
        scores = {name.removeprefix("score/"): score for name, score in out.items() if name.startswith("score/")}
        for name, members in (("perception", PERCEPTION), ("cognition", COGNITION), ("total", tuple(scores))):
            if present := [scores[category] for category in members if category in scores]:
                out[name] = math.fsum(present)
        return out
