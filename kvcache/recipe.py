"""A recipe: the share of entries that each layer keeps, measured once on samples and used for every prompt after.

With it a layer can be compacted right after its own attention, so the whole cache never stands in memory. A recipe
holds one list of shares for each of several budgets; between them the shares are interpolated.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import warnings
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from kvcache.budget import OnSmallBudget, recipe_budgets
from kvcache.checks import check_keep_ratio
from vlmeff.errors import RecipeFormatError, RecipeMismatchError

Metric = Literal["full", "mean", "window"]
FORMAT = "vlmeff.kv_recipe"
VERSION = 1
MEAN_TOLERANCE = 0.01  # between a list's mean and the budget it stands for
GEOMETRY = {"num_key_value_heads": "kv_heads", "head_dim": "head_dim", "num_hidden_layers": "hidden_layers"}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Shares kept of each retained layer, for one or more budgets.

    Args:
        keep_ratios: budget -> shares in [0, 1], one for each of ``layers``; their mean is the budget within 0.01.
        layers: numbers of the retained layers, ascending. None: 0, 1, 2, ... for each share.
        std: budget -> standard deviation of each share over the samples.
        metric, metric_args, sink, recent, selection: what the samples were scored with.
        model: geometry of the model: id, model_type, text_model_type, num_hidden_layers, num_attention_heads,
            num_key_value_heads, head_dim. What is missing is not checked.
        calibration: how it came to be: dataset, split, samples, seed, mean_prompt_tokens, token_pruning, ...

    Raises:
        RecipeFormatError: naming the field.
    """

    keep_ratios: Mapping[float, tuple[float, ...]]
    layers: tuple[int, ...] = None  # type: ignore[assignment]  # a tuple after construction
    std: Mapping[float, tuple[float, ...]] = field(default_factory=dict)
    policy: str = "prefixkv"
    metric: Metric = "full"
    metric_args: Mapping[str, Any] = field(default_factory=dict)
    selection: Literal["shared"] = "shared"
    sink: int = 1
    recent: int = 1
    model: Mapping[str, Any] = field(default_factory=dict)
    calibration: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("keep_ratios", "std", "metric_args", "model", "calibration"):
            if not isinstance(getattr(self, name), Mapping):
                raise RecipeFormatError(f"recipe: {name} must be an object, not {getattr(self, name)!r}.")
        for name in ("keep_ratios", "std"):
            object.__setattr__(self, name, _lists(name, getattr(self, name)))
        if not self.keep_ratios:
            raise RecipeFormatError("recipe: keep_ratios must hold the shares of one budget or more.")
        layers = range(len(next(iter(self.keep_ratios.values())))) if self.layers is None else self.layers
        if not isinstance(layers, range | list | tuple) or not all(type(n) is int and n >= 0 for n in layers):
            raise RecipeFormatError(f"recipe: layers={layers!r} must be layer numbers.")
        object.__setattr__(self, "layers", tuple(layers))
        if not self.layers or any(b <= a for a, b in zip(self.layers, self.layers[1:], strict=False)):
            raise RecipeFormatError(f"recipe: layers={self.layers!r} must ascend, one or more.")
        for name, lists in (("keep_ratios", self.keep_ratios), ("std", self.std)):
            for budget, values in lists.items():
                self._check_list(f'{name}["{budget}"]', values, most=1.0)
        for budget, shares in self.keep_ratios.items():
            mean = sum(shares) / len(shares)
            if abs(mean - budget) > MEAN_TOLERANCE:
                raise RecipeFormatError(
                    f'recipe: keep_ratios["{budget}"] has the mean {mean:.4f}, which is off its budget by more than '
                    f"{MEAN_TOLERANCE}. Shares are what is kept; convert evicted shares with convert_official."
                )
        for name, legal in (("policy", ("prefixkv",)), ("metric", get_args(Metric)), ("selection", ("shared",))):
            if getattr(self, name) not in legal:
                raise RecipeFormatError(f"recipe: {name}={getattr(self, name)!r} must be {' or '.join(legal)}.")
        for name in ("sink", "recent"):
            if type(getattr(self, name)) is not int or getattr(self, name) < 0:
                raise RecipeFormatError(f"recipe: {name}={getattr(self, name)!r} must be an int >= 0.")
        window = self.metric_args.get("window", 1)
        if type(window) is not int or window < 1:
            raise RecipeFormatError(f"recipe: metric_args.window={window!r} must be an int >= 1.")

    def _check_list(self, name: str, values: tuple[float, ...], *, most: float) -> None:
        if len(values) != len(self.layers):
            raise RecipeFormatError(f"recipe: {name} has {len(values)} entries for {len(self.layers)} layers.")
        for value in values:
            if not _is_number(value) or not 0 <= value <= most:  # also false for NaN
                raise RecipeFormatError(f"recipe: {name} holds {value!r}, which is not a share in [0, 1].")

    def shares(self, keep_ratio: float) -> tuple[float, ...]:
        """The share that each layer keeps at ``keep_ratio``: linear between the budgets at hand.

        Below the smallest it goes to 0, above the largest to 1, where everything is kept.

        Raises:
            ConfigError: ``keep_ratio`` is not in (0, 1].
        """
        check_keep_ratio("Recipe", keep_ratio)
        count = len(self.layers)
        known = {0.0: (0.0,) * count, 1.0: (1.0,) * count, **self.keep_ratios}
        grid = sorted(known)
        at = bisect_left(grid, keep_ratio)
        if grid[at] == keep_ratio:
            return known[keep_ratio]
        low, high = grid[at - 1], grid[at]
        t = (keep_ratio - low) / (high - low)
        return tuple((1 - t) * a + t * b for a, b in zip(known[low], known[high], strict=True))

    def budgets(
        self,
        *,
        keep_ratio: float,
        n: int,
        protected: int | None = None,
        on_small_budget: OnSmallBudget = "clamp",
        say: bool = True,
    ) -> list[int]:
        """Entries of each layer of a prompt of ``n`` tokens, round(keep_ratio * L * n) together (``recipe_budgets``).

        ``protected``: tokens that stay whatever their score; None: the recipe's sink + recent.
        """
        return recipe_budgets(
            self.shares(keep_ratio),
            keep_ratio=keep_ratio,
            n=n,
            protected=self.sink + self.recent if protected is None else protected,
            on_small_budget=on_small_budget,
            say=say,
        )

    def check_model(
        self,
        *,
        layers: Sequence[int],
        kv_heads: int,
        head_dim: int,
        hidden_layers: int | None = None,
        model_id: str | None = None,
        token_pruning: Any = None,
    ) -> None:
        """Compare with the model that the recipe is to be used on; ``layers`` are its retained ones.

        Warns where the geometry agrees and ``model_id`` or ``token_pruning`` (what shortens the prompt, None: nothing)
        is not that of the calibration.

        Raises:
            RecipeMismatchError: other layers, kv heads or head_dim.
        """
        theirs = {"kv_heads": kv_heads, "head_dim": head_dim, "hidden_layers": hidden_layers}
        wrong = [
            f"{name} {self.model[name]} (the model: {theirs[ours]})"
            for name, ours in GEOMETRY.items()
            if self.model.get(name) is not None and theirs[ours] is not None and self.model[name] != theirs[ours]
        ]
        if tuple(layers) != self.layers:
            wrong.append(f"retained layers {_brief(self.layers)} (the model: {_brief(tuple(layers))})")
        if wrong:
            raise RecipeMismatchError(
                f"recipe: made for {self.model.get('id') or 'a model'} with {', '.join(wrong)}. Pass the recipe of "
                "this model, or calibrate one."
            )
        known = self.model.get("id")
        if known is not None and model_id is not None and known != model_id:
            warnings.warn(f"recipe: calibrated on {known}, used on {model_id} of equal geometry.", stacklevel=2)
        if self.calibration and self.calibration.get("token_pruning") != token_pruning:
            was = self.calibration.get("token_pruning")
            warnings.warn(
                f"recipe: calibrated with token pruning {was!r}, used with {token_pruning!r}; calibrate it "
                "as it is used.",
                stacklevel=2,
            )


