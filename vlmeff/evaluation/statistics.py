"""Statistics of paired runs: intervals, tests and verdicts on what a preset costs in accuracy.

Documents of one group (an image with several questions, a question with its circular variants) are not independent:
intervals resample whole groups. "Adding Error Bars to Evals", arXiv 2411.00640. Needs scipy (extra ``eval``), no torch.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from vlmeff.errors import ConfigError, DataError, MissingExtraError
from vlmeff.evaluation.results_schema import Verdict
from vlmeff.evaluation.samples import SampleRow

RESAMPLES = 10_000
# An aggregate in Python costs about a microsecond a row: this many row visits, but never fewer resamples than 1,000.
AGGREGATE_VISITS, FEWEST_RESAMPLES = 1_000_000, 1_000
CELLS = 2**21  # elements of one block of resampled values: 16 MB as float64
Z = 1.960 + 0.842  # two-sided 5 %, power 80 %
FEWEST_GROUPS = 10  # that a verdict is given on

Aggregate = Callable[[Sequence[SampleRow]], Mapping[str, float]]


@dataclass(frozen=True, eq=False)
class Bootstrap:
    """``value`` on the data, its 95 % percentile ``interval`` (None: fewer than two groups), the resampled values."""

    value: float
    interval: tuple[float, float] | None
    distribution: np.ndarray


@dataclass(frozen=True)
class Pairs:
    """Rows of two runs joined by document, in the baseline's order. ``unmatched``: documents that only one run has."""

    baseline: list[SampleRow]
    candidate: list[SampleRow]
    unmatched: int


def _stats() -> Any:
    try:
        from scipy import stats
    except ImportError as error:
        raise MissingExtraError("scipy", "eval", "statistics") from error
    return stats


def percentile_interval(distribution: np.ndarray) -> tuple[float, float] | None:
    """The 2.5 and 97.5 percentiles of the finite values [B]; None where there are none."""
    finite = distribution[np.isfinite(distribution)]
    if finite.size == 0:
        return None
    low, high = np.percentile(finite, (2.5, 97.5))
    return float(low), float(high)


