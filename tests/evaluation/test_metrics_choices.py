"""Metrics of yes/no questions and of multiple choice, and what holds for every metric."""

from __future__ import annotations

import copy
import random
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from metric_rows import document, evaluate, score, stored

from vlmeff.errors import DataError
from vlmeff.evaluation.metrics import Metric, failed, metrics, mmmu, pope, scienceqa
from vlmeff.evaluation.metrics.choice import read_option
from vlmeff.evaluation.metrics.yesno import read_yes_no

# POPE


@pytest.mark.parametrize(
    ("prediction", "parsed"),
    [
        ("NO", "yes"),
        ("Nope", "yes"),
        ("", "yes"),
        ("I cannot tell", "yes"),
        ("no\n", "no"),
        ("No, there is not", "no"),
        ("There is not", "no"),
        ("Yes. No", "yes"),
        ("Hm,no", "yes"),
    ],
)
def test_pope_official_reading(prediction, parsed):
    assert pope.official(prediction) == parsed


PAIRS = [("yes", "no"), ("yes", "No"), ("no", "No"), ("no", "no"), ("yes", "Yes."), ("no", "No, there is not")]


def test_pope_worked_example():
    figures = evaluate("pope", [{"answers": [gold], "prediction": p} for gold, p in PAIRS])
    expected = {"accuracy": 4 / 6, "precision": 1, "recall": 1 / 3, "f1": 0.5, "yes_ratio": 1 / 6}
    assert figures == pytest.approx(expected | {"accuracy_strict": 2 / 6, "unparsed": 0})


def test_pope_reports_each_split_and_their_mean():
    rows = [{"answers": [gold], "prediction": p, "split": "random"} for gold, p in PAIRS]
    rows += [{"answers": ["yes"], "prediction": "I cannot tell", "split": "popular"}]
    figures = evaluate("pope", rows)
    assert figures["f1/random"] == 0.5
    assert figures["f1/popular"] == figures["unparsed/popular"] == 1
    assert figures["f1"] == 0.75
    assert figures["yes_ratio"] == pytest.approx((1 / 6 + 1) / 2)


def test_pope_without_a_positive_anywhere_gives_zeros():
    figures = evaluate("pope", [{"answers": ["no"], "prediction": "no"}])
    assert (figures["accuracy"], figures["precision"], figures["recall"], figures["f1"]) == (1, 0, 0, 0)


# MME


@pytest.mark.parametrize(
    ("prediction", "parsed"),
    [
        ("Yes", "yes"),
        ("No, it", "no"),
        ("Not sure", "no"),
        ("None", "no"),
        ("Nope", "no"),
        ("unknown", None),
        ("Sure", None),
        ("", None),
        ('"Yes"', "yes"),
        ("**Yes**", None),
        ("Absolutely, yes", None),
        ("Y.", "yes"),
        ("n", "no"),
    ],
)
def test_mme_reading(prediction, parsed):
    assert read_yes_no(prediction) == parsed
    result = score("mme", prediction, ["yes"])
    assert (result["parsed"], result["unparsed"]) == (parsed, parsed is None)


def mme_rows(category, *pictures):
    return [
        {"answers": ["yes"], "prediction": "yes" if right else "no", "group": f"{category}/{i}", "category": category}
        for i, picture in enumerate(pictures)
        for right in picture
    ]


def test_mme_worked_example():
    figures = evaluate("mme", mme_rows("OCR", (1, 1), (1, 0)))
    expected = {"acc/OCR": 75, "acc_plus/OCR": 50, "score/OCR": 125, "perception": 125, "total": 125}
    assert figures == pytest.approx(expected)


def test_mme_adds_up_perception_and_cognition():
    rows = mme_rows("OCR", (1, 1)) + mme_rows("count", (0, 1)) + mme_rows("code_reasoning", (1, 1), (0, 0))
    figures = evaluate("mme", rows)
    assert (figures["perception"], figures["cognition"], figures["total"]) == (250, 100, 350)


@pytest.mark.parametrize("picture", [(1,), (1, 1, 1)])
def test_mme_refuses_a_picture_without_exactly_two_questions(picture):
    with pytest.raises(DataError, match=r"^E-DATA-07: .*OCR/0"):
        evaluate("mme", mme_rows("OCR", picture))


def test_yesno_reports_how_often_yes_was_said():
    rows = [{"answers": [gold], "prediction": p} for gold, p in (*PAIRS, ("yes", "maybe"))]
    assert evaluate("yesno", rows) == pytest.approx({"accuracy": 4 / 7, "yes_ratio": 1 / 7})


@pytest.mark.parametrize("metric", ["pope", "mme", "yesno"])
def test_a_yes_no_question_needs_such_a_reference(metric):
    with pytest.raises(DataError, match=r"^E-DATA-03: document 'd' has the answer 'maybe'"):
        score(metric, "yes", ["maybe"])


# Letters

CHOICES = ["a red cat", "a dog", "two birds"]


