"""PerceptionLM: a timm Perception Encoder with rotary positions, tokens averaged 2 x 2, pictures in tiles, video.

The worked example of ``docs/adding-a-family.md``.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from tokenpruning import Layout
from vlmeff.errors import UnsupportedInputError, UnsupportedModelError
from vlmeff.vlm.families.base import PIXELS, Encoded, EncoderInputs, Family, Kwargs, Modality
from vlmeff.vlm.families.timm_attention import timm_attention_layers, timm_model, timm_query_key
from vlmeff.vlm.probe import QueryKey


class PerceptionLM(Family):
    """pixel_values [pictures, tiles, 3, h, w], thumbnail first; pixel_values_videos [videos, frames, 3, h, w].

    Tiles and frames are the segments of a picture or video.
    """

    model_type = "perception_lm"
    encoder_inputs: ClassVar[EncoderInputs] = {"image": ("pixel_values",), "video": ("pixel_values_videos",)}

    def _raster(self, model: Any, height: int, width: int) -> tuple[int, int]:
        """Tower tokens of a tile, without prefix tokens."""
        patch_height, patch_width = timm_model(model.base_model.vision_tower).patch_embed.patch_size
        return height // patch_height, width // patch_width

    def _pooled(self, model: Any, side: int) -> int:
        return side // max(1, model.config.projector_pooling_ratio)

    def patches_per_token(self, model: Any) -> int:
        return max(1, model.config.projector_pooling_ratio) ** 2

    def layout_of_size(self, model: Any, height: int, width: int) -> Layout:
        size = timm_model(model.base_model.vision_tower).patch_embed.img_size
        side = self._pooled(model, self._raster(model, *size)[0])
        return Layout(grids=[(side, side)])  # one tile; the processor makes several of a large picture

    def layouts(self, model: Any, kwargs: Kwargs, modality: Modality) -> list[Layout]:
        pixels = kwargs.get(PIXELS[modality])
        if pixels is None:  # which tiles belong together is lost: each is a picture
            features = kwargs["mm_encoder_outputs"][modality].pooler_output
            (count, tokens), tiles = features.shape[:2], 1
            side = round(tokens**0.5)
        else:
            if pixels.ndim != 5 or pixels.shape[-1] != pixels.shape[-2]:
                raise UnsupportedInputError(
                    f"perception_lm: {PIXELS[modality]} must be [pictures, tiles, 3, side, side], got "
                    f"{tuple(pixels.shape)}; use the model's processor."
                )
            count, tiles = pixels.shape[:2]
            side = self._pooled(model, self._raster(model, *pixels.shape[-2:])[0])
        return [Layout(grids=[(side, side)] * tiles)] * count

    def encode(self, model: Any, kwargs: Kwargs, modality: Modality) -> Encoded:
        output = (kwargs.get("mm_encoder_outputs") or {}).get(modality)
        if output is None:  # the model has no get_video_features: frames go the way of tiles
            output = model.base_model.get_image_features(pixel_values=kwargs[PIXELS[modality]], return_dict=True)
        return self.split(output, self.layouts(model, kwargs, modality))

    def attention_layers(self, model: Any) -> list[nn.Module]:
        return timm_attention_layers(model.base_model.vision_tower)

    def query_key(self, module: Any, hidden: Tensor, kwargs: Kwargs) -> QueryKey:
        return timm_query_key(module, hidden, kwargs)

    def token_scores(self, model: Any, kwargs: Kwargs, modality: Modality, score: Tensor) -> list[list[Tensor]]:
        pixels = kwargs[PIXELS[modality]]
        height, width = self._raster(model, *pixels.shape[-2:])
        maps = score[:, -height * width :].view(-1, 1, height, width)  # without the class token
        side = self._pooled(model, height)
        # The projector's own pooling: its windows are uneven where the ratio does not divide the side.
        return [list(tiles) for tiles in F.adaptive_avg_pool2d(maps, (side, side)).flatten(1).split(pixels.shape[1])]

    def pixels(self, model: Any, kwargs: Kwargs, modality: Modality) -> list[list[Tensor]]:
        return [list(tiles) for tiles in kwargs[PIXELS[modality]]]

    def refuse_model(self, model: Any) -> None:
        super().refuse_model(model)
        prefix = timm_model(model.base_model.vision_tower).num_prefix_tokens
        if prefix != int(model.config.vision_use_cls_token):
            raise UnsupportedModelError(
                f"perception_lm: the tower has {prefix} tokens before the patches and vision_use_cls_token="
                f"{model.config.vision_use_cls_token} drops {int(model.config.vision_use_cls_token)}: the rest have no "
                "place in the grid."
            )