def read_recipe(path: str | os.PathLike[str]) -> Recipe:
    """Read a file of ``write_recipe``.

    Raises:
        RecipeFormatError: naming the file and the field.
    """
    path = Path(path).expanduser()
    content = _read_json(path)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise RecipeFormatError(f"recipe file {path}: 'format' is not {FORMAT!r}.")
    if content.get("version") != VERSION:
        raise RecipeFormatError(
            f"recipe file {path}: version {content.get('version')!r}, this vlmeff reads version {VERSION}; "
            "calibrate again."
        )
    fields = {name: value for name, value in content.items() if name not in ("format", "version")}
    try:
        return Recipe(**fields)
    except (RecipeFormatError, TypeError) as error:  # TypeError: a field too many or too few
        raise RecipeFormatError(f"recipe file {path}: {error}") from error


def write_recipe(path: str | os.PathLike[str], recipe: Recipe) -> Path:
    """Write ``recipe`` as JSON and return the path."""
    content: dict[str, Any] = {"format": FORMAT, "version": VERSION}
    for item in dataclasses.fields(recipe):
        value = getattr(recipe, item.name)
        if item.name in ("keep_ratios", "std"):
            value = {str(budget): list(shares) for budget, shares in sorted(value.items())}
        content[item.name] = dict(value) if isinstance(value, Mapping) else value
    path = Path(path)
    path.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    return path


