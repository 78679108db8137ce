"""Metrics of free answers: exact match, consensus, ANLS, relaxed accuracy, easy-vqa."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from metric_rows import evaluate, score

from vlmeff.evaluation.metrics.anls import anls
from vlmeff.evaluation.metrics.consensus import consensus
from vlmeff.evaluation.metrics.relaxed import relaxed_match

words = st.sampled_from(["yes", "no", "red", ""])


@pytest.mark.parametrize(
    ("metric", "prediction", "reference", "right"),
    [
        ("exact_nopunct", "Dog.", "dog", 1),
        ("exact_nopunct", "a dog", "dog", 0),
        ("exact_nopunct", "t-shirt", "t shirt", 0),
        ("exact", " Red. ", "red", 1),
        ("exact", "red!", "red", 0),
    ],
)
def test_exact_match(metric, prediction, reference, right):
    assert score(metric, prediction, [reference])["scores"] == {"right": right}


@pytest.mark.parametrize("k", range(11))
def test_consensus_of_ten_annotators(k):
    references = ["cat"] * k + [f"dog {i}" for i in range(10 - k)]
    value = [0, 0.3, 0.6, 0.9, 1.0][min(k, 4)]
    assert consensus("cat", references) == pytest.approx(value, abs=1e-15)
    assert score("vqa", "The cat.", references)["scores"]["consensus"] == pytest.approx(value, abs=1e-15)


@given(words, st.lists(words, min_size=1, max_size=12), st.randoms())
def test_consensus_leaves_one_out_by_index_and_does_not_depend_on_the_order(given_, references, rng):
    n = len(references)
    slow = sum(min(1, sum(references[j] == given_ for j in range(n) if j != i) / 3) for i in range(n)) / n
    shuffled = rng.sample(references, n)
    assert consensus(given_, references) == pytest.approx(slow, abs=1e-12)
    assert consensus(given_, shuffled) == consensus(given_, references)


def test_unanimous_references_are_normalised_too():
    assert score("vqa", "Yes", ["yes"] * 10)["scores"]["consensus"] == 1
    assert score("vqa_evalai", "redwhite", ["red,white"] * 10)["scores"]["consensus"] == 1
    assert score("vqa", "redwhite", ["red,white"] * 10)["scores"]["consensus"] == 0


def test_vqa_reports_answer_types():
    docs = [("yes", ["yes"] * 10, "yes/no"), ("2", ["two"] * 3 + ["three"] * 7, "number"), ("x", ["y"] * 10, "other")]
    figures = evaluate("vqa", [{"prediction": p, "answers": a, "category": c} for p, a, c in docs])
    assert figures["accuracy"] == pytest.approx(1.9 / 3)
    assert figures["accuracy/number"] == pytest.approx(0.9)
    assert figures["accuracy/other"] == 0


@pytest.mark.parametrize(
    ("reference", "prediction", "value"),
    [
        ("abcd", "abce", 0.75),
        ("abc", "abx", 2 / 3),
        ("ab", "ac", 0.5),
        ("yes", "no", 0),
        ("hello world", "Hello  World ", 1),
        ("1.2", "1.20", 0.75),
        ("", "", 1),
        # distance 4 between the folded texts ("abcdef", "ab"), over the 8 characters of the prediction as it came
        ("abcdef", "ab      ", 0.5),
    ],
)
def test_anls_vectors(reference, prediction, value):
    pytest.importorskip("rapidfuzz", reason="needs the extra eval")
    assert anls(prediction, [reference]) == pytest.approx(value)


@given(st.text("ab ", max_size=6), st.lists(st.text("ab ", max_size=6), min_size=1, max_size=3))
def test_anls_equals_a_plain_edit_distance(prediction, references):
    pytest.importorskip("rapidfuzz", reason="needs the extra eval")

    def distance(x, y):
        if not x or not y:
            return len(x) + len(y)
        rest = distance(x[1:], y[1:]) + (x[0] != y[0])
        return min(rest, distance(x[1:], y) + 1, distance(x, y[1:]) + 1) if rest else 0

    nls = []
    for reference in references:
        longest = max(len(reference), len(prediction))
        d = distance(" ".join(reference.split()), " ".join(prediction.split()))
        nls.append(d / longest if longest else 0)
    s = 1 - min(nls)
    assert anls(prediction, references) == pytest.approx(0 if s < 0.5 else s)


@pytest.mark.parametrize(
    ("prediction", "target", "right"),
    [
        ("95", "100", True),
        ("94.9", "100", False),
        ("12%", "12%", True),
        ("12%", "12", False),
        ("3,000", "3000", False),
        ("0", "0", True),
        ("0.0", "0", False),
        ("$5", "5", False),
        ("Yes", "yes", True),
        (" 100", "100", True),
        ("-5", "5", False),
        ("nan", "100", False),
    ],
)
def test_relaxed_vectors(prediction, target, right):
    assert relaxed_match(prediction, target) is right


def test_chartqa_reports_human_and_augmented():
    docs = [("95", "100", "human"), ("94", "100", "human"), ("yes", "Yes", "augmented")]
    rows = [{"prediction": p, "answers": [a], "category": c} for p, a, c in docs]
    expected = {"overall": 2 / 3, "overall/augmented": 1, "overall/human": 0.5}
    assert evaluate("relaxed", rows) == pytest.approx(expected)


EASY = [
    # question, answer, prediction, category
    ("what color is the circle?", "red", "Red.", "color"),
    ("what shape is in the image?", "circle", "a circle", "shape"),  # the first word counts: wrong
    ("what is the red shape?", "circle", " circle it is", "shape"),
    ("is there a circle?", "yes", "yes", "yesno"),
    ("is a red shape present?", "yes", "no", "yesno"),
    ("is there not a circle?", "yes", "yes", "yesno"),
    ("is there a square?", "no", "no", "yesno"),
    ("is no red shape present?", "no", "yes", "yesno"),
]


def test_easy_vqa_has_open_questions_as_headline_and_balances_the_others():
    rows = [{"question": q, "answers": [a], "prediction": p, "category": c} for q, a, p, c in EASY]
    assert evaluate("easy_vqa", rows) == pytest.approx(
        {
            "easy_vqa_open": 2 / 3,
            "easy_vqa_color": 1,
            "easy_vqa_shape": 0.5,
            # plain yes 1/2, negated yes 1, plain no 1, negated no 0
            "easy_vqa_yesno_balanced": (0.5 + 1 + 1 + 0) / 4,
            "easy_vqa_all": 5 / 8,
        }
    )
    assert "open" not in score("easy_vqa", "yes", ["yes"], question="is there a circle?")["scores"]


def test_a_model_that_always_says_yes_gets_half_of_the_balanced_questions():
    rows = [
        {"question": f"is {word} x?", "answers": [answer], "prediction": "yes"}
        for word, answer, times in (("a", "yes", 90), ("no", "no", 5), ("a", "no", 3), ("no", "yes", 2))
        for _ in range(times)
    ]
    random.Random(0).shuffle(rows)
    figures = evaluate("easy_vqa", rows)
    assert figures["easy_vqa_yesno_balanced"] == 0.5
    assert figures["easy_vqa_all"] == pytest.approx(0.92)
    assert "easy_vqa_open" not in figures
