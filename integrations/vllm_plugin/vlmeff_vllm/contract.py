"""How many tokens a picture has, known before it is encoded. Pure functions: nothing here needs vLLM.

vLLM writes a picture's placeholders into the prompt, and reserves cache for them, before the encoder runs. So a method
fits only if its count follows from the picture's grid and the settings: HiPrune with ``keep`` given, and Fourier (DCT).
What is kept may depend on the picture, how much may not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from tokenpruning import Fourier, HiPrune, Segment, split_budget
from tokenpruning.layout import Grid
from vlmeff.errors import ConfigError, UnknownNameError, UnsupportedModelError

METHODS: dict[str, type[HiPrune] | type[Fourier]] = {"hiprune": HiPrune, "fourier": Fourier, "dct": Fourier}
# The strategy under which the tower's output is exactly its grid: CLIP's class token is dropped, SigLIP has none.
STRATEGIES = {"clip_vision_model": "default", "siglip_vision_model": "full"}


@dataclass(frozen=True)
class Contract:
    """A method whose token count is known in advance."""

    method: HiPrune | Fourier

    def tokens(self, grid: Grid) -> int:
        """Tokens of a picture whose tower gives (H, W) of them."""
        if isinstance(self.method, Fourier):
            height, width = self.method.new_grid(grid)
            return height * width
        return split_budget(self.method.keep, [grid[0] * grid[1]])[0]

    def additional_tokens(self, grid: Grid, strategy: str) -> int:
        """``num_additional_image_tokens`` under which transformers' LlavaProcessor writes ``tokens(grid)``
        placeholders: it counts H * W of a picture, this number more, and one less for "default"."""
        return self.tokens(grid) - grid[0] * grid[1] + (strategy == "default")

    def reduce(self, features: Tensor, grid: Grid, scores: Mapping[str, Tensor] | None = None) -> Tensor:
        """[B, H * W, C] tower features -> [B, tokens(grid), C], in front of the projector.

        Args:
            scores: HiPrune's "object" and "deep", [B, H * W] each.
        Raises:
            ConfigError: the features are not those of the grid, or HiPrune has no scores.
        """
        if features.ndim != 3 or features.shape[1] != grid[0] * grid[1]:
            raise ConfigError(f"vlmeff: features {tuple(features.shape)} are not [B, {grid[0]} * {grid[1]}, C].")
        if isinstance(self.method, Fourier):
            return self.method.resample(features, grid)
        if scores is None or not set(self.method.needs) <= scores.keys():
            raise ConfigError(f"vlmeff: HiPrune needs the scores {', '.join(self.method.needs)} of the vision tower.")
        kept = []
        for row, picture in enumerate(features):
            segment = Segment(grid=grid, scores={name: score[row] for name, score in scores.items()})
            kept.append(picture[self.method.select(segment, self.tokens(grid)).index])
        return torch.stack(kept)


def read_contract(settings: Any) -> Contract:
    """{"method": "hiprune", "keep": 192} or {"method": "fourier", "side": 12}: the method and fields of its class.

    Raises:
        ConfigError: this is no such mapping, or the count would not be fixed by it.
        UnknownNameError: another method, whose count is not known in advance or not promised here; another field.
    """
    if not isinstance(settings, Mapping) or not isinstance(settings.get("method"), str):
        raise ConfigError(f'vlmeff: {settings!r} is not of the form {{"method": "hiprune", "keep": 192}}.')
    given = {name: value for name, value in settings.items() if name != "method"}
    name = settings["method"]
    if name not in METHODS:
        raise UnknownNameError("method with a token count known before the encoder runs", name, METHODS)
    known = [field.name for field in fields(METHODS[name])]
    for field in given:
        if field not in known:
            raise UnknownNameError(f"setting of {name}", field, known)
    if METHODS[name] is HiPrune and type(given.get("keep")) not in (int, float):
        raise ConfigError("vlmeff: HiPrune needs a fixed keep: tokens per picture (192) or a share of them (0.3333).")
    if METHODS[name] is Fourier and not given.keys() & {"side", "ratio"}:
        raise ConfigError("vlmeff: Fourier needs side (rows and columns kept) or ratio (share of each).")
    return Contract(METHODS[name](**given))


def grid_of(config: Any) -> Grid:
    """The tokens of every picture of a LLaVA-1.5 model, (H, W), from its config.

    Raises:
        UnsupportedModelError: the number of tokens follows the picture's size, pictures are tiled, or the tower's
            output is not its grid.
    """
    if config.model_type != "llava":
        raise UnsupportedModelError(
            f"vlmeff: model type {config.model_type!r} is not supported under vLLM, only 'llava' (LLaVA-1.5): tiled "
            "pictures and positions that follow the grid (M-RoPE) need more than a token count."
        )
    vision = config.vision_config
    wanted = STRATEGIES.get(vision.model_type)
    if wanted is None or config.vision_feature_select_strategy != wanted:
        raise UnsupportedModelError(
            f"vlmeff: a {vision.model_type} tower with vision_feature_select_strategy="
            f"{config.vision_feature_select_strategy!r} gives no plain grid of tokens; supported: {STRATEGIES}."
        )
    if not isinstance(config.vision_feature_layer, int):
        raise UnsupportedModelError("vlmeff: a model that projects several layers of its tower is not supported.")
    side = vision.image_size // vision.patch_size
    return side, side
