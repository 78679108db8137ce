"""How a run compares with its baseline and with its controls, and what presets keep over benchmarks. No torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from vlmeff.errors import DataError
from vlmeff.evaluation import statistics
from vlmeff.evaluation.results_schema import (
    CategoryDelta,
    Comparison,
    ControlComparison,
    ControlVerdict,
    McNemar,
    Retained,
    Speedup,
)
from vlmeff.evaluation.runs import (
    POINTS,
    Loaded,
    decode_ms,
    document_score,
    may_be_timed,
    metric_of,
    resample,
    seed_of,
)
from vlmeff.evaluation.samples import SampleRow
from vlmeff.evaluation.statistics import Pairs

MOST_CATEGORIES = 64


def join(reference: Loaded, candidate: Loaded, *, allow_partial: bool) -> Pairs:
    """The documents of both runs, paired by id; raises E-STAT-01 when they come from different data or prompts."""
    ours, theirs = reference.folder.data, candidate.folder.data
    for name, one, other in zip(("data id", "data revision", "data hash", "prompt"), ours, theirs, strict=True):
        if one != other:
            raise DataError(
                f"E-STAT-01: different prompt or data fingerprint: {candidate.run.id} and {reference.run.id}, which it "
                f"is compared with, differ in their {name}: {other!r} and {one!r}. Evaluate both on the same data with "
                "the same vlmeff."
            )
    try:
        return statistics.join(reference.rows, candidate.rows, allow_partial=allow_partial)
    except DataError as error:
        raise DataError(f"{error} (candidate {candidate.run.id}, compared with {reference.run.id})") from error


def controls_of(preset: Loaded, controls: Sequence[Loaded]) -> list[Loaded]:
    """The controls that ``preset`` has to beat: those made for its name, and those made for no preset (blank)."""
    return [c for c in controls if c.run.preset is None or c.run.preset == preset.run.preset]


@dataclass(frozen=True, eq=False)
class _Difference:
    """``drawn``: candidate - reference and its bootstrap. ``scored``: (before, after, row) of its documents.

    ``reference``: the score that the difference starts from.
    """

    scored: list[tuple[float, float, SampleRow]]
    drawn: statistics.Bootstrap
    reference: float
    detectable: float | None

    @property
    def change(self) -> np.ndarray:
        return np.array([after - before for before, after, _ in self.scored])

    @property
    def groups(self) -> list[str]:
        return [statistics.group_of(row) for *_, row in self.scored]

    def mcnemar(self) -> McNemar:
        better, worse = int((self.change > 0).sum()), int((self.change < 0).sum())
        return McNemar(b=better, c=worse, p=statistics.mcnemar(better, worse))


def _difference(reference: Loaded, candidate: Loaded, pairs: Pairs, seed: int) -> _Difference:
    """The paired difference of the headline figure, through the metric's aggregate where that is no mean."""
    metric, benchmark = metric_of(candidate.folder), candidate.run.benchmark
    scored = [
        (before, after, row)
        for row, b, c in zip(pairs.baseline, pairs.baseline, pairs.candidate, strict=True)
        if (before := document_score(b, metric.per_document)) is not None
        and (after := document_score(c, metric.per_document)) is not None
    ]
    if not scored:
        raise DataError(
            f"E-STAT-01: the runs do not cover the same doc ids: no document of {candidate.run.id} and "
            f"{reference.run.id} has the score {metric.per_document!r} in both. Evaluate both with this version."
        )
    change = np.array([after - before for before, after, _ in scored])
    groups = [statistics.group_of(row) for *_, row in scored]
    if reference.is_mean and candidate.is_mean:
        drawn = statistics.bootstrap_mean(change, groups, rng=np.random.default_rng(seed_of(seed, benchmark)))
        start = float(np.mean([before for before, *_ in scored]))
        return _Difference(
            scored, drawn, start, statistics.detectable_difference(len(change), float(np.mean(change**2)))
        )
    ours = _through_aggregate(reference, pairs.baseline, pairs, seed)
    theirs = _through_aggregate(candidate, pairs.candidate, pairs, seed)
    distribution = theirs.distribution - ours.distribution
    interval = statistics.percentile_interval(distribution)
    drawn = statistics.Bootstrap(theirs.value - ours.value, interval, distribution)
    spread = float(np.nanstd(distribution)) if distribution.size else 0.0
    return _Difference(scored, drawn, ours.value, statistics.Z * spread or None)


