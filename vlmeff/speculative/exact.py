"""Mode "exact": speculative sampling on denoising paths.

The density of a token under a diffusion head is not known, that of its denoising path is: y = (x_T, ..., x_1) is a
chain of Gaussian steps from a start that both models share, so log p(y)/q(y) is a sum over the steps, with p evaluated
by teacher forcing on the draft's own path. Accept the path with probability min(1, p/q); after a rejection draw paths
from the target and accept them with probability 1 - min(1, q/p). On path space this is ordinary speculative sampling,
and the token is then the target's last, deterministic step from x_1: the law is the target's.

Later drafts of a block are conditioned on the draft's last step instead of the target's; ``context_gap_max`` of the
statistics is the largest difference. With ``final_noise`` both models add the last step's noise, the ratio includes
that step, and there is no gap.

Source: the path view is that of "Accelerated Diffusion Models via Speculative Sampling", arXiv 2501.05370.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vlmeff import ops
from vlmeff.errors import ConfigError
from vlmeff.speculative.gaussian import first_accepted, residual_acceptance, with_temperature
from vlmeff.speculative.job import Job, Player, Tokens

FIRST_TRIES = 4  # residual paths of a unit that are drawn together at first; then twice as many, and so on
MOST_TRIES = 64


@dataclass(frozen=True)
class Draft:
    """One drafted unit of some samples: its tokens under the draft, their values [N, D] and paths [T, N, D]."""

    tokens: Tokens
    x0: Tensor
    path: Tensor
    means: Tensor
    log_sigmas: Tensor


def decode(job: Job) -> None:
    """Decode what is left of a job: draft ``window`` units, verify them in one trunk pass and one head evaluation."""
    while len(job.active):
        _round(job)


def _round(job: Job) -> None:
    assert job.draft is not None
    window = int(job.config.window or 1)
    active = job.active
    done = job.done[active]
    counts = (job.K - done).clamp(max=window)
    scratch = job.values.clone()
    drafts = []
    for offset in range(int(counts.max())):
        due = offset < counts
        drafts.append(_draft(job, job.draft, scratch, active[due], done[due] + offset))

    # The same contexts for the target; the rows follow the drafts, so that their tokens are in one order.
    sample = torch.cat([active[offset < counts] for offset in range(len(drafts))])
    units = torch.cat([(done + offset)[offset < counts] for offset in range(len(drafts))])
    contexts = job.target.contexts(scratch, sample, units)
    tokens = job.tokens_of(contexts, job.unit[sample] == units[:, None])
    path, mean_q, log_q = (torch.cat([getattr(d, name) for d in drafts], 1) for name in ("path", "means", "log_sigmas"))
    mean_p, log_p = job.target.path_stats(tokens, path)
    drafted = torch.cat([d.x0 for d in drafts])
    after = drafted if job.config.final_noise else None
    log_ratio = _path_ratio(job, path, after, (mean_p, log_p), (mean_q, log_q))
    row_ratio = torch.zeros(len(sample), dtype=torch.float64, device=job.device)
    row_ratio = row_ratio.index_add(0, tokens.row, log_ratio)
    accepted = job.uniforms(sample, _first_positions(job, sample, units)).log() < row_ratio

    x0 = drafted if job.config.final_noise else mean_p[-1]  # the target's last step from the draft's x_1
    kept, rejected = _decide(job, sample, accepted, counts, active)
    emitted = kept[tokens.row]
    job.emit(tokens.pick(emitted), x0[emitted])
    gap = (x0 - drafted)[emitted].square().mean(-1).sqrt()
    job.stats.count_distances((x0 - drafted).square().mean(-1).sqrt().tolist())
    job.stats.widen_gap(float(gap.max()) if len(gap) else 0.0)
    if bool(rejected.any()):
        again = rejected[tokens.row]
        from_draft = _joined([d.tokens for d in drafts]).pick(again)
        _resample(job, tokens.pick(again), from_draft)
    job.done[active] += torch.zeros_like(job.done).index_add(0, sample, (kept | rejected).long())[active]


def _draft(job: Job, player: Player, scratch: Tensor, sample: Tensor, units: Tensor) -> Draft:
    """Draft one unit of each sample on the values so far, and write it to them."""
    contexts = player.contexts(scratch, sample, units)
    tokens = job.tokens_of(contexts, job.unit[sample] == units[:, None])
    run = player.run(tokens, keep_path=True)
    x0 = job.final(run, tokens)
    job.check_finite(tokens, x0)
    scratch[tokens.sample, tokens.position] = x0
    return Draft(tokens, x0, run.path, run.means, run.log_sigmas)


def _path_ratio(
    job: Job, path: Tensor, after: Tensor | None, p: tuple[Tensor, Tensor], q: tuple[Tensor, Tensor]
) -> Tensor:
    """log p/q [N] of paths [T, N, D], the states x_T ... x_1, at the job's temperature; ``after`` [N, D]: x_0, if the
    last step is random as well.

    Raises:
        ConfigError: a step before the last has no variance, so there is no density.
    """
    (mean_p, log_p), (mean_q, log_q) = p, q
    if not bool(log_p[:-1].isfinite().all() & log_q[:-1].isfinite().all()):
        raise ConfigError(
            "mode='exact': a step before the last has a variance that is not positive, so its law has no density. "
            "Use mode='coupled'."
        )
    ends = path[1:] if after is None else torch.cat([path[1:], after[None]])
    steps, tau = len(ends), job.temperature  # without ``after`` the last step is a fixed map, which takes no part
    log_p, log_q = with_temperature(log_p[:steps], tau), with_temperature(log_q[:steps], tau)
    return ops.gaussian_path_log_ratio(ends, mean_p[:steps], log_p, mean_q[:steps], log_q)


def _first_positions(job: Job, sample: Tensor, units: Tensor) -> Tensor:
    """[R] the position of a unit that is decoded first: its uniform decides on the unit."""
    return (job.rank[sample] == job.starts[units][:, None]).long().argmax(1)


def _decide(job: Job, sample: Tensor, accepted: Tensor, counts: Tensor, active: Tensor) -> tuple[Tensor, Tensor]:
    """([R] in the accepted prefix of its sample, [R] the first rejection of it); rows are ordered by offset."""
    alive = torch.zeros(job.batch, dtype=torch.bool, device=job.device)
    alive[active] = True
    kept, rejected = torch.zeros_like(accepted), torch.zeros_like(accepted)
    start = 0
    for offset in range(int(counts.max())):
        rows = slice(start, start + int((offset < counts).sum()))
        start = rows.stop
        here = alive[sample[rows]]
        kept[rows] = here & accepted[rows]
        rejected[rows] = here & ~accepted[rows]
        alive[sample[rows]] = kept[rows]
    kept_of = torch.zeros(job.batch, dtype=torch.long, device=job.device).index_add(0, sample, kept.long()).tolist()
    for one, rows_of in zip(active.tolist(), counts.tolist(), strict=True):
        job.stats.count_round(one, drafted=rows_of, accepted=kept_of[one], rejected=int(kept_of[one] < rows_of))
    return kept, rejected


def _joined(parts: list[Tokens]) -> Tokens:
    """Tokens of several passes, one after the other; ``row`` keeps its meaning within each part."""

    def cat(name: str) -> Tensor:
        return torch.cat([getattr(part, name) for part in parts])

    unconditional = None if parts[0].z_uncond is None else cat("z_uncond")
    return Tokens(cat("z"), unconditional, cat("row"), cat("sample"), cat("position"), cat("unit"))


def _resample(job: Job, target: Tokens, draft: Tokens) -> None:
    """Emit units from the residual: paths of the target, kept with probability 1 - min(1, q/p), one choice a unit.

    The same tokens under both models, one rejected unit a sample. Expected tries a unit: (1 - a)/(1 - a) = 1 per unit
    that was decided on, so 1/(1 - a) per rejection. Some tries at once go through the head together, since a run of it
    takes T steps however few its rows are; of those behind the first accepted one no statistic but the head's rows
    knows. How many depends on nothing but the tries before, so that a sample's numbers do not depend on its batch.
    """
    assert job.draft is not None
    left, tries = int(job.config.max_tries or 1), FIRST_TRIES
    while True:
        tries = min(tries, left)
        left -= tries
        unit = target.sample.unique(return_inverse=True)[1]
        count = len(unit)
        uniform, noise = job.fresh_paths(target.sample, tries)
        every = torch.arange(count, device=job.device).repeat(tries)
        run = job.target.run(target.pick(every), noise=noise, keep_path=True)
        x0 = job.final(run, target, noise[1][:, -1])
        q = job.draft.path_stats(draft.pick(every), run.path)
        after = x0 if job.config.final_noise else None
        log_p_over_q = _path_ratio(job, run.path, after, (run.means, run.log_sigmas), q).view(tries, count)
        log_q_over_p = torch.zeros(uniform.shape, dtype=torch.float64, device=job.device)
        log_q_over_p = log_q_over_p.index_add(1, unit, -log_p_over_q)
        found, chosen, looked_at = first_accepted(uniform < residual_acceptance(log_q_over_p))
        job.stats.residual_draws += looked_at
        if not left:
            job.stats.residual_exhausted += int((~found).sum())
            found = torch.ones_like(found)
        out = found[unit]
        x0 = x0.view(tries, count, -1)[chosen[unit], torch.arange(count, device=job.device)]
        job.emit(target.pick(out), x0[out])
        target, draft = target.pick(~out), draft.pick(~out)
        if not len(target.sample):
            return
        tries = min(2 * tries, MOST_TRIES)  # paths are held whole: memory grows with the tries of a block
