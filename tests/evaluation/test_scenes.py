"""Scenes: an independent solver confirms every answer, every thing can be seen, and no question gives itself away."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
from collections import Counter
from dataclasses import asdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ImageChops, ImageStat

from vlmeff.errors import ConfigError
from vlmeff.evaluation import scenes
from vlmeff.evaluation.scenes.balance import EXPECTED_PRIOR
from vlmeff.evaluation.scenes.composition import COLORS, SHAPES, SIZE_NAMES, WORDS, Scene, Thing
from vlmeff.evaluation.scenes.drawing import label_map, thing_mask
from vlmeff.evaluation.scenes.glyphs import GLYPHS

SIZES = tuple(scenes.GEOMETRIES)
COMPOSITION_DIGEST = "6e78f5247843e3fdde68735c4fd886136f176c23755d691f8ca5f88da043c56f"
NUMBERS = ["zero", "one", "two", "three", "four", *map(str, range(5, 11))]

pictures = st.builds(
    scenes.compose,
    st.integers(0, 10**6),
    split=st.sampled_from(("train", "test")),
    size=st.sampled_from(SIZES),
    seed=st.integers(0, 3),
)


# --- a solver that knows the questions' words only, written without the code that asks them


def fitting(scene: Scene, words: str) -> list[Thing]:
    """Things that a phrase such as "small red circle" or "stars" fits."""
    found = list(scene.things)
    for word in words.split():
        if word in ("shape", "shapes", "one"):
            continue
        singular = {"crosses": "cross"}.get(word, word.removesuffix("s") if word not in SHAPES else word)
        known = {*COLORS, *SHAPES, *SIZE_NAMES}
        assert word in known or singular in known, word
        found = [t for t in found if {t.color, t.shape, t.size} & {word, singular}]
    return found


def solve(scene: Scene, text: str) -> set[str]:
    """Every answer that the words allow: more than one where a phrase fits several things."""
    if m := re.fullmatch(r"what color is the (left|right|top|bottom)most shape\?", text):
        sign = -1 if m[1] in ("right", "bottom") else 1
        key = {t: sign * (t.x if m[1] in ("left", "right") else t.y) for t in scene.things}
        return {t.color for t in scene.things if key[t] - min(key.values()) < 70}
    if m := re.fullmatch(r"what color is the (.+)\?", text):
        return {t.color for t in fitting(scene, m[1])} if len(fitting(scene, m[1])) == 1 else set()
    if m := re.fullmatch(r"what shape is the (.+)\?", text):
        return {t.shape for t in fitting(scene, m[1])} if len(fitting(scene, m[1])) == 1 else set()
    if m := re.fullmatch(r"is the (.+) small or large\?", text):
        return {t.size for t in fitting(scene, m[1])} if len(fitting(scene, m[1])) == 1 else set()
    if m := re.fullmatch(r"how many (.+) are there\?", text):
        return {NUMBERS[len(fitting(scene, m[1]))]}
    if m := re.fullmatch(r"are there more (.+) than (.+)\?", text):
        a, b = len(fitting(scene, m[1])), len(fitting(scene, m[2]))
        return {"yes"} if a > b else {"no"} if a < b else {"yes", "no"}
    if m := re.fullmatch(r"is the (.+) larger than the (.+)\?", text):
        return {
            "yes" if a.radius > 1.3 * b.radius else "no" if b.radius > 1.3 * a.radius else "unclear"
            for a in fitting(scene, m[1])
            for b in fitting(scene, m[2])
        }
    if m := re.fullmatch(r"is the (.+) (to the left of|to the right of|above|below) the (.+)\?", text):
        out = set()
        for a in fitting(scene, m[1]):
            for b in fitting(scene, m[3]):
                gap = (b.x - a.x) if m[2] == "to the left of" else (a.x - b.x) if "right" in m[2] else (b.y - a.y)
                gap = -gap if m[2] == "below" else gap
                out.add("unclear" if abs(gap) < 100 else "yes" if gap > 0 else "no")
        return out
    if m := re.fullmatch(r"is there (an?) (.+)\?", text):
        assert (m[1] == "an") == (m[2][0] in "aeiou")
        return {"yes" if fitting(scene, m[2]) else "no"}
    if m := re.fullmatch(r"what (digit|word) is on a sign\?", text):
        return {s.text for s in scene.signs if s.kind == m[1]}
    raise AssertionError(f"not understood: {text}")


@settings(max_examples=150, deadline=None)
@given(pictures)
def test_every_question_has_exactly_the_answer_given(scene: Scene) -> None:
    for question in scenes.all_questions(scene):
        assert solve(scene, question.text) == {question.answer}, question


@settings(max_examples=100, deadline=None)
@given(pictures)
def test_what_is_asked_is_among_the_questions_and_never_twice(scene: Scene) -> None:
    asked = scenes.ask(scene)
    assert set(asked) <= set(scenes.all_questions(scene))
    assert len({q.text for q in asked}) == len(asked)
    assert max(Counter(q.type for q in asked).values()) <= 2
    assert asked == scenes.ask(scene)


@settings(max_examples=100, deadline=None)
@given(pictures)
def test_a_no_is_hard(scene: Scene) -> None:
    """Its colour is there and its shape is there, only not on one thing."""
    for q in scenes.all_questions(scene):
        if q.type == "existence" and q.answer == "no":
            color, shape = q.text.removesuffix("?").split()[-2:]
            assert fitting(scene, color)
            assert fitting(scene, shape)


@settings(max_examples=25, deadline=None)
@given(pictures)
def test_three_quarters_of_every_thing_can_be_seen_and_stand_out(scene: Scene) -> None:
    labels, picture = label_map(scene), scenes.draw(scene)
    assert picture.size == labels.size == (scene.size, scene.size)
    for number, thing in enumerate(scene.things, start=1):
        mask, _ = thing_mask(thing, scene.size)
        whole = sum(mask.point([0] * 128 + [1] * 128).get_flattened_data())
        visible = labels.point([255 if i == number else 0 for i in range(256)])
        assert visible.histogram()[255] >= 0.75 * whole
        mean = ImageStat.Stat(picture, visible).mean
        assert max(abs(m - c) for m, c in zip(mean, COLORS[thing.color], strict=True)) < 40
        near = min(COLORS, key=lambda c: sum((m - v) ** 2 for m, v in zip(mean, COLORS[c], strict=True)))
        assert near == thing.color


def test_small_and_large_are_far_apart_at_every_size() -> None:
    for geometry in scenes.GEOMETRIES.values():
        assert geometry.large[0] > 1.5 * geometry.small[1]


def test_the_question_alone_says_little() -> None:
    """The most frequent training answer of each question string, per type; the docstring of ``balance`` states it."""
    prior = scenes.question_only_accuracy(scenes.samples(1500, split="train"), scenes.samples(400))
    assert set(prior) == set(scenes.TYPES) == set(EXPECTED_PRIOR)
    for name, expected in EXPECTED_PRIOR.items():
        assert prior[name] == pytest.approx(expected, abs=0.06), name  # a few hundred questions a type


def test_question_only_accuracy_by_hand() -> None:
    from vlmeff.evaluation.samples import Sample

    def sample(question: str, answer: str) -> Sample:
        return Sample(doc_id=question + answer, images=(), question=question, answers=(answer,), category="c")

    train = [sample("a", "1"), sample("a", "1"), sample("a", "2"), sample("b", "2"), sample("b", "2")]
    test = [sample("a", "1"), sample("a", "2"), sample("b", "2"), sample("new", "1"), sample("new", "2")]
    # "new" gets the category's most frequent answer: "2", three times of five.
    assert scenes.question_only_accuracy(train, test) == {"c": pytest.approx(3 / 5)}


def test_counts_are_even() -> None:
    answers = Counter(s.answers[0] for s in scenes.samples(1500, types=["counting"]))
    assert set(answers) == {"zero", "one", "two", "three", "four"}
    assert min(answers.values()) > 0.8 * 1500 / 5


def test_samples_name_their_picture_and_type() -> None:
    found = list(scenes.samples(20, size=224, seed=3, start=5))
    assert len({s.doc_id for s in found}) == len(found)
    assert {s.group for s in found} == {f"scenes224/test/3/{i}" for i in range(5, 25)}
    assert {s.category for s in found} == set(scenes.TYPES)
    assert found[0].images[0]().size == (224, 224)
    assert found == sorted(found, key=lambda s: s.meta["index"])
    only = list(scenes.samples(20, size=224, seed=3, start=5, types=["reading"]))
    assert [s.doc_id for s in only] == [s.doc_id for s in found if s.category == "reading"]
    assert {s.answers[0] for s in only} <= {*WORDS, *"0123456789"}


def test_no_picture_is_in_both_splits() -> None:
    def looks(split: str) -> set[str]:
        drawn = [scenes.compose(i, split=split) for i in range(300)]  # type: ignore[arg-type]
        return {json.dumps([asdict(t) for t in s.things]) for s in drawn}

    assert len(looks("train")) == 300
    assert not looks("train") & looks("test")


def test_a_picture_follows_from_its_number_on_every_machine() -> None:
    """The digest was computed once; it changes with what is drawn, and then VERSION must be raised."""
    text = json.dumps([asdict(scenes.compose(i, size=size)) for size in SIZES for i in range(20)], sort_keys=True)
    assert hashlib.sha256(text.encode()).hexdigest() == COMPOSITION_DIGEST
    twice = [scenes.draw(scenes.compose(7)) for _ in range(2)]
    assert ImageChops.difference(*twice).getbbox() is None


def test_every_text_can_be_written() -> None:
    assert {char for word in (*WORDS, "0123456789") for char in word.upper()} <= set(GLYPHS)
    assert len(set(GLYPHS.values())) == len(GLYPHS)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [({"split": "val"}, "split='val'"), ({"size": 100}, "size=100"), ({"types": ["colour"]}, "colour")],
)
def test_errors_name_the_argument(arguments: dict[str, object], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        next(scenes.samples(1, **arguments))  # type: ignore[arg-type]


def test_a_negative_index_is_an_error() -> None:
    with pytest.raises(ConfigError, match="index=-1"):
        scenes.compose(-1)


def test_nothing_here_imports_torch_or_numpy() -> None:
    code = "import sys, vlmeff.evaluation.scenes; assert not {'torch', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
