"""How much each visual token has to do with the question: the text sources behind the score "text".

A text source gets the question and the tokens of one picture and answers one number per token. Three sources:
``EmbeddingText`` needs nothing but the model itself, ``TowerText`` the text half of the CLIP whose vision half is the
model's tower, ``OpenClipText`` any CLIP of open_clip, which looks at the pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmeff.errors import ConfigError, IncompatibleError, UnsupportedInputError, UnsupportedModelError

Grid = tuple[int, int]
BATCH = 16  # pictures that a CLIP sees at once


@dataclass(frozen=True, eq=False, kw_only=True)
class Question:
    """What a text source gets for one picture.

    ``text_ids`` [T] int64: ids of the text after the picture, without placeholders and padding. ``features`` [N, D]:
    the tokens of the picture's segments, one after another, as the language model receives them. ``grids``: (H, W) of
    each segment, N in sum. ``embed``: the language model's input embedding. ``tower_features`` () -> [N, C]: output of
    the vision tower before the projector, without class tokens. ``pixels`` () -> per segment [3, h, w]: normalised
    pixels as the tower saw them. The last two raise ``UnsupportedModelError`` where the family has no such thing.
    """

    text_ids: Tensor
    features: Tensor
    grids: list[Grid]
    embed: Callable[[Tensor], Tensor]
    tower_features: Callable[[], Tensor]
    pixels: Callable[[], list[Tensor]]


@runtime_checkable
class TextSource(Protocol):
    """Scores visual tokens against the question. One that calls ``tower_features`` says so: ``uses_tower = True``."""

    def relevance(self, question: Question) -> list[Tensor]:
        """Per segment [H * W] float32 in raster order, on the device of ``question.features``; higher is nearer."""
        ...


@dataclass(frozen=True, kw_only=True)
class EmbeddingText:
    """Cosine between each token and the mean input embedding of the question's ids.

    score_j = cos(f_j, mean_t E[id_t]), in float32. It costs one embedding lookup and no further model. This is what
    HiPrune++ does on Qwen-VL, where it brings nothing (arXiv 2508.00553, table 4): projected tokens and word embeddings
    share a space without having been trained to be near each other. Prefer a CLIP where one is at hand.
    """

    @torch.no_grad()
    def relevance(self, question: Question) -> list[Tensor]:
        _check_text(question.text_ids)
        text = question.embed(question.text_ids).float().mean(0)
        return _per_segment(_cosine(question.features, text), question, "features")


@dataclass(frozen=True, eq=False)
class TowerText:
    """Cosine in the joint space of the CLIP whose vision half is the model's own tower (LLaVA: CLIP-L/14-336).

    score_j = cos(W_v LN_post(h_j), t): ``h_j`` is the tower's output for the patch, ``LN_post`` and ``W_v`` are
    ``vision_model.post_layernorm`` and ``visual_projection``, ``t`` is ``get_text_features``. CLIP trains only its
    class token that way, so patches of the original CLIPs follow the text loosely. Source: HiPrune++, arXiv 2508.00553.

    Args:
        clip_model: transformers ``CLIPModel``; its vision half may be dropped after ``post_layernorm``.
        tokenizer: the CLIP's tokenizer (transformers).  decode: turns ids of the language model into the question.
    """

    clip_model: Any
    tokenizer: Any
    decode: Callable[[Tensor], str]

    uses_tower: ClassVar[bool] = True

    @torch.no_grad()
    def relevance(self, question: Question) -> list[Tensor]:
        text = _question_text(question, self.decode)
        tower = question.tower_features()
        norm, projection = self.clip_model.vision_model.post_layernorm, self.clip_model.visual_projection
        if tower.shape[-1] != projection.in_features:
            raise IncompatibleError(
                f"TowerText: the tower gives {tower.shape[-1]} channels and clip_model's visual_projection takes "
                f"{projection.in_features}. Pass the CLIPModel that the vision tower was taken from."
            )
        weight = projection.weight
        patches = projection(norm(tower.to(weight.device, weight.dtype)))
        ids = self.tokenizer([text], truncation=True, return_tensors="pt").to(weight.device)
        features = self.clip_model.get_text_features(
            input_ids=ids["input_ids"], attention_mask=ids.get("attention_mask")
        )
        # transformers 5 returns the text model's output, transformers 4 the tensor itself
        embedding = features if isinstance(features, Tensor) else features.pooler_output
        return _per_segment(_cosine(patches, embedding[0]), question, "tower_features")


@dataclass(frozen=True, eq=False)
class OpenClipText:
    """Cosine between the patches and the question in any CLIP of open_clip, which sees the picture a second time.

    Each segment's pixels are taken back to [0, 1], resized to the CLIP's size without regard to the aspect ratio and
    normalised its way. The map of relevance on the CLIP's grid is resized bilinearly to the segment's grid. CLIPs that
    average their patches, or pool them with attention (SigLIP), place patches well; in those with a class token only
    that token was trained to match texts.

    Args:
        clip: open_clip model (``CLIP`` or ``CustomTextCLIP``) in evaluation mode.  tokenizer: open_clip tokenizer.
        decode: turns ids of the language model into the question.
        image_mean, image_std: of the language model's image processor, which normalised the pixels; three numbers each.
    Raises:
        UnsupportedModelError: the image tower has no patch tokens in the joint space (ResNet, CoCa).
    """

    clip: Any
    tokenizer: Any
    decode: Callable[[Tensor], str]
    image_mean: Sequence[float]
    image_std: Sequence[float]

    def __post_init__(self) -> None:
        if len(self.image_mean) != 3 or len(self.image_std) != 3:
            raise ConfigError(
                "OpenClipText: image_mean and image_std must have three numbers each, as in the processor."
            )

    @torch.no_grad()
    def relevance(self, question: Question) -> list[Tensor]:
        text = _question_text(question, self.decode)
        parameter = next(self.clip.parameters())
        embedding = self.clip.encode_text(self.tokenizer([text]).to(parameter.device))[0]
        pixels = torch.stack([self._clip_pixels(x.to(parameter.device)) for x in question.pixels()])
        maps = [
            _cosine(dense_tokens(self.clip.visual, part.to(parameter.dtype)), embedding) for part in pixels.split(BATCH)
        ]
        device = question.features.device
        return [
            resize_map(one, grid).flatten().to(device)
            for one, grid in zip(torch.cat(maps), question.grids, strict=True)
        ]

    def _clip_pixels(self, pixels: Tensor) -> Tensor:
        """[3, h, w] in the model's normalisation -> [3, S, S] in the CLIP's."""
        from open_clip import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD

        visual = self.clip.visual
        x = pixels.float() * _channels(self.image_std, pixels) + _channels(self.image_mean, pixels)
        size = (visual.image_size,) * 2 if isinstance(visual.image_size, int) else tuple(visual.image_size)
        if tuple(x.shape[1:]) != size:
            x = F.interpolate(x[None], size=size, mode="bicubic", antialias=True, align_corners=False)[0]
        mean = getattr(visual, "image_mean", None) or OPENAI_DATASET_MEAN
        std = getattr(visual, "image_std", None) or OPENAI_DATASET_STD
        return (x.clamp(0, 1) - _channels(mean, x)) / _channels(std, x)


def dense_tokens(visual: Any, pixel_values: Tensor) -> Tensor:
    """Patch tokens of an open_clip image tower in the joint space of pictures and texts.

    open_clip's ``VisionTransformer``: y_j = LN_post(x_j) proj, from ``forward_intermediates``. A timm tower
    (``TimmModel``): each token of ``trunk.forward_features`` goes alone through ``trunk.forward_head`` and the head of
    the adapter, as if the picture had this one token; for average pooling that is the norm and the projection, for
    attention pooling (SigLIP) the path of the values. (``TimmModel.forward_intermediates`` stops before what some
    trunks do between their last block and their head.)

    Args:
        visual: ``clip.visual``.  pixel_values: [B, 3, S, S] in the tower's normalisation.
    Returns:
        [B, h, w, E] in the tower's dtype.
    Raises:
        UnsupportedModelError: any other tower, or one that mixes all tokens when it pools.
    """
    from open_clip.timm_model import TimmModel
    from open_clip.transformer import VisionTransformer

    if isinstance(visual, VisionTransformer) and visual.attn_pool is None:
        out = visual.forward_intermediates(
            pixel_values, indices=1, normalize_intermediates=True, intermediates_only=True, output_fmt="NLC"
        )
        tokens = out["image_intermediates"][-1].unflatten(1, visual.grid_size)
        return tokens if visual.proj is None else tokens @ visual.proj
    if isinstance(visual, TimmModel) and "pool" not in dict(visual.head.named_children()):
        return _timm_tokens(visual, pixel_values)
    raise UnsupportedModelError(
        f"{type(visual).__name__}: no patch tokens in the joint space can be had from this image tower. Use a CLIP "
        "with open_clip's VisionTransformer without attentional pooling (ViT-*), or a timm tower without an attention "
        "head of open_clip's own (SigLIP, ConvNeXt, EVA-02)."
    )


def _timm_tokens(visual: Any, pixel_values: Tensor) -> Tensor:
    trunk = visual.trunk
    x = trunk.forward_features(pixel_values)
    batch = len(x)
    if x.ndim == 3:  # [B, prefix + N, C]
        prefix = getattr(trunk, "num_prefix_tokens", 0)
        tokens = x[:, prefix:]
        grid = getattr(trunk.patch_embed, "grid_size", None)
        if grid is None or math.prod(grid) != tokens.shape[1]:
            grid = (math.isqrt(tokens.shape[1]),) * 2
        alone = tokens.flatten(0, 1)[:, None]
        # Where pooling cuts the prefix off there has to be one; a class token is read at place 0 and needs none.
        if prefix and trunk.global_pool != "token" and not getattr(trunk, "pool_include_prefix", False):
            alone = torch.cat([alone.new_zeros(len(alone), prefix, alone.shape[-1]), alone], 1)
    elif getattr(trunk, "output_fmt", "NCHW") == "NHWC":
        grid = tuple(x.shape[1:3])
        alone = x.flatten(0, 2)[:, None, None]
    else:  # [B, C, h, w]
        grid = tuple(x.shape[2:])
        alone = x.permute(0, 2, 3, 1).flatten(0, 2)[..., None, None]
    out = visual.head(trunk.forward_head(alone))
    return out.reshape(batch, *grid, -1)


def resize_map(values: Tensor, grid: Grid) -> Tensor:
    """[h, w] -> [H, W] = ``grid``, bilinear with pixel centres aligned, averaging where it shrinks; float32."""
    if values.shape == grid:
        return values.float()
    x = values.float()[None, None]
    return F.interpolate(x, size=grid, mode="bilinear", antialias=True, align_corners=False)[0, 0]


def _cosine(tokens: Tensor, text: Tensor) -> Tensor:
    """[..., D] and [D] -> [...], computed in float32."""
    return F.normalize(tokens.float(), dim=-1) @ F.normalize(text.float().to(tokens.device), dim=-1)


def _channels(values: Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor(tuple(values), dtype=torch.float32, device=like.device).view(3, 1, 1)


def _per_segment(scores: Tensor, question: Question, what: str) -> list[Tensor]:
    sizes = [h * w for h, w in question.grids]
    if scores.shape != (sum(sizes),):
        raise UnsupportedModelError(
            f"{what} has {len(scores)} tokens and the grids of the picture have {sum(sizes)}: this model's projector "
            "merges tokens, so the tower's cannot be scored one by one. Use OpenClipText or EmbeddingText."
        )
    return list(scores.to(question.features.device).split(sizes))


def _check_text(text_ids: Tensor) -> None:
    if text_ids.numel() == 0:
        raise UnsupportedInputError(
            "there is no text after the picture to score its tokens against: put the question behind the picture, or "
            "use a method that does not look at the text."
        )


def _question_text(question: Question, decode: Callable[[Tensor], str]) -> str:
    _check_text(question.text_ids)
    text = decode(question.text_ids).strip()
    if not text:
        raise UnsupportedInputError(
            "the text after the picture decodes to nothing: ask a question behind the picture, or pass a decode= that "
            "keeps its words."
        )
    return text
