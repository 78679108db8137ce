"""Draft from the model's own runners-up: token recycling.

Source: "Turning Trash into Treasure: Accelerating Inference of Large Language Models with Token Recycling",
arXiv 2408.08696. A matrix M [V, k] holds, for every id, the k likeliest next ids when the model last saw it; a tree is
read off it: node (a, b, c) is M[M[M[last, a], b], c]. Differs from the official code: 21 nodes instead of 80, ids that
were never seen have no children (there: zeros), and the prompt's text can be learned from (``learn_prompt``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from vlmeff.errors import ConfigError
from vlmeff.speculative.drafting import Request
from vlmeff.speculative.tree import TREE, Draft, Template, chain_template, checked_template

BREADTH = 8  # k


class Runners:
    """M int32 [V, k], -1 where an id was not seen yet. 1 MB for 32 k ids. Survives from one call to the next."""

    def __init__(self) -> None:
        self._best = np.full((0, BREADTH), -1, dtype=np.int32)

    def learn(self, tokens: Sequence[int], logits: Tensor) -> None:
        """The top k of ``logits`` [m, V] behind each token; of an id that stands there twice the last row counts."""
        if logits.shape[1] > len(self._best):
            grown = np.full((logits.shape[1], BREADTH), -1, dtype=np.int32)
            grown[: len(self._best)] = self._best
            self._best = grown
        k = min(BREADTH, logits.shape[1])
        top = logits.topk(k, dim=-1).indices.cpu().numpy()
        last = {token: row for row, token in enumerate(tokens) if 0 <= token < len(self._best)}
        self._best[list(last), :k] = top[list(last.values())]

    def after(self, token: int, rank: int) -> int:
        """The ``rank``-th likeliest id after ``token``; -1: not known."""
        return int(self._best[token, rank]) if token < len(self._best) and rank < BREADTH else -1


@dataclass(frozen=True, eq=False)
class Recycle:
    """Guess that the model goes on from a token as it (nearly) did the last time.

    Args:
        tree: child ranks below 8, every prefix present; ``vlmeff.speculative.tree.chain_template(4)`` for a chain.
            Where trees cannot be verified (flash attention, sliding windows) the chain of the same depth is used.
        learn_prompt: learn from the prompt too. Its logits are computed for every position: V x prompt numbers.
    Raises:
        ConfigError: a malformed tree.
    """

    tree: Template = TREE
    learn_prompt: bool = False
    runners: Runners = field(default_factory=Runners, repr=False)
    name = "recycle"
    rests = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "tree", checked_template(self.tree))
        if max(rank for node in self.tree for rank in node) >= BREADTH:
            raise ConfigError(f"Recycle: the ranks of a tree end at {BREADTH - 1}.")

    @property
    def depth(self) -> int:
        return max(map(len, self.tree))

    def start(self, request: Request) -> RecycleSession:
        return RecycleSession(self.tree if request.takes_trees else chain_template(self.depth), self.runners)


class RecycleSession:
    def __init__(self, tree: Template, runners: Runners) -> None:
        self._tree, self._runners = tree, runners

    def propose(self, ids: Sequence[int], depth: int, *, early: bool) -> Draft:
        if early:
            return Draft()
        index: dict[tuple[int, ...], int] = {(): -1}
        tokens: list[int] = []
        parents: list[int] = []
        for node in self._tree:
            if len(node) > depth or node[:-1] not in index:
                continue
            parent = index[node[:-1]]
            token = self._runners.after(ids[-1] if parent < 0 else tokens[parent], node[-1])
            if token >= 0:
                index[node] = len(tokens)
                tokens.append(token)
                parents.append(parent)
        return Draft(tokens, parents)

    def observe(self, tokens: Sequence[int], logits: Tensor) -> None:
        self._runners.learn(tokens, logits)
