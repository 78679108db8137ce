"""Lookup and recycling, against slow searches of the whole text."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmeff.errors import ConfigError
from vlmeff.speculative.drafting import Request
from vlmeff.speculative.lookup import Lookup
from vlmeff.speculative.pace import Pace
from vlmeff.speculative.recycle import Recycle
from vlmeff.speculative.text import TextSpeculation

FORBIDDEN = 0


def request(*, vocabulary: int = 6, takes_trees: bool = True) -> Request:
    return Request(
        model=None,
        prompt=[],
        inputs={},
        assistant_inputs=None,
        processors=[],
        do_sample=False,
        vocabulary=vocabulary,
        takes_trees=takes_trees,
        forbidden={FORBIDDEN},
    )


def searched(ids: Sequence[int], depth: int, *, longest: int, shortest: int) -> list[int]:
    """The newest place where the longest suffix stood before and went on with a legal token; copied token by token."""
    for n in range(min(longest, len(ids)), shortest - 1, -1):
        for start in range(len(ids) - 1, n - 1, -1):
            if list(ids[start - n : start]) == list(ids[-n:]) and FORBIDDEN not in ids[start - n : start + 1]:
                text = list(ids)
                for k in range(depth):
                    if text[start + k] == FORBIDDEN:
                        break
                    text.append(text[start + k])
                return text[len(ids) :]
    return []


@given(st.lists(st.integers(0, 4), min_size=1, max_size=40), st.integers(1, 8), st.booleans(), st.data())
@settings(deadline=None, max_examples=200)
def test_lookup_finds_what_a_search_of_the_text_finds(
    ids: list[int], depth: int, early: bool, data: st.DataObject
) -> None:
    session = Lookup(ngram=3).start(request())
    known = data.draw(st.integers(1, len(ids)))  # the table grows with the text
    session.propose(ids[:known], 1, early=False)
    draft = session.propose(ids, depth, early=early)
    assert draft.tokens == searched(ids, depth, longest=3, shortest=3 if early else 1)
    assert draft.is_chain


def test_lookup_never_copies_a_placeholder_though_the_prompt_ends_as_the_text_before_the_picture() -> None:
    session = Lookup().start(request())
    assert session.propose([1, 2, FORBIDDEN, FORBIDDEN, 3, 1, 2], 10, early=False).tokens == []
    assert session.propose([1, 2, FORBIDDEN, FORBIDDEN, 3, 1, 2, 3, 1, 2], 10, early=False).tokens == [3, 1, 2] * 3 + [
        3
    ]


def test_lookup_reads_further_texts_but_prefers_what_was_said() -> None:
    pool = ((1, 2, 3, 4), (2, 5))
    assert Lookup(pool=pool).start(request()).propose([1, 2], 3, early=False).tokens == [3, 4]
    assert Lookup(pool=pool).start(request()).propose([1, 2, 1, 1, 2], 2, early=False).tokens == [1, 1]


@pytest.mark.parametrize("arguments", [{"depth": 0}, {"ngram": 0}, {"depth": 1.5}, {"pool": (("a",),)}, {"pool": 3}])
def test_lookup_refuses(arguments: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(arguments))):
        Lookup(**arguments)  # type: ignore[arg-type]


def test_recycling_reads_the_tree_off_the_latest_runners_up() -> None:
    torch.manual_seed(0)
    settings = Recycle(tree=((0,), (1,), (0, 0), (0, 2), (1, 1), (0, 2, 0)))
    session = settings.start(request(vocabulary=40))
    tokens = [3, 7, 3, *range(40)][:30]
    logits = torch.randn(len(tokens), 40)
    session.observe(tokens, logits)
    best: dict[int, list[int]] = {}
    for token, row in zip(tokens, logits.tolist(), strict=True):
        best[token] = sorted(range(40), key=lambda v: -row[v])[:8]
    draft = session.propose([5, 3], 3, early=False)
    found = {}
    for index, parent in enumerate(draft.parents):
        found[index] = (*found.get(parent, ()), draft.tokens[index])
    expected = set()
    for node in settings.tree:
        path: list[int] = []
        for rank in node:
            before = path[-1] if path else 3
            if before not in best:
                path = []
                break
            path.append(best[before][rank])
        if path:
            expected.add(tuple(path))
    assert set(found.values()) == expected
    assert session.propose([5, 39], 3, early=False).tokens == []  # never seen
    assert settings.start(request()).propose([3], 1, early=False).depth == 1  # the next call still knows


def test_recycling_drafts_a_chain_where_trees_cannot_be_verified() -> None:
    settings = Recycle()
    settings.runners.learn([0, 1, 2, 3], torch.from_numpy(np.roll(np.eye(9, dtype=np.float32), 1, 1)[:4]))
    draft = settings.start(request(vocabulary=9, takes_trees=False)).propose([0], 5, early=False)
    assert draft.tokens == [1, 2, 3, 4]
    assert draft.is_chain


def test_recycling_refuses_ranks_that_are_not_kept() -> None:
    with pytest.raises(ConfigError, match="ranks"):
        Recycle(tree=((8,),))


def test_the_pace_halves_after_three_misses_rests_and_grows_again() -> None:
    pace = Pace(TextSpeculation(drafter=Lookup(depth=10)))
    for emitted in (1, 2, 3):
        assert pace.depth(emitted) == 10
        pace.note(10, 0, emitted=emitted)
    assert [pace.depth(n) for n in (4, 10, 11)] == [0, 0, 5]
    pace.note(5, 5, emitted=16)
    assert pace.depth(16) == 7
    pace.note(7, 3, emitted=20)
    assert pace.depth(20) == 7
    steady = Pace(TextSpeculation(drafter=Recycle(), adaptive=False))
    for emitted in range(9):
        steady.note(5, 0, emitted=emitted)
    assert steady.depth(9) == 5
