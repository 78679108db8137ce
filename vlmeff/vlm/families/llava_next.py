"""LLaVA-NeXT and LLaVA-OneVision: a thumbnail, high-resolution tiles, newlines."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from tokenpruning import Layout, Resampler
from tokenpruning.layout import SEPARATOR
from vlmeff.errors import ConfigError, IncompatibleError, UnsupportedInputError
from vlmeff.vlm.families.base import Encoded, EncoderInputs, Kwargs, Modality
from vlmeff.vlm.families.llava import ClipTower
from vlmeff.vlm.families.tiles import Mosaic


class Tiled(ClipTower):
    """What the two share. ``per_tile``: a budget is spent tile by tile, or on the mosaic of all tiles."""

    per_tile: ClassVar[bool]

    def mosaics(self, model: Any, kwargs: Kwargs, side: int | None = None) -> list[Mosaic]:
        """Per picture where its tiles' tokens stand, for tiles of ``side`` x ``side`` tokens."""
        sizes = kwargs.get("image_sizes")
        if sizes is None:
            raise UnsupportedInputError(
                f"{self.model_type}: image_sizes is missing; pass all of the processor's outputs."
            )
        return [self.mosaic(model, kwargs, tuple(size), side) for size in torch.as_tensor(sizes).tolist()]

    def mosaic(self, model: Any, kwargs: Kwargs, size: tuple[int, int], side: int | None) -> Mosaic:
        vision = model.config.vision_config
        side = vision.image_size // vision.patch_size if side is None else side
        return Mosaic.of_picture(size, model.config.image_grid_pinpoints, vision.image_size, side, None)

    def layouts(self, model: Any, kwargs: Kwargs, modality: Modality) -> list[Layout]:
        return [mosaic.layout(per_tile=self.per_tile) for mosaic in self.mosaics(model, kwargs)]

    def layout_of_size(self, model: Any, height: int, width: int) -> Layout:
        return self.mosaic(model, {}, (height, width), None).layout(per_tile=self.per_tile)

    def token_scores(self, model: Any, kwargs: Kwargs, modality: Modality, score: Tensor) -> list[list[Tensor]]:
        mosaics = self.mosaics(model, kwargs)
        tiles = score[:, -(mosaics[0].side ** 2) :]  # without the class token
        pictures = tiles.split([mosaic.tiles for mosaic in mosaics])
        return [
            mosaic.segment_maps(part, per_tile=self.per_tile) for mosaic, part in zip(mosaics, pictures, strict=True)
        ]

    def _resampled_mosaics(self, model: Any, kwargs: Kwargs, method: Resampler) -> list[Mosaic]:
        side = self.mosaics(model, kwargs)[0].side
        small, width = method.new_grid((side, side))
        if small != width:
            raise ConfigError(f"{self.model_type}: tiles are square, so they must be resampled to a square.")
        return self.mosaics(model, kwargs, small)

    def resampled_layouts(
        self, model: Any, kwargs: Kwargs, layouts: Sequence[Layout], method: Resampler
    ) -> list[Layout]:
        return [m.layout(per_tile=self.per_tile) for m in self._resampled_mosaics(model, kwargs, method)]

    def encode_resampled(self, model: Any, kwargs: Kwargs, modality: Modality, method: Resampler) -> Encoded:
        """Tiles are resampled alike before the projector and packed as the model packs them.

        The model's own packing knows one tile size, so it runs as ever, and what its projector was given is resampled,
        projected and packed here (one more pass of the small projector).
        """
        if (kwargs.get("mm_encoder_outputs") or {}).get(modality) is not None:
            raise IncompatibleError(
                f"{self.model_type}: tokens are resampled before the projector, which mm_encoder_outputs have passed; "
                "pass the pixels instead."
            )
        side = self.mosaics(model, kwargs)[0].side
        mosaics = self._resampled_mosaics(model, kwargs, method)
        projector, seen = model.base_model.multi_modal_projector, []
        handle = projector.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        try:
            output = self.encode(model, kwargs, modality).output
        finally:
            handle.remove()
        (tiles,) = seen
        small = projector(method.resample(tiles, (side, side)))
        pictures = small.split([mosaic.tiles for mosaic in mosaics])
        newline = model.base_model.image_newline
        items = [mosaic.pack(part, newline) for mosaic, part in zip(mosaics, pictures, strict=True)]
        return Encoded(output, items, [], [mosaic.layout(per_tile=self.per_tile) for mosaic in mosaics])

    def pixels(self, model: Any, kwargs: Kwargs, modality: Modality) -> list[list[Tensor]]:
        out = []
        for mosaic, tiles in zip(self.mosaics(model, kwargs), kwargs["pixel_values"], strict=True):
            pixels = tiles[: mosaic.tiles].permute(0, 2, 3, 1)
            scale = pixels.shape[1] / mosaic.side

            def cut(picture: Tensor, y: int, x: int, h: int, w: int, scale: float = scale) -> Tensor:
                y0, y1, x0, x1 = (round(scale * edge) for edge in (y, y + h, x, x + w))
                return picture[y0:y1, x0:x1].permute(2, 0, 1)

            parts = [pixels[0].permute(2, 0, 1)]
            if self.per_tile:
                parts += [cut(pixels[tile], *rest) for tile, *rest in mosaic.rectangles()]
            elif mosaic.rows:
                grid = pixels[1:].unflatten(0, (mosaic.rows, mosaic.columns))
                whole = grid.transpose(1, 2).flatten(0, 1).flatten(1, 2)
                parts.append(cut(whole, mosaic.top, mosaic.left, mosaic.height, mosaic.width))
            out.append(parts)
        return out


