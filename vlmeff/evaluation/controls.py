"""What is run: the baseline, presets, and the controls that a preset has to beat at the same number of tokens.

* ``random``: as many visual tokens at random places (for a preset that only retains the cache: random entries).
* ``downsample``: the picture made smaller until the encoder yields that many tokens; where the encoder yields the same
  number for every picture, an even lattice of its tokens.
* ``blank``: every picture replaced by mid-grey, with nothing reduced: what the questions alone are worth.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from tokenpruning import Method, Selector
from vlmeff.config import Plan, described, make_plan
from vlmeff.errors import ConfigError, UnknownNameError
from vlmeff.evaluation.settings import CONTROLS
from vlmeff.vlm.families import Family
from vlmeff.vlm.wrapped import attach, detach
from vlmeff.wrapping import is_wrapped

logger = logging.getLogger("vlmeff")

GREY = (128, 128, 128)
Picture = Callable[[Image.Image], Image.Image]


@dataclass(frozen=True, eq=False)
class RunSpec:
    """One way to answer every document. ``plan`` None: the model as it is. ``change``: of each picture, beforehand.

    ``parameters``: everything that decides the answers, as plain values. ``reduces``: visual tokens or cache entries
    must become fewer, or the preset had no effect.
    """

    kind: str
    preset: str | None = None
    control: str | None = None
    plan: Plan | None = None
    family: Family | None = None
    change: Picture | None = None
    parameters: dict[str, Any] = field(default_factory=dict)
    reduces: bool = False

    @property
    def name(self) -> str:
        """Of its folder: "baseline", "fast", "fast-random", "blank"."""
        return "-".join(filter(None, (self.preset, self.control))) or self.kind

    @property
    def sees_nothing(self) -> bool:
        """Whether its answers follow from the prompt and the pictures' sizes alone, so that they can be used again."""
        return self.plan is None and self.control == "blank"

    def apply(self, model: Any) -> None:
        """Make ``model`` answer like this. Nothing is worked out again, so runs can take turns."""
        if self.plan is not None:
            attach(model, self.plan, self.family)
        elif is_wrapped(model):
            detach(model)


def make_runs(
    model: Any, presets: Sequence[str], controls: Sequence[str], *, baseline: bool = True, seed: int = 0
) -> list[RunSpec]:
    """The runs of an evaluation, the baseline first, each preset in front of its controls.

    Raises:
        UnknownNameError: a control.  ConfigError: nothing to run.  What ``wrap`` raises of a preset.
    """
    for control in controls:
        if control not in CONTROLS:
            raise UnknownNameError("control", control, CONTROLS, code="E-USE-01")
    runs = [RunSpec("baseline")] if baseline else []
    for preset in presets:
        plan, family = make_plan(model, preset, tokens=None, unavailable={}, overrides={})
        runs.append(_spec("preset", preset, None, plan, family))
        makers = {"random": _random, "downsample": _downsample}
        for control in controls:
            made = makers[control](model, preset, plan, family, seed) if control in makers else None
            if made is not None:
                runs.append(made)
    if "blank" in controls:
        runs.append(RunSpec("control", control="blank", change=blank, parameters={"picture": "mid-grey"}))
    if not runs:
        raise ConfigError("eval: nothing to run; pass --presets or leave --baseline on.")
    return runs


def _spec(
    kind: str, preset: str, control: str | None, plan: Plan, family: Family | None, change: Picture | None = None
) -> RunSpec:
    return RunSpec(
        kind,
        preset,
        control,
        plan,
        family,
        change,
        parameters_of(plan),
        reduces=bool(plan.methods) or (plan.kv is not None and plan.kv.keep_ratio < 1),
    )


def parameters_of(plan: Plan) -> dict[str, Any]:
    """A plan as plain values: every method with all its fields, and the options of the reduction."""
    reduction = plan.reduction
    return {
        "method": plan.method_name,
        "tokens": [repr(method) for method in plan.methods],
        "kv": None if plan.kv is None else repr(plan.kv),
        "kv_storage": plan.kv_storage,
        "positions": reduction.positions,
        "newline": reduction.newline,
        "min_visual_tokens": reduction.min_visual_tokens,
    }


def _random(model: Any, preset: str, plan: Plan, family: Family | None, seed: int) -> RunSpec | None:
    if not plan.methods:
        if plan.kv is None:
            return None
        other, of = make_plan(model, preset, tokens=None, kv="random", unavailable={}, overrides={"seed": seed})
        return _spec("control", preset, "random", other, of)
    keep = kept_share(model, plan.methods)
    if keep is None:
        logger.warning("eval: preset %r has no random control: %s resamples tokens", preset, described(plan.methods))
        return None
    from tokenpruning.controls import Random

    other, of = make_plan(model, preset, tokens=Random(keep=keep, seed=seed), unavailable={}, overrides={})
    return _spec("control", preset, "random", other, of)


def _downsample(model: Any, preset: str, plan: Plan, family: Family | None, seed: int) -> RunSpec | None:
    if not plan.methods or family is None:
        return None
    keep = kept_share(model, plan.methods)
    if keep is None:
        return None
    # Where positions follow the picture's own grid, the encoder yields tokens in proportion to its area.
    if family.positions == "keep" and isinstance(keep, float):
        smaller = dataclasses.replace(plan, reduction=dataclasses.replace(plan.reduction, method=None), inner=None)
        made = _spec("control", preset, "downsample", smaller, family, smaller_picture(keep))
        return dataclasses.replace(made, parameters={**made.parameters, "picture": f"area x {keep}"})
    from tokenpruning.controls import Downsample

    other, of = make_plan(model, preset, tokens=Downsample(keep=keep), unavailable={}, overrides={})
    return _spec("control", preset, "downsample", other, of)


def kept_share(model: Any, chosen: Sequence[Method]) -> Any:
    """The budget of methods joined: a share of the visual tokens (averaged over layers), or the selector's own.

    None where tokens are resampled, to as many as fit the grid.
    """
    selectors = [method for method in chosen if isinstance(method, Selector)]
    inner = [method for method in chosen if hasattr(method, "visual_per_layer")]
    if len(selectors) + len(inner) != len(chosen):
        return None
    keep: Any = selectors[0].keep if selectors else 1.0
    if inner:
        layers, many = model.config.get_text_config().num_hidden_layers, 10_000
        share = sum(inner[0].visual_per_layer(many, layers)) / layers / many  # type: ignore[attr-defined]
        keep = keep * share if isinstance(keep, float) else max(1, round(keep * share))
    return keep


def smaller_picture(area: float) -> Picture:
    """Resize a picture to that share of its area."""

    def change(picture: Image.Image) -> Image.Image:
        side = math.sqrt(area)
        size = tuple(max(1, round(x * side)) for x in picture.size)
        return picture.resize((size[0], size[1]), Image.Resampling.BICUBIC)

    return change


def blank(picture: Image.Image) -> Image.Image:
    """A mid-grey picture of the same size."""
    return Image.new("RGB", picture.size, GREY)
