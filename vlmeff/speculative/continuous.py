"""``Continuous``: how a MAR generator decodes, what that guarantees, and which pairs of models can work together."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

from vlmeff.errors import ConfigError, UnknownPresetError

if TYPE_CHECKING:
    from torch import Tensor

    from vlmeff.speculative.statistics import Stats

CSPD_SOFTENING = 42.0  # "inner_temperature" of the official code; not in the paper's formula
CSPD_PREFILL = 0.05  # recommended by the paper
OFFICIAL_PREFILL, OFFICIAL_GAMMA = 0.15, 8  # defaults of the official code

# Fields of one mode only, by mode. Naming one for another mode is an error: it would have no effect.
OWN_FIELDS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "coupled": ("delta", "proposal"),
        "exact": ("final_noise", "max_tries"),
        "cspd": (
            "variant",
            "verify",
            "rollback",
            "sigma_term",
            "softening",
            "residual",
            "on_exhausted",
            "max_tries",
            "align",
        ),
    }
)
COUPLED: Mapping[str, Any] = MappingProxyType({"window": 8, "prefill": 0.0, "delta": 0.02, "proposal": "self"})
EXACT: Mapping[str, Any] = MappingProxyType({"window": 4, "prefill": 0.0, "final_noise": False, "max_tries": 100})
CSPD_PAPER: Mapping[str, Any] = MappingProxyType(
    {
        "window": 4,
        "prefill": CSPD_PREFILL,
        "verify": "sequential",
        "rollback": True,
        "sigma_term": "paper",
        "softening": CSPD_SOFTENING,
        "residual": "official",
        "on_exhausted": "target",
        "max_tries": 100,
        "align": True,
    }
)
CSPD_OFFICIAL: Mapping[str, Any] = MappingProxyType(
    {
        **CSPD_PAPER,
        "window": OFFICIAL_GAMMA,
        "prefill": OFFICIAL_PREFILL,
        "verify": "parallel",
        "rollback": False,
        "sigma_term": "official",
    }
)
CHOICES: Mapping[str, tuple[Any, ...]] = MappingProxyType(
    {
        "mode": (None, "coupled", "exact", "cspd"),
        "proposal": ("self", "draft"),
        "variant": ("paper", "official"),
        "verify": ("sequential", "parallel"),
        "rollback": (True, False),
        "sigma_term": ("paper", "official", "off"),
        "residual": ("match", "official"),
        "on_exhausted": ("target", "zeros"),
    }
)


@dataclass(frozen=True, kw_only=True)
class Continuous:
    """How a MAR generator decodes its continuous tokens. A field left at None takes the default of its mode.

    Modes:
        None: plain decoding.
        "coupled" (default): the noise of every position is fixed before decoding, so plain decoding is a function of
            it; guesses of several units are verified by evaluating that function on all of them at once, and what comes
            out is always the target's own value. Needs no draft.
        "exact": speculative sampling on denoising paths with teacher-forced densities; keeps the target's law.
        "cspd": "Continuous Speculative Decoding", arXiv 2411.11925. Approximate: it trades the target's law for the
            draft's roughly in proportion to what it accepts. ``variant="paper"`` has the published criterion with
            roll-back and the acceptance-rejection residual; ``variant="official"`` does what the published code does:
            it advances ``gamma`` steps with each target pass, whatever is accepted.

    Args:
        window: units that a round looks at (``gamma`` is the same field); 0 is plain decoding (not in coupled).
        prefill: share of the units that plain target steps decode first, rounded up; "official" takes
            floor(K prefill) + 1 units.
        delta: coupled; a guess holds if no token of its unit is further than this from the target's (RMS over the
            token's values). 0 reproduces plain decoding up to the rounding of the hardware.
        proposal: coupled; guesses are the target's own parallel predictions ("self") or a draft model's ("draft").
        verify: cspd; "sequential" gives each draft a context with the drafts before it, "parallel" hides them all and
            takes the guidance weight of the block's last step, as the published code does.
        rollback: cspd; end the round at the first rejection, instead of replacing what was rejected and going on.
        sigma_term: cspd; the determinants of the steps before the last with the paper's sign, the published code's
            (inverted) or not at all.
        softening: cspd; width of the criterion in units of the last step's sigma.
        residual: cspd; "official" draws from the published residual (with width 1, whatever ``softening`` is),
            "match" takes the target's token for the same noise.
        on_exhausted: cspd; what a token becomes whose residual accepted none of ``max_tries`` proposals; "zeros" is
            what the published code leaves.
        align: cspd; the target denoises with the draft's noise (trajectory alignment), or with other noise.
        final_noise: exact; adds the last step's noise to both models, which makes the scheme exact without a gap, for a
            target that is itself changed by that noise (0.0064).
    Raises:
        ConfigError: a value cannot work, or belongs to another mode.
    """

    mode: Literal["coupled", "exact", "cspd"] | None = "coupled"
    window: int | None = None
    gamma: int | None = None
    prefill: float | None = None
    delta: float | None = None
    proposal: Literal["self", "draft"] | None = None
    variant: Literal["paper", "official"] | None = None
    verify: Literal["sequential", "parallel"] | None = None
    rollback: bool | None = None
    sigma_term: Literal["paper", "official", "off"] | None = None
    softening: float | None = None
    residual: Literal["match", "official"] | None = None
    on_exhausted: Literal["target", "zeros"] | None = None
    max_tries: int | None = None
    align: bool | None = None
    final_noise: bool | None = None

    def __post_init__(self) -> None:
        self._check_choice("mode")
        self._reject_fields_of_other_modes()
        if self.window is not None and self.gamma is not None and self.window != self.gamma:
            raise ConfigError(f"Continuous: window={self.window} and gamma={self.gamma} are one field; give one.")
        defaults = dict(self._defaults())
        if self.gamma is not None:
            defaults["window"] = self.gamma
        for name, value in defaults.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        object.__setattr__(self, "gamma", self.window)
        self._check_values()

    def _defaults(self) -> Mapping[str, Any]:
        if self.mode == "coupled":
            return COUPLED
        if self.mode == "exact":
            return EXACT
        if self.mode == "cspd":
            variant = self.variant or "paper"
            return {"variant": variant, **(CSPD_OFFICIAL if variant == "official" else CSPD_PAPER)}
        return {}

    def _reject_fields_of_other_modes(self) -> None:
        own = OWN_FIELDS.get(self.mode or "", ())
        foreign = {name for names in OWN_FIELDS.values() for name in names} - set(own)
        given = [f"{name}={getattr(self, name)!r}" for name in sorted(foreign) if getattr(self, name) is not None]
        if given:
            raise ConfigError(f"Continuous: {', '.join(given)} has no effect with mode={self.mode!r}; leave it out.")

    def _check_choice(self, name: str) -> None:
        if getattr(self, name) not in CHOICES[name]:
            choices = ", ".join(map(repr, CHOICES[name]))
            raise ConfigError(f"Continuous: {name}={getattr(self, name)!r}; choose one of {choices}.")

    def _check_values(self) -> None:
        if self.mode is None:
            return
        for name in set(CHOICES) & set(OWN_FIELDS[self.mode]):
            self._check_choice(name)
        least = 1 if self.mode == "coupled" else 0
        if not isinstance(self.window, int) or isinstance(self.window, bool) or self.window < least:
            raise ConfigError(f"Continuous: window={self.window!r} (gamma); a whole number from {least} is needed.")
        for name in ("prefill", "delta", "softening"):
            value = getattr(self, name)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise ConfigError(f"Continuous: {name}={value!r}; a finite number is needed.")
        if self.prefill is None or not 0 <= self.prefill <= 1:
            raise ConfigError(f"Continuous: prefill={self.prefill!r}; a share of the steps in [0, 1] is needed.")
        if self.delta is not None and not self.delta >= 0:
            raise ConfigError(f"Continuous: delta={self.delta!r}; a tolerance of 0 or more is needed.")
        if self.softening is not None and not self.softening > 0:
            raise ConfigError(f"Continuous: softening={self.softening!r}; a width above 0 is needed.")
        if self.max_tries is not None and (type(self.max_tries) is not int or self.max_tries < 1):
            raise ConfigError(f"Continuous: max_tries={self.max_tries!r}; a whole number from 1 is needed.")

    @classmethod
    def named(cls, name: str, **overrides: Any) -> Continuous:
        """A preset of ``PRESETS``, with fields replaced."""
        if name not in PRESETS:
            raise UnknownPresetError("preset of continuous speculative decoding", name, PRESETS)
        return cls(**{**PRESETS[name], **overrides})

    def but(self, **changes: Any) -> Continuous:
        """The same with fields replaced; ``window`` and ``gamma`` follow each other."""
        if "window" in changes or "gamma" in changes:
            changes = {"window": None, "gamma": None, **changes}
        return replace(self, **changes)

    @property
    def needs_draft(self) -> bool:
        """Whether a second model takes part."""
        return self.takes_draft and not self.plain

    @property
    def takes_draft(self) -> bool:
        """Whether the mode is one that a second model takes part in, even where this call of it decodes plainly."""
        return self.proposal == "draft" if self.mode == "coupled" else self.mode is not None

    @property
    def plain(self) -> bool:
        """Whether this is plain decoding whatever the call."""
        return self.mode is None or self.window == 0 or (self.prefill == 1 and self.variant != "official")

    @property
    def guarantee(self) -> str:
        """What the output has to do with plain decoding of the target, in one sentence."""
        if self.plain:
            return "Plain decoding of the target."
        if self.mode == "coupled":
            return (
                f"The same seed gives plain decoding's output up to what contexts within {self.delta:g} (RMS per "
                "token) of the emitted tokens change; every token is the target's own."
            )
        if self.mode == "exact" and self.final_noise:
            return "The law of the target with the last step's noise added (0.0064); not the same samples."
        if self.mode == "exact":
            return (
                "The target's law, but for the gap between the draft's and the target's last denoising step in the "
                "contexts of a block; not the same samples."
            )
        if self.variant == "official":
            return "Approximate, without a bound: as the published code, a fixed number of steps per target pass."
        return "Approximate, without a bound: shifted toward the draft, the more so the more is accepted."


PRESETS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "coupled": {"mode": "coupled"},
        "coupled-strict": {"mode": "coupled", "delta": 1e-4},
        "exact": {"mode": "exact"},
        "cspd": {"mode": "cspd", "variant": "paper"},
        "cspd-official": {"mode": "cspd", "variant": "official"},
    }
)

# What target and draft must have in common; widths and depths may differ.
SHARED = (
    "img_size",
    "vae_stride",
    "patch_size",
    "vae_embed_dim",
    "class_num",
    "num_sampling_steps",
    "noise_schedule",
    "train_steps",
    "latent_scale",
    "latent_shift",
    "codec",
    "clip_x0",
)


def check_pair(target: Any, draft: Any) -> None:
    """Raise ConfigError with all that target and draft do not have in common."""
    missing = [name for name in ("config", "head", "trunk", "class_embedding") if not hasattr(draft, name)]
    if missing or isinstance(draft, type):
        raise ConfigError(f"draft: a {type(draft).__name__} is no MAR generator; pass a model as load_draft() gives.")
    pairs = {name: (getattr(target.config, name, None), getattr(draft.config, name, None)) for name in SHARED}
    differ = [f"{name}: target {a!r}, draft {b!r}" for name, (a, b) in pairs.items() if a != b]
    if differ:
        raise ConfigError("draft: not a draft of this target; they differ in " + "; ".join(differ) + ".")


def check_draft(config: Continuous, target: Any, draft: Any) -> None:
    """Raise ConfigError unless ``draft`` is what the mode needs."""
    if config.needs_draft and draft is None:
        raise ConfigError(f"draft: mode={config.mode!r} needs a draft model; pass draft=..., or take mode='coupled'.")
    if draft is not None and draft is not target:
        check_pair(target, draft)


def decode(
    target: Any,
    draft: Any,
    labels: Tensor | None,
    *,
    config: Continuous,
    num_iter: int | None = None,
    cfg: float = 1.0,
    cfg_schedule: str = "linear",
    temperature: float = 1.0,
    seed: int = 0,
    batch: int | None = None,
    order: Tensor | None = None,
    noise: Any = None,
) -> tuple[Tensor, Stats]:
    """Decode with a configuration; the arguments besides ``config`` and ``draft`` are plain decoding's.

    Returns:
        (latents [B, L, D] float32, statistics).
    Raises:
        ConfigError: an argument or the pair of models cannot work; the message names it.
        FloatingPointError: a token is not finite; the message says where.
    """
    from vlmeff.models.mar.sampling import plain
    from vlmeff.speculative.job import Job

    call: dict[str, Any] = {
        **{"num_iter": num_iter, "cfg": cfg, "cfg_schedule": cfg_schedule, "temperature": temperature},
        **{"seed": seed, "batch": batch, "order": order, "noise": noise},
    }
    if config.plain:
        return plain(target, labels, **call)
    check_draft(config, target, draft)
    return Job(target, draft if config.needs_draft else None, labels, config=config, **call).decode()
