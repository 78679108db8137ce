"""Statistics against full enumeration, scipy's own tests, definitions and closed forms."""

import itertools
import math
import subprocess
import sys
import tracemalloc
from collections import Counter

import numpy as np
import pytest
from finished_runs import row
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from vlmeff.errors import ConfigError, DataError
from vlmeff.evaluation import statistics
from vlmeff.evaluation.statistics import Pairs

KS = 0.02  # 10,000 draws differ from their distribution by more than this once in 10^3


def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def largest_gap(drawn: np.ndarray, exact: list[float]) -> float:
    """Kolmogorov-Smirnov distance between draws and the equally likely values ``exact``."""
    at = np.unique(np.round(exact, 12))
    drawn, whole = np.round(drawn, 12), np.round(exact, 12)
    assert set(drawn) <= set(at)
    return max(abs((drawn <= x).mean() - (whole <= x).mean()) for x in at)


def test_documents_are_resampled_as_full_enumeration_says() -> None:
    values = [-1.0, 0.0, 0.25, 1.0]
    exact = [sum(draw) / 4 for draw in itertools.product(values, repeat=4)]
    result = statistics.bootstrap_mean(np.array(values), None, rng=rng())
    assert result.value == pytest.approx(0.0625)
    assert result.distribution.shape == (10_000,)
    assert largest_gap(result.distribution, exact) < KS
    assert result.interval == pytest.approx(np.percentile(result.distribution, (2.5, 97.5)))


def test_groups_of_unequal_size_are_resampled_whole() -> None:
    groups = {"a": [1.0], "b": [0.0, -1.0, -1.0], "c": [1.0, 0.0]}
    exact = [
        sum(sum(groups[g]) for g in draw) / sum(len(groups[g]) for g in draw)
        for draw in itertools.product(groups, repeat=3)
    ]
    # Rows of a group need not stand together.
    flat = [("b", 0.0), ("a", 1.0), ("c", 1.0), ("b", -1.0), ("c", 0.0), ("b", -1.0)]
    result = statistics.bootstrap_mean(np.array([v for _, v in flat]), [g for g, _ in flat], rng=rng())
    assert result.value == 0.0
    assert largest_gap(result.distribution, exact) < KS


