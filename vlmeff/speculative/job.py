"""What every mode works on: one call's models, its fixed noise, its units and what is decoded so far.

B samples, L positions, D token dim, K units, R rows (contexts), N tokens that a head run makes. A *unit* is what one
step of plain decoding predicts (one token for K = L). A *context* is a sample with its first so many units visible.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from vlmeff.errors import ConfigError
from vlmeff.models.mar.sampling import (
    NoiseBank,
    batch_size,
    check_noise,
    check_order,
    guidance,
    seconds_since,
    units,
    uses_guidance,
)
from vlmeff.speculative.continuous import Continuous
from vlmeff.speculative.statistics import Stats

# Streams of random numbers beside orders and noise, by what is xor-ed to the seed of a sample.
UNIFORMS, RESIDUAL, UNALIGNED = 0x9E3779B9, 0x7F4A7C15, 0x3C6EF372
MAX_ROWS = 65536  # of one call of the head, in a teacher-forced evaluation


class Head(Protocol):
    """The diffusion head; see ``vlmeff.models.mar.head``."""

    def sample(self, z: Tensor, x_T: Tensor, eps: Tensor, **options: Any) -> Any: ...

    def path_stats(self, z: Tensor, path: Tensor, **options: Any) -> tuple[Tensor, Tensor]: ...


class Generator(Protocol):
    """What a mode needs of a model."""

    config: Any
    head: Head

    def trunk(self, tokens: Tensor, visible: Tensor, class_embedding: Tensor) -> Tensor: ...

    def class_embedding(self, labels: Tensor | None, batch: int) -> Tensor: ...


@dataclass(frozen=True)
class Contexts:
    """Trunk outputs of R rows: z and, with guidance, z_uncond [R, L, Dd]; sample and units visible [R] of each."""

    z: Tensor
    z_uncond: Tensor | None
    sample: Tensor
    units: Tensor


@dataclass(frozen=True)
class Tokens:
    """N positions that a head works on, with what conditions them: row [N] of the contexts, sample, position, unit."""

    z: Tensor
    z_uncond: Tensor | None
    row: Tensor
    sample: Tensor
    position: Tensor
    unit: Tensor

    def pick(self, index: Tensor) -> Tokens:
        """Those of an index or mask [N]."""
        unconditional = None if self.z_uncond is None else self.z_uncond[index]
        return Tokens(
            self.z[index],
            unconditional,
            self.row[index],
            self.sample[index],
            self.position[index],
            self.unit[index],
        )


class Player:
    """A model with its class embeddings; counts what it is called for."""

    def __init__(self, model: Generator, role: str, job: Job, labels: Tensor | None) -> None:
        self.model, self.role, self.job = model, role, job
        self.embedding = model.class_embedding(labels, job.batch)
        self.unconditional = model.class_embedding(None, job.batch) if job.guided else None

    def contexts(self, values: Tensor, sample: Tensor, units: Tensor) -> Contexts:
        """One trunk pass over the contexts (sample [R], units visible [R]) with token values [B, L, D]."""
        job = self.job
        tokens, visible, embedding = values[sample], job.visible(sample, units), self.embedding[sample]
        if self.unconditional is not None:
            tokens, visible = torch.cat([tokens, tokens]), torch.cat([visible, visible])
            embedding = torch.cat([embedding, self.unconditional[sample]])
        z = self.model.trunk(tokens, visible, embedding)
        self._count(passes=1, rows=len(tokens))
        if self.unconditional is None:
            return Contexts(z, None, sample, units)
        conditional, unconditional = z.chunk(2)
        return Contexts(conditional, unconditional, sample, units)

    def run(
        self,
        tokens: Tokens,
        *,
        noise: tuple[Tensor, Tensor] | None = None,
        keep_path: bool = False,
        weight_unit: Tensor | None = None,
    ) -> Any:
        """A sequential run of the head; ``noise`` = (x_T [N, D], eps [N, T, D]), the positions' own by default.

        ``weight_unit`` [N]: take the guidance weight of these units instead.
        """
        job = self.job
        x_T, eps = noise or job.noise_of(tokens)
        run = self.model.head.sample(
            tokens.z,
            x_T,
            eps,
            z_uncond=tokens.z_uncond,
            cfg=job.weights(tokens.unit if weight_unit is None else weight_unit),
            temperature=job.temperature,
            keep_path=keep_path,
        )
        self._count(head_calls=job.T, head_rows=job.T * len(x_T) * self._branches)
        return run

    def path_stats(self, tokens: Tokens, path: Tensor) -> tuple[Tensor, Tensor]:
        """Means and log sigmas [T, N, D] of this model's steps from the states of a path [T, N, D]."""
        rows = len(path) * path.shape[1] * self._branches
        self._count(head_calls=-(-rows // MAX_ROWS), head_rows=rows)
        return self.model.head.path_stats(
            tokens.z, path, z_uncond=tokens.z_uncond, cfg=self.job.weights(tokens.unit), max_rows=MAX_ROWS
        )

    @property
    def _branches(self) -> int:
        return 1 if self.unconditional is None else 2

    def _count(self, **more: int) -> None:
        stats = self.job.stats
        for name, value in more.items():
            setattr(stats, f"{self.role}_{name}", getattr(stats, f"{self.role}_{name}") + value)


class Job:
    """One call; ``decode`` runs it. Arguments as ``vlmeff.speculative.continuous.decode``.

    ``values`` [B, L, D] float32: emitted tokens, and guesses where a mode keeps some. ``done`` [B]: units emitted.
    """

    def __init__(
        self,
        target: Generator,
        draft: Generator | None,
        labels: Tensor | None,
        *,
        config: Continuous,
        num_iter: int | None,
        cfg: float,
        cfg_schedule: str,
        temperature: float,
        seed: int,
        batch: int | None,
        order: Tensor | None,
        noise: Any,
    ) -> None:
        self._started = time.perf_counter()  # as plain decoding does, before noise and embeddings are made
        self.config = config
        self.L, self.D, self.T = (
            target.config.seq_len,
            target.config.token_dim,
            target.config.num_sampling_steps,
        )
        self.K = self.L if num_iter is None else num_iter
        self.batch = batch_size(labels, batch)
        self.sizes, weights = units(self.L, self.K), guidance(self.L, self.K, cfg, cfg_schedule)
        self.temperature, self.seed = float(temperature), seed
        _check_temperature(config, self.temperature, self.T)
        self.guided = uses_guidance(cfg, labels)
        name = f"cspd-{config.variant}" if config.mode == "cspd" else str(config.mode)
        self.stats = Stats(mode=name, steps=self.K, batch=self.batch, seq_len=self.L, window=config.window)
        self.target = Player(target, "target", self, labels)
        self.draft = None if draft is None else Player(draft, "draft", self, labels)
        self.device = self.target.embedding.device
        self.starts = torch.tensor([0, *self.sizes], device=self.device).cumsum(0)
        self.guidance = torch.tensor(weights, device=self.device)
        if noise is None:
            noise = NoiseBank(seed, self.batch, self.L, self.T, self.D, device=self.device)
        self.noise = check_noise(noise, self.batch, target)
        orders = noise.orders if order is None else check_order(order.to(self.device), self.batch, self.L)
        unit_of_rank = torch.repeat_interleave(
            torch.arange(self.K, device=self.device), torch.tensor(self.sizes, device=self.device)
        )
        self.rank = orders.argsort(1)  # [B, L] when each position is decoded
        self.unit = unit_of_rank[self.rank]  # [B, L] and in which unit
        self.values = torch.zeros(self.batch, self.L, self.D, device=self.device)
        self.done = torch.zeros(self.batch, dtype=torch.long, device=self.device)
        self._residual: dict[int, torch.Generator] = {}
        self._uniforms: Tensor | None = None
        self._unaligned: NoiseBank | None = None

    @torch.no_grad()
    def decode(self) -> tuple[Tensor, Stats]:
        """Run the mode. Returns the latents [B, L, D] and the statistics."""
        from vlmeff.speculative import coupled, cspd, exact

        self._prefill()
        {"coupled": coupled, "exact": exact, "cspd": cspd}[str(self.config.mode)].decode(self)
        self.stats.wall_s = seconds_since(self._started, self.device)
        return self.values, self.stats

    def _prefill(self) -> None:
        share = self.config.prefill or 0.0
        if self.config.variant == "official":
            count = min(self.K, int(self.K * share) + 1)
        else:
            count = min(self.K, math.ceil(self.K * share - 1e-9))  # 0.07 x 100 is 7 units
        self.plain_units(count)
        self.stats.prefill_units, self.stats.prefill_tokens = count, sum(self.sizes[:count])

    def plain_units(self, count: int) -> None:
        """Decode that many units of every sample as plain decoding does."""
        everyone = torch.arange(self.batch, device=self.device)
        for unit in range(count):
            contexts = self.target.contexts(self.values, everyone, self.done)
            tokens = self.tokens_of(contexts, self.unit == unit)
            self.emit(tokens, self.final(self.target.run(tokens), tokens))
            self.done += 1

    @property
    def active(self) -> Tensor:
        """Samples that are not finished."""
        return (self.done < self.K).nonzero().squeeze(1)

    def visible(self, sample: Tensor, units: Tensor) -> Tensor:
        """[R, L] bool: positions of the first ``units`` [R] units of ``sample`` [R]."""
        return self.unit[sample] < units[:, None]

    def tokens_of(self, contexts: Contexts, wanted: Tensor) -> Tokens:
        """The tokens where ``wanted`` [R, L] bool, each conditioned on its row."""
        row, position = wanted.nonzero(as_tuple=True)
        sample = contexts.sample[row]
        unconditional = None if contexts.z_uncond is None else contexts.z_uncond[row, position]
        return Tokens(contexts.z[row, position], unconditional, row, sample, position, self.unit[sample, position])

    def weights(self, unit: Tensor) -> Tensor | float:
        """Guidance weight of each token by its unit."""
        return self.guidance[unit] if self.guided else 1.0

    def noise_of(self, tokens: Tokens, *, aligned: bool = True) -> tuple[Tensor, Tensor]:
        """(x_T [N, D], eps [N, T, D]) of the tokens' positions; not ``aligned``: of a second, independent bank."""
        bank = self.noise
        if not aligned:
            if self._unaligned is None:
                seeds = [(self.seed + sample) ^ UNALIGNED for sample in range(self.batch)]
                self._unaligned = NoiseBank(seeds, self.batch, self.L, self.T, self.D, device=self.device)
            bank = self._unaligned
        return bank.gather(tokens.sample, tokens.position)

    def final(self, run: Any, tokens: Tokens, noise: Tensor | None = None) -> Tensor:
        """The tokens [N, D] of a run: x_0, or with ``final_noise`` x_0 and the last step's noise."""
        if not self.config.final_noise:
            return run.x0
        last = self.noise_of(tokens)[1][:, -1] if noise is None else noise
        return run.x0 + self.temperature * run.log_sigma0.exp() * last

    def emit(self, tokens: Tokens, x0: Tensor) -> None:
        """Write tokens (or guesses) [N, D].

        Raises:
            FloatingPointError: some value is not finite.
        """
        self.check_finite(tokens, x0)
        self.values[tokens.sample, tokens.position] = x0

    def check_finite(self, tokens: Tokens, x0: Tensor) -> None:
        finite = x0.isfinite().all(-1)
        if not bool(finite.all()):
            at = int((~finite).nonzero()[0])
            sample, position = int(tokens.sample[at]), int(tokens.position[at])
            raise FloatingPointError(
                f"{self.stats.mode}: a token is not finite: sample {sample}, position {position}, round "
                f"{self.stats.rounds_of[sample]}. An untrained head does this; so does half precision without clip_x0."
            )

    def uniforms(self, sample: Tensor, position: Tensor) -> Tensor:
        """One number in [0, 1) for each position of each sample: every draft is decided on at most once."""
        if self._uniforms is None:
            rows = [torch.rand(self.L, generator=self._generator(b, UNIFORMS)) for b in range(self.batch)]
            self._uniforms = torch.stack(rows).double().to(self.device)
        return self._uniforms[sample, position]

    def fresh_paths(self, sample: Tensor, tries: int) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """New randomness for some residual paths of each of the tokens [N], of their samples' own streams.

        Returns:
            (uniform of each try and sample [tries, S], samples ascending; (x_T [tries N, D], eps [tries N, T, D]), the
            tokens of the first try before those of the next).
        """
        streams, counts, back = self._streams(sample)
        drawn, uniform = [], []
        for stream, count in zip(streams, counts, strict=True):
            drawn.append(torch.randn(tries, count, self.T + 1, self.D, generator=stream))
            uniform.append(torch.rand(tries, generator=stream))
        noise = torch.cat(drawn, 1)[:, back].flatten(0, 1).to(self.device)
        return torch.stack(uniform, 1).double().to(self.device), (noise[:, 0], noise[:, 1:])

    def fresh_tokens(self, sample: Tensor, tries: int) -> tuple[Tensor, Tensor]:
        """(noise [tries, N, D], uniform [tries, N]) for some proposals a token, of the tokens' samples' own streams."""
        streams, counts, back = self._streams(sample)
        drawn, uniform = [], []
        for stream, count in zip(streams, counts, strict=True):
            drawn.append(torch.randn(tries, count, self.D, generator=stream))
            uniform.append(torch.rand(tries, count, generator=stream))
        noise, uniforms = torch.cat(drawn, 1)[:, back], torch.cat(uniform, 1)[:, back]
        return noise.to(self.device), uniforms.double().to(self.device)

    def _streams(self, sample: Tensor) -> tuple[list[torch.Generator], list[int], Tensor]:
        """Generators of the samples of tokens [N] in ascending order, the tokens of each, and the index [N] that puts
        what was drawn sample after sample back to the tokens."""
        order = sample.cpu().argsort(stable=True)
        samples, counts = sample.cpu()[order].unique_consecutive(return_counts=True)
        for one in samples.tolist():
            if one not in self._residual:
                self._residual[one] = self._generator(one, RESIDUAL)
        return [self._residual[one] for one in samples.tolist()], counts.tolist(), order.argsort()

    def _generator(self, sample: int, stream: int) -> torch.Generator:
        return torch.Generator().manual_seed((self.seed + sample) ^ stream)


def _check_temperature(config: Continuous, temperature: float, steps: int) -> None:
    if not temperature >= 0:
        raise ConfigError(f"temperature={temperature!r} must be 0 or more.")
    if config.mode != "exact":
        return
    if temperature == 0:
        raise ConfigError("temperature=0: mode='exact' compares densities, and there are none; take mode='coupled'.")
    if steps < 2:
        raise ConfigError(f"num_sampling_steps={steps}: mode='exact' needs a random step, so 2 or more.")
