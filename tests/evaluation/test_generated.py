"""The generated benchmarks as ``vlmeff eval`` sees them: the same documents every time, in groups, at their size."""

from __future__ import annotations

import pytest

from vlmeff.evaluation import benchmarks
from vlmeff.evaluation.generated import PICTURES


@pytest.mark.parametrize(
    ("name", "side"), [("scenes", 112), ("scenes_224", 224), ("scenes_448", 448), ("mosaics", 128)]
)
def test_documents_are_the_same_every_time(name, side):
    first, again = (benchmarks.get(name).load(limit=30) for _ in range(2))
    assert first.data == again.data
    assert first.data["source"] == "generated"
    assert first.doc_ids == again.doc_ids
    assert len(set(first.doc_ids)) == 30
    assert first.partial
    assert first[3].images[0]().tobytes() == again[3].images[0]().tobytes()
    if side is not None:
        assert first[3].images[0]().size == (side, side)
    metric, sample = benchmarks.get(name).metric, first[3]
    assert metric.score(sample, f" {sample.answers[0].upper()}. ")["scores"]["right"] == 1
    assert metric.score(sample, "no idea")["scores"]["right"] == 0
    assert benchmarks.get(name).prompt(sample) == sample.question + "\nAnswer the question using a single word."


def test_questions_come_in_groups_of_one_picture():
    loaded = benchmarks.get("mosaics").load()
    assert loaded.n_groups == PICTURES
    assert not loaded.partial
    assert loaded.notes
