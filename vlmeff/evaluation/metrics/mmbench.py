"""MMBench: a question counts if it is answered rightly however its options are turned (arXiv 2307.06281)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from vlmeff.errors import DataError
from vlmeff.evaluation.metrics.base import by_category, gold_letter, mean, metrics, option_letters, scored, value
from vlmeff.evaluation.metrics.choice import read_option
from vlmeff.evaluation.samples import Sample, SampleRow

SHIFT = 1_000_000  # index = base question + SHIFT * how far the options are turned


@metrics.register("mmbench")
class MmBench:
    """``circular``: share of base questions of which every shift is right. ``vanilla``: accuracy over base rows alone.

    ``group`` of a row is its base question, the score ``doc_shift`` how far its options are turned (``meta["index"]``
    of the sample divided by a million).
    """

    headline, per_document, binary = "circular", "right", True

    def score(self, sample: Sample, prediction: str) -> dict[str, Any]:
        gold = gold_letter(sample)
        parsed = read_option(prediction, sample.choices or (), option_letters(sample))
        shift = int(sample.meta.get("index", 0)) // SHIFT
        return scored(parsed, {"right": float(parsed == gold), "doc_shift": float(shift)})

    def aggregate(self, rows: Sequence[SampleRow]) -> dict[str, float]:
        """Raises:
        DataError: of a base question a shift is missing or occurs twice (E-DATA-07)."""
        questions: dict[str, dict[float, list[SampleRow]]] = defaultdict(lambda: defaultdict(list))
        for row in rows:
            questions[row.group or row.doc_id][value(row, "doc_shift")].append(row)
        base, all_right = [], {}
        for question, shifts in questions.items():
            check_shifts(question, [int(shift) for shift, same in shifts.items() for _ in same])
            base.append(shifts[0.0][0])
            all_right[question] = min(value(row, "right") for same in shifts.values() for row in same)
        vanilla = by_category(base, "vanilla", lambda part: mean(value(row, "right") for row in part))
        return vanilla | by_category(
            base, "circular", lambda part: mean(all_right[row.group or row.doc_id] for row in part)
        )


def check_shifts(question: str, shifts: Sequence[int]) -> None:
    """Raises:
    DataError: the shifts are not 0, 1, 2, ... each once (E-DATA-07)."""
    if sorted(shifts) != list(range(len(shifts))):
        raise DataError(
            f"E-DATA-07: MMBench's question {question!r} has the circular shifts {sorted(shifts)} instead of "
            f"{list(range(len(shifts)))}; evaluate whole questions."
        )
