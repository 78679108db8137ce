"""LLaVA-1.5."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from tokenpruning import Layout
from vlmeff.errors import UnsupportedInputError, UnsupportedModelError
from vlmeff.vlm.families.base import EncoderInputs, Family, Kwargs, Modality, separate_heads
from vlmeff.vlm.probe import QueryKey


class ClipTower(Family):
    """What the LLaVA models share: a CLIP or SigLIP tower of which one layer is projected."""

    def attention_layers(self, model: Any) -> list[nn.Module]:
        tower = model.base_model.vision_tower
        tower = getattr(tower, "vision_model", tower)
        layers = getattr(getattr(tower, "encoder", None), "layers", None)
        if layers is None or not hasattr(layers[0].self_attn, "q_proj"):
            raise UnsupportedModelError(
                f"{self.model_type}: the vision tower {type(tower).__name__} is not a CLIP or SigLIP tower; supported "
                "towers have encoder.layers[i].self_attn with q_proj and k_proj."
            )
        return [layer.self_attn for layer in layers]

    def deep_layer(self, model: Any) -> int:
        layer = model.config.vision_feature_layer
        if not isinstance(layer, int):
            raise UnsupportedModelError(
                f"{self.model_type}: vision_feature_layer={layer!r} concatenates several layers; token reduction needs "
                "one."
            )
        # hidden_states has one entry more than there are layers: entry s >= 1 is the output of layer s - 1.
        count = len(self.attention_layers(model))
        index = count + layer if layer < 0 else layer - 1
        if not 0 <= index < count:
            raise UnsupportedModelError(
                f"{self.model_type}: vision_feature_layer={layer} is not the output of a layer."
            )
        return index

    def query_key(self, module: Any, hidden: Tensor, kwargs: Kwargs) -> QueryKey:
        heads = separate_heads(module)
        return QueryKey(heads(module.q_proj(hidden)), heads(module.k_proj(hidden)), module.scale)

    def refuse_model(self, model: Any) -> None:
        super().refuse_model(model)
        tower = getattr(model.base_model.vision_tower, "vision_model", model.base_model.vision_tower)
        strategy = model.config.vision_feature_select_strategy
        has_class_token = hasattr(getattr(tower, "embeddings", None), "class_embedding")
        if strategy != "default" and has_class_token:
            raise UnsupportedModelError(
                f"{self.model_type}: vision_feature_select_strategy={strategy!r} projects the class token, which has "
                "no place in the grid; token reduction needs 'default'."
            )

    def refuse_unsupported(self, model: Any, kwargs: Kwargs) -> None:
        super().refuse_unsupported(model, kwargs)
        for name in ("vision_feature_layer", "vision_feature_select_strategy"):
            if kwargs.get(name) is not None:
                raise UnsupportedInputError(
                    f"{self.model_type}: {name} per call is not supported by token reduction; set model.config.{name} "
                    "before wrap."
                )


class Llava(ClipTower):
    """LLaVA-1.5: a square grid, one-dimensional positions."""

    model_type = "llava"
    encoder_inputs: ClassVar[EncoderInputs] = {
        "image": ("pixel_values", "vision_feature_layer", "vision_feature_select_strategy", "image_sizes")
    }

    def layouts(self, model: Any, kwargs: Kwargs, modality: Modality) -> list[Layout]:
        if kwargs.get("image_sizes") is not None:
            raise UnsupportedInputError("llava: image_sizes (Pixtral towers) is not supported by token reduction.")
        vision = model.config.vision_config
        if kwargs.get("pixel_values") is None:
            count, size = len(kwargs["mm_encoder_outputs"]["image"].pooler_output), (vision.image_size,) * 2
        else:
            count, size = len(kwargs["pixel_values"]), kwargs["pixel_values"].shape[-2:]
        return [Layout(grids=[(size[0] // vision.patch_size, size[1] // vision.patch_size)])] * count

    def layout_of_size(self, model: Any, height: int, width: int) -> Layout:
        side = model.config.vision_config.image_size // model.config.vision_config.patch_size
        return Layout(grids=[(side, side)])  # every picture is resized and cropped to the tower's square

    def token_scores(self, model: Any, kwargs: Kwargs, modality: Modality, score: Tensor) -> list[list[Tensor]]:
        tokens = self.layouts(model, kwargs, modality)[0].n_tokens
        return [[row[-tokens:]] for row in score]  # the class token votes as a query and is dropped as a column

    def projector(self, model: Any) -> nn.Module:
        return model.base_model.multi_modal_projector

    def tower_module(self, model: Any) -> nn.Module:
        return model.base_model.multi_modal_projector

    def pixels(self, model: Any, kwargs: Kwargs, modality: Modality) -> list[list[Tensor]]:
        return [[picture] for picture in kwargs["pixel_values"]]
