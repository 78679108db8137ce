"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: dynamic resolution, tokens merged 2 x 2, three-dimensional positions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tokenpruning import Layout
from vlmeff.errors import UnsupportedInputError
from vlmeff.vlm.families.base import EncoderInputs, Family, Kwargs, Modality
from vlmeff.vlm.probe import QueryKey

HEADS_AT_ONCE = 4
GRIDS: Mapping[Modality, str] = {"image": "image_grid_thw", "video": "video_grid_thw"}


class QwenVL(Family):
    """What the three share. Every temporal slice of a video is a segment of its own."""

    positions = "keep"
    encoder_inputs: ClassVar[EncoderInputs] = {
        "image": ("pixel_values", "image_grid_thw"),
        "video": ("pixel_values_videos", "video_grid_thw"),
    }
    grid_inputs = ("second_per_grid_ts",)

    def _thw(self, kwargs: Kwargs, modality: Modality) -> list[list[int]]:
        grids = kwargs.get(GRIDS[modality])
        if grids is None:
            raise UnsupportedInputError(
                f"{self.model_type}: {GRIDS[modality]} is missing; pass all of the processor's outputs."
            )
        return torch.as_tensor(grids).tolist()

    def layouts(self, model: Any, kwargs: Kwargs, modality: Modality) -> list[Layout]:
        merge = model.config.vision_config.spatial_merge_size
        return [Layout(grids=[(h // merge, w // merge)] * t) for t, h, w in self._thw(kwargs, modality)]

    def layout_of_size(self, model: Any, height: int, width: int) -> Layout:
        from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

        vision = model.config.vision_config
        side = vision.patch_size * vision.spatial_merge_size
        # The processor's published limits: 4 to 16384 tokens per picture.
        height, width = smart_resize(height, width, factor=side, min_pixels=4 * side**2, max_pixels=16384 * side**2)
        return Layout(grids=[(height // side, width // side)])

    def patches_per_token(self, model: Any) -> int:
        return model.config.vision_config.spatial_merge_size**2

    def attention_layers(self, model: Any) -> list[nn.Module]:
        return [block.attn for block in model.base_model.visual.blocks]

    def object_layer(self, model: Any) -> int:
        target = 0.5 * len(self.attention_layers(model))  # 16 of 32, as in the paper
        return min(self.legal_object_layers(model), key=lambda number: (abs(number - target), number), default=0)

    def query_key(self, module: Any, hidden: Tensor, kwargs: Kwargs) -> Iterator[QueryKey]:
        """A few heads at a time: q, k and v of all heads at once are large at 16k patches."""
        # The rotation is the same function in all three.
        from transformers.models.qwen2_vl.modeling_qwen2_vl import apply_rotary_pos_emb_vision

        for q, k in _heads(module, hidden):
            q, k = apply_rotary_pos_emb_vision(q, k, *kwargs["position_embeddings"])
            yield QueryKey(q, k, module.scaling, kwargs["cu_seqlens"])

    def merged(self, model: Any, kwargs: Kwargs, modality: Modality, score: Tensor) -> Tensor:
        """[patches] -> [tokens]: a merged token's score is the mean of its patches', which stand together."""
        return score.view(-1, model.config.vision_config.spatial_merge_size**2).mean(1)

    def token_scores(self, model: Any, kwargs: Kwargs, modality: Modality, score: Tensor) -> list[list[Tensor]]:
        layouts = self.layouts(model, kwargs, modality)
        merged = self.merged(model, kwargs, modality, score)
        pictures = merged.split([layout.n_tokens for layout in layouts])
        return [list(layout.segments(picture)) for layout, picture in zip(layouts, pictures, strict=True)]

    def regrid(self, model: Any, kwargs: Kwargs, new_layouts: Mapping[Modality, list[Layout]]) -> dict[str, Any]:
        merge, out = model.config.vision_config.spatial_merge_size, {}
        for modality, layouts in new_layouts.items():
            old = kwargs[GRIDS[modality]]
            rows = [[len(new.grids), new.grids[0][0] * merge, new.grids[0][1] * merge] for new in layouts]
            out[GRIDS[modality]] = torch.tensor(rows, dtype=old.dtype, device=old.device)
        return out

    def pixels(self, model: Any, kwargs: Kwargs, modality: Modality) -> list[list[Tensor]]:
        vision = model.config.vision_config
        merge, patch, depth = vision.spatial_merge_size, vision.patch_size, vision.temporal_patch_size
        thw = self._thw(kwargs, modality)
        values = kwargs["pixel_values" if modality == "image" else "pixel_values_videos"]
        out = []
        for (t, h, w), patches in zip(thw, values.split([t * h * w for t, h, w in thw]), strict=True):
            # Patches stand merge square by merge square; each holds [channels, frames, patch, patch].
            grid = patches.view(t, h // merge, w // merge, merge, merge, -1, depth, patch, patch)[:, :, :, :, :, :, 0]
            out.append(list(grid.permute(0, 5, 1, 3, 6, 2, 4, 7).reshape(t, -1, h * patch, w * patch)))
        return out


def _heads(module: Any, hidden: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """q and k [T, heads, D] of a fused projection, ``HEADS_AT_ONCE`` heads at a time where its weights are plain."""
    qkv, heads = module.qkv, module.num_heads
    plain = type(qkv) is nn.Linear and not hasattr(qkv, "_hf_hook") and qkv.weight.device == hidden.device
    if not plain:  # quantized or offloaded: only the module knows its weights
        q, k, _ = qkv(hidden).view(len(hidden), 3, heads, -1).unbind(1)
        yield q, k
        return
    weight = qkv.weight.view(3, heads, -1, qkv.in_features)
    bias = None if qkv.bias is None else qkv.bias.view(3, heads, -1)
    for start in range(0, heads, HEADS_AT_ONCE):
        part = slice(start, start + HEADS_AT_ONCE)
        yield tuple(  # type: ignore[misc]
            F.linear(
                hidden, weight[i, part].flatten(0, 1), None if bias is None else bias[i, part].flatten()
            ).unflatten(1, (-1, weight.shape[2]))
            for i in (0, 1)
        )


class Qwen2VL(QwenVL):
    model_type = "qwen2_vl"


class Qwen2_5VL(QwenVL):
    """Most of its vision layers attend within windows and stand in window order."""

    model_type = "qwen2_5_vl"

    def legal_object_layers(self, model: Any) -> list[int]:
        return sorted(i + 1 for i in model.config.vision_config.fullatt_block_indexes)

    def merged(self, model: Any, kwargs: Kwargs, modality: Modality, score: Tensor) -> Tensor:
        from transformers.vision_utils import get_vision_window_index

        vision = model.config.vision_config
        window_index, _ = get_vision_window_index(
            kwargs[GRIDS[modality]], vision.spatial_merge_size, vision.window_size, vision.patch_size
        )
        merged = super().merged(model, kwargs, modality, score)
        return merged[torch.argsort(window_index).to(score.device)]


class Qwen3VL(QwenVL):
    """Feeds features of several vision layers to the first language layers (deepstack). The frames of a video stand
    apart, with their times between them, so its positions need no time stamps."""

    model_type = "qwen3_vl"


class Qwen3VLMoe(Qwen3VL):
    model_type = "qwen3_vl_moe"
