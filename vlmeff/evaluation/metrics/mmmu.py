"""MMMU: multiple choice with a guess as fallback, and open questions (arXiv 2311.16502)."""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Sequence
from typing import Any

from vlmeff.evaluation.metrics.base import gold_letter, mean_by_category, metrics, option_letters
from vlmeff.evaluation.samples import Sample, SampleRow

INDICATORS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
NUMBERS = (
    r"-?\b\d{1,3}(?:,\d{3})+\b",  # groups of three
    r"-?\d+(?:\.\d+)?[eE][+-]?\d+",  # scientific
    r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])",  # plain
)


def read_option(prediction: str, choices: Sequence[str], letters: str) -> str | None:
    """The option an answer names, by the first form that occurs at all: "(X)", "X ", "X.", the text of an option
    (in answers of more than five words). Of several the one named last. None: no form occurs.

    "USA is it" names A, as in the official code.
    """
    for mark in ",.!?;:'":
        prediction = prediction.strip(mark)
    text = f" {prediction} "
    lowered = text.lower()
    texts = dict(zip(letters, (choice.lower() for choice in choices), strict=True))
    if found := [x for x in letters if f"({x})" in text]:
        return max(found, key=lambda x: text.rfind(f"({x})"))
    if found := [x for x in letters if f"{x} " in text] or [x for x in letters if f"{x}." in text]:
        return max(found, key=lambda x: text.rfind(f" {x} "))
    if len(text.split()) > 5 and (found := [x for x in letters if texts[x] in lowered]):
        return max(found, key=lambda x: lowered.rfind(texts[x]))
    return None


def guess(doc_id: str, letters: str) -> str:
    """A random option that depends on the document alone, so that the runs of a pair guess alike."""
    digest = hashlib.sha256(doc_id.encode()).hexdigest()
    return random.Random(int(digest[:16], 16)).choice(letters)


def candidates(prediction: str) -> set[str | float]:
    """What an open answer may mean: its key parts and every number in them, normalised."""
    keys = _key_parts(prediction)
    numbers = [number for key in keys for pattern in NUMBERS for number in re.findall(pattern, key)]
    return {value for text in [*keys, *numbers] for value in _normalized(text)}


def open_match(prediction: str, references: Sequence[str]) -> bool:
    """A reference string occurs in a candidate string, or a reference number equals a candidate number."""
    gold = [value for answer in references for value in _normalized(answer)]
    words = [value for value in gold if isinstance(value, str)]
    return any(
        any(word in candidate for word in words) if isinstance(candidate, str) else candidate in gold
        for candidate in candidates(prediction)
    )


def _key_parts(prediction: str) -> list[str]:
    """The tail behind the last indicator word of each sentence or line; the whole answer if there is none.

    Sentences are told apart before lower-casing: the official code lower-cases first and then looks for a capital
    letter behind the full stop, so that its sentences never end.
    """
    sentences = re.split(r"\.\s(?=[A-Z])|\n", prediction.strip().strip("."))
    keys = []
    for i, sentence in enumerate(sentences):
        sentence, last = sentence.lower(), i == len(sentences) - 1
        marks = (*INDICATORS, "=") if last else INDICATORS
        tails = [sentence.rpartition(mark)[2].strip() for mark in marks if mark in sentence]
        if tails and (tail := min(tails, key=len)) not in ("", *":,.!?;'"):
            keys.append(tail)
    return keys or [prediction.strip().strip(".").lower()]


def _normalized(text: str) -> list[str | float]:
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        lowered = text.lower()
        # A single letter would be found in every word; with a space it has to stand alone on one side.
        return [f" {lowered}", f"{lowered} "] if len(lowered) == 1 else [lowered]


@metrics.register("mmmu")
class Mmmu:
    """``accuracy`` over instances, with guesses where no option was read; ``acc_no_guess`` counts those as wrong.

    A sample with ``choices`` is multiple choice, one without is open. Categories: "discipline/subject".
    """

    headline, per_document, binary = "accuracy", "right", True

    def score(self, sample: Sample, prediction: str) -> dict[str, Any]:
        if not sample.choices:
            right = float(open_match(prediction, sample.answers))
            parsed = " | ".join(sorted(str(value) for value in candidates(prediction))) if prediction.strip() else None
            return {"parsed": parsed, "unparsed": parsed is None, "scores": {"right": right, "right_no_guess": right}}
        letters = option_letters(sample)
        read = read_option(prediction, sample.choices, letters)
        parsed = read or guess(sample.doc_id, letters)
        gold = gold_letter(sample)
        scores = {"right": float(parsed == gold), "right_no_guess": float(read == gold)}
        return {"parsed": parsed, "unparsed": read is None, "scores": scores}

    def aggregate(self, rows: Sequence[SampleRow]) -> dict[str, float]:
        accuracy = mean_by_category(rows, "accuracy", "right")
        return accuracy | mean_by_category(rows, "acc_no_guess", "right_no_guess")
