"""Where the tokens of a tiled picture stand: a thumbnail, then the tiles as one mosaic with a newline behind each row.

The picture was resized into the mosaic and padded; the padding is cut off again, so what remains of the mosaic is a
rectangle, and of each tile a smaller one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from tokenpruning import Layout
from tokenpruning.layout import SEPARATOR, Grid
from vlmeff.errors import UnsupportedInputError


@dataclass(frozen=True)
class Mosaic:
    """``rows`` x ``columns`` tiles of ``side`` x ``side`` tokens, of which the rectangle at ``top``, ``left`` of
    ``height`` x ``width`` tokens remains; ``scaled`` is its size after interpolation. No rows: a single tile."""

    side: int
    rows: int = 0
    columns: int = 0
    top: int = 0
    left: int = 0
    height: int = 0
    width: int = 0
    scaled: Grid | None = None

    @classmethod
    def of_picture(
        cls, size: tuple[int, int], pinpoints: list[tuple[int, int]], tile_pixels: int, side: int, most: int | None
    ) -> Mosaic:
        """The mosaic of a picture of ``size`` (height, width); above ``most`` tiles' worth of tokens it is shrunk."""
        from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape, unpad_image

        rows, columns = get_anyres_image_grid_shape(size, pinpoints, tile_pixels)
        where = torch.arange(rows * side * columns * side).view(1, rows * side, columns * side)
        rest = unpad_image(where, size)[0]
        if not rest.numel():
            raise UnsupportedInputError(
                f"a picture of {size[0]} x {size[1]} px is so narrow that nothing of its tiles is left; crop or pad it."
            )
        top, left = divmod(int(rest[0, 0]), columns * side)
        height, width = rest.shape
        scaled = None
        if most is not None and (ratio := math.sqrt(height * width / (most * side**2))) > 1.1:
            scaled = (int(height // ratio), int(width // ratio))
        return cls(side, rows, columns, top, left, height, width, scaled)

    @property
    def tiles(self) -> int:
        """Tiles of the encoder, the thumbnail included."""
        return 1 + self.rows * self.columns

    @property
    def grid(self) -> Grid:
        """Of the mosaic in the prompt."""
        return self.scaled or (self.height, self.width)

    def rectangles(self) -> list[tuple[int, int, int, int, int]]:
        """(tile, top, left, height, width) of what remains of each tile, in raster order; lost tiles are left out."""
        out = []
        for r in range(self.rows):
            for c in range(self.columns):
                y0, y1 = max(self.top, r * self.side), min(self.top + self.height, (r + 1) * self.side)
                x0, x1 = max(self.left, c * self.side), min(self.left + self.width, (c + 1) * self.side)
                if y1 > y0 and x1 > x0:
                    tile = 1 + r * self.columns + c
                    out.append((tile, y0 - r * self.side, x0 - c * self.side, y1 - y0, x1 - x0))
        return out

    def assemble(self, tiles: Tensor) -> Tensor:
        """[tiles, side, side, ...] maps of all tiles, thumbnail first -> the unscaled mosaic [height, width, ...]."""
        parts = tiles[1:].view(self.rows, self.columns, self.side, self.side, *tiles.shape[3:])
        whole = parts.transpose(1, 2).flatten(0, 1).flatten(1, 2)
        return whole[self.top : self.top + self.height, self.left : self.left + self.width]

    def layout(self, *, per_tile: bool) -> Layout:
        """``per_tile``: every tile is a segment; otherwise the mosaic is one, with the tiles' share of a budget."""
        n = self.side**2
        thumbnail = torch.arange(n)
        if not self.rows:
            slots = torch.cat([thumbnail, torch.tensor([SEPARATOR])])
            return Layout(grids=[(self.side, self.side)], slots=slots, spans=torch.tensor([[0, n]]))
        height, width = self.grid
        grids, shares = [(self.side, self.side)], None
        if per_tile:
            ids = torch.empty(self.tiles, self.side, self.side, dtype=torch.int64)
            start = n
            for tile, top, left, h, w in self.rectangles():
                ids[tile, top : top + h, left : left + w] = torch.arange(start, start + h * w).view(h, w)
                grids.append((h, w))
                start += h * w
            mosaic = self.assemble(ids)
        else:
            mosaic = torch.arange(n, n + height * width).view(height, width)
            grids.append((height, width))
            shares = [1, self.rows * self.columns]
        rows = torch.cat([mosaic, torch.full((height, 1), SEPARATOR)], 1)
        first = n + torch.arange(height) * (width + 1)
        spans = torch.stack([first, first + width], 1)
        return Layout(grids=grids, shares=shares, slots=torch.cat([thumbnail, rows.flatten()]), spans=spans)

    def segment_maps(self, tiles: Tensor, *, per_tile: bool) -> list[Tensor]:
        """[tiles, side * side] scores -> per segment [H * W]; an interpolated mosaic interpolates its scores alike."""
        maps = tiles.view(-1, self.side, self.side)
        if not self.rows:
            return [maps[0].flatten()]
        if per_tile:
            rest = [maps[t, y : y + h, x : x + w].flatten() for t, y, x, h, w in self.rectangles()]
            return [maps[0].flatten(), *rest]
        return [maps[0].flatten(), self.scale(self.assemble(maps)[..., None]).flatten()]

    def scale(self, mosaic: Tensor) -> Tensor:
        """[height, width, C] -> the mosaic's size in the prompt, as the model interpolates it."""
        if self.scaled is None:
            return mosaic
        return F.interpolate(mosaic.permute(2, 0, 1)[None], list(self.scaled), mode="bilinear")[0].permute(1, 2, 0)

    def pack(self, tiles: Tensor, newline: Tensor) -> Tensor:
        """[tiles, side * side, D] features -> [placeholders, D], as the model packs them."""
        newline = newline.to(tiles)
        if not self.rows:
            return torch.cat([tiles[0], newline[None]])
        maps = tiles.view(-1, self.side, self.side, tiles.shape[-1])
        mosaic = self.scale(self.assemble(maps))
        rows = torch.cat([mosaic, newline.expand(len(mosaic), 1, -1)], 1)
        return torch.cat([tiles[0], rows.flatten(0, 1)])