def convert_official(path: str | os.PathLike[str], evict_ratio: float) -> Recipe:
    """A recipe from a file of the official repository's ``confs``: one list of *evicted* shares.

    The number in the file's name is the evicted share too. Kept are 1 - e, at the budget 1 - evict_ratio. The official
    evaluation protects the first and the last token. Nothing is known of the model but its number of layers.

    Raises:
        RecipeFormatError: not such a list, or its mean is off ``evict_ratio`` by more than 0.01.
    """
    path = Path(path).expanduser()
    evicted = _read_json(path)
    if not isinstance(evicted, list) or not evicted or not all(map(_is_number, evicted)):
        raise RecipeFormatError(f"{path}: not a list of evicted shares, one for each layer.")
    if not _is_number(evict_ratio) or not 0 <= evict_ratio < 1:
        raise RecipeFormatError(f"convert_official: evict_ratio={evict_ratio!r} must be the evicted share, in [0, 1).")
    keep_ratio = round(1 - evict_ratio, 12)  # 1 - 0.9 is not 0.1 in binary
    try:
        return Recipe(
            keep_ratios={keep_ratio: tuple(1 - e for e in evicted)},
            sink=1,
            recent=1,
            model={"num_hidden_layers": len(evicted)},
        )
    except RecipeFormatError as error:
        raise RecipeFormatError(f"{path}, evict_ratio={evict_ratio}: {error}") from error


def _lists(name: str, value: Mapping[Any, Any]) -> dict[float, tuple[float, ...]]:
    """Budgets as numbers, lists as tuples: JSON has neither."""
    out = {}
    for key, values in value.items():
        try:
            budget = float(key)
        except (TypeError, ValueError):
            budget = math.nan
        if not 0 < budget <= 1 or isinstance(key, bool):  # also true for NaN
            raise RecipeFormatError(f"recipe: {name} has the key {key!r}, which is not a budget in (0, 1].")
        if isinstance(values, str) or not isinstance(values, Sequence):
            raise RecipeFormatError(f'recipe: {name}["{key}"] must be a list.')
        out[budget] = tuple(values)
    return out


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _brief(layers: tuple[int, ...]) -> str:
    return str(list(layers)) if len(layers) <= 6 else f"{len(layers)} of {layers[0]}..{layers[-1]}"


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RecipeFormatError(f"{path}: cannot be read as JSON ({error}).") from error