def test_the_spread_is_that_of_the_groups_and_not_of_their_copies() -> None:
    values = np.random.default_rng(1).normal(size=60)
    copies = np.repeat(values, 8)
    clustered = statistics.bootstrap_mean(copies, [str(i // 8) for i in range(480)], rng=rng())
    assert clustered.distribution.std() == pytest.approx(values.std() / math.sqrt(60), rel=0.05)
    naive = statistics.bootstrap_mean(copies, None, rng=rng())
    assert naive.distribution.std() == pytest.approx(values.std() / math.sqrt(480), rel=0.05)


@pytest.mark.parametrize("groups", [None, ["a", "a", "b", "c", "c"]])
def test_a_constant_difference_has_an_interval_without_width(groups: list[str] | None) -> None:
    result = statistics.bootstrap_mean(np.full(5, 0.25), groups, rng=rng())
    assert result.interval == (0.25, 0.25)


def test_one_group_gives_no_interval_and_no_document_an_error() -> None:
    assert statistics.bootstrap_mean(np.array([1.0, 0.0]), ["a", "a"], rng=rng()).interval is None
    assert statistics.bootstrap_mean(np.array([1.0]), None, rng=rng()).interval is None
    with pytest.raises(DataError, match="E-STAT-01"):
        statistics.bootstrap_mean(np.array([]), None, rng=rng())


@pytest.mark.parametrize("grouped", [False, True])
def test_memory_is_bounded_by_the_block(grouped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "CELLS", 2**16)
    values = np.random.default_rng(0).normal(size=8000)
    groups = [str(i // 2) for i in range(8000)] if grouped else None
    statistics.bootstrap_mean(values[:4], None, rng=rng(), resamples=10)  # imports
    tracemalloc.start()
    statistics.bootstrap_mean(values, groups, rng=rng(), resamples=1000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8e6  # all at once: 32 MB of indices with groups, 64 MB without


def test_blocks_do_not_change_the_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    values, groups = np.arange(12.0), [str(i // 3) for i in range(12)]
    whole = statistics.bootstrap_mean(values, groups, rng=rng()).distribution
    monkeypatch.setattr(statistics, "CELLS", 400)
    assert np.array_equal(statistics.bootstrap_mean(values, groups, rng=rng()).distribution, whole)


def f1(rows: list) -> dict[str, float]:
    right, wrong = sum(r.scores["right"] for r in rows), sum(1 - r.scores["right"] for r in rows)
    return {"f1": 2 * right / (2 * right + wrong)}


def test_a_figure_that_is_no_mean_is_resampled_through_its_aggregate() -> None:
    groups = {"a": [1, 1], "b": [0], "c": [1, 0, 0]}
    rows = [row(f"{g}{i}", float(x), group=g) for g, xs in groups.items() for i, x in enumerate(xs)]
    exact = []
    for draw in itertools.product(groups, repeat=3):
        right = sum(sum(groups[g]) for g in draw)
        exact.append(2 * right / (right + sum(len(groups[g]) for g in draw)))
    result = statistics.bootstrap_aggregate(rows, f1, "f1", seed=[0])
    assert result.value == f1(rows)["f1"]
    assert largest_gap(result.distribution, exact) < KS
    assert statistics.bootstrap_aggregate(rows[::-1], f1, "f1", seed=[0]).distribution.tolist() == (
        result.distribution.tolist()
    )


def test_images_are_resampled_within_categories_and_stay_whole() -> None:
    rows = [
        row(f"{category}{image}{q}", float((image + q) % 2), category=category, group=f"{category}{image}")
        for category, images in (("count", 3), ("color", 5))
        for image in range(images)
        for q in range(2)
    ]
    drawn: list[Counter] = []

    def points(sample: list) -> dict[str, float]:
        pictures = Counter((r.category, r.group) for r in sample)
        assert set(pictures.values()) == {2}  # also when an image is drawn twice
        assert Counter(r.category for r in sample) == {"count": 6, "color": 10}
        drawn.append(Counter(r.doc_id for r in sample))
        return {"total": sum(r.scores["right"] for r in sample)}

    statistics.bootstrap_aggregate(rows, points, "total", seed=[3], within_categories=True)
    assert max(max(c.values()) for c in drawn) >= 4
    assert len({tuple(sorted(c.items())) for c in drawn}) > 100
    assert rows[0].group == "count0"


def test_two_runs_are_resampled_alike() -> None:
    before = [row(str(i), float(i % 3 == 0), group=str(i // 2)) for i in range(20)]
    after = [row(str(i), float(i % 3 != 0), group=str(i // 2)) for i in range(20)]
    share = lambda rows: {"s": sum(r.scores["right"] for r in rows) / len(rows)}  # noqa: E731
    one = statistics.bootstrap_aggregate(before, share, "s", seed=[1, 2]).distribution
    other = statistics.bootstrap_aggregate(after, share, "s", seed=[1, 2]).distribution
    assert one + other == pytest.approx(1.0)  # what is wrong in one is right in the other, in every draw
    assert one.std() > 0


def test_a_large_run_is_resampled_less_often() -> None:
    assert statistics.aggregate_resamples(50) == 10_000
    assert statistics.aggregate_resamples(500) == 2_000
    assert statistics.aggregate_resamples(10**6) == 1_000


def test_the_median_of_ratios() -> None:
    values = [1.0, 2.0, 4.0]
    exact = [sorted(draw)[1] for draw in itertools.product(values, repeat=3)]
    result = statistics.bootstrap_median(np.array(values), rng=rng())
    assert (result.value, result.interval) == (2.0, (1.0, 4.0))
    assert largest_gap(result.distribution, exact) < KS
    assert statistics.bootstrap_median(np.array([3.0]), rng=rng()).interval is None


def test_mcnemar_is_the_exact_binomial_test() -> None:
    for b, c in itertools.product(range(25), repeat=2):
        expected = stats.binomtest(min(b, c), b + c, 0.5).pvalue if b + c else 1.0
        assert statistics.mcnemar(b, c) == pytest.approx(expected, rel=1e-9)
    assert statistics.mcnemar(12, 25) == pytest.approx(0.04703, abs=5e-6)
    assert statistics.mcnemar(0, 4000) == pytest.approx(0.0, abs=1e-300)


@given(st.lists(st.floats(0, 1), max_size=8))
def test_holm_by_its_definition(p: list[float]) -> None:
    def rejected(level: float) -> set[int]:
        """Holm's procedure itself: go up the sorted p-values while each is within level / (tests left)."""
        order, out = sorted(range(len(p)), key=lambda i: p[i]), set()
        for rank, i in enumerate(order):
            if p[i] * (len(p) - rank) > level:
                break
            out.add(i)
        return out

    adjusted = statistics.holm(p)
    for level in {0.05, 0.5, 0.999, *adjusted} - {1.0}:
        assert {i for i, q in enumerate(adjusted) if q <= level} == rejected(level)
    assert all(0 <= before <= after <= 1 for before, after in zip(p, adjusted, strict=True))


def test_holm_of_a_worked_example() -> None:
    assert statistics.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (-0.5, 0.5, "non-inferior"),
        (0.1, 0.5, "non-inferior"),
        (-0.99, 0.0, "non-inferior"),
        (-0.9, -0.1, "worse but within margin"),
        (-3.0, -1.1, "inferior"),
        (-3.0, -1.0, "inconclusive"),
        (-1.0, 0.5, "inconclusive"),
        (-1.0, -0.5, "inconclusive"),
        (-3.0, 2.0, "inconclusive"),
    ],
)
def test_verdicts_and_their_borders(low: float, high: float, expected: str) -> None:
    assert statistics.verdict((low, high), 1.0) == expected


def test_a_verdict_needs_an_interval_and_a_margin_that_can_be() -> None:
    assert statistics.verdict(None, 1.0) == "inconclusive"
    assert statistics.verdict((0.0, 0.0), 0.0) == "inconclusive"
    for margin in (-1.0, math.nan, math.inf):
        with pytest.raises(ConfigError, match=r"E-USE-02: margin"):
            statistics.verdict((0.0, 0.0), margin)


def test_documents_for_a_difference_of_two_points() -> None:
    assert statistics.documents_needed(0.02, 0.06) == 1170


@given(st.integers(2, 10**6), st.floats(1e-4, 1))
def test_the_detectable_difference_needs_just_these_documents(n: int, discordant: float) -> None:
    difference = statistics.detectable_difference(n, discordant)
    assert difference is not None
    needed = (1.960 + 0.842) ** 2 * (discordant - difference**2) / difference**2
    assert needed == pytest.approx(n, rel=1e-6)


def test_nothing_changed_says_nothing_about_what_could_be_detected() -> None:
    assert statistics.detectable_difference(100, 0.0) is None


def test_runs_are_joined_by_document_whatever_their_order() -> None:
    baseline = [row(str(i), i % 2) for i in range(9)]
    candidate = [row(str(i), (i + 1) % 2) for i in (4, 8, 0, 2, 6, 1, 7, 3, 5)]
    pairs = statistics.join(baseline, candidate)
    assert [r.doc_id for r in pairs.baseline] == [r.doc_id for r in pairs.candidate] == list("012345678")
    assert all(b.scores["right"] + c.scores["right"] == 1 for b, c in zip(pairs.baseline, pairs.candidate, strict=True))


def test_documents_of_one_run_only_are_refused_or_counted() -> None:
    one, other = [row(i, 1) for i in "abc"], [row(i, 1) for i in "bcde"]
    with pytest.raises(DataError, match=r"E-STAT-01: the runs do not cover the same doc ids: 3 .*'a', 'd', 'e'"):
        statistics.join(one, other)
    pairs = statistics.join(one, other, allow_partial=True)
    assert ([r.doc_id for r in pairs.candidate], pairs.unmatched) == (["b", "c"], 3)
    with pytest.raises(DataError, match="E-STAT-01: the runs do not cover the same doc ids: they share none"):
        statistics.join(one, [row("z", 1)], allow_partial=True)


def test_a_document_twice_or_in_another_group_is_refused() -> None:
    with pytest.raises(DataError, match=r"E-DATA-03: duplicate doc_id: the candidate has 'a' twice"):
        statistics.join([row("a", 1)], [row("a", 1), row("a", 0)])
    with pytest.raises(DataError, match=r"E-STAT-01: different data fingerprint: the document 'a'"):
        statistics.join([row("a", 1, group="x")], [row("a", 1, group="y")])


def test_agreement_is_about_what_was_read_in_the_answers() -> None:
    before = [
        row("same", 1, prediction="Red.", parsed="red"),
        row("other", 1, prediction="red", parsed="red"),
        row("unread", 0, prediction="hm ", parsed=None),
        row("unread differently", 0, prediction="hm", parsed=None),
        row("failed", 0, prediction="", parsed=None, error="boom"),
        row("read once", 1, prediction="x", parsed="x"),
    ]
    after = [
        row("same", 1, prediction="red", parsed="red"),
        row("other", 0, prediction="blue", parsed="blue"),
        row("unread", 0, prediction="hm", parsed=None),
        row("unread differently", 0, prediction="well", parsed=None),
        row("failed", 0, prediction="", parsed=None, error="boom"),
        row("read once", 0, prediction="x", parsed=None),
    ]
    assert statistics.agreement(Pairs(before, after, 0)) == pytest.approx(2 / 6)


def test_statistics_and_reports_do_not_need_torch() -> None:
    code = (
        "import sys, vlmeff.evaluation.results, vlmeff.evaluation.statistics; "
        "sys.exit('torch' in sys.modules or 'matplotlib' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("interval", "groups", "expected"),
    [
        ((0.0, 0.0), 9, "inconclusive"),  # too few for any verdict
        ((-0.5, -0.2), 9, "inconclusive"),
        ((-0.5, -0.2), 10, "inferior"),
        ((0.0, 0.0), 299, "inconclusive"),  # 3 / 299 > 1 point
        ((0.0, 0.0), 301, "non-inferior"),
        ((-0.005, 0.002), 50, "non-inferior"),
    ],
)
def test_little_evidence_is_no_verdict(interval: tuple[float, float], groups: int, expected: str) -> None:
    assert statistics.verdict(interval, 0.01, groups=groups) == expected
