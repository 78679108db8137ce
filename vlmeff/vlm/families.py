"""What vlmeff has to know of a model family: where the vision layers are, the grid, the placeholder.

A family is one small class of facts. Everything else (scoring, selecting, shortening the request, positions) is the
same for all of them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from vlmeff.errors import ConfigError, UnsupportedInputError, UnsupportedModelError
from vlmeff.vlm.probe import QueryKey

Kwargs = Mapping[str, Any]
Grid = tuple[int, int]


class Family(ABC):
    """Facts of one model class.

    ``positions``: "repack" numbers the shortened prompt from 0 (LLaVA, whose positions are one-dimensional); "keep"
    leaves every surviving token its original multi-dimensional position (Qwen-VL).
    ``encoder_inputs``: the arguments that the encoder consumes; they never reach the language model.
    """

    model_type: ClassVar[str]
    positions: ClassVar[Literal["repack", "keep"]]
    encoder_inputs: ClassVar[tuple[str, ...]]

    @abstractmethod
    def grids(self, model: Any, kwargs: Kwargs) -> list[list[Grid]]:
        """Per picture the (H, W) grids of its segments, in the order of its visual tokens."""

    @abstractmethod
    def attention_layers(self, model: Any) -> list[nn.Module]:
        """The attention module of every layer of the vision tower."""

    @abstractmethod
    def deep_layer(self, model: Any) -> int:
        """0-based index of the layer whose output is projected."""

    @abstractmethod
    def object_layer(self, model: Any) -> int:
        """Default object layer, 1-based."""

    @abstractmethod
    def query_key(self, module: Any, hidden: Tensor, kwargs: Kwargs) -> QueryKey:
        """q and k of an attention module from its input."""

    @abstractmethod
    def token_scores(self, model: Any, kwargs: Kwargs, score: Tensor) -> list[list[Tensor]]:
        """Per picture and segment the score [H * W] of its visual tokens, from the score of the tower's tokens."""

    def legal_object_layers(self, model: Any) -> list[int]:
        """1-based numbers of the layers that see the whole picture."""
        return list(range(1, len(self.attention_layers(model)) + 1))

    def score_layers(self, model: Any, names: tuple[str, ...], object_layer: int | None) -> dict[str, nn.Module]:
        """The attention modules behind the scores a selector asks for; raises on an object layer that is not legal."""
        if not names:
            return {}
        layers, legal = self.attention_layers(model), self.legal_object_layers(model)
        number = self.object_layer(model) if object_layer is None else object_layer
        if "object" in names and number not in legal:
            why = "uses windowed attention" if number <= len(layers) else f"does not exist (there are {len(layers)})"
            raise ConfigError(
                f"object_layer={number}: layer {number} of the vision tower {why}. "
                f"Legal (1-based) layers: {', '.join(map(str, legal))}."
            )
        deep = self.deep_layer(model)
        if "deep" in names and deep + 1 not in legal:
            raise UnsupportedModelError(
                f"the layer that feeds the projector ({deep + 1}) uses windowed attention, so its scores only rank "
                "tokens within a window; use a method without attention scores: tokens='downsample'."
            )
        found = {"object": layers[number - 1], "deep": layers[deep]} if legal else {}
        return {name: found[name] for name in names}

    def refuse_model(self, model: Any) -> None:
        """Raise ``UnsupportedModelError`` for a model of the class whose tokens cannot be reduced."""
        if not hasattr(model, "generate"):
            raise UnsupportedModelError(
                f"{type(model).__name__} has no language model head: wrap the ...ForConditionalGeneration model."
            )

    def refuse_unsupported(self, kwargs: Kwargs) -> None:
        """Raise ``UnsupportedInputError`` for inputs that would silently stay unpruned."""
        encoded = kwargs.get("mm_encoder_outputs") or {}
        if kwargs.get("pixel_values_videos") is not None or encoded.get("video") is not None:
            raise UnsupportedInputError(
                f"{self.model_type}: token reduction for video is not supported; pass the frames as pictures, or "
                "vlmeff.unwrap(model) first."
            )

    def encode(self, model: Any, kwargs: Kwargs) -> Any:
        """Run the model's own encoder; its output holds ``pooler_output``, one [tokens, D] tensor per picture."""
        arguments = {name: kwargs[name] for name in self.encoder_inputs if kwargs.get(name) is not None}
        return model.base_model.get_image_features(**arguments, return_dict=True)

    def image_token_id(self, model: Any) -> int:
        return model.config.image_token_id


