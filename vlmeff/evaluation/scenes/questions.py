"""Every question that has exactly one answer on a scene, and the few of them that the benchmark asks.

A thing is referred to only by words that fit it alone; places and sizes are compared only where the difference is
plain (``MARGIN``); "one" answers are never guessed. The types:

==========  =====================================================  ==========================
type        question                                               answers
==========  =====================================================  ==========================
attribute   what color is the small star?                          eight colours
            what shape is the red one?                             five shapes
            is the red circle small or large?                      small, large
counting    how many red shapes are there? how many stars ...?     zero to four
comparison  are there more red shapes than blue shapes?            yes, no
            is the red circle larger than the blue star?           yes, no
relation    is the red circle to the left of the blue star?        yes, no
            what color is the leftmost shape?                      eight colours
existence   is there a red circle?                                 yes, no (hard negatives)
reading     what digit is on a sign? what word is on a sign?       ten digits, sixteen words
==========  =====================================================  ==========================
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from vlmeff.evaluation.scenes.composition import COLORS, SHAPES, Scene, Thing

TYPES = ("attribute", "counting", "comparison", "relation", "existence", "reading")
NUMBERS = ("zero", "one", "two", "three", "four")
MARGIN = 120  # thousandths of the side between two places that are compared
EXTREME_MARGIN = 70

_BEFORE: dict[str, Callable[[Thing, Thing], int]] = {  # how far the first lies in the direction
    "to the left of": lambda a, b: b.x - a.x,
    "to the right of": lambda a, b: a.x - b.x,
    "above": lambda a, b: b.y - a.y,
    "below": lambda a, b: a.y - b.y,
}
_EXTREMES: dict[str, Callable[[Thing], int]] = {
    "leftmost": lambda t: t.x,
    "rightmost": lambda t: -t.x,
    "topmost": lambda t: t.y,
    "bottommost": lambda t: -t.y,
}


@dataclass(frozen=True)
class Question:
    """``type`` of ``TYPES``; ``form``: which kind of question within the type."""

    type: str
    form: str
    text: str
    answer: str


def plural(shape: str) -> str:
    return shape + ("es" if shape == "cross" else "s")


def article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def all_questions(scene: Scene) -> list[Question]:
    """Every question that the scene answers, in a fixed order; for negatives only hard ones."""
    return [
        *_attribute(scene),
        *(_count(scene, value) for value in (*COLORS, *SHAPES)),
        *_comparison(scene),
        *_relation(scene),
        *_existence(scene),
        *_reading(scene),
    ]


def theme_question(scene: Scene) -> Question:
    """How many things have the scene's theme: the one count whose answer was drawn evenly."""
    return _count(scene, scene.theme)


def ask(scene: Scene) -> list[Question]:
    """What the benchmark asks about the scene: up to nine questions, at most two of a type, drawn from its name.

    counting is about the theme alone, whose number was drawn evenly; yes and no are drawn evenly before the question.
    """
    rng = random.Random(f"questions-{scene.name}")
    out: list[Question] = []
    forms = _by(all_questions(scene), lambda q: q.form)
    for form in rng.sample(("color", "shape", "size"), 2):
        out += _pick(rng, forms.get(form, []), by_answer=form == "size")
    out.append(theme_question(scene))
    for form in ("more", "larger"):
        out += _pick(rng, forms.get(form, []), by_answer=True)
    out += _pick(rng, forms.get("beside", []), by_answer=True)
    out += _pick(rng, forms.get("extreme", []), by_answer=False)
    out += _pick(rng, forms.get("existence", []), by_answer=True)
    out += _pick(rng, [*forms.get("digit", []), *forms.get("word", [])], by_answer=False)
    return out


def _by(questions: Iterable[Question], key: Callable[[Question], str]) -> dict[str, list[Question]]:
    out: dict[str, list[Question]] = {}
    for question in questions:
        out.setdefault(key(question), []).append(question)
    return out