def compare(
    baseline: Loaded, candidate: Loaded, pairs: Pairs, *, margin: float, seed: int
) -> tuple[Comparison, np.ndarray]:
    """The comparison (before Holm's adjustment) and the resampled shares of the baseline's score retained, in %.

    ``margin`` is in points; for scores in points of their own it is a percentage of the baseline's score. The retained
    share takes the baseline's score as given: 100 (1 + difference / baseline).
    """
    metric, found = metric_of(candidate.folder), _difference(baseline, candidate, pairs, seed)
    drawn, reference, change = found.drawn, found.reference, found.change
    accepted = margin / 100 * (abs(reference) if candidate.folder.info["metric"] in POINTS else 1.0)
    retained = 100 * (1 + drawn.distribution / reference) if reference > 0 else np.empty(0)
    comparison = Comparison(
        baseline=baseline.run.id,
        candidate=candidate.run.id,
        label=candidate.run.label,
        kind=candidate.run.kind,
        benchmark=candidate.run.benchmark,
        metric=metric.headline,
        n=len(change),
        unmatched=pairs.unmatched,
        delta=drawn.value,
        ci95=drawn.interval,
        resamples=drawn.distribution.size,
        margin=accepted,
        verdict=statistics.verdict(drawn.interval, accepted, groups=len(set(found.groups))),
        mcnemar=found.mcnemar() if metric.binary else None,
        detectable=found.detectable,
        agreement=statistics.agreement(pairs),
        churn=int((change != 0).sum()) / len(change),
        retained=100 * (1 + drawn.value / reference) if reference > 0 else None,
        retained_ci95=statistics.percentile_interval(retained),
        token_ratio=_ratio_of_sums(pairs, _tokens_seen),
        kv_ratio=_ratio_of_sums(pairs, lambda row: row.kv_bytes_prefill),
        speedup=_speedup(baseline, candidate, pairs, seed),
        categories=_by_category(found.scored, seed_of(seed, candidate.run.benchmark)),
    )
    return comparison, retained


def compare_with_control(control: Loaded, preset: Loaded, pairs: Pairs, *, seed: int) -> ControlComparison:
    """What a preset is worth beyond a control (before Holm's adjustment): preset - control on the documents of both.

    ``pairs``: of ``join(control, preset)``. Groups are drawn as for every other interval of the benchmark.
    """
    metric, found = metric_of(preset.folder), _difference(control, preset, pairs, seed)
    return ControlComparison(
        preset=preset.run.id,
        control=control.run.id,
        preset_label=preset.run.label,
        control_label=control.run.label,
        benchmark=preset.run.benchmark,
        metric=metric.headline,
        n=len(found.scored),
        unmatched=pairs.unmatched,
        delta=found.drawn.value,
        ci95=found.drawn.interval,
        resamples=found.drawn.distribution.size,
        verdict=_beaten(found.drawn.interval, len(set(found.groups))),
        mcnemar=found.mcnemar() if metric.binary else None,
        token_ratio=_ratio_of_sums(pairs, _tokens_seen),
    )


def _beaten(interval: tuple[float, float] | None, groups: int) -> ControlVerdict:
    if interval is None or groups < statistics.FEWEST_GROUPS:
        return "inconclusive"
    return "better" if interval[0] > 0 else "worse" if interval[1] < 0 else "inconclusive"


def _through_aggregate(side: Loaded, rows: Sequence[SampleRow], pairs: Pairs, seed: int) -> statistics.Bootstrap:
    if pairs.unmatched == 0 and not side.is_mean:
        return side.bootstrap  # of the same documents with the same draws
    return resample(rows, metric_of(side.folder), side.folder.info, seed)


def _by_category(scored: Sequence[tuple[float, float, SampleRow]], seed: Sequence[int]) -> dict[str, CategoryDelta]:
    by_name: dict[str, list[tuple[float, str]]] = {}
    for before, after, row in scored:
        name = row.category or row.split
        if name is not None:
            by_name.setdefault(str(name), []).append((after - before, statistics.group_of(row)))
    if not 2 <= len(by_name) <= MOST_CATEGORIES:
        return {}
    out = {}
    for name, changes in sorted(by_name.items()):
        rng = np.random.default_rng(seed)
        drawn = statistics.bootstrap_mean(np.array([d for d, _ in changes]), [g for _, g in changes], rng=rng)
        out[name] = CategoryDelta(delta=drawn.value, ci95=drawn.interval, n=len(changes))
    return out


def _tokens_seen(row: SampleRow) -> float | None:
    """Visual tokens that the language model works on: the mean over its layers where some are dropped inside."""
    return row.visual_tokens_kept if row.visual_tokens_layer_mean is None else row.visual_tokens_layer_mean


