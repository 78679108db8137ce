"""Mode "cspd": Continuous Speculative Decoding as published, and as its published code does it. Approximate.

Both heads denoise with the same noise. With the last step's means m and sigmas s (temperature included) of the two
models and S, the sum of log sigmas of the steps before it, a draft token x is accepted if

    log U < -|x - m_p|^2 / (2 lam^2 s_p^2) - log|s_p| + |x - m_q|^2 / (2 lam^2 s_q^2) + log|s_q| + sgn sum(S_q - S_p)

with lam the softening and sgn = +1 as in the paper, -1 as in its code (the inverse), 0 without the term. The last step
is deterministic, so x = m_q: the criterion is a soft threshold on the distance between the two models' tokens for one
noise. The two densities belong to different points of path space, so this is no likelihood ratio and the law is not the
target's: with lam = 42 the mean moves by -0.139 between N(0.3, 0.467) and N(0, 0.565) (tests/speculative).

What differs from the published code (repository MarkXCloud/CSpD at d91f721): logarithms throughout (products of sigmas
leave float32 from 18 values a token), random numbers of each sample's own streams, the first accepted proposal of a
residual instead of the last (same law), and ``on_exhausted="target"`` instead of a token of zeros. Where temperature is
0 the widths are those of temperature 1, so that the criterion stays defined.

Source: "Continuous Speculative Decoding for Autoregressive Image Generation", arXiv 2411.11925.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vlmeff import ops
from vlmeff.speculative.gaussian import TRIES_AT_ONCE, first_accepted, residual_acceptance, with_temperature
from vlmeff.speculative.job import Contexts, Job, Player, Tokens

SIGN = {"paper": 1.0, "official": -1.0, "off": 0.0}


class Steps:
    """What the criterion needs of a head run: last means and log sigmas, sums of the others' [N, D]."""

    def __init__(self, run: Any, temperature: float) -> None:
        self.mean = run.mean0
        self.log_sigma = with_temperature(run.log_sigma0, temperature or 1.0)
        self.log_sigma_sum = run.sum_log_sigma

    @classmethod
    def joined(cls, parts: list[Steps]) -> Steps:
        return cls._of(lambda name: torch.cat([getattr(part, name) for part in parts]))

    def pick(self, index: Tensor) -> Steps:
        """Those of an index or mask [N]."""
        return self._of(lambda name: getattr(self, name)[index])

    @classmethod
    def _of(cls, get: Callable[[str], Tensor]) -> Steps:
        out = cls.__new__(cls)
        out.mean, out.log_sigma, out.log_sigma_sum = (get(name) for name in ("mean", "log_sigma", "log_sigma_sum"))
        return out


def log_acceptance(x: Tensor, p: Steps, q: Steps, *, softening: float, sigma_term: str) -> Tensor:
    """The logarithm of what a uniform number is held against: x [..., N, D] -> [..., N] float64."""
    last = (t.expand_as(x).reshape(1, -1, x.shape[-1]) for t in (x, p.mean, p.log_sigma, q.mean, q.log_sigma))
    ends = ops.gaussian_path_log_ratio(*last, softening=softening).view(x.shape[:-1])
    return ends + SIGN[sigma_term] * (q.log_sigma_sum - p.log_sigma_sum).sum(-1, dtype=torch.float64)


def decode(job: Job) -> None:
    """Decode what is left of a job, block by block."""
    while len(job.active):
        _round(job)


