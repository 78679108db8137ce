"""Multiple choice: which option does an answer name?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vlmeff.evaluation.metrics.base import gold_letter, mean_by_category, metrics, option_letters, scored
from vlmeff.evaluation.samples import Sample, SampleRow

# How a letter X may stand in a sentence, tried in this order.
WRAPPERS = "X. X, X: X) X). (X) (X). :X :X, :X. :X) :X).".split()


def read_option(prediction: str, choices: Sequence[str], letters: str) -> str | None:
    """The letter an answer names, else the option whose text it contains, else None (VLMEvalKit's ``can_infer``).

    A bare letter counts if no other option's letter stands as a word of its own, and not where "A" is among more than
    three words: it may be the article.
    """
    words = prediction.split()
    bare = [letter for letter in letters if letter in words]
    if len(bare) == 1 and not ("A" in words and len(words) > 3):
        return bare[0]
    for wrapper in WRAPPERS:
        found = [letter for letter in letters if wrapper.replace("X", letter) in words]
        if len(found) == 1:
            return found[0]
    lowered = prediction.lower()
    named = [letter for letter, text in zip(letters, choices, strict=True) if text.lower() in lowered]
    return named[0] if len(named) == 1 else None


@metrics.register("choice")
class Choice:
    """Share of answers that name the right option; none named is wrong. No judge model is asked."""

    headline, per_document, binary = "accuracy", "right", True

    def score(self, sample: Sample, prediction: str) -> dict[str, Any]:
        gold = gold_letter(sample)
        parsed = read_option(prediction, sample.choices or (), option_letters(sample))
        return scored(parsed, {"right": float(parsed == gold)})

    def aggregate(self, rows: Sequence[SampleRow]) -> dict[str, float]:
        return mean_by_category(rows, "accuracy", "right")