@pytest.mark.parametrize(
    ("prediction", "parsed"),
    [
        ("B", "B"),
        ("The answer is C", "C"),
        ("A", "A"),
        ("It is A", "A"),
        ("A big animal barks", None),  # an article, in more than three words
        ("A dog is what we see", "B"),  # ... and then the text of an option
        ("A or B", None),
        ("B.", "B"),
        ("I say (C).", "C"),
        ("Answer :B", "B"),
        ("Answer:B", None),
        ("b", None),
        ("two birds and a dog", None),
        ("I see Two Birds there", "C"),
        ("", None),
        ("D", None),
    ],
)
def test_choice_reading(prediction, parsed):
    assert read_option(prediction, CHOICES, "ABC") == parsed
    result = score("choice", prediction, ["B"], choices=CHOICES)
    assert result == {"parsed": parsed, "unparsed": parsed is None, "scores": {"right": float(parsed == "B")}}


@pytest.mark.parametrize(("answer", "right"), [("b", 1), ("a dog", 1), ("C", 0)])
def test_the_reference_is_a_letter_or_the_text_of_an_option(answer, right):
    assert score("choice", "B", [answer], choices=CHOICES)["scores"]["right"] == right


@pytest.mark.parametrize(("answer", "choices"), [("D", CHOICES), ("x", ["x", "x"]), ("A", None)])
def test_a_reference_that_is_no_option_is_refused(answer, choices):
    with pytest.raises(DataError, match=r"^E-DATA-03: document 'd'"):
        score("choice", "B", [answer], choices=choices)


def mmbench_rows(question, *right, category="l2/fine"):
    return [
        {
            "answers": ["A"],
            "choices": ["x", "y"],
            "prediction": "A" if r else "B",
            "doc_id": str(question + 1_000_000 * shift),
            "group": str(question),
            "meta": {"index": question + 1_000_000 * shift},
            "category": category,
        }
        for shift, r in enumerate(right)
    ]


def test_mmbench_counts_a_question_if_every_shift_is_right():
    rows = [*mmbench_rows(1, 1, 1, 1), *mmbench_rows(2, 1, 0), *mmbench_rows(3, 0, 1, category="l2/other")]
    figures = evaluate("mmbench", rows)
    assert figures == pytest.approx(
        {
            "circular": 1 / 3,
            "circular/l2": 1 / 3,
            "circular/l2/fine": 0.5,
            "circular/l2/other": 0,
            "vanilla": 2 / 3,
            "vanilla/l2": 2 / 3,
            "vanilla/l2/fine": 1,
            "vanilla/l2/other": 0,
        }
    )


@pytest.mark.parametrize("missing", [0, 1])
def test_mmbench_refuses_a_cut_circular_set(missing):
    rows = mmbench_rows(7, 1, 1, 1)
    del rows[missing]
    with pytest.raises(DataError, match=r"^E-DATA-07: .*'7'"):
        evaluate("mmbench", rows)


@pytest.mark.parametrize(
    ("prediction", "parsed"),
    [
        ("A", "A"),
        ("a", "A"),
        ("A.", "A"),
        ("A. foo", "A"),
        ("(A)", None),
        ("A) foo", None),
        ("The answer is A.", "A"),
        ("So The answer is B", "B"),
        ("The answer is Apple", None),
        ("", None),
    ],
)
def test_scienceqa_reading(prediction, parsed):
    assert scienceqa.read_letter(prediction) == parsed
    assert score("scienceqa", prediction, ["A"], choices=["x", "y"])["scores"]["right"] == (parsed == "A")


# MMMU


@pytest.mark.parametrize(
    ("prediction", "parsed"),
    [
        ("B", "B"),
        ("(B)", "B"),
        ("B.", "B"),
        ("The answer is B", "B"),
        ("The answer is (A) not (C)", "C"),
        ("USA is it", "A"),
        ("'B'!", "B"),
        ("it says that two birds can be seen here", "C"),
        ("two birds", None),  # option texts count only in answers of more than five words
        ("", None),
    ],
)
def test_mmmu_option_reading(prediction, parsed):
    assert mmmu.read_option(prediction, CHOICES, "ABC") == parsed


def test_mmmu_guesses_alike_for_the_same_document_and_says_so():
    results = [score("mmmu", p, ["B"], choices=CHOICES, doc_id="validation_Art_1") for p in ("", "hm", "no idea")]
    assert all(result == results[0] for result in results)
    assert results[0]["unparsed"]
    assert results[0]["scores"]["right_no_guess"] == 0
    guesses = {score("mmmu", "", ["B"], choices=CHOICES, doc_id=str(i))["parsed"] for i in range(30)}
    assert guesses == set("ABC")


def test_mmmu_open_candidates():
    assert mmmu.candidates("So x = 1,234.567") == {1234.57, 1234.0, 234.57}
    assert mmmu.candidates("It was red. Thus it is 5 m\nThe final answer is B") == {"5 m", 5.0, " b", "b "}


