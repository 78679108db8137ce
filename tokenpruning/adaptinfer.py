"""AdaptInfer: drop visual tokens inside the language model, as the text asks ("AdaptInfer", arXiv 2508.06084).

At a few layers the text scores the visual tokens (``vlmeff.ops.text_to_vision_scores``), and the layers behind it go on
with the best. This file holds the schedules - at which layers, how many stay - and the choice by score; the hooks are
in ``vlmeff.vlm.inner``.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, get_args

from torch import Tensor

from tokenpruning.plan import methods
from vlmeff.errors import ConfigError, DataError, IncompatibleError, UnknownNameError, UnsupportedModelError
from vlmeff.ops import top_indices

Origin = Literal["published", "calibrated", "custom"]
FILE_FORMAT = "vlmeff adaptinfer schedule"
FILE_VERSION = 1


def _is_share(value: object) -> bool:
    legal = isinstance(value, int | float) and not isinstance(value, bool)
    return legal and math.isfinite(value) and 0 < value <= 1  # type: ignore[operator, arg-type]


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """After which layers visual tokens are dropped, and how many stay.

    Args:
        layers: 0-based, ascending. Tokens are dropped *after* a layer: it still runs, and caches, all of them.
        keep: tokens that stay after each layer, whatever their number before; at least one is always dropped, and 0
            drops the picture (the paper's 32-token schedule does).
        ratios: instead of ``keep``, the share of the *current* tokens that stays after each layer, in (0, 1]; rounded
            down, at least one token stays, and 1 drops nothing.
        origin: "published" by the paper's authors, "calibrated" by ``vlmeff calibrate adaptinfer``, or "custom".
        name: what reports call it.
    """

    layers: tuple[int, ...]
    keep: tuple[int, ...] | None = None
    ratios: tuple[float, ...] | None = None
    origin: Origin = "custom"
    name: str = "custom"

    def __post_init__(self) -> None:
        for field in ("layers", "keep", "ratios"):  # lists come from JSON and YAML
            value = getattr(self, field)
            if isinstance(value, list):
                object.__setattr__(self, field, tuple(value))
            elif value is not None and not isinstance(value, tuple):
                raise ConfigError(f"Schedule: {field}={value!r} must be a tuple with one entry per pruning layer.")
        legal = len(self.layers) > 0 and all(type(n) is int and n >= 0 for n in self.layers)
        if not legal or any(b <= a for a, b in pairwise(self.layers)):
            raise ConfigError(f"Schedule: layers={self.layers!r} must be ascending 0-based layer numbers, one or more.")
        if (self.keep is None) == (self.ratios is None):
            raise ConfigError("Schedule: give either keep (tokens) or ratios (shares of the current tokens).")
        if self.keep is not None and any(type(n) is not int or n < 0 for n in self.keep):
            raise ConfigError(f"Schedule: keep={self.keep!r} must be token counts, ints >= 0.")
        if self.ratios is not None and not all(_is_share(r) for r in self.ratios):
            raise ConfigError(f"Schedule: ratios={self.ratios!r} must be shares in (0, 1].")
        amounts = self.keep if self.keep is not None else self.ratios
        assert amounts is not None
        if len(amounts) != len(self.layers):
            raise ConfigError(f"Schedule: {len(self.layers)} layers and {len(amounts)} amounts do not match.")
        if self.origin not in get_args(Origin):
            raise ConfigError(f"Schedule: origin={self.origin!r} must be one of {', '.join(get_args(Origin))}.")

    @property
    def relative(self) -> bool:
        """Whether the amounts are shares. Only then may the picture have lost tokens before the language model."""
        return self.ratios is not None

    def counts(self, nv: int) -> tuple[int, ...]:
        """Visual tokens that stay after each pruning layer, of ``nv`` at the start.

        keep: k_l = min(table, n - 1). ratios: k_l = max(1, int(ratio * n)). n is the number at that layer.
        """
        out, now = [], nv
        for i in range(len(self.layers)):
            if self.keep is not None:
                now = max(0, min(self.keep[i], now - 1))
            elif now:
                assert self.ratios is not None
                now = max(1, int(self.ratios[i] * now))
            out.append(now)
        return tuple(out)

    def visual_per_layer(self, nv: int, layers: int) -> list[int]:
        """Visual tokens that each of ``layers`` layers processes."""
        return self._per_layer(nv, layers, first=1)

    def _per_layer(self, nv: int, layers: int, *, first: int) -> list[int]:
        """``first``: how many layers behind a pruning layer its count begins (0: at the layer itself)."""
        out = [nv] * layers
        for layer, count in zip(self.layers, self.counts(nv), strict=True):
            out[layer + first :] = [count] * len(out[layer + first :])
        return out

    def check_depth(self, layers: int) -> None:
        """Raise ``ConfigError`` unless each pruning layer of ``layers`` layers has one behind it."""
        if self.layers[-1] > layers - 2:
            raise ConfigError(
                f"Schedule: layers={self.layers!r} does not fit a language model of {layers} layers: tokens are "
                f"dropped after a layer, so the last legal number is {layers - 2}."
            )


def processed_tokens(schedule: Schedule, nv: int, layers: int) -> float:
    """Visual tokens that are processed, averaged over the layers: what to compare with other methods on."""
    return sum(schedule.visual_per_layer(nv, layers)) / layers


def label_tokens(schedule: Schedule, nv: int, layers: int) -> float:
    """The average that the paper labels its schedules by: a pruning layer, which processes all, counts as pruned."""
    return sum(schedule._per_layer(nv, layers, first=0)) / layers


def _published() -> dict[str, Schedule]:
    """Arxiv 2508.06084 and the authors' code. LLaVA by tokens of 576, Qwen by ratios of the current count."""
    kept = {
        "llava-1.5-7b-128": (290, 72, 18),
        "llava-1.5-7b-64": (133, 27, 3),
        "llava-1.5-7b-48": (80, 24, 2),
        "llava-1.5-7b-32": (40, 12, 0),
        "llava-1.5-13b-128": (300, 94, 30),
        "llava-1.5-13b-64": (148, 40, 5),
    }
    shares = {
        "qwen2-vl-2b-10": (0.17, 0.6, 0.3),
        "qwen2-vl-2b-30": (0.5, 0.6, 0.3),
        "qwen2-vl-2b-50": (0.7, 0.9, 0.3),
    }
    out = {n: Schedule(layers=(1, 10, 20), keep=k, origin="published", name=n) for n, k in kept.items()}
    return out | {n: Schedule(layers=(0, 9, 19), ratios=r, origin="published", name=n) for n, r in shares.items()}


SCHEDULES: Mapping[str, Schedule] = _published()
# (model_type, layers, hidden size) of the language models that a schedule was published for, and its mildest one.
DEFAULTS: Mapping[tuple[str, int, int], str] = {
    ("llava", 32, 4096): "llava-1.5-7b-128",
    ("llava", 40, 5120): "llava-1.5-13b-128",
    ("qwen2_vl", 28, 1536): "qwen2-vl-2b-50",
}


@methods.register("adaptinfer")
@dataclass(frozen=True, kw_only=True)
class AdaptInfer:
    """Drop visual tokens between layers of the language model, chosen by the attention of the text after the picture.

    Tokens that stay keep their positions.

    Args:
        schedule: the name of a published schedule (``SCHEDULES``), a ``Schedule``, the path of a file written by
            ``vlmeff calibrate adaptinfer``, a mapping with a Schedule's fields, or None for the schedule published
            for the model. After construction it is a ``Schedule`` or None.

    Source: arXiv 2508.06084. Differs from the official LLaVA code in leaving positions as they were (that numbers the
    tokens anew in each stage) and in accepting batches and several pictures: their union is pruned, and the text after
    the last one votes.
    """

    schedule: Schedule | str | Path | Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.schedule, Schedule | str | Path | Mapping | None):
            raise ConfigError(
                f"AdaptInfer: schedule={self.schedule!r} must be a Schedule, the name of a published one "
                f"({', '.join(SCHEDULES)}), the path of a schedule file, or None."
            )
        if isinstance(self.schedule, str | Path):
            object.__setattr__(self, "schedule", find_schedule(self.schedule))
        elif isinstance(self.schedule, Mapping):
            object.__setattr__(self, "schedule", _schedule_of(self.schedule))

    @property
    def layers(self) -> tuple[int, ...]:
        """0-based layers after which tokens are dropped; () until ``for_model`` has filled in a default."""
        return self.schedule.layers if isinstance(self.schedule, Schedule) else ()

    def visual_per_layer(self, nv: int, layers: int) -> list[int]:
        """Visual tokens that each of ``layers`` layers processes, of ``nv`` at the start."""
        assert isinstance(self.schedule, Schedule)
        return self.schedule.visual_per_layer(nv, layers)

    @property
    def relative(self) -> bool:
        """Whether the schedule says shares, so that a method before the language model may go first."""
        return isinstance(self.schedule, Schedule) and self.schedule.relative

    def for_model(self, *, model_type: str, layers: int, hidden_size: int) -> AdaptInfer:
        """This method with a schedule that fits a model whose language model has that many layers.

        Raises:
            UnsupportedModelError: no schedule is given, and none is published for the model.
            ConfigError: the schedule's layers exceed the model's.
        """
        schedule = self.schedule
        if schedule is None:
            name = DEFAULTS.get((model_type, layers, hidden_size))
            if name is None:
                known = ", ".join(sorted(DEFAULTS.values()))
                raise UnsupportedModelError(
                    f"AdaptInfer: no schedule is published for {model_type} with {layers} layers of width "
                    f"{hidden_size} (published: {known}). Derive one with 'vlmeff calibrate adaptinfer' and pass its "
                    "file as schedule=..., or pass a Schedule."
                )
            schedule = SCHEDULES[name]
        assert isinstance(schedule, Schedule)
        schedule.check_depth(layers)
        return dataclasses.replace(self, schedule=schedule)

    def refuse_after(self, other: object) -> None:
        """Raise ``IncompatibleError`` when ``other`` shortens the picture first and the schedule counts tokens."""
        if not self.relative:
            raise IncompatibleError(
                f"AdaptInfer after {type(other).__name__}: the schedule counts tokens of a whole picture. Use one with "
                "ratios: a qwen2-vl-2b-... schedule, a calibrated file, or Schedule(layers=..., ratios=...)."
            )