def bootstrap_mean(
    values: np.ndarray, groups: Sequence[str] | None, *, rng: np.random.Generator, resamples: int = RESAMPLES
) -> Bootstrap:
    """The mean of ``values`` [n] and its bootstrap, resampling groups, or documents where each is its own group.

    With groups the resampled statistic is (sum of the drawn groups' sums) / (sum of their sizes). Memory is O(n), the
    values are drawn in blocks of ``CELLS``.
    """
    values = np.asarray(values, np.float64)
    if values.size == 0:
        raise DataError(
            "E-STAT-01: the runs do not cover the same doc ids: none is left to compare. Evaluate both on the same "
            "benchmark and limit."
        )
    value = float(values.mean())
    _, member = np.unique(np.asarray(groups), return_inverse=True) if groups is not None else (None, None)
    if member is None or member.max() + 1 == values.size:
        if values.size < 2:
            return Bootstrap(value, None, np.empty(0))
        result = _stats().bootstrap(
            (values,),
            np.mean,
            n_resamples=resamples,
            batch=max(1, CELLS // values.size),
            vectorized=True,
            method="percentile",
            rng=rng,
        )
        distribution = np.asarray(result.bootstrap_distribution)
        interval = (float(result.confidence_interval.low), float(result.confidence_interval.high))
        return Bootstrap(value, interval, distribution)
    sums, sizes = np.bincount(member, weights=values), np.bincount(member)
    if sums.size < 2:
        return Bootstrap(value, None, np.empty(0))
    distribution = np.empty(resamples)
    block = max(1, CELLS // sums.size)
    for start in range(0, resamples, block):
        drawn = rng.integers(0, sums.size, (min(block, resamples - start), sums.size))
        distribution[start : start + block] = sums[drawn].sum(1) / sizes[drawn].sum(1)
    return Bootstrap(value, percentile_interval(distribution), distribution)


def group_of(row: SampleRow) -> str:
    """The group of ``row``: what is resampled as one. A document without a group is one of its own."""
    return row.doc_id if row.group is None else row.group


def aggregate_resamples(rows: int) -> int:
    """How often a run of this many rows is resampled through its metric's own aggregate."""
    return max(FEWEST_RESAMPLES, min(RESAMPLES, AGGREGATE_VISITS // max(1, rows)))


def bootstrap_aggregate(
    rows: Sequence[SampleRow], aggregate: Aggregate, key: str, *, seed: Sequence[int], within_categories: bool = False
) -> Bootstrap:
    """``aggregate(rows)[key]`` and its bootstrap, for figures that are no mean over documents (F1, MME, circular).

    Groups are drawn, inside their category with ``within_categories`` (MME: images within categories, so that each
    resample has every category at its size). A group that is drawn again goes by another name, so that a metric that
    looks at whole groups still sees whole ones. Two runs over the same documents with the same ``seed`` get the same
    draws: the difference of their distributions is the paired bootstrap.
    """
    by_group: dict[tuple[str, str], list[SampleRow]] = {}
    for row in rows:
        stratum = str(row.category) if within_categories else ""
        by_group.setdefault((stratum, group_of(row)), []).append(row)
    keys = sorted(by_group)
    strata = [np.array([i for i, k in enumerate(keys) if k[0] == name]) for name in sorted({k[0] for k in keys})]
    value = float(aggregate(rows)[key])
    if all(len(stratum) < 2 for stratum in strata):
        return Bootstrap(value, None, np.empty(0))
    copies: dict[tuple[int, int], list[SampleRow]] = {}

    def copy(group: int, number: int) -> list[SampleRow]:
        original = by_group[keys[group]]
        if number == 0:
            return original
        if (group, number) not in copies:
            copies[group, number] = [
                row if row.group is None else replace(row, group=f"{row.group}~{number}") for row in original
            ]
        return copies[group, number]

    rng = np.random.default_rng(seed)
    distribution = np.empty(aggregate_resamples(len(rows)))
    for i in range(distribution.size):
        drawn = Counter(int(g) for stratum in strata for g in rng.choice(stratum, stratum.size))
        resampled = [row for group, times in drawn.items() for number in range(times) for row in copy(group, number)]
        distribution[i] = aggregate(resampled).get(key, math.nan)
    return Bootstrap(value, percentile_interval(distribution), distribution)


def bootstrap_median(values: np.ndarray, *, rng: np.random.Generator, resamples: int = RESAMPLES) -> Bootstrap:
    """The median of ``values`` [n] with its percentile interval."""
    values = np.asarray(values, np.float64)
    if values.size < 2:
        return Bootstrap(float(np.median(values)), None, np.empty(0))
    batch = max(1, CELLS // values.size)
    result = _stats().bootstrap(
        (values,), np.median, n_resamples=resamples, batch=batch, vectorized=True, method="percentile", rng=rng
    )
    interval = (float(result.confidence_interval.low), float(result.confidence_interval.high))
    return Bootstrap(float(np.median(values)), interval, np.asarray(result.bootstrap_distribution))


def join(baseline: Sequence[SampleRow], candidate: Sequence[SampleRow], *, allow_partial: bool = False) -> Pairs:
    """The documents that both runs have, in the baseline's order.

    Raises:
        DataError: E-STAT-01, a document is in one run only (unless ``allow_partial``), or in another group or
            category; E-DATA-03, a document is in one run twice.
    """
    by_id = {row.doc_id: row for row in candidate}
    ids = {row.doc_id for row in baseline}
    for name, rows, known in (("baseline", baseline, ids), ("candidate", candidate, by_id.keys())):
        if len(known) != len(rows):
            twice = Counter(row.doc_id for row in rows).most_common(1)[0][0]
            raise DataError(f"E-DATA-03: duplicate doc_id: the {name} has {twice!r} twice. Run the evaluation again.")
    alone = sorted(ids ^ by_id.keys())
    if alone and not allow_partial:
        names = ", ".join([*map(repr, alone[:3]), *(["..."] if len(alone) > 3 else [])])
        raise DataError(
            f"E-STAT-01: the runs do not cover the same doc ids: {len(alone)} are in one of the two only ({names}). "
            "Evaluate both on the same documents, or join what they share (--allow-partial-join)."
        )
    pairs = [(row, by_id[row.doc_id]) for row in baseline if row.doc_id in by_id]
    if not pairs:
        raise DataError(
            "E-STAT-01: the runs do not cover the same doc ids: they share none. Evaluate both on the same benchmark "
            "and limit."
        )
    for b, c in pairs:
        if (b.group, b.category) != (c.group, c.category):
            raise DataError(
                f"E-STAT-01: different data fingerprint: the document {b.doc_id!r} is in group {b.group!r}, category "
                f"{b.category!r} of the baseline and in {c.group!r}, {c.category!r} of the candidate. Run both again."
            )
    return Pairs([b for b, _ in pairs], [c for _, c in pairs], len(alone))


def mcnemar(b: int, c: int) -> float:
    """Exact two-sided McNemar test of b against c discordant documents: 2 P[Bin(b+c, 1/2) <= min(b, c)], at most 1."""
    return 1.0 if b + c == 0 else float(min(1.0, 2 * _stats().binom.cdf(min(b, c), b + c, 0.5)))


def holm(p: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment: the i-th smallest of m times (m - i + 1), never falling, at most 1."""
    order = sorted(range(len(p)), key=lambda i: p[i])
    adjusted, largest = [0.0] * len(p), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(p) - rank) * p[i]))
        adjusted[i] = largest
    return adjusted


def verdict(interval: tuple[float, float] | None, margin: float, *, groups: int | None = None) -> Verdict:
    """What the 95 % interval of candidate - baseline says against the ``margin`` (>= 0, in the same unit).

    ``groups``: how many the interval was resampled from. Fewer than ``FEWEST_GROUPS`` prove nothing: the interval is
    too narrow then. Where no document changed it has no width at all, however few there are; what still may be lost is
    then taken as 3 / groups, the 95 % bound of a share that was never seen ("rule of three").
    """
    if margin < 0 or not math.isfinite(margin):
        raise ConfigError(f"E-USE-02: margin={margin} is not a margin. Use points >= 0, for example 1.0.")
    if interval is None or (groups is not None and groups < FEWEST_GROUPS):
        return "inconclusive"
    low, high = interval
    if groups is not None and low == high == 0:
        low = -3 / groups
    if high < 0 and low > -margin:
        return "worse but within margin"
    if low > -margin:
        return "non-inferior"
    return "inferior" if high < -margin else "inconclusive"


def documents_needed(difference: float, discordant: float) -> int:
    """Documents that show ``difference`` with 80 % power when the share ``discordant`` of them changes."""
    return math.ceil(Z**2 * (discordant - difference**2) / difference**2)


def detectable_difference(n: int, discordant: float) -> float | None:
    """The smallest difference that ``n`` documents show with 80 % power: ``documents_needed`` solved for it.

    ``discordant``: share of documents that changed, for scores between 0 and 1 the mean squared difference. None
    where nothing changed, for then the variance is unknown. Takes documents as independent.
    """
    return math.sqrt(Z**2 * discordant / (n + Z**2)) if discordant > 0 else None


def agreement(pairs: Pairs) -> float:
    """Share of documents with the same parsed answer; where neither could be parsed, with the same text."""

    def answer(row: SampleRow) -> tuple[bool, str]:
        return (True, row.parsed) if row.parsed is not None else (False, row.prediction.strip())

    same = sum(
        b.error is None and c.error is None and answer(b) == answer(c)
        for b, c in zip(pairs.baseline, pairs.candidate, strict=True)
    )
    return same / len(pairs.baseline)