def _pick(rng: random.Random, questions: list[Question], *, by_answer: bool) -> list[Question]:
    if not questions:
        return []
    if by_answer:
        groups = _by(questions, lambda q: q.answer)
        if len(groups) < 2:  # both answers must have been possible, or the question tells which pictures allow it
            return []
        questions = groups[rng.choice(sorted(groups))]
    return [rng.choice(questions)]


def _unique(scene: Scene, key: Callable[[Thing], str]) -> list[tuple[str, Thing]]:
    """(words, thing) where the words fit one thing alone."""
    counts = Counter(key(t) for t in scene.things)
    return [(key(t), t) for t in scene.things if counts[key(t)] == 1]


def _named(scene: Scene) -> list[tuple[str, Thing]]:
    return _unique(scene, lambda t: f"{t.color} {t.shape}")


def _attribute(scene: Scene) -> list[Question]:
    out = []
    for words, thing in _unique(scene, lambda t: t.shape) + _unique(scene, lambda t: f"{t.size} {t.shape}"):
        out.append(Question("attribute", "color", f"what color is the {words}?", thing.color))
    for words, thing in _unique(scene, lambda t: t.color) + _unique(scene, lambda t: f"{t.size} {t.color}"):
        out.append(Question("attribute", "shape", f"what shape is the {words} one?", thing.shape))
    for words, thing in _named(scene):
        out.append(Question("attribute", "size", f"is the {words} small or large?", thing.size))
    return out


def _count(scene: Scene, value: str) -> Question:
    number = sum(value in (t.color, t.shape) for t in scene.things)
    what = f"{value} shapes" if value in COLORS else plural(value)
    answer = NUMBERS[number] if number < len(NUMBERS) else str(number)
    return Question("counting", "counting", f"how many {what} are there?", answer)


def _comparison(scene: Scene) -> list[Question]:
    out = []
    colors, shapes = Counter(t.color for t in scene.things), Counter(t.shape for t in scene.things)
    for counts, words in ((colors, {c: f"{c} shapes" for c in COLORS}), (shapes, {s: plural(s) for s in SHAPES})):
        for a in counts:
            for b in counts:
                if counts[a] != counts[b]:
                    answer = "yes" if counts[a] > counts[b] else "no"
                    out.append(Question("comparison", "more", f"are there more {words[a]} than {words[b]}?", answer))
    named = _named(scene)
    for name, thing in named:
        for other, second in named:
            if thing.size != second.size:
                answer = "yes" if thing.size == "large" else "no"
                out.append(Question("comparison", "larger", f"is the {name} larger than the {other}?", answer))
    return out


def _relation(scene: Scene) -> list[Question]:
    out = []
    named = _named(scene)
    for name, a in named:
        for other, b in named:
            for words, ahead in _BEFORE.items():
                if a is not b and abs(ahead(a, b)) >= MARGIN:
                    answer = "yes" if ahead(a, b) > 0 else "no"
                    out.append(Question("relation", "beside", f"is the {name} {words} the {other}?", answer))
    for words, place in _EXTREMES.items():
        first, second = sorted(scene.things, key=place)[:2]
        if place(second) - place(first) >= EXTREME_MARGIN:
            out.append(Question("relation", "extreme", f"what color is the {words} shape?", first.color))
    return out


def _existence(scene: Scene) -> list[Question]:
    """A negative shares its colour with one thing and its shape with another: only together they do not occur."""
    present = {(t.color, t.shape) for t in scene.things}
    out = []
    for color in COLORS:
        for shape in SHAPES:
            there = (color, shape) in present
            if there or (any(c == color for c, _ in present) and any(s == shape for _, s in present)):
                answer = "yes" if there else "no"
                out.append(Question("existence", "existence", f"is there {article(color)} {color} {shape}?", answer))
    return out


def _reading(scene: Scene) -> list[Question]:
    return [Question("reading", s.kind, f"what {s.kind} is on a sign?", s.text) for s in scene.signs]
