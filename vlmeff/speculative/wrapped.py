"""The wrapped MAR generator: ``model.sample(...)`` decodes as configured, and says what it did."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from vlmeff.errors import ConfigError
from vlmeff.speculative.continuous import Continuous, check_draft
from vlmeff.speculative.statistics import Stats

STATE = "_vlmeff"


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """Plain decoding with ``num_iter`` steps, run beside: seconds, and RMS difference to all the steps."""

    num_iter: int
    target_passes: int
    wall_s: float
    deviation_rms: float


@dataclass(frozen=True, kw_only=True)
class ContinuousReport:
    """What one ``sample`` call of a wrapped generator did.

    Measured: passes, rows, head calls, acceptance, tokens per round, ``context_gap_max`` (how far an emitted token is
    from the one that later contexts were computed with, RMS; None where no mode keeps track of it) and seconds.
    ``deviation_rms``, the RMS difference to plain decoding with the same noise, and ``baselines`` are there after
    ``compare``; plain decoding itself has deviation 0.
    """

    model: str
    draft: str | None
    config: Continuous
    guarantee: str
    stats: Stats
    deviation_rms: float | None = None
    baselines: tuple[Baseline, ...] = ()

    @property
    def mode(self) -> str:
        return self.stats.mode

    @property
    def speedup(self) -> float | None:
        """Seconds of plain decoding over this call's; None unless both ran (``compare``)."""
        full = [b for b in self.baselines if b.num_iter == self.stats.steps]
        if not full or not self.stats.wall_s:
            return None
        return full[0].wall_s / self.stats.wall_s

    def to_dict(self) -> dict[str, Any]:
        """The report as plain JSON values."""
        return {
            "model": self.model,
            "draft": self.draft,
            "mode": self.mode,
            "config": {name: value for name, value in vars(self.config).items() if value is not None},
            "guarantee": self.guarantee,
            "stats": self.stats.to_dict(),
            "deviation_rms": self.deviation_rms,
            "speedup": self.speedup,
            "baselines": [vars(b) for b in self.baselines],
        }

    def rows_of_text(self) -> list[tuple[str, str, str]]:
        """(what, value, how it was got), for tables."""
        s = self.stats
        rows = [("mode", self.mode, ""), ("guarantee", self.guarantee, "")]
        if self.draft is not None:
            rows.append(("draft", self.draft, ""))
        rows += [
            ("samples, tokens, steps", f"{s.batch} x {s.seq_len} in {s.steps}", ""),
            ("target passes", f"{s.target_passes} ({s.target_rows} rows)", "measured"),
        ]
        if s.draft_passes:
            rows.append(("draft passes", f"{s.draft_passes} ({s.draft_rows} rows)", "measured"))
        rows.append(("head calls", _both(s.target_head_calls, s.draft_head_calls), "measured"))
        rows.append(("head rows", _both(s.target_head_rows, s.draft_head_rows), "measured"))
        if s.prefill_units:
            rows.append(("steps decoded plainly first", str(s.prefill_units), ""))
        if s.acceptance_rate is not None:
            rows.append(("acceptance", f"{s.acceptance_rate:.1%} of {s.drafted} units", "measured"))
        if s.tokens_per_round is not None:
            rows.append(("tokens per round", f"{s.tokens_per_round:.2f}", "measured"))
        if s.residual_draws:
            spent = f", {s.residual_exhausted} without success" if s.residual_exhausted else ""
            rows.append(("residual draws", f"{s.residual_draws}{spent}", "measured"))
        if s.context_gap_max is not None:
            rows.append(("largest context gap, RMS", f"{s.context_gap_max:.2g}", "measured"))
        if self.deviation_rms is not None:
            rows.append(("deviation from plain, RMS", f"{self.deviation_rms:.2g}", "measured"))
        if s.wall_s is not None:
            rows.append(("seconds", f"{s.wall_s:.3f}", "measured"))
        return rows + self._baseline_rows()

    def _baseline_rows(self) -> list[tuple[str, str, str]]:
        """Decoding plainly with fewer steps, which every figure has to be held against."""
        if not self.baselines:
            passes = self.stats.target_passes
            if passes >= self.stats.steps:
                return []
            return [("plain steps for these passes", f"num_iter={passes}, with another deviation", "counted")]
        return [
            (f"plain, {b.num_iter} steps", f"{b.wall_s:.3f} s, deviation {b.deviation_rms:.2g} RMS", "measured")
            for b in self.baselines
        ]

    def __str__(self) -> str:
        rows = self.rows_of_text()
        width = max(len(name) for name, _, _ in rows)
        return "\n".join(f"{name:<{width}}  {value}  {f'({how})' if how else ''}".rstrip() for name, value, how in rows)


def _both(target: int, draft: int) -> str:
    return f"{target} target, {draft} draft" if draft else str(target)


