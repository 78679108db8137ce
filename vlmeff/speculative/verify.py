"""Walk along a draft with the model's own choices: what speculation may emit is what plain decoding would.

Greedy and, of drafts that were chosen, sampled: the next token is the model's own choice, and the walk goes on as long
as the draft holds it. Of drafts that were drawn from a distribution q: the token is kept with probability min(1, p/q),
else replaced by one drawn from max(0, p - q), normalised (arXiv 2211.17192). Both emit the law of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from vlmeff.speculative.tree import Draft

Process = Callable[[Tensor], Tensor]


def accepted_or_redrawn(p: Tensor, q: Tensor, token: int) -> int:
    """One step of speculative sampling. p, q: [V] float probabilities; ``token`` was drawn from q."""
    if float(torch.rand((), device=p.device)) * float(q[token]) < float(p[token]):
        return token
    rest = (p - q).clamp(min=0)
    total = float(rest.sum())
    return int(torch.multinomial(rest / total if total > 0 else p, 1))


def walk(
    draft: Draft, logits: Tensor, process: Process, *, do_sample: bool
) -> Iterator[tuple[int, int, Tensor, Tensor]]:
    """Yield (token, row, logits, scores) of one emitted token after the other, until the draft goes another way.

    Args:
        logits: [m, V], root first.
        process: [1, V] -> [1, V] processed scores, called once for every emitted token, when all tokens before it have
            been handed out.
    ``row``: 1 + the index in the draft of the emitted token; 0 when the draft does not hold it, which ends the walk.
    """
    row = 0
    while True:
        own = logits[row : row + 1].to(torch.float32, copy=True)
        scores = process(own)
        below = draft.children.get(row - 1, {})
        if not do_sample:
            token = int(scores.argmax(-1))
        else:
            p = scores.softmax(-1)
            if draft.probs is not None and below:
                drafted, index = next(iter(below.items()))
                token = accepted_or_redrawn(p[0], draft.probs[index].to(p), drafted)
            else:
                token = int(torch.multinomial(p, 1))
        row = below.get(token, -1) + 1
        yield token, row, own, scores
        if not row:
            return
