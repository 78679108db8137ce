"""Descriptions of mosaics: which of the objects in the reference an answer names, in the right place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vlmeff.evaluation.metrics.base import mean, metrics, scored, value
from vlmeff.evaluation.mosaics import named_objects
from vlmeff.evaluation.samples import Sample, SampleRow


@metrics.register("objects")
class Objects:
    """``objects_right``: share of the reference's objects that are named with colour, shape and place, averaged over
    documents. ``sentences_right``: share of answers that name all of them and no other."""

    headline, per_document, binary = "objects_right", "objects", False

    def score(self, sample: Sample, prediction: str) -> dict[str, Any]:
        truth, named = named_objects(sample.answers[0]), named_objects(prediction)
        share = len(truth & named) / len(truth) if truth else float(not named)
        scores = {"objects": share, "sentence": float(truth == named)}
        return scored(", ".join(sorted(map(str, named))) or None, scores)

    def aggregate(self, rows: Sequence[SampleRow]) -> dict[str, float]:
        if not rows:
            return {}
        return {
            "objects_right": mean(value(row, "objects") for row in rows),
            "sentences_right": mean(value(row, "sentence") for row in rows),
        }
