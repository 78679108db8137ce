"""Drafts and their masks, against formulations by paths."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmeff.errors import ConfigError
from vlmeff.speculative.tree import TREE, Draft, ancestors, chain_template, checked_template, tree_mask

trees = st.integers(0, 12).flatmap(lambda n: st.tuples(*(st.integers(-1, i - 1) for i in range(n))))


def path_of(parents: tuple[int, ...], node: int) -> list[int]:
    return [] if node < 0 else [*path_of(parents, parents[node]), node]


@given(trees)
@settings(deadline=None, max_examples=60)
def test_a_node_sees_the_root_and_its_own_path(parents: tuple[int, ...]) -> None:
    seen = ancestors(parents)
    for node in range(-1, len(parents)):
        expected = {0} | {n + 1 for n in path_of(parents, node)}
        assert set(seen[node + 1].nonzero().flatten().tolist()) == expected


@given(trees, st.lists(st.integers(0, 3), min_size=12, max_size=12), st.integers(0, 5))
@settings(deadline=None, max_examples=100)
def test_pruning_drops_whole_branches(parents: tuple[int, ...], words: list[int], depth: int) -> None:
    """0 is illegal, 1 ends the text. What stays is described by the texts of the paths that stay."""
    draft = Draft(words[: len(parents)], list(parents))
    texts = set()
    for node in range(len(parents)):
        text = tuple(draft.tokens[n] for n in path_of(parents, node))
        repeated = any(
            parents[other] == parents[on] and draft.tokens[other] == draft.tokens[on]
            for on in path_of(parents, node)
            for other in range(on)
        )
        if len(text) <= depth and 0 not in text and 1 not in text[:-1] and not repeated:
            texts.add(text)
    pruned = draft.pruned(depth=depth, legal=lambda token: token != 0, last={1})
    found = [tuple(pruned.tokens[n] for n in path_of(tuple(pruned.parents), node)) for node in range(len(pruned))]
    assert len(found) == len(set(found))
    assert set(found) == texts
    assert pruned.depths == [len(text) for text in found]


def test_the_additive_mask_hides_what_the_boolean_one_does_not_show() -> None:
    padding = torch.tensor([[0, 1, 1, 1]])
    shown = tree_mask([-1, -1, 0], past=3, padding=padding, device=torch.device("cpu"), dtype=None)
    added = tree_mask([-1, -1, 0], past=3, padding=padding, device=torch.device("cpu"), dtype=torch.float32)
    expected = torch.tensor(
        [[0, 1, 1, 1, 0, 0, 0], [0, 1, 1, 1, 1, 0, 0], [0, 1, 1, 1, 0, 1, 0], [0, 1, 1, 1, 1, 0, 1]]
    )
    assert torch.equal(shown[0, 0], expected.bool())
    assert torch.equal(added == 0, shown)
    assert bool((added[~shown] == torch.finfo(torch.float32).min).all())


def test_the_default_tree_has_the_nodes_of_its_description() -> None:
    assert [sum(len(node) == d for node in TREE) for d in range(1, 7)] == [5, 7, 5, 3, 1, 0]
    assert set(checked_template(TREE)) == set(TREE)
    assert chain_template(3) == ((0,), (0, 0), (0, 0, 0))


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ([], "at least one node"),
        ([(0,), (1, 0)], r"\(1, 0\) has no parent: add \(1,\)"),
        ([(0,), (0,)], "given twice"),
        ([(0,), (-1,)], "child ranks"),
    ],
)
def test_a_malformed_template_is_refused(template: list[tuple[int, ...]], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        checked_template(template)
