"""Mosaics as a benchmark: answers follow from the cells, and the question alone says little."""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest

from vlmeff.errors import ConfigError
from vlmeff.evaluation import mosaics
from vlmeff.evaluation.samples import Sample
from vlmeff.evaluation.scenes import question_only_accuracy

PRIOR = {"position": 0.23, "where": 0.25, "exists": 0.50, "count": 0.35}


@pytest.fixture(scope="module")
def found() -> list[Sample]:
    return list(mosaics.samples(300))


def seen(sample: Sample) -> dict[str, tuple[str, str]]:
    """{position: (colour, shape)}, read from the pixels by comparing the cells with every tile."""
    pixels = np.asarray(sample.images[0]())
    tiles = {t.pixels.tobytes(): (t.color, t.shape) for t in mosaics.load_tiles("test")}
    side = mosaics.TILE
    cells = {
        "top left": pixels[:side, :side],
        "top right": pixels[:side, side:],
        "bottom left": pixels[side:, :side],
        "bottom right": pixels[side:, side:],
    }
    return {where: tiles[cell.tobytes()] for where, cell in cells.items() if cell.tobytes() in tiles}


def solve(objects: dict[str, tuple[str, str]], text: str) -> set[str]:
    if m := re.fullmatch(r"what color is the shape in the (.+)\?", text):
        return {objects[m[1]][0]}
    if m := re.fullmatch(r"what shape is in the (.+)\?", text):
        return {objects[m[1]][1]}
    if m := re.fullmatch(r"where is the (\w+) (\w+)\?", text):
        return {where for where, look in objects.items() if look == (m[1], m[2])}
    if m := re.fullmatch(r"is there a (\w+) (\w+)\?", text):
        return {"yes" if (m[1], m[2]) in objects.values() else "no"}
    assert text == "how many shapes are there?"
    return {("zero", "one", "two", "three", "four")[len(objects)]}


def test_every_answer_follows_from_the_pixels(found: list[Sample]) -> None:
    for sample in found[:200]:
        assert solve(seen(sample), sample.question) == set(sample.answers), sample.question


def test_a_no_shares_colour_or_shape_with_the_picture(found: list[Sample]) -> None:
    hard = [s for s in found[:400] if s.answers == ("no",)]
    assert hard
    for sample in hard:
        color, shape = sample.question.removesuffix("?").split()[-2:]
        looks = seen(sample).values()
        assert color in {c for c, _ in looks} or shape in {s for _, s in looks}


def test_documents_are_unique_grouped_by_picture_and_the_same_every_time(found: list[Sample]) -> None:
    assert len({s.doc_id for s in found}) == len(found)
    assert Counter(s.category for s in found)["position"] == 600
    assert {s.group for s in found} == {f"mosaics/test/0/{i}" for i in range(300)}
    again = list(mosaics.samples(10, start=20))
    assert [(s.doc_id, s.question, s.answers) for s in again] == [
        (s.doc_id, s.question, s.answers) for s in found if 20 <= s.meta["index"] < 30
    ]


def test_the_question_alone_says_little(found: list[Sample]) -> None:
    prior = question_only_accuracy(mosaics.samples(3000, split="train"), found)
    assert prior == {kind: pytest.approx(value, abs=0.08) for kind, value in PRIOR.items()}


def test_an_unknown_split_is_an_error() -> None:
    with pytest.raises(ConfigError, match="split='val'"):
        next(mosaics.samples(1, split="val"))  # type: ignore[arg-type]


def test_it_does_not_import_torch() -> None:
    code = "import sys, vlmeff.evaluation.mosaics; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
