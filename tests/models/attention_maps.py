"""The scores that reach a method, and what they should be: computed from the maps of the tower's own eager attention
and from what the model's own connector makes of single tower tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, ClassVar

import torch
from tiny_models import tiny

import vlmeff
from tokenpruning.plan import all_of

# Means of float32 probabilities, summed in another order.
SCORE_TOLERANCE = {"atol": 1e-6, "rtol": 0.0}
OBJECT, DEEP = 1, 3  # indices of the layers: the second of four; the last, but where CLIP's layer -2 is read


@dataclass(frozen=True)
class Spy:
    """Notes the segments that it is asked about."""

    keep: float = 0.5
    needs: ClassVar[tuple[str, ...]] = ("object", "deep")
    seen: list[Any] = field(default_factory=list)

    def select(self, segment, k):
        self.seen.append(segment)
        return all_of(segment)


def spied(model, inputs):
    """The segments of a forward pass, in order."""
    spy = Spy()
    vlmeff.wrap(model, None, tokens=spy)
    model(**inputs)
    vlmeff.unwrap(model)
    return spy.seen


def same_scores(segments, expected):
    """``expected``: per segment (grid, object scores, deep scores)."""
    assert [segment.grid for segment in segments] == [grid for grid, *_ in expected]
    for segment, (_, *scores) in zip(segments, expected, strict=True):
        for name, score in zip(("object", "deep"), scores, strict=True):
            assert segment.scores[name].dtype == torch.float32
            torch.testing.assert_close(segment.scores[name], score.flatten(), **SCORE_TOLERANCE)


def real_tiles(model, inputs):
    """[tiles, 3, h, w]: what the tower sees, without what only fills up a batch."""
    pixels = inputs["pixel_values"]
    if pixels.ndim == 4:
        return pixels
    return pixels[(pixels != 0).flatten(2).any(2)]


def tower_maps(model, pixels, mask=None):
    """[layers, tiles, H, M, M] attention of an eager tower."""
    base, arguments = model.model, {}
    if model.config.model_type == "perception_lm":
        return timm_maps(base.vision_tower, pixels)
    tower = base.vision_model if model.config.model_type in ("idefics3", "smolvlm") else base.vision_tower
    if mask is not None:
        arguments["patch_attention_mask"] = mask
    return torch.stack(tower(pixels, output_attentions=True, **arguments).attentions)


def timm_maps(tower, pixels):
    """As ``tower_maps``: what goes through the dropout of timm's attention when it is not fused."""
    seen, handles = [], []
    for block in tower.timm_model.blocks:
        block.attn.fused_attn = False
        handles.append(block.attn.attn_drop.register_forward_hook(lambda module, args, output: seen.append(output)))
    tower(pixels)
    for handle in handles:
        handle.remove()
    return torch.stack(seen)


def layers_of(model):
    return (OBJECT, DEEP - 1) if model.config.model_type in ("llava", "llava_next") else (OBJECT, DEEP)


def connect(model, hidden):
    """[n, M, C] output of the tower without class token -> [n, tokens, D]: the model's own connector."""
    base, kind = model.model, model.config.model_type
    if kind in ("idefics3", "smolvlm"):
        return base.connector(hidden)
    if kind == "internvl":
        side = math.isqrt(hidden.shape[1])
        shuffled = base.pixel_shuffle(hidden.view(len(hidden), side, side, -1), model.config.downsample_ratio)
        hidden = shuffled.flatten(1, 2)
    return base.multi_modal_projector(hidden)


@lru_cache
def members(name):
    """[tokens, M] 0 or 1: the tower tokens that a visual token is made of, found by disturbing each."""
    model = tiny(name)
    count = 25 if name == "llava_onevision" else 36
    base = torch.randn(count, 32, generator=torch.Generator().manual_seed(4))
    out = connect(model, base + torch.cat([torch.zeros(1, count), torch.eye(count)])[:, :, None] * base.flip(0))
    moved = (out[1:] - out[0]).abs().amax(-1) > 1e-4
    assert bool(moved.any(1).all())
    assert len(set(moved.sum(0).tolist())) == 1
    return moved.T.float()


def token_scores(name, model, pixels, mask=None):
    """(object, deep) [tiles, tokens]: mean over heads and queries, then over the tower tokens behind a token."""
    maps = tower_maps(model, pixels, mask)
    merge = members(name)
    out = []
    for layer in layers_of(model):
        # Only real patches vote.
        votes = torch.ones(maps.shape[1], maps.shape[-1]) if mask is None else mask.flatten(1).float()
        mean = (maps[layer].mean(1) * votes[:, :, None]).sum(1) / votes.sum(1, keepdim=True)
        out.append(mean[:, -merge.shape[1] :] @ merge.T / merge.sum(1))
    return out