def _ratio_of_sums(pairs: Pairs, value: Callable[[SampleRow], float | None]) -> float | None:
    both = [(value(b), value(c)) for b, c in zip(pairs.baseline, pairs.candidate, strict=True)]
    known = [(b, c) for b, c in both if b is not None and c is not None]
    total = sum(b for b, _ in known)
    return sum(c for _, c in known) / total if total else None


def _speedup(baseline: Loaded, candidate: Loaded, pairs: Pairs, seed: int) -> Speedup | None:
    ours, theirs = baseline.folder.info, candidate.folder.info
    if ours["environment"] != theirs["environment"] or not (may_be_timed(ours) and may_be_timed(theirs)):
        return None
    timed = [
        (b, c)
        for b, c in zip(pairs.baseline, pairs.candidate, strict=True)
        if b.timing_valid and c.timing_valid and b.error is None and c.error is None
    ]

    def ratios(value: Callable[[SampleRow], float | None]) -> np.ndarray:
        both = [(value(b), value(c)) for b, c in timed]
        return np.array([b / c for b, c in both if b is not None and c is not None and b > 0 and c > 0])

    ttft, e2e, decode = ratios(lambda row: row.ttft_ms), ratios(lambda row: row.e2e_ms), ratios(decode_ms)
    if not (ttft.size or e2e.size):
        return None
    rng = np.random.default_rng(seed_of(seed, candidate.run.benchmark))
    return Speedup(
        ttft=float(np.median(ttft)) if ttft.size else None,
        e2e=float(np.median(e2e)) if e2e.size else None,
        decode=float(np.median(decode)) if decode.size else None,
        ci95=statistics.bootstrap_median(ttft, rng=rng).interval if ttft.size else None,
        n=ttft.size or e2e.size,
    )


def adjust(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """Holm's adjustment over all benchmarks: presets are one family of tests, controls another."""
    adjusted: dict[str, float] = {}
    for family in ("preset", "control"):
        tests = [(c.candidate, c.mcnemar.p) for c in comparisons if c.kind == family and c.mcnemar is not None]
        adjusted.update(zip([i for i, _ in tests], statistics.holm([p for _, p in tests]), strict=True))
    return [c.model_copy(update={"p_holm": adjusted.get(c.candidate)}) for c in comparisons]


def adjust_controls(comparisons: Sequence[ControlComparison]) -> list[ControlComparison]:
    """Holm's adjustment over every preset, control and benchmark: one family of tests."""
    tested = [(i, c.mcnemar.p) for i, c in enumerate(comparisons) if c.mcnemar is not None]
    adjusted = dict(zip([i for i, _ in tested], statistics.holm([p for _, p in tested]), strict=True))
    return [c.model_copy(update={"p_holm": adjusted.get(i)}) for i, c in enumerate(comparisons)]


def summarise(comparisons: Sequence[Comparison], resampled: Mapping[tuple[str, str], np.ndarray]) -> list[Retained]:
    """Retained accuracy of each preset and control, by benchmark and averaged over all of them.

    A run that lacks a benchmark gets no average: averages over different benchmarks are not comparable. The interval
    of the average resamples the benchmarks independently of each other.
    """
    benchmarks = list(dict.fromkeys(c.benchmark for c in comparisons))
    kinds = {c.label: c.kind for c in comparisons}
    out = []
    for label in sorted(kinds, key=lambda name: kinds[name] == "control"):
        own = {c.benchmark: c for c in comparisons if c.label == label}
        values = {name: own[name].retained if name in own else None for name in benchmarks}
        known = [value for value in values.values() if value is not None]
        complete = len(known) == len(benchmarks)
        interval = None
        if complete:
            draws = [resampled[name, label] for name in benchmarks]
            size = min(draw.size for draw in draws)
            if size:
                interval = statistics.percentile_interval(np.mean([draw[:size] for draw in draws], axis=0))
        speedups = [c.speedup.ttft if c.speedup else None for c in own.values()]
        out.append(
            Retained(
                label=label,
                kind=kinds[label],
                benchmarks=values,
                mean=math.fsum(known) / len(known) if complete else None,
                ci95=interval,
                token_ratio=_geometric_mean([c.token_ratio for c in own.values()]) if complete else None,
                ttft_speedup=_geometric_mean(speedups) if complete else None,
            )
        )
    return out


def _geometric_mean(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    if len(known) < len(values) or not known or min(known) <= 0:
        return None
    return math.exp(math.fsum(map(math.log, known)) / len(known))
