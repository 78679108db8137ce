"""VQA consensus: an answer is as right as the number of annotators who gave it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vlmeff.evaluation import normalize
from vlmeff.evaluation.metrics.base import mean_by_category, metrics, scored
from vlmeff.evaluation.samples import Sample, SampleRow

AGREEING = 3  # so many other annotators make an answer fully right


def consensus(given: str, references: Sequence[str]) -> float:
    """acc = (1/n) sum_i min(1, |{j != i : r_j = given}| / 3), both sides normalised already.

    Leaving one annotator out goes by index: with k of n equal to ``given``, k of the terms see k - 1 others and n - k
    see k. Ten references give 0, 0.3, 0.6, 0.9 and 1 for k = 0, 1, 2, 3 and more.
    """
    n, k = len(references), sum(reference == given for reference in references)
    return (k * min(AGREEING, k - 1) + (n - k) * min(AGREEING, k)) / (AGREEING * n) if k else 0.0


@metrics.register("vqa")
class VqaConsensus:
    """VQAv2. Both sides are always normalised, as lmms-eval and VLMEvalKit do; the official script leaves unanimous
    references as they are, so that "Yes" would be wrong where all ten annotators wrote "yes"."""

    headline, per_document, binary = "accuracy", "consensus", False
    min_references = AGREEING + 1  # fewer can never add up to 1
    normalize = staticmethod(normalize.vqa)

    def score(self, sample: Sample, prediction: str) -> dict[str, Any]:
        given = self.normalize(prediction)
        value = consensus(given, [self.normalize(answer) for answer in sample.answers])
        return scored(given if prediction.strip() else None, {"consensus": value})

    def aggregate(self, rows: Sequence[SampleRow]) -> dict[str, float]:
        return mean_by_category(rows, "accuracy", "consensus")


@metrics.register("vqa_evalai")
class VqaConsensusEvalAi(VqaConsensus):
    """TextVQA and VizWiz: consensus after the tokenisation of their servers."""

    normalize = staticmethod(normalize.evalai)
