"""Mode "coupled": Jacobi verification of guesses under fixed noise.

With the noise of every position fixed, plain decoding is x_i = F(x_<i; noise_i). Given guesses for a block, F is
evaluated for all of its units in parallel on the guessed prefix. The first result is exact, the second if the guess of
the first was, and so on. A token that is emitted is always the target's own value; with tolerance ``delta`` its context
is within ``delta`` (RMS per token) of the emitted tokens. No density, no residual; any head will do.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vlmeff.speculative.job import Job


def decode(job: Job) -> None:
    """Decode what is left of a job.

    proposal "self": the last row of every pass also predicts the units behind its own, so the first guess of a unit is
    the target's parallel prediction. proposal "draft": before every round the draft extends the guesses one by one on
    the values so far; units that the target has evaluated keep its value as their guess.

    Each round evaluates up to ``window`` trunk rows a sample in one pass and emits at least one unit of each.
    """
    guessed = torch.zeros(job.batch, job.L, dtype=torch.bool, device=job.device)
    while len(job.active):
        if job.config.proposal == "draft":
            _extend(job, guessed)
        _round(job, guessed)


def _round(job: Job, guessed: Tensor) -> None:
    """One trunk pass, one head run; emits 1 to ``window`` units of each active sample."""
    window, delta = int(job.config.window or 1), float(job.config.delta or 0.0)
    active = job.active
    done = job.done[active]
    have = _consecutive(job, guessed, active)
    counts = (1 + have).clamp(max=window).minimum(job.K - done)  # rows of each sample
    sample = active.repeat_interleave(counts)
    first = (counts.cumsum(0) - counts).repeat_interleave(counts)
    offset = torch.arange(len(sample), device=job.device) - first  # j of each row
    contexts = job.target.contexts(job.values, sample, job.done[sample] + offset)

    unit = job.unit[sample]  # [R, L]
    own = unit == contexts.units[:, None]
    wanted = own
    if job.config.proposal == "self":
        # Guesses further ahead than the next round can look at would be made from an older context for nothing.
        last = offset == (counts.repeat_interleave(counts) - 1)
        ahead = (unit > contexts.units[:, None]) & (unit < (contexts.units + window)[:, None])
        wanted = own | (last[:, None] & ahead & ~guessed[sample])
    tokens = job.tokens_of(contexts, wanted)
    old = job.values[tokens.sample, tokens.position]
    new = job.target.run(tokens).x0
    job.check_finite(tokens, new)

    # d_j = max over the unit's tokens of RMS(new - guess), infinite where there was no guess.
    distance = (new - old).square().mean(-1).sqrt()
    distance = torch.where(guessed[tokens.sample, tokens.position], distance, torch.inf)
    is_own = own[tokens.row, tokens.position]
    row_distance = torch.zeros(len(sample), device=job.device)
    row_distance = row_distance.scatter_reduce(0, tokens.row[is_own], distance[is_own], "amax")
    held = row_distance <= delta

    job.values[tokens.sample, tokens.position] = new
    guessed[tokens.sample, tokens.position] = True
    _advance(job, active, counts.tolist(), held.tolist(), row_distance.tolist())


def _advance(job: Job, active: Tensor, counts: list[int], held: list[bool], distance: list[float]) -> None:
    """Emit new_0, and new_t for as long as the guess before it held."""
    at = 0
    steps = []
    for sample, rows in zip(active.tolist(), counts, strict=True):
        took = 1
        while took < rows and held[at + took - 1]:
            took += 1
        compared = distance[at : at + rows - 1]  # the last row's guess was in no context
        job.stats.count_round(sample, drafted=rows - 1, accepted=took - 1, rejected=int(took < rows))
        job.stats.count_distances(compared)
        job.stats.widen_gap(max(compared[: took - 1], default=0.0))
        steps.append(took)
        at += rows
    job.done[active] += torch.tensor(steps, device=job.device)


def _consecutive(job: Job, guessed: Tensor, active: Tensor) -> Tensor:
    """[A] units from the first unfinished one on that have guesses for all of their tokens, without a gap."""
    missing = torch.where(guessed[active], job.K, job.unit[active])
    missing = torch.where(job.unit[active] < job.done[active][:, None], job.K, missing)
    return missing.amin(1) - job.done[active]


def _extend(job: Job, guessed: Tensor) -> None:
    """Let the draft guess, one unit after the other, all but the last unit that the round can look at."""
    assert job.draft is not None
    window = int(job.config.window or 1)
    for _ in range(window - 1):
        active = job.active
        have = _consecutive(job, guessed, active)
        due = active[(have < window - 1) & (job.done[active] + have < job.K - 1)]
        if not len(due):
            return
        units = job.done[due] + _consecutive(job, guessed, due)
        contexts = job.draft.contexts(job.values, due, units)
        tokens = job.tokens_of(contexts, job.unit[due] == units[:, None])
        job.emit(tokens, job.draft.run(tokens).x0)
        guessed[tokens.sample, tokens.position] = True