@pytest.mark.parametrize(
    ("prediction", "answers", "right"),
    [
        ("The answer is 24/7 hours", ["24/7"], 1),
        ("about 3.4285", ["3.429"], 1),  # both are rounded to two decimals
        ("3.4", ["3.429"], 0),
        ("it costs 1,200 dollars", ["1200"], 1),
        ("1.2e3", ["1200"], 1),
        ("a tibia", ["Tibia"], 1),
        ("x", ["x"], 1),
        ("box", ["x"], 0),
        ("", ["x"], 0),
    ],
)
def test_mmmu_open_questions(prediction, answers, right):
    assert score("mmmu", prediction, answers)["scores"]["right"] == right


def test_mmmu_reports_subjects_and_disciplines_with_and_without_guesses():
    choices, rows = ["x", "y"], []
    for prediction, category in (("A", "Science/Math"), ("B", "Science/Physics"), ("?", "Business/Finance")):
        rows.append({"answers": ["A"], "choices": choices, "prediction": prediction, "category": category})
    figures = evaluate("mmmu", rows)
    assert figures["accuracy/Science"] == figures["acc_no_guess/Science"] == 0.5
    assert figures["accuracy/Science/Math"] == 1
    assert figures["acc_no_guess"] == pytest.approx(1 / 3)
    assert figures["acc_no_guess/Business"] == 0
    assert figures["accuracy"] in (pytest.approx(1 / 3), pytest.approx(2 / 3))


# Every metric

GOLD = {"pope": "yes", "mme": "yes", "yesno": "yes", "choice": "B", "mmbench": "B", "scienceqa": "B", "mmmu": "B"}


def some_documents(name, seed):
    """Documents with every field set and predictions that are right, wrong and unreadable; whole groups."""
    rng, rows = random.Random(seed), []
    for i in range(24):
        gold = GOLD.get(name) or rng.choice(["red", "two", "100"])
        rows.append(
            {
                "answers": [gold] * rng.randint(4, 6) + ["a dog"],
                "choices": ["x", "y", "z"] if gold == "B" else None,
                "prediction": rng.choice([gold, f"{gold}.", "no", "", "A", "it is 99", None]),
                "question": rng.choice(["is there a circle?", "is there no circle?", "what color?"]),
                "group": str(i // 2),
                "category": ["OCR", "count"][i // 2 % 2] if name == "mme" else rng.choice(["a/b", "a/c", "d", None]),
                "split": rng.choice(["random", "popular"]),
                "meta": {"index": i // 2 + 1_000_000 * (i % 2)},
            }
        )
    return rows


every_metric = pytest.mark.parametrize("name", metrics.names())


@every_metric
def test_every_metric_is_a_metric_and_its_keys_exist(name):
    metric = metrics.get(name)()
    assert isinstance(metric, Metric)
    rows = stored(name, some_documents(name, 0))
    figures = metric.aggregate(rows)
    assert metric.headline in figures
    values = [row.scores[metric.per_document] for row in rows if metric.per_document in row.scores]
    assert values
    assert not metric.binary or set(values) <= {0, 1}
    assert all(isinstance(figure, float) and figure == figure for figure in figures.values())
    assert metric.aggregate([]) == {}


@every_metric
@settings(max_examples=15)
@given(seed=st.integers(0, 30), rng=st.randoms(use_true_random=False))
def test_aggregate_does_not_depend_on_the_order(name, seed, rng):
    rows = stored(name, some_documents(name, seed))
    metric = metrics.get(name)()
    assert metric.aggregate(rng.sample(rows, len(rows))) == metric.aggregate(rows)


@every_metric
@settings(max_examples=15)
@given(seed=st.integers(0, 30), prediction=st.text(max_size=20))
def test_metrics_change_nothing_they_are_given(name, seed, prediction):
    fields = some_documents(name, seed)[0] | {"doc_id": "7"}
    sample = document(**{key: value for key, value in fields.items() if key != "prediction"})
    before = copy.deepcopy(sample.__dict__)
    metric = metrics.get(name)()
    first = metric.score(sample, prediction)
    assert metric.score(sample, prediction) == first
    assert sample.__dict__ == before
    rows = stored(name, some_documents(name, seed))
    kept = copy.deepcopy([row.to_json() for row in rows])
    metric.aggregate(rows)
    assert [row.to_json() for row in rows] == kept


@every_metric
def test_a_document_whose_generation_failed_counts_as_wrong(name):
    documents = [d | {"prediction": None} for d in some_documents(name, 1)]
    metric = metrics.get(name)()
    rows = stored(name, documents)
    assert all(row.scores.get(metric.per_document, 0) == 0 and row.unparsed for row in rows)
    assert metric.aggregate(rows)[metric.headline] == 0
    assert failed(metric, document(documents[0]["answers"], choices=documents[0]["choices"]))["parsed"] is None


def test_metrics_and_data_need_no_torch():
    code = (
        "import sys\n"
        "from vlmeff.evaluation import benchmarks, folder, images, import_tsv, normalize, sources\n"
        "from vlmeff.evaluation.metrics import metrics\n"
        "assert benchmarks.names() and metrics.names()\n"
        "found = {'torch', 'transformers', 'datasets', 'rapidfuzz'} & set(sys.modules)\n"
        "assert not found, found"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