@dataclass(eq=False)
class State:
    """What a wrapped generator carries in ``model._vlmeff``."""

    config: Continuous
    original_class: Any
    draft: Any = field(default=None, repr=False)
    report: ContinuousReport | None = None


def attach(model: Any, config: Continuous, draft: Any = None) -> None:
    """Let ``model.sample`` decode as configured; a generator that is wrapped is unwrapped first.

    Raises:
        ConfigError: the mode needs a draft, or the draft does not fit.
    """
    if draft is not None and STATE in getattr(draft, "__dict__", {}) and draft is not model:
        raise ConfigError("draft: this model is wrapped itself; pass vlmeff.unwrap(draft).")
    _refuse_unused(config, draft)
    check_draft(config, model, draft)
    if STATE in model.__dict__:
        detach(model)
    # Not by setattr: the draft must not become a submodule of the model.
    original: Any = type(model)
    object.__setattr__(model, STATE, State(config, original, draft))
    model.__class__ = _wrapped_class(original)


def _refuse_unused(config: Continuous, draft: Any) -> None:
    """Raise ConfigError if there is a draft and the mode never uses one."""
    if draft is not None and not config.takes_draft:
        raise ConfigError(
            f"draft: mode={config.mode!r} does not use a draft"
            + (" with proposal='self'; take proposal='draft', or leave it out." if config.mode == "coupled" else ".")
        )


def detach(model: Any) -> None:
    """Undo ``attach``."""
    state: State = model.__dict__[STATE]
    model.__class__ = state.original_class
    object.__delattr__(model, STATE)


@functools.cache
def _wrapped_class(original: Any) -> Any:
    """A subclass under the same name whose ``sample`` decodes as the state says."""

    def sample(self: Any, labels: Any = None, **call: Any) -> Any:
        if STATE not in self.__dict__:
            return original.sample(self, labels, **call)
        state: State = self.__dict__[STATE]
        if "mode" not in call:
            _refuse_unused(state.config, call.get("draft"))
            if call.get("draft") is None:
                call = {**call, "draft": state.draft}
            call = {**call, "mode": state.config}
        out = original.sample(self, labels, **call)
        state.report = _report(self, call["mode"], call.get("draft"), out.stats)
        return out

    members = {
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
        "sample": functools.wraps(original.sample)(sample),
    }
    return type(original.__name__, (original,), members)


def _report(model: Any, mode: Any, draft: Any, stats: Stats) -> ContinuousReport:
    config = Continuous.named(mode) if isinstance(mode, str) else mode or Continuous(mode=None)
    return ContinuousReport(
        model=_describe(model),
        draft=None if draft is None or not config.needs_draft else _describe(draft),
        config=config,
        guarantee=config.guarantee,
        stats=stats,
        deviation_rms=0.0 if config.plain else None,
    )


def _describe(model: Any) -> str:
    parameters = sum(p.numel() for p in model.parameters())
    return f"{type(model).__name__}, {parameters / 1e6:.3g} M parameters"


def rms(a: Tensor, b: Tensor) -> float:
    """Root mean square difference, over everything."""
    return float((a - b).float().square().mean().sqrt())


def compare(model: Any, labels: Any = None, *, shares: tuple[float, ...] = (1.0, 0.5, 0.25), **call: Any) -> Any:
    """Sample as configured and plainly, with all the steps and with fewer, from the same noise.

    One more run, as configured, comes first and counts for nothing: it warms up.

    Args:
        model: a wrapped generator.  shares: of ``num_iter``, the plain runs; the first must be 1.
        **call: of ``model.sample``; without ``mode``.
    Returns:
        The output of the configured run. ``vlmeff.report(model)`` then has ``deviation_rms``, ``speedup`` and
        ``baselines``.
    Raises:
        ConfigError: the model is not wrapped.
    """
    if STATE not in getattr(model, "__dict__", {}):
        raise ConfigError("compare: the model is not wrapped. Call model = vlmeff.wrap(model) first.")
    if shares[0] != 1.0:
        raise ConfigError(f"compare: shares={shares}; the first must be 1, what the others are held against.")
    state: State = model.__dict__[STATE]
    steps = call.get("num_iter") or model.config.seq_len
    model.sample(labels, **call)  # not counted: what is allocated, compiled or cached at first is no mode's cost
    runs = []
    for share in shares:
        runs.append(model.sample(labels, **{**call, "num_iter": max(1, round(share * steps)), "mode": None}))
    out = model.sample(labels, **call)
    assert state.report is not None
    full = runs[0].latents
    state.report = replace(
        state.report,
        deviation_rms=rms(out.latents, full),
        baselines=tuple(
            Baseline(
                num_iter=run.stats.steps,
                target_passes=run.stats.target_passes,
                wall_s=run.stats.wall_s,
                deviation_rms=rms(run.latents, full),
            )
            for run in runs
        ),
    )
    return out
