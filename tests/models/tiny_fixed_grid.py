"""Tiny models whose tiles all give the same number of tokens: InternVL, Idefics3, SmolVLM, Gemma 3, PaliGemma and
PerceptionLM, and prompts as their processors deliver them."""

from __future__ import annotations

from typing import Any

import torch
from tiny_common import (
    BOS,
    IMAGE,
    NEWLINE,
    PATCH,
    SIDE,
    TAG,
    VIDEO,
    VISION_END,
    VISION_START,
    dealt,
    decoder,
    interleaved,
    left_padded,
    ready,
    sharpen,
    text,
    vit,
)
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    InternVLConfig,
    InternVLForConditionalGeneration,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PerceptionLMConfig,
    PerceptionLMForConditionalGeneration,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)
from transformers.models.timm_wrapper.configuration_timm_wrapper import TimmWrapperConfig

PATCHES = (SIDE // PATCH) ** 2
SPLITS = [(1, 2), (0, 0), (2, 2)]  # (rows, columns) of crops of a picture; (0, 0): the picture is not split


def tiny_internvl(*, dtype: torch.dtype = torch.float32, attention: str = "sdpa", seed: int = 0, **vision: Any):
    """Tiles of 6 x 6 patches and a CLS token; 2 x 2 patches are shuffled into one of 3 x 3 tokens."""
    torch.manual_seed(seed)
    tower = vit(initializer_range=0.3, layer_scale_init_value=0.5, **vision)
    config = InternVLConfig(
        vision_config={"model_type": "internvl_vision", **tower},
        text_config={"model_type": "qwen2", **decoder()},
        image_token_id=IMAGE,
        image_seq_length=9,
        tie_word_embeddings=False,
    )
    model = InternVLForConditionalGeneration(config)
    embeddings = model.model.vision_tower.embeddings
    with torch.no_grad():  # both are zero at first
        embeddings.cls_token.normal_()
        embeddings.position_embeddings.normal_()
    return ready(model, dtype, attention)


def tiny_idefics3(*, dtype: torch.dtype = torch.float32, attention: str = "sdpa", seed: int = 0, **vision: Any):
    """Tiles of 6 x 6 patches without CLS; 2 x 2 patches are shuffled into one of 3 x 3 tokens."""
    torch.manual_seed(seed)
    config = Idefics3Config(
        vision_config=vit(initializer_range=0.3, **vision),
        text_config={"model_type": "llama", **decoder()},
        image_token_id=IMAGE,
        scale_factor=2,
        tie_word_embeddings=False,
    )
    return ready(Idefics3ForConditionalGeneration(config), dtype, attention)


def tiny_smolvlm(*, dtype: torch.dtype = torch.float32, attention: str = "sdpa", seed: int = 0, **vision: Any):
    """As Idefics3, but 3 x 3 patches are shuffled into one of 2 x 2 tokens."""
    torch.manual_seed(seed)
    config = SmolVLMConfig(
        vision_config=vit(initializer_range=0.3, **vision),
        text_config={"model_type": "llama", **decoder()},
        image_token_id=IMAGE,
        scale_factor=3,
        tie_word_embeddings=False,
    )
    return ready(SmolVLMForConditionalGeneration(config), dtype, attention)


def tiny_gemma3(
    *, dtype: torch.dtype = torch.float32, attention: str = "sdpa", seed: int = 0, window: int = 256, **vision: Any
):
    """6 x 6 patches averaged to 3 x 3 tokens that see each other; layers 0 and 1 of the decoder slide over ``window``
    tokens, more than a prompt has unless a test asks for less."""
    torch.manual_seed(seed)
    layer_types = ["sliding_attention", "sliding_attention", "full_attention"]
    config = Gemma3Config(
        vision_config={"model_type": "siglip_vision_model", **vit(vision_use_head=False, **vision)},
        text_config=decoder(head_dim=8, query_pre_attn_scalar=8, sliding_window=window, layer_types=layer_types),
        mm_tokens_per_image=9,
        boi_token_index=VISION_START,
        eoi_token_index=VISION_END,
        image_token_index=IMAGE,
        initializer_range=0.3,
        tie_word_embeddings=False,
    )
    model = Gemma3ForConditionalGeneration(config)
    sharpen(model.model.vision_tower)
    with torch.no_grad():  # zero at first: every picture would look the same
        model.model.multi_modal_projector.mm_input_projection_weight.normal_(0, 0.3)
    return ready(model, dtype, attention)


def tiny_paligemma(*, dtype: torch.dtype = torch.float32, attention: str = "sdpa", seed: int = 0, **vision: Any):
    """6 x 6 = 36 tokens a picture at the head of the prompt, which attends to itself in both directions."""
    torch.manual_seed(seed)
    config = PaliGemmaConfig(
        vision_config={"model_type": "siglip_vision_model", **vit(vision_use_head=False, **vision)},
        text_config={"model_type": "gemma", **decoder(head_dim=8)},
        image_token_index=IMAGE,
        projection_dim=32,
        hidden_size=32,
        vocab_size=decoder()["vocab_size"],
        tie_word_embeddings=False,
    )
    model = PaliGemmaForConditionalGeneration(config)
    sharpen(model.model.vision_tower)
    return ready(model, dtype, attention)


def tiny_perception_lm(
    *,
    dtype: torch.dtype = torch.float32,
    attention: str = "sdpa",
    seed: int = 0,
    class_token: bool = True,
    pooling: int = 2,
    **vision: Any,
):
    """A timm Perception Encoder with 2-D rotary positions on tiles of 6 x 6 patches, pooled to 3 x 3 tokens."""
    torch.manual_seed(seed)
    encoder = {
        "embed_dim": 32,
        "depth": 4,
        "num_heads": 4,
        "img_size": (SIDE, SIDE),
        "patch_size": PATCH,
        "ref_feat_shape": (SIDE // PATCH, SIDE // PATCH),
        "init_values": 0.5,
        "global_pool": "",
        "class_token": class_token,
        **vision,
    }
    config = PerceptionLMConfig(
        vision_config=TimmWrapperConfig(
            architecture="vit_pe_lang_large_patch14_448", do_pooling=False, model_args=encoder
        ),
        text_config={"model_type": "llama", **decoder()},
        vision_use_cls_token=class_token,
        projector_pooling_ratio=pooling,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        tie_word_embeddings=False,
    )
    model = PerceptionLMForConditionalGeneration(config)
    sharpen(model.model.vision_tower)
    return ready(model, dtype, attention)


def internvl_inputs(model: Any, pictures: list[int], *, seed: int = 1) -> dict[str, torch.Tensor]:
    """pixel_values [all tiles, 3, 24, 24]: the crops of each picture, then its thumbnail if there are several."""
    g = torch.Generator().manual_seed(seed)
    tiles = [[rows * columns + 1 for rows, columns in row] for row in dealt(pictures, SPLITS)]
    inputs = interleaved([[[VISION_START, *[IMAGE] * (9 * n), VISION_END] for n in row] for row in tiles], g)
    if sum(pictures):
        inputs["pixel_values"] = _pixels(model, g, sum(map(sum, tiles)))
    return inputs


def idefics_inputs(model: Any, pictures: list[int], *, seed: int = 1) -> dict[str, torch.Tensor]:
    """pixel_values [rows, most tiles of a row, 3, 24, 24], zero where a row has fewer, with pixel_attention_mask."""
    g = torch.Generator().manual_seed(seed)
    n = PATCHES // model.config.scale_factor**2
    splits = dealt(pictures, SPLITS)
    inputs = interleaved([[_crops(rows, columns, n) for rows, columns in row] for row in splits], g)
    counts = [sum(rows * columns + 1 for rows, columns in row) for row in splits]
    if sum(pictures):
        pixels = torch.zeros(len(pictures), max(counts), 3, SIDE, SIDE, dtype=model.dtype)
        for row, count in zip(pixels, counts, strict=True):
            row[:count] = _pixels(model, g, count)
        inputs["pixel_values"] = pixels
        real = torch.arange(max(counts)) < torch.tensor(counts)[:, None]
        inputs["pixel_attention_mask"] = real.long()[:, :, None, None].repeat(1, 1, SIDE, SIDE)
    return inputs


def _crops(rows: int, columns: int, n: int) -> list[int]:
    """The crops of a picture row by row, each after a mark and its place, then the whole picture."""
    tokens = []
    for _ in range(rows):
        tokens += [VISION_START, TAG, *[IMAGE] * n] * columns + [NEWLINE]
    return [*tokens, VISION_START, TAG, *[IMAGE] * n, VISION_START]


def gemma3_inputs(model: Any, pictures: list[int], *, seed: int = 1) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    n = model.config.mm_tokens_per_image
    block = [NEWLINE, VISION_START, *[IMAGE] * n, VISION_END, NEWLINE]
    inputs = interleaved([[block] * count for count in pictures], g)
    inputs["token_type_ids"] = (inputs["input_ids"] == IMAGE).long()
    if sum(pictures):
        inputs["pixel_values"] = _pixels(model, g, sum(pictures))
    return inputs


def paligemma_inputs(
    model: Any, pictures: list[int], *, seed: int = 1, labels: bool = False
) -> dict[str, torch.Tensor]:
    """All pictures first, then BOS, text and a newline; token_type_ids are 0 for the prompt and its padding.

    The real processor always adds labels, all -100 without a suffix; here only on request, so that a test can pass its
    own. It puts BOS amid the text of a row without pictures; here it stands in front.
    """
    g = torch.Generator().manual_seed(seed)
    rows = [[IMAGE] * (PATCHES * n) + [BOS, *text(g, 4 + i), NEWLINE] for i, n in enumerate(pictures)]
    inputs = left_padded(rows)
    inputs["token_type_ids"] = torch.zeros_like(inputs["input_ids"])
    if labels:
        inputs["labels"] = torch.full_like(inputs["input_ids"], -100)
    if sum(pictures):
        inputs["pixel_values"] = _pixels(model, g, sum(pictures))
    return inputs


def perception_inputs(model: Any, pictures: list[int], *, seed: int = 1, tiles: int = 3) -> dict[str, torch.Tensor]:
    """pixel_values [pictures, tiles, 3, 24, 24]: the pictures of one call have equally many tiles, thumbnail first."""
    return _perception(model, [[tiles] * count for count in pictures], IMAGE, "pixel_values", seed)


def perception_videos(model: Any, frames: list[int], *, seed: int = 1) -> dict[str, torch.Tensor]:
    """``frames[i]`` frames in the video of row i; videos of one call share their length."""
    blocks = [[count] if count else [] for count in frames]
    return _perception(model, blocks, VIDEO, "pixel_values_videos", seed)


def _perception(model: Any, tiles: list[list[int]], token: int, name: str, seed: int) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    n = PATCHES // model.config.projector_pooling_ratio**2
    inputs = interleaved([[[token] * (count * n) for count in row] for row in tiles], g)
    flat = [count for row in tiles for count in row]
    if flat:
        inputs[name] = _pixels(model, g, len(flat), flat[0])
    return inputs


def _pixels(model: Any, g: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, 3, SIDE, SIDE, generator=g).to(model.dtype)
