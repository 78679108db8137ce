"""Families whose pictures (or tiles) all give the same square of tokens: InternVL, Idefics3, SmolVLM, Gemma 3,
PaliGemma. Several tower tokens may become one: the score of a token is the mean of theirs.

Each tile that the processor makes is a picture of its own here: the inputs do not say which tiles belong together.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tokenpruning import Layout
from vlmeff.errors import UnsupportedInputError, UnsupportedModelError
from vlmeff.vlm.families.base import EncoderInputs, Family, Kwargs, Modality, pooled_scores, separate_heads
from vlmeff.vlm.probe import QueryKey


class FixedGrid(Family):
    """What they share: ``block`` x ``block`` tower tokens in one, square pictures, one-dimensional positions."""

    encoder_inputs: ClassVar[EncoderInputs] = {"image": ("pixel_values",)}

    @abstractmethod
    def block(self, model: Any) -> int:
        """Tower tokens along an edge of a visual token."""

    def patches_per_token(self, model: Any) -> int:
        return self.block(model) ** 2

    def layout_of_size(self, model: Any, height: int, width: int) -> Layout:
        side = self.side(model)
        return Layout(grids=[(side, side)])  # one tile; processors that split pictures make more of them

    def tower(self, model: Any) -> Any:
        tower = model.base_model.vision_tower
        return getattr(tower, "vision_model", tower)

    def side(self, model: Any, pixels: int | None = None) -> int:
        """Tokens along an edge of a picture of ``pixels`` (the tower's own size when None)."""
        vision = model.config.vision_config
        size, patch = vision.image_size, vision.patch_size
        size = size[0] if isinstance(size, list | tuple) else size
        patch = patch[0] if isinstance(patch, list | tuple) else patch
        return (size if pixels is None else pixels) // patch // self.block(model)

    def count(self, model: Any, kwargs: Kwargs) -> int:
        """Pictures (tiles) of a request."""
        return len(kwargs["pixel_values"])

    def layouts(self, model: Any, kwargs: Kwargs, modality: Modality) -> list[Layout]:
        if kwargs.get("pixel_values") is None:
            side = self.side(model)
            features = kwargs["mm_encoder_outputs"]["image"].pooler_output
            count = sum(part.numel() // part.shape[-1] for part in features) // side**2
        else:
            height, width = kwargs["pixel_values"].shape[-2:]
            if height != width:
                raise UnsupportedInputError(
                    f"{self.model_type}: pixel_values of {height} x {width} are not square; use the model's processor."
                )
            side, count = self.side(model, height), self.count(model, kwargs)
        return [Layout(grids=[(side, side)])] * count

    def attention_layers(self, model: Any) -> list[nn.Module]:
        layers = getattr(getattr(self.tower(model), "encoder", None), "layers", None)
        if layers is None or not hasattr(layers[0].self_attn, "q_proj"):
            raise UnsupportedModelError(
                f"{self.model_type}: the vision tower {type(self.tower(model)).__name__} has no encoder.layers with "
                "self_attn.q_proj."
            )
        return [layer.self_attn for layer in layers]

    def query_key(self, module: Any, hidden: Tensor, kwargs: Kwargs) -> QueryKey:
        heads = separate_heads(module)
        q, k = heads(module.q_proj(hidden)), heads(module.k_proj(hidden))
        return QueryKey(q, k, module.scale, valid=_valid(kwargs.get("attention_mask")))

    def token_scores(self, model: Any, kwargs: Kwargs, modality: Modality, score: Tensor) -> list[list[Tensor]]:
        block = self.block(model)
        tokens = self.layouts(model, kwargs, modality)[0].n_tokens * block**2
        return [[row] for row in pooled_scores(score[:, -tokens:], block)]

    def pixels(self, model: Any, kwargs: Kwargs, modality: Modality) -> list[list[Tensor]]:
        return [[picture] for picture in kwargs["pixel_values"]]


class InternVL(FixedGrid):
    """Its own ViT with a class token; pixel shuffle. The processor turns videos into pictures."""

    model_type = "internvl"
    encoder_inputs: ClassVar[EncoderInputs] = {
        "image": ("pixel_values", "vision_feature_layer", "vision_feature_select_strategy")
    }

    def block(self, model: Any) -> int:
        return round(1 / model.config.downsample_ratio)

    def attention_layers(self, model: Any) -> list[nn.Module]:
        return [layer.attention for layer in model.base_model.vision_tower.encoder.layer]

    def deep_layer(self, model: Any) -> int:
        layer, count = model.config.vision_feature_layer, len(self.attention_layers(model))
        index = count + layer if isinstance(layer, int) and layer < 0 else layer - 1
        if not isinstance(layer, int) or not 0 <= index < count:
            raise UnsupportedModelError(f"internvl: vision_feature_layer={layer!r} is not the output of one layer.")
        return index

    def query_key(self, module: Any, hidden: Tensor, kwargs: Kwargs) -> QueryKey:
        heads = separate_heads(module)
        q, k = module.q_norm(module.q_proj(hidden)), module.k_norm(module.k_proj(hidden))
        return QueryKey(heads(q), heads(k), module.scale)

    def refuse_model(self, model: Any) -> None:
        super().refuse_model(model)
        if model.config.vision_feature_select_strategy != "default":
            raise UnsupportedModelError(
                "internvl: vision_feature_select_strategy must be 'default' (the class token has no place in the grid)."
            )

    def refuse_unsupported(self, model: Any, kwargs: Kwargs) -> None:
        super().refuse_unsupported(model, kwargs)
        for name in ("vision_feature_layer", "vision_feature_select_strategy"):
            if kwargs.get(name) is not None:
                raise UnsupportedInputError(
                    f"internvl: {name} per call is not supported by token reduction; set model.config.{name} before "
                    "wrap."
                )


class Idefics3(FixedGrid):
    """pixel_values [rows, pictures, 3, h, w]; pictures of zeros only fill up a row and are dropped by the model."""

    model_type = "idefics3"
    encoder_inputs: ClassVar[EncoderInputs] = {"image": ("pixel_values", "pixel_attention_mask")}

    def block(self, model: Any) -> int:
        return model.config.scale_factor

    def tower(self, model: Any) -> Any:
        return model.base_model.vision_model

    def _real(self, kwargs: Kwargs) -> Tensor:
        return (kwargs["pixel_values"] != 0).flatten(2).any(2)

    def count(self, model: Any, kwargs: Kwargs) -> int:
        return int(self._real(kwargs).sum())

    def pixels(self, model: Any, kwargs: Kwargs, modality: Modality) -> list[list[Tensor]]:
        return [[picture] for picture in kwargs["pixel_values"][self._real(kwargs)]]


class SmolVLM(Idefics3):
    model_type = "smolvlm"


class Gemma3(FixedGrid):
    """SigLIP, averaged to 16 x 16 tokens: there is little to gain. The tokens of a picture see each other."""

    model_type = "gemma3"

    def block(self, model: Any) -> int:
        vision = model.config.vision_config
        return vision.image_size // vision.patch_size // round(model.config.mm_tokens_per_image**0.5)


class PaliGemma(FixedGrid):
    """SigLIP, one token per patch; the whole prompt sees itself in both directions. Positions count from 1."""

    model_type = "paligemma"
    first_position = 1

    def block(self, model: Any) -> int:
        return 1


def _valid(mask: Any) -> Tensor | None:
    """[B, M] bool from an attention mask in any of transformers' forms; None when nothing is masked."""
    if not isinstance(mask, Tensor):
        return None
    if mask.ndim == 4:  # the same for every head and query: bool, or 0 and a large negative number
        mask = mask[:, 0, 0]
        mask = mask if mask.dtype == torch.bool else mask == 0
    return mask.bool()
