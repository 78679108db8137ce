"""The law of sampled text with drafts, against the product of known conditionals (five words, two tokens)."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from scipy.stats import chi2
from torch import Tensor

from vlmeff.speculative.tree import Draft
from vlmeff.speculative.verify import accepted_or_redrawn, walk

WORDS, SEQUENCES = 5, 20_000


def tables(seed: int) -> tuple[Tensor, Tensor]:
    """Logits of the first token [5], and of the second behind each first [5, 5]."""
    g = torch.Generator().manual_seed(seed)
    return 0.6 * torch.randn(WORDS, generator=g), 0.6 * torch.randn(WORDS, WORDS, generator=g)


def p_value(counts: Tensor, law: Tensor) -> float:
    expected = law.flatten() * counts.sum()
    assert float(expected.min()) > 5
    statistic = float(((counts.flatten() - expected) ** 2 / expected).sum())
    return float(chi2.sf(statistic, counts.numel() - 1))


def chosen() -> list[Draft]:
    """A tree that the random numbers of the walk have nothing to do with."""
    return [Draft([0, 3, 1], [-1, -1, 0])] * SEQUENCES


def drawn() -> list[Draft]:
    """Each token from another distribution than the model's."""
    q = tables(1)[0].softmax(-1)
    of_token = [Draft.chain([token], q[None]) for token in range(WORDS)]
    g = torch.Generator().manual_seed(8)
    return [of_token[token] for token in torch.multinomial(q, SEQUENCES, replacement=True, generator=g).tolist()]


@pytest.mark.parametrize("drafts_of", [chosen, drawn], ids=["a chosen tree", "a drawn chain"])
def test_pairs_of_tokens_have_the_law_of_the_model(drafts_of: Callable[[], list[Draft]]) -> None:
    first, second = tables(0)
    temperature = 0.8
    law = (first / temperature).softmax(-1)[:, None] * (second / temperature).softmax(-1)
    counts = torch.zeros(WORDS, WORDS)
    torch.manual_seed(7)
    drafts = drafts_of()
    passes = {id(draft): torch.stack([first, *(second[token] for token in draft.tokens)]) for draft in drafts}
    for draft in drafts:
        said: list[int] = []
        for token, row, _own, _scores in walk(draft, passes[id(draft)], lambda x: x / temperature, do_sample=True):
            said.append(token)
            if len(said) == 2 or not row:
                break
        if len(said) == 1:  # the next pass
            only = second[said[0]][None]
            said.append(next(walk(Draft(), only, lambda x: x / temperature, do_sample=True))[0])
        counts[said[0], said[1]] += 1
    assert p_value(counts, law) > 1e-4


def test_the_chi_square_test_notices_a_draft_that_is_always_accepted() -> None:
    """Power: what the check above would say of a wrong rule."""
    q = tables(1)[0].softmax(-1)
    torch.manual_seed(7)
    counts = torch.bincount(torch.multinomial(q, SEQUENCES, replacement=True), minlength=WORDS).float()
    assert p_value(counts, tables(0)[0].softmax(-1)) < 1e-4


def test_equal_distributions_accept_and_disjoint_ones_redraw() -> None:
    p = torch.tensor([0.5, 0.5, 0.0])
    torch.manual_seed(0)
    assert all(accepted_or_redrawn(p, p, 1) == 1 for _ in range(50))
    q = torch.tensor([0.0, 0.0, 1.0])
    assert {accepted_or_redrawn(p, q, 2) for _ in range(50)} == {0, 1}
