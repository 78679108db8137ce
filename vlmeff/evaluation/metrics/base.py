"""What a metric is, the registry of metrics, and the few steps that all of them share."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol, runtime_checkable

from vlmeff.errors import DataError
from vlmeff.evaluation.samples import Sample, SampleRow
from vlmeff.registry import Registry

FACT = "doc_"  # a score of this prefix is a fact of the document (its gold label, ...), true whatever the model says


@runtime_checkable
class Metric(Protocol):
    """``headline``: the key of ``aggregate`` that a table shows. ``per_document``: the key of ``scores`` that pairs are
    compared by; a document without it is no part of the headline. ``binary``: whether that is 0 or 1."""

    @property
    def headline(self) -> str: ...

    @property
    def per_document(self) -> str: ...

    @property
    def binary(self) -> bool: ...

    def score(self, sample: Sample, prediction: str) -> dict[str, Any]:
        """{"parsed": str | None, "unparsed": bool, "scores": {name: number}} of one answer."""
        ...

    def aggregate(self, rows: Sequence[SampleRow]) -> dict[str, float]:
        """Figures of a run, from its stored rows alone, in any order; a figure without documents is left out."""
        ...


metrics: Registry[Metric] = Registry("metric")


def scored(parsed: str | None, scores: dict[str, float]) -> dict[str, Any]:
    """What ``score`` returns; an answer in which nothing was read is ``unparsed``."""
    return {"parsed": parsed, "unparsed": parsed is None, "scores": scores}


def failed(metric: Metric, sample: Sample) -> dict[str, Any]:
    """What to store for a document whose generation failed: wrong in every score, its facts kept."""
    scores = metric.score(sample, "")["scores"]
    return scored(None, {name: value if name.startswith(FACT) else 0.0 for name, value in scores.items()})


def value(row: SampleRow, key: str) -> float:
    """A stored score; 0 where generation failed, unless it is a fact of the document."""
    return float(row.scores[key]) if row.error is None or key.startswith(FACT) else 0.0


def mean(values: Iterable[float]) -> float:
    """Mean that does not depend on the order, to the last bit; 0 of nothing."""
    values = list(values)
    return math.fsum(values) / len(values) if values else 0.0


def levels(category: str | None) -> list[str]:
    """Names a document is reported under: "science/biology" counts for "science" and for "science/biology"."""
    parts = category.split("/") if category else []
    return ["/".join(parts[: i + 1]) for i in range(len(parts))]


def by_category(
    rows: Sequence[SampleRow],
    name: str,
    figure: Callable[[list[SampleRow]], float],
    *,
    names: Callable[[SampleRow], Iterable[str]] = lambda row: levels(row.category),
) -> dict[str, float]:
    """{"name": figure of all rows, "name/category": figure of those of each category}; {} of no rows."""
    parts: dict[str, list[SampleRow]] = defaultdict(list)
    for row in rows:
        for part in names(row):
            parts[part].append(row)
    whole = {name: figure(list(rows))} if rows else {}
    return whole | {f"{name}/{part}": figure(parts[part]) for part in sorted(parts)}


def mean_by_category(rows: Sequence[SampleRow], name: str, key: str) -> dict[str, float]:
    """``by_category`` of the mean of a stored score."""
    return by_category(rows, name, lambda part: mean(value(row, key) for row in part))


def gold_yes(sample: Sample) -> bool:
    """Whether the reference of a yes/no question is "yes".

    Raises:
        DataError: it is neither "yes" nor "no" (E-DATA-03).
    """
    gold = sample.answers[0].strip().lower()
    if gold not in ("yes", "no"):
        raise DataError(
            f"E-DATA-03: document {sample.doc_id!r} has the answer {gold!r}: a yes/no question needs 'yes' or 'no'."
        )
    return gold == "yes"


def gold_letter(sample: Sample) -> str:
    """Letter of the right option; the reference may be the letter or the text of one option.

    Raises:
        DataError: there are no options, or the reference is none of them (E-DATA-03).
    """
    gold, choices = sample.answers[0].strip(), sample.choices or ()
    letters = option_letters(sample)
    if gold.upper() in letters:
        return gold.upper()
    same = [letter for letter, text in zip(letters, choices, strict=True) if text.strip() == gold]
    if len(same) != 1:
        raise DataError(
            f"E-DATA-03: document {sample.doc_id!r} has the answer {gold!r}, which is neither a letter nor the text of "
            f"exactly one of its {len(choices)} options."
        )
    return same[0]


def option_letters(sample: Sample) -> str:
    """ "ABC" of a document with three options."""
    return "".join(chr(ord("A") + i) for i in range(len(sample.choices or ())))