def _schedule_of(fields: Mapping[str, Any]) -> Schedule:
    try:
        return Schedule(**fields)
    except TypeError as error:
        legal = ", ".join(field.name for field in dataclasses.fields(Schedule))
        raise ConfigError(f"AdaptInfer: schedule={dict(fields)!r} must have the fields {legal} ({error}).") from error


def choose(score: Tensor, k: int) -> Tensor:
    """[B, n] scores -> [B, k] int64: the best k of each row, ascending; equal scores: lowest index first."""
    return top_indices(score, k)


def find_schedule(name: str | Path) -> Schedule:
    """A published schedule by name, or the schedule in a file.

    Raises:
        UnknownNameError: neither.  DataError: the file cannot be used.
    """
    if isinstance(name, str) and name in SCHEDULES:
        return SCHEDULES[name]
    path = Path(name).expanduser()
    if isinstance(name, Path) or path.suffix == ".json" or path.is_file():
        return read_schedule(path)
    raise UnknownNameError("AdaptInfer schedule", name, SCHEDULES)


def read_schedule(path: str | Path) -> Schedule:
    """Read a file of ``write_schedule``; raises ``DataError`` naming the file and the field."""
    path = Path(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"schedule file {path}: cannot be read as JSON ({error}).") from error
    if not isinstance(content, dict) or content.get("format") != FILE_FORMAT:
        raise DataError(
            f"schedule file {path}: 'format' is not {FILE_FORMAT!r}; write it with 'vlmeff calibrate adaptinfer'."
        )
    if content.get("version") != FILE_VERSION:
        raise DataError(
            f"schedule file {path}: version {content.get('version')!r}, this vlmeff reads version {FILE_VERSION}; "
            "calibrate again."
        )
    fields = {name: content[name] for name in ("layers", "keep", "ratios", "origin") if content.get(name) is not None}
    try:
        return Schedule(**fields, name=str(content.get("name") or path.stem))
    except (ConfigError, TypeError) as error:
        raise DataError(f"schedule file {path}: {error}") from error


def write_schedule(path: str | Path, schedule: Schedule, **about: Any) -> Path:
    """Write ``schedule`` as JSON. ``about``: how it came to be (model, samples, date, versions); read by people."""
    amounts: dict[str, Sequence[float]] = {}
    if schedule.keep is not None:
        amounts["keep"] = schedule.keep
    if schedule.ratios is not None:
        amounts["ratios"] = schedule.ratios
    content = {
        "format": FILE_FORMAT,
        "version": FILE_VERSION,
        "name": schedule.name,
        "origin": schedule.origin,
        "layers": schedule.layers,
        **amounts,
        "about": about,
    }
    path = Path(path)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return path
