"""Drafters that know the truth or talk rubbish, for the tests of text speculation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from vlmeff.speculative.drafting import Request
from vlmeff.speculative.text import TextSpeculation
from vlmeff.speculative.tree import Draft


class Scripted:
    """Proposes the ``truth``; every ``wrong``-th draft ends in another token. ``tree``: with wrong branches beside it,
    in front of it where the columns of the cache have to be moved."""

    name = "scripted"
    rests = False

    def __init__(self, truth: Sequence[int], *, depth: int = 4, wrong: int = 0, tree: bool = False) -> None:
        self.truth, self.depth, self.wrong, self.tree = list(truth), depth, wrong, tree
        self.drafts = 0

    def start(self, request: Request) -> Scripted:
        self._width, self._tree = len(request.prompt), self.tree and request.takes_trees
        return self

    def propose(self, ids: Sequence[int], depth: int, *, early: bool) -> Draft:
        behind = len(ids) - self._width
        tokens = self.truth[behind : behind + depth]
        self.drafts += 1
        if tokens and self.wrong and self.drafts % self.wrong == 0:
            tokens[-1] = other(tokens[-1])
        if not tokens or not self._tree:
            return Draft.chain(tokens)
        words, parents, last = [other(tokens[0]), 50], [-1, 0], -1
        for token in tokens:
            words += [token, other(other(token))]
            parents += [last, last]
            last = len(words) - 2
        return Draft(words, parents)

    def observe(self, tokens: Sequence[int], logits: Tensor) -> None:
        assert len(tokens) == len(logits)


def other(token: int) -> int:
    """Another ordinary word of the tiny models."""
    return 10 + (token + 31) % 100


def scripted(truth: Sequence[int], **options: Any) -> TextSpeculation:
    return TextSpeculation(drafter=Scripted(truth, **options), warmup=0, adaptive=False)