def block_ends(job: Job, done: Tensor) -> Tensor:
    """[A] the unit behind the block of each sample.

    The published code, which never rolls back, verifies after every unit whose number is a multiple of gamma; its first
    and last blocks may be shorter.
    """
    window = int(job.config.window or 1)
    if job.config.variant == "official" and not job.config.rollback:
        ends = -(-done // window) * window + 1
    else:
        ends = done + window
    return ends.clamp(max=job.K)


def _round(job: Job) -> None:
    assert job.draft is not None
    config = job.config
    active = job.active
    done = job.done[active]
    ends = block_ends(job, done)
    drafts: list[Tokens] = []
    steps: list[Steps] = []
    for offset in range(int((ends - done).max())):
        due = done + offset < ends
        tokens, found = _draft(job, job.draft, active[due], done[due] + offset)
        drafts.append(tokens)
        steps.append(found)
    tokens, run = _verify(job, _order(drafts), active, done, ends)
    p, q = Steps(run, job.temperature), Steps.joined(steps)
    x = job.values[tokens.sample, tokens.position]
    job.check_finite(tokens, run.x0)
    job.stats.count_distances((x - run.x0).square().mean(-1).sqrt().tolist())
    log_u = job.uniforms(tokens.sample, tokens.position).log()
    accepted = log_u < log_acceptance(
        x, p, q, softening=float(config.softening or 1.0), sigma_term=str(config.sigma_term)
    )
    replace, ends = _decide(job, tokens, accepted, active, done, ends)
    _replace(job, tokens, replace, p, q, run.x0)
    job.done[active] = ends


def _draft(job: Job, player: Player, sample: Tensor, units: Tensor) -> tuple[Tokens, Steps]:
    contexts = player.contexts(job.values, sample, units)
    tokens = job.tokens_of(contexts, job.unit[sample] == units[:, None])
    run = player.run(tokens)
    job.emit(tokens, run.x0)
    return tokens, Steps(run, job.temperature)


def _order(drafts: list[Tokens]) -> tuple[Tensor, Tensor, Tensor]:
    """(sample, position, unit) [N] of all drafted tokens, in the order in which they were drafted."""
    sample, position, unit = (torch.cat([getattr(d, n) for d in drafts]) for n in ("sample", "position", "unit"))
    return sample, position, unit


def _verify(
    job: Job, drafted: tuple[Tensor, Tensor, Tensor], active: Tensor, done: Tensor, ends: Tensor
) -> tuple[Tokens, Any]:
    """The target's run at every drafted token, in one trunk pass and one run of the head."""
    sample, position, unit = drafted
    row_of = torch.zeros(job.batch, dtype=torch.long, device=job.device)
    if job.config.verify == "parallel":
        contexts = job.target.contexts(job.values, active, done)
        row_of[active] = torch.arange(len(active), device=job.device)
        row = row_of[sample]
        last = torch.zeros_like(row_of)
        last[active] = ends - 1
        weight_unit = last[sample]  # the published code guides all of a block by its current step
    else:
        counts = ends - done
        rows = active.repeat_interleave(counts)
        row_of[active] = counts.cumsum(0) - counts
        offset = torch.arange(len(rows), device=job.device) - row_of[rows]
        contexts = job.target.contexts(job.values, rows, job.done[rows] + offset)
        row = row_of[sample] + unit - job.done[sample]
        weight_unit = unit
    tokens = _tokens_at(contexts, row, sample, position, unit)
    noise = job.noise_of(tokens, aligned=bool(job.config.align))
    return tokens, job.target.run(tokens, noise=noise, weight_unit=weight_unit)


def _tokens_at(contexts: Contexts, row: Tensor, sample: Tensor, position: Tensor, unit: Tensor) -> Tokens:
    unconditional = None if contexts.z_uncond is None else contexts.z_uncond[row, position]
    return Tokens(contexts.z[row, position], unconditional, row, sample, position, unit)


def _decide(
    job: Job, tokens: Tokens, accepted: Tensor, active: Tensor, done: Tensor, ends: Tensor
) -> tuple[Tensor, Tensor]:
    """([N] which tokens to replace, [A] the unit behind what is emitted).

    A unit is accepted when all its tokens are; of a rejected one only the rejected tokens are replaced.
    """
    bad = torch.zeros(job.batch, job.K, dtype=torch.long, device=job.device)
    bad.index_put_((tokens.sample, tokens.unit), (~accepted).long(), accumulate=True)
    held = (bad == 0)[active]  # [A, K]
    number = torch.arange(job.K, device=job.device)
    drafted = (number >= done[:, None]) & (number < ends[:, None])
    rejected = drafted & ~held
    if job.config.rollback:
        first = torch.where(rejected, number, job.K).amin(1)
        ends = torch.minimum(ends, first + 1)
    emitted = (number >= done[:, None]) & (number < ends[:, None])
    kept, lost = (emitted & held).sum(1).tolist(), (emitted & rejected).sum(1).tolist()
    for i, sample in enumerate(active.tolist()):
        job.stats.count_round(sample, drafted=int(drafted[i].sum()), accepted=kept[i], rejected=lost[i])
    end_of = torch.zeros(job.batch, dtype=torch.long, device=job.device)
    end_of[active] = ends
    return ~accepted & (tokens.unit < end_of[tokens.sample]), ends


def _replace(job: Job, tokens: Tokens, replace: Tensor, p: Steps, q: Steps, aligned: Tensor) -> None:
    """Write what rejected tokens become. ``aligned`` [N, D]: the target's tokens for the same noise."""
    at = replace.nonzero().squeeze(1)
    if not len(at):
        return
    if job.config.residual == "match":
        job.emit(tokens.pick(at), aligned[at])
        return
    unaccepted = aligned[at] if job.config.on_exhausted == "target" else torch.zeros_like(aligned[at])
    job.emit(tokens.pick(at), unaccepted)
    left = int(job.config.max_tries or 1)
    while len(at) and left:
        tries = min(TRIES_AT_ONCE, left)
        left -= tries
        here = p.pick(at)
        noise, uniform = job.fresh_tokens(tokens.sample[at], tries)
        x = here.mean + here.log_sigma.exp() * noise  # [tries, n, D]
        log_p_over_q = log_acceptance(x, here, q.pick(at), softening=1.0, sigma_term=str(job.config.sigma_term))
        found, chosen, looked_at = first_accepted(uniform < residual_acceptance(-log_p_over_q))
        job.stats.residual_draws += looked_at
        taken = x[chosen, torch.arange(len(at), device=job.device)]
        job.emit(tokens.pick(at[found]), taken[found])
        at = at[~found]
    job.stats.residual_exhausted += len(at)