class LlavaNext(Tiled):
    """Every tile is a segment, as in HiPrune; tokens of the padding have no placeholder and are never chosen."""

    model_type = "llava_next"
    per_tile = True
    encoder_inputs: ClassVar[EncoderInputs] = {
        "image": ("pixel_values", "image_sizes", "vision_feature_layer", "vision_feature_select_strategy")
    }


class LlavaOnevision(Tiled):
    """A large mosaic is interpolated, so its tokens belong to no tile: the mosaic is one segment, scored through the
    same interpolation. Pictures of a prompt with several have a single tile. A video's frames are pooled 2 x 2."""

    model_type = "llava_onevision"
    per_tile = False
    encoder_inputs: ClassVar[EncoderInputs] = {
        "image": (
            "pixel_values",
            "image_sizes",
            "vision_feature_layer",
            "vision_feature_select_strategy",
            "vision_aspect_ratio",
            "batch_num_images",
        ),
        "video": ("pixel_values_videos", "vision_feature_layer", "vision_feature_select_strategy"),
    }
    grid_inputs = ("image_sizes_videos",)

    def mosaics(self, model: Any, kwargs: Kwargs, side: int | None = None) -> list[Mosaic]:
        mosaics = super().mosaics(model, kwargs, side)
        counts = kwargs.get("batch_num_images")
        if counts is None:
            return mosaics
        alone = [n == 1 for n in torch.as_tensor(counts).tolist() for _ in range(n)]
        return [mosaic if tiled else Mosaic(mosaic.side) for mosaic, tiled in zip(mosaics, alone, strict=True)]

    def mosaic(self, model: Any, kwargs: Kwargs, size: tuple[int, int], side: int | None) -> Mosaic:
        vision = model.config.vision_config
        side = vision.image_size // vision.patch_size if side is None else side
        most = int((kwargs.get("vision_aspect_ratio") or model.config.vision_aspect_ratio).removeprefix("anyres_max_"))
        return Mosaic.of_picture(size, model.config.image_grid_pinpoints, vision.image_size, side, most)

    def _frame(self, model: Any) -> int:
        """Tokens along an edge of a pooled video frame."""
        vision = model.config.vision_config
        return math.ceil(vision.image_size // vision.patch_size / 2)

    def layouts(self, model: Any, kwargs: Kwargs, modality: Modality) -> list[Layout]:
        if modality == "image":
            return super().layouts(model, kwargs, modality)
        side = self._frame(model)
        if kwargs.get("pixel_values_videos") is None:
            features = kwargs["mm_encoder_outputs"]["video"].pooler_output
            return [_frames((len(video) - 1) // side**2, side) for video in features]
        return [_frames(len(video), side) for video in kwargs["pixel_values_videos"]]

    def token_scores(self, model: Any, kwargs: Kwargs, modality: Modality, score: Tensor) -> list[list[Tensor]]:
        if modality == "image":
            return super().token_scores(model, kwargs, modality, score)
        vision = model.config.vision_config
        side = vision.image_size // vision.patch_size
        maps = score[:, -(side**2) :].view(-1, 1, side, side)
        pooled = F.interpolate(maps, size=[self._frame(model)] * 2, mode="bilinear").flatten(1)
        videos = pooled.split([len(layout.grids) for layout in self.layouts(model, kwargs, "video")])
        return [list(frames) for frames in videos]

    def resampled_layouts(
        self, model: Any, kwargs: Kwargs, layouts: Sequence[Layout], method: Resampler
    ) -> list[Layout]:
        if layouts and layouts[0].spans is not None and bool((layouts[0].spans[:, 0] == layouts[0].spans[:, 1]).all()):
            return [_frames(len(layout.grids), *method.new_grid(layout.grids[0])) for layout in layouts]  # videos
        return super().resampled_layouts(model, kwargs, layouts, method)

    def encode_resampled(self, model: Any, kwargs: Kwargs, modality: Modality, method: Resampler) -> Encoded:
        if modality == "image":
            return super().encode_resampled(model, kwargs, modality, method)
        full = self.encode(model, kwargs, "video")
        items = []
        for item, layout in zip(full.items, full.layouts, strict=True):
            frames = item[:-1].view(len(layout.grids), -1, item.shape[-1])
            small = method.resample(frames, layout.grids[0])
            items.append(torch.cat([small.flatten(0, 1), item[-1:]]))
        return Encoded(full.output, items, [], self.resampled_layouts(model, kwargs, full.layouts, method))

    def pixels(self, model: Any, kwargs: Kwargs, modality: Modality) -> list[list[Tensor]]:
        if modality == "image":
            return super().pixels(model, kwargs, modality)
        return [list(video) for video in kwargs["pixel_values_videos"]]


def _frames(count: int, height: int, width: int | None = None) -> Layout:
    """The layout of a video: its frames, then one newline that always stays."""
    width = height if width is None else width
    slots = torch.cat([torch.arange(count * height * width), torch.tensor([SEPARATOR])])
    return Layout(grids=[(height, width)] * count, slots=slots, spans=torch.tensor([[0, 0]]))
