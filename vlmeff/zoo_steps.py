"""The zoo's records joined by name, and what a preset's steps are on one model. Needs no torch."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from vlmeff.zoo_schema import Entry, ModelRecord, Preset, StepOverride, StepRecord

Kind = Literal["vlm", "video", "image"]
TASKS: Mapping[str, Kind] = {"text-to-video": "video", "class-to-image": "image"}


@dataclass(frozen=True)
class Zoo:
    """Everything known by name, in file order."""

    models: Mapping[str, ModelRecord]
    presets: Mapping[str, Preset]
    entries: Mapping[str, Entry]
    files: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Step:
    """One technique with the parameters for one model.

    ``keep`` is the budget of visual tokens, None for other techniques; KV retention has ``keep_ratio`` in ``params``.
    """

    method: str
    keep: int | float | None = None
    params: dict[str, Any] = field(default_factory=dict)

    @property
    def is_retention(self) -> bool:
        """Whether this is KV retention; some names are those of token methods too ("random")."""
        return "keep_ratio" in self.params

    def budget(self) -> dict[str, int | float]:
        """``{"keep": ...}``, empty for a technique without a budget."""
        return {} if self.keep is None else {"keep": self.keep}

    def __str__(self) -> str:
        return (
            f"{self.method}({', '.join(f'{key}={value}' for key, value in {**self.budget(), **self.params}.items())})"
        )


def kind_of(record: ModelRecord) -> Kind:
    """What kind of model a record is of."""
    return TASKS.get(record.task, "vlm")


def records_of(preset: Preset, kind: Kind) -> tuple[StepRecord, ...]:
    """A preset's steps for one kind of model, as written."""
    return {"vlm": preset.steps, "video": preset.video, "image": preset.image}[kind]


def steps_of(
    preset: Preset, record: ModelRecord | None, entry: Entry | None, *, kind: Kind = "vlm"
) -> tuple[Step, ...]:
    """The steps of a preset for one kind of model, with the parameters of model and entry."""
    steps = []
    for step in records_of(preset, kind):
        own = record.method_params.get(step.method, {}) if record else {}
        override = entry.overrides.get(step.method, StepOverride()) if entry else StepOverride()
        keep = step.keep if override.keep is None else override.keep
        ratio = step.keep_ratio if override.keep_ratio is None else override.keep_ratio
        params = {**({} if ratio is None else {"keep_ratio": ratio}), **step.params, **own, **override.params}
        steps.append(Step(step.method, keep, copy.deepcopy(params)))  # the zoo is shared, its parameters stay as read
    return tuple(steps)


def kept_tokens(grid: tuple[int, int], steps: tuple[Step, ...]) -> int:
    """Visual tokens that reach the language model of one picture after all steps."""
    from tokenpruning import Resampler, methods
    from tokenpruning.budget import tokens_to_keep

    tokens = math.prod(grid)
    for step in steps:
        if step.keep is not None:
            tokens = tokens_to_keep(step.keep, tokens)
        elif step.method in methods.names() and not step.is_retention:
            method = methods.get(step.method)(**step.params)
            tokens = math.prod(method.new_grid(grid)) if isinstance(method, Resampler) else tokens
    return tokens
