"""easy-vqa: the open questions are the headline, since a blind model gets 67 % of all questions right."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from vlmeff.evaluation.metrics.base import mean, metrics, scored, value
from vlmeff.evaluation.normalize import first_word
from vlmeff.evaluation.samples import Sample, SampleRow


@metrics.register("easy_vqa")
class EasyVqa:
    """Exact match of the first word.

    ``easy_vqa_open``: over the questions whose answer is a colour or a shape; only they have the score ``open``, so
    only they are paired. ``easy_vqa_color``, ``easy_vqa_shape``: its two parts, by category.
    ``easy_vqa_yesno_balanced``: mean of the accuracies of four kinds of yes/no questions: asked plainly or with a
    "no" or "not", the answer yes or no. ``easy_vqa_all``: every question; meaningless without the blind prior.
    """

    headline, per_document, binary = "easy_vqa_open", "open", True

    def score(self, sample: Sample, prediction: str) -> dict[str, Any]:
        parsed = first_word(prediction)
        gold = first_word(sample.answers[0])
        scores = {"right": float(parsed == gold)}
        if gold in ("yes", "no"):
            negated = re.search(r"\b(no|not)\b", sample.question.lower()) is not None
            scores |= {"doc_yes": float(gold == "yes"), "doc_negated": float(negated)}
        else:
            scores["open"] = scores["right"]
        return scored(parsed or None, scores)

    def aggregate(self, rows: Sequence[SampleRow]) -> dict[str, float]:
        parts: dict[str, list[float]] = defaultdict(list)
        cells: dict[tuple[float, float], list[float]] = defaultdict(list)
        for row in rows:
            right = value(row, "right")
            if "open" in row.scores:
                parts["open"].append(right)
                parts[row.category or "open_other"].append(right)
            else:
                cells[value(row, "doc_yes"), value(row, "doc_negated")].append(right)
        names = ("open", *sorted(set(parts) - {"open"}))
        out = {f"easy_vqa_{name}": mean(parts[name]) for name in names if parts[name]}
        if cells:
            out["easy_vqa_yesno_balanced"] = mean(mean(cell) for cell in cells.values())
        if rows:
            out["easy_vqa_all"] = mean(value(row, "right") for row in rows)
        return out
