"""``TrainingConfig``: everything that decides what a training run computes."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from vlmeff.diffusion.qvgen.fake_quant import Compat, check_bits
from vlmeff.diffusion.qvgen.prepare import PHI_KINDS, PhiKind
from vlmeff.diffusion.qvgen.rank_decay import RankSchedule
from vlmeff.errors import QuantConfigError

Precision = Literal["auto", "float32", "bfloat16"]
NOT_PART_OF_THE_RESULT = ("save_every", "validate_every")


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Settings of a QVGen run; the defaults are those of the official Wan2.1-1.3B run where it published one.

    Args:
        steps, batch_size: the official run took 2667 steps of 48 clips.
        w_bits, a_bits: of weights and activations.
        phi: "svd" (QVGen), "lora", "keep", "drop" or None (plain LSQ+ with distillation).
        rank, decay, decay_fraction, decay_warmup, fade: the schedule of Phi (``RankSchedule``); decay_fraction 1.0 ends
            it with the training, as the paper does.
        slots: intervals of the timestep with a learned clip each.
        compat: "qvgen" computes activations as the official code does.
        lr, clip_lr, warmup_steps: one cosine cycle after a linear warm-up; the clip's logits have a rate of their own.
        weight_decay, beta1, beta2, eps, grad_clip: of AdamW; grad_clip is a norm, 0 for none.
        condition_dropout: share of the clips that are trained with the empty prompt (classifier-free guidance).
        shift: of the flow-matching noise; None takes the scheduler's. The official run used 1.
        precision: of matrix products; "auto" is bfloat16 on CUDA and float32 elsewhere. Masters are float32.
        gradient_checkpointing: keep one tensor per block and compute the rest again in the backward pass.
        validation_clips: last clips of the data, held out; at most a fifth of them.
        validate_every, save_every: in steps; 0 for at the end only.
        rules: tuples (pattern, scheme) in front of the family's rules.
        seed: of noise, timesteps, order and dropout.
    Raises:
        QuantConfigError: a value is out of range; the message names it.
    """

    steps: int = 2667
    batch_size: int = 1
    w_bits: int = 4
    a_bits: int = 4
    phi: PhiKind = "svd"
    rank: int = 32
    decay: float = 0.5
    decay_fraction: float = 0.5
    decay_warmup: int = 0
    fade: Literal["cosine", "linear"] = "cosine"
    slots: int = 1
    compat: Compat = None
    lr: float = 3e-5
    clip_lr: float = 1e-2
    warmup_steps: int | None = None
    """None: a tenth of the steps."""
    weight_decay: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    grad_clip: float = 1.0
    condition_dropout: float = 0.05
    shift: float | None = None
    precision: Precision = "auto"
    gradient_checkpointing: bool = False
    validation_clips: int = 8
    validate_every: int = 0
    save_every: int = 100
    rules: tuple[tuple[str, str], ...] | None = None
    seed: int = 42

    def __post_init__(self) -> None:
        whole = {"steps": 1, "batch_size": 1, "rank": 0, "decay_warmup": 0, "slots": 1, "validation_clips": 0}
        for name, least in {**whole, "validate_every": 0, "save_every": 0, "seed": 0}.items():
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise QuantConfigError(f"{name}={value!r} must be a whole number from {least} on.")
        for name in ("lr", "clip_lr", "eps"):
            self._check_number(name, above=0)
        for name in ("weight_decay", "grad_clip"):
            self._check_number(name, least=0)
        for name in ("beta1", "beta2", "condition_dropout"):
            self._check_number(name, least=0, below=1)
        if self.shift is not None:
            self._check_number("shift", above=0)
        check_bits(self.w_bits, self.a_bits)
        if self.phi is not None and self.phi not in PHI_KINDS:
            raise QuantConfigError(f"phi={self.phi!r} must be one of {', '.join(PHI_KINDS)}, or none.")
        if self.compat not in (None, "qvgen"):
            raise QuantConfigError(f"compat={self.compat!r} must be left out or 'qvgen'.")
        if self.precision not in ("auto", "float32", "bfloat16"):
            raise QuantConfigError(f"precision={self.precision!r} must be auto, float32 or bfloat16.")
        if self.warmup_steps is not None and (type(self.warmup_steps) is not int or self.warmup_steps < 0):
            raise QuantConfigError(f"warmup_steps={self.warmup_steps!r} must be a whole number from 0 on.")
        if type(self.gradient_checkpointing) is not bool:
            raise QuantConfigError(f"gradient_checkpointing={self.gradient_checkpointing!r} must be true or false.")
        if self.rules is not None:
            try:
                rules = tuple((str(pattern), str(scheme)) for pattern, scheme in self.rules)
            except (TypeError, ValueError) as error:
                raise QuantConfigError(f"rules={self.rules!r} must be pairs [pattern, scheme].") from error
            object.__setattr__(self, "rules", rules)
        self.schedule()

    def _check_number(
        self, name: str, *, above: float = -math.inf, least: float = -math.inf, below: float = math.inf
    ) -> None:
        value = getattr(self, name)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not above < value < below or not value >= least:  # also for NaN
            at_least = f"at least {least:g}" if least > -math.inf else f"above {above:g}"
            at_most = "" if below == math.inf else f" and below {below:g}"
            raise QuantConfigError(f"{name}={value!r} must be a number {at_least}{at_most}.")

    @property
    def warmup(self) -> int:
        """Steps of the linear warm-up of the learning rate."""
        return self.steps // 10 if self.warmup_steps is None else self.warmup_steps

    def schedule(self) -> RankSchedule:
        """The schedule of Phi."""
        return RankSchedule(
            steps=self.steps,
            rank=0 if self.phi is None else self.rank,
            decay=self.decay,
            decay_fraction=self.decay_fraction,
            warmup=self.decay_warmup,
            fade=self.fade,
            mode=self.phi if self.phi in ("keep", "drop") else "decay",
        )

    def lr_factor(self, step: int) -> float:
        """What learning rates are multiplied by at a step: linear warm-up, then half a cosine down to 0."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        return (1 + math.cos(math.pi * (step - self.warmup) / max(self.steps - self.warmup, 1))) / 2

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON or YAML."""
        values = asdict(self)
        values["rules"] = None if self.rules is None else [list(rule) for rule in self.rules]
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainingConfig:
        """Build from plain values; ``bits`` sets both kinds of bits.

        Raises:
            QuantConfigError: an unknown setting (the message has the nearest name), or a value out of range.
        """
        values = dict(values)
        bits = values.pop("bits", None)
        if bits is not None:
            values = {"w_bits": bits, "a_bits": bits, **values}
        known = {field.name for field in fields(cls)}
        for name in values:
            if name not in known:
                near = difflib.get_close_matches(str(name), sorted(known), n=1)
                hint = f" Did you mean {near[0]!r}?" if near else ""
                raise QuantConfigError(f"unknown training setting {name!r}.{hint} Known: {', '.join(sorted(known))}.")
        for name in ("lr", "clip_lr", "eps", "weight_decay"):
            if isinstance(values.get(name), str):  # YAML 1.1 reads 3e-5 as text
                try:
                    values[name] = float(values[name])
                except ValueError as error:
                    raise QuantConfigError(f"{name}={values[name]!r} must be a number.") from error
        if isinstance(values.get("phi"), str) and values["phi"].lower() == "none":
            values["phi"] = None
        return cls(**values)

    @classmethod
    def from_yaml(cls, path: str | Path, **overrides: Any) -> TrainingConfig:
        """Read a YAML mapping of settings; ``overrides`` win.

        Raises:
            QuantConfigError: no such file, not a mapping, or a setting that cannot work.
        """
        return cls.from_dict({**read_yaml(path), **overrides})


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The settings of a YAML file."""
    import yaml

    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise QuantConfigError(f"the configuration {str(path)!r} cannot be read: {reason}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise QuantConfigError(f"the configuration {str(path)!r} must be a mapping of settings to values.")
    return values
