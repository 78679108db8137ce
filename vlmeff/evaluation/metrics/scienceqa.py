"""ScienceQA with pictures: one letter (arXiv 2209.09513)."""

from __future__ import annotations

import re

from vlmeff.evaluation.metrics.base import gold_letter, metrics, scored
from vlmeff.evaluation.metrics.choice import Choice
from vlmeff.evaluation.samples import Sample


def read_letter(prediction: str) -> str | None:
    """A lone letter, "X. ..." or "... The answer is X ...", else None ("(A)" and "A) foo" are not understood).

    The first two forms are lmms-eval's, the third is LLaVA's.
    """
    text = prediction.strip()
    if re.fullmatch("[A-Za-z]", text):
        return text.upper()
    match = re.match(r"([A-Z])\.", text) or re.search(r"The answer is ([A-Z])\b", text)
    return match[1] if match else None


@metrics.register("scienceqa")
class ScienceQa(Choice):
    """Share of answers whose letter is right."""

    def score(self, sample: Sample, prediction: str) -> dict[str, object]:
        parsed = read_letter(prediction)
        return scored(parsed, {"right": float(parsed == gold_letter(sample))})
