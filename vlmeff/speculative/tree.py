"""Drafts: tokens proposed behind the last emitted one, as a chain or as a tree, and the mask to verify them with.

Letters: n drafted tokens, m = n + 1 columns of a verifying pass (the last emitted token, *root*, in front), V ids.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from vlmeff.errors import ConfigError

Template = tuple[tuple[int, ...], ...]

# Child ranks: (a, b) is the b-th guess behind the a-th guess. 21 nodes, broad where a guess is likely to be right.
TREE: Template = tuple(
    [(rank,) for rank in range(5)]
    + [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (1, 1), (2, 0)]
    + [(0, 0, 0), (0, 0, 1), (0, 0, 2), (0, 1, 0), (1, 0, 0)]
    + [(0, 0, 0, 0), (0, 0, 0, 1), (0, 0, 1, 0), (0, 0, 0, 0, 0)]
)


def chain_template(depth: int) -> Template:
    """The first guess of every depth: (0,), (0, 0), ..."""
    return tuple((0,) * d for d in range(1, depth + 1))


def checked_template(template: Sequence[Sequence[int]]) -> Template:
    """Sorted by depth, parents in front of children.

    Raises:
        ConfigError: empty, an entry that is no tuple of ranks >= 0, one given twice, or one whose parent is missing.
    """
    nodes = [tuple(node) for node in template]
    known = set(nodes)
    if not nodes:
        raise ConfigError("tree: a template needs at least one node, such as ((0,), (1,), (0, 0)).")
    for node in nodes:
        if not node or any(type(rank) is not int or rank < 0 for rank in node):
            raise ConfigError(f"tree: node {node!r} must be a tuple of child ranks >= 0, such as (0, 1).")
        if len(node) > 1 and node[:-1] not in known:
            raise ConfigError(f"tree: node {node} has no parent: add {node[:-1]}.")
    if len(known) != len(nodes):
        twice = next(node for node in nodes if nodes.count(node) > 1)
        raise ConfigError(f"tree: node {twice} is given twice.")
    return tuple(sorted(nodes, key=lambda node: (len(node), node)))


@dataclass(frozen=True, eq=False)
class Draft:
    """Tokens proposed behind the last emitted one.

    ``parents[i]`` < i is the index of token i's parent, -1 the root. ``probs`` [n, V] float, of a chain only: the
    distributions that the tokens were drawn from; None when they were chosen, not drawn.
    """

    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    probs: Tensor | None = None

    @classmethod
    def chain(cls, tokens: Sequence[int], probs: Tensor | None = None) -> Draft:
        return cls(list(tokens), list(range(-1, len(tokens) - 1)), probs)

    def __len__(self) -> int:
        return len(self.tokens)

    @cached_property
    def depths(self) -> list[int]:
        """Tokens on the way from the root, from 1 on."""
        out: list[int] = []
        for parent in self.parents:
            out.append(1 if parent < 0 else out[parent] + 1)
        return out

    @property
    def depth(self) -> int:
        return max(self.depths, default=0)

    @property
    def is_chain(self) -> bool:
        return self.parents == list(range(-1, len(self.tokens) - 1))

    @cached_property
    def children(self) -> dict[int, dict[int, int]]:
        """By parent: token -> index."""
        out: dict[int, dict[int, int]] = {}
        for index, (token, parent) in enumerate(zip(self.tokens, self.parents, strict=True)):
            out.setdefault(parent, {}).setdefault(token, index)
        return out

    def pruned(self, *, depth: int, legal: Callable[[int], bool], last: Collection[int]) -> Draft:
        """Without nodes deeper than ``depth``, illegal ones, what follows one of ``last`` (end of text), and repeated
        siblings; each with everything behind it."""
        index: dict[int, int] = {-1: -1}  # of nodes that may have children
        seen: set[tuple[int, int]] = set()
        tokens: list[int] = []
        parents: list[int] = []
        rows: list[int] = []
        for i, (token, parent) in enumerate(zip(self.tokens, self.parents, strict=True)):
            if parent not in index or self.depths[i] > depth or not legal(token) or (parent, token) in seen:
                continue
            seen.add((parent, token))
            if token not in last:
                index[i] = len(tokens)
            tokens.append(token)
            parents.append(index[parent])
            rows.append(i)
        return Draft(tokens, parents, None if self.probs is None else self.probs[rows])


def ancestors(parents: Sequence[int]) -> Tensor:
    """[m, m] bool, root first: whether the column is the row itself or in front of it on its path."""
    out = torch.eye(len(parents) + 1, dtype=torch.bool)
    out[:, 0] = True
    for i, parent in enumerate(parents):
        out[i + 1] |= out[parent + 1]
    return out


def tree_mask(
    parents: Sequence[int], *, past: int, padding: Tensor | None, device: torch.device, dtype: torch.dtype | None
) -> Tensor:
    """[1, 1, m, past + m]: every column in front of the pass, and of the pass the node's own path.

    Args:
        padding: [1, >= past] attention mask of the sequence, 0 where nobody may look; None: nowhere.
        dtype: None for a bool mask (sdpa); of an additive one, 0 and the smallest number (eager attention).
    """
    own = ancestors(parents).to(device)
    old = torch.ones(len(own), past, dtype=torch.bool, device=device)
    if padding is not None:
        old &= padding[0, :past].to(device).bool()
    allowed = torch.cat([old, own], 1)[None, None]
    if dtype is None:
        return allowed
    return torch.zeros(allowed.shape, dtype=dtype, device=device).masked_fill(~allowed, torch.finfo(dtype).min)