class Llava(Family):
    """LLaVA-1.5: a CLIP or SigLIP tower, a square grid, one-dimensional positions."""

    model_type = "llava"
    positions = "repack"
    encoder_inputs = ("pixel_values", "vision_feature_layer", "vision_feature_select_strategy", "image_sizes")

    def grids(self, model: Any, kwargs: Kwargs) -> list[list[Grid]]:
        if kwargs.get("image_sizes") is not None:
            raise UnsupportedInputError("llava: image_sizes (Pixtral towers) is not supported by token reduction.")
        vision = model.config.vision_config
        if kwargs.get("pixel_values") is None:
            features, size = kwargs["mm_encoder_outputs"]["image"].pooler_output, (vision.image_size, vision.image_size)
        else:
            features, size = kwargs["pixel_values"], kwargs["pixel_values"].shape[-2:]
        return [[(size[0] // vision.patch_size, size[1] // vision.patch_size)]] * len(features)

    def attention_layers(self, model: Any) -> list[nn.Module]:
        tower = model.base_model.vision_tower
        tower = getattr(tower, "vision_model", tower)
        layers = getattr(getattr(tower, "encoder", None), "layers", None)
        if layers is None or not hasattr(layers[0].self_attn, "q_proj"):
            raise UnsupportedModelError(
                f"llava: the vision tower {type(tower).__name__} is not a CLIP or SigLIP tower; supported towers have "
                "encoder.layers[i].self_attn with q_proj and k_proj."
            )
        return [layer.self_attn for layer in layers]

    def deep_layer(self, model: Any) -> int:
        layer = model.config.vision_feature_layer
        if not isinstance(layer, int):
            raise UnsupportedModelError(
                f"llava: vision_feature_layer={layer!r} concatenates several layers; token reduction needs one."
            )
        # hidden_states has one entry more than there are layers: entry s >= 1 is the output of layer s - 1.
        count = len(self.attention_layers(model))
        index = count + layer if layer < 0 else layer - 1
        if not 0 <= index < count:
            raise UnsupportedModelError(f"llava: vision_feature_layer={layer} is not the output of a layer.")
        return index

    def object_layer(self, model: Any) -> int:
        return max(1, round(0.375 * len(self.attention_layers(model))))  # 9 of 24, as in the paper

    def query_key(self, module: Any, hidden: Tensor, kwargs: Kwargs) -> QueryKey:
        def heads(x: Tensor) -> Tensor:
            return x.view(*x.shape[:-1], -1, module.head_dim).transpose(1, 2)

        return QueryKey(heads(module.q_proj(hidden)), heads(module.k_proj(hidden)), module.scale)

    def token_scores(self, model: Any, kwargs: Kwargs, score: Tensor) -> list[list[Tensor]]:
        grid = self.grids(model, kwargs)[0][0]
        extra = score.shape[-1] - grid[0] * grid[1]  # CLS votes as a query and is dropped as a column
        return [[row[extra:]] for row in score]

    def refuse_model(self, model: Any) -> None:
        super().refuse_model(model)
        tower = getattr(model.base_model.vision_tower, "vision_model", model.base_model.vision_tower)
        strategy = model.config.vision_feature_select_strategy
        if strategy != "default" and hasattr(getattr(tower, "embeddings", None), "class_embedding"):
            raise UnsupportedModelError(
                f"llava: vision_feature_select_strategy={strategy!r} projects the class token, which has no place in "
                "the grid; token reduction needs 'default'."
            )

    def refuse_unsupported(self, kwargs: Kwargs) -> None:
        super().refuse_unsupported(kwargs)
        for name in ("vision_feature_layer", "vision_feature_select_strategy"):
            if kwargs.get(name) is not None:
                raise UnsupportedInputError(
                    f"llava: {name} per call is not supported by token reduction; set model.config.{name} before wrap."
                )


class Qwen2_5VL(Family):
    """Qwen2.5-VL: dynamic resolution, windowed layers, tokens merged 2 x 2, three-dimensional positions."""

    model_type = "qwen2_5_vl"
    positions = "keep"
    encoder_inputs = ("pixel_values", "image_grid_thw")

    def grids(self, model: Any, kwargs: Kwargs) -> list[list[Grid]]:
        if kwargs.get("image_grid_thw") is None:
            raise UnsupportedInputError("qwen2_5_vl: image_grid_thw is missing; pass all of the processor's outputs.")
        merge = model.config.vision_config.spatial_merge_size
        return [[(h // merge, w // merge)] * t for t, h, w in kwargs["image_grid_thw"].tolist()]

    def attention_layers(self, model: Any) -> list[nn.Module]:
        return [block.attn for block in model.base_model.visual.blocks]

    def legal_object_layers(self, model: Any) -> list[int]:
        return sorted(i + 1 for i in model.config.vision_config.fullatt_block_indexes)

    def deep_layer(self, model: Any) -> int:
        return len(self.attention_layers(model)) - 1

    def object_layer(self, model: Any) -> int:
        target = 0.5 * len(self.attention_layers(model))  # 16 of 32, as in the paper
        return min(self.legal_object_layers(model), key=lambda number: (abs(number - target), number), default=0)

    def query_key(self, module: Any, hidden: Tensor, kwargs: Kwargs) -> QueryKey:
        from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb_vision

        q, k, _ = module.qkv(hidden).view(len(hidden), 3, module.num_heads, -1).unbind(1)
        q, k = apply_rotary_pos_emb_vision(q, k, *kwargs["position_embeddings"])
        return QueryKey(q, k, module.scaling, kwargs["cu_seqlens"])

    def token_scores(self, model: Any, kwargs: Kwargs, score: Tensor) -> list[list[Tensor]]:
        from transformers.vision_utils import get_vision_window_index

        vision = model.config.vision_config
        window_index, _ = get_vision_window_index(
            kwargs["image_grid_thw"], vision.spatial_merge_size, vision.window_size, vision.patch_size
        )
        merged = score.view(-1, vision.spatial_merge_size**2).mean(1)  # a merged token is the mean of its patches
        merged = merged[torch.argsort(window_index).to(score.device)]
        grids = self.grids(model, kwargs)
        segments = iter(merged.split([h * w for picture in grids for h, w in picture]))
        return [[next(segments) for _ in picture] for picture in grids]


FAMILIES: dict[str, Family] = {family.model_type: family for family in (Llava(), Qwen2_5VL())}


def is_vlm(model: Any) -> bool:
    """Whether the model takes pictures."""
    return "image" in getattr(model, "input_modalities", ())


def family_of(model: Any) -> Family:
    """The family of a model; raises ``UnsupportedModelError`` with the list of supported ones."""
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if model_type not in FAMILIES:
        raise UnsupportedModelError(
            f"token reduction does not support {type(model).__name__} (model_type {model_type!r}). "
            f"Supported model types: {', '.join(sorted(FAMILIES))}."
        )
    return FAMILIES[model_type]
