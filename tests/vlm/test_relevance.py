"""Text sources against slow formulations, the outputs of transformers and open_clip themselves, and drawn truth."""

from __future__ import annotations

import math
import random
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from open_clip.timm_model import TimmModel
from transformers import CLIPConfig, CLIPModel

from vlmeff.errors import ConfigError, IncompatibleError, UnsupportedInputError, UnsupportedModelError
from vlmeff.models import tiny_clip
from vlmeff.models.tiny_clip.captions import named_pair
from vlmeff.vlm.relevance import (
    EmbeddingText,
    OpenClipText,
    Question,
    TextSource,
    TowerText,
    dense_tokens,
    resize_map,
)

ABOVE_OTHER = 0.95  # measured: 1.0 of 1000 on tiny-clip's own grid
MEAN, STD = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)  # some language model's normalisation


def unavailable() -> Any:
    raise UnsupportedModelError("not here")


def question(**given_: Any) -> Question:
    base = {
        "text_ids": torch.tensor([3, 1, 4]),
        "features": torch.zeros(4, 8),
        "grids": [(2, 2)],
        "embed": torch.nn.Embedding(10, 8),
        "tower_features": unavailable,
        "pixels": unavailable,
    }
    return Question(**{**base, **given_})


def cosine(a: list[float], b: list[float]) -> float:
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    return dot / math.sqrt(sum(x * x for x in a)) / math.sqrt(sum(x * x for x in b))


@settings(max_examples=25, deadline=None)
@given(
    grids=st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)), min_size=1, max_size=3),
    n_text=st.integers(1, 5),
    seed=st.integers(0, 1000),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_embedding_text_equals_a_plain_loop(grids, n_text, seed, dtype):
    generator = torch.Generator().manual_seed(seed)
    table = torch.randn(10, 6, generator=generator).to(dtype)
    n = sum(h * w for h, w in grids)
    features = torch.randn(n, 6, generator=generator).to(dtype)
    ids = torch.randint(0, 10, (n_text,), generator=generator)
    found = EmbeddingText().relevance(question(text_ids=ids, features=features, grids=grids, embed=lambda i: table[i]))
    mean = [sum(float(table[i, d]) for i in ids) / n_text for d in range(6)]
    expected = [cosine([float(v) for v in row], mean) for row in features]
    assert [len(s) for s in found] == [h * w for h, w in grids]
    assert all(s.dtype == torch.float32 for s in found)
    assert torch.cat(found).tolist() == pytest.approx(expected, abs=1e-5)


@pytest.fixture(scope="module")
def hf_clip() -> CLIPModel:
    torch.manual_seed(0)
    text = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "eos_token_id": 49}
    vision = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "image_size": 16, "patch_size": 4}
    heads = {"num_attention_heads": 2}
    config = CLIPConfig(text_config={**text, **heads}, vision_config={**vision, **heads}, projection_dim=12)
    return CLIPModel(config).eval()


class Encoding(dict):
    def to(self, device: Any) -> Encoding:
        return self


def fake_tokenizer(texts: list[str], *, truncation: bool, return_tensors: str) -> Encoding:
    ids = torch.tensor([[min(48, len(word)) for word in text.split()] + [49] for text in texts])
    return Encoding(input_ids=ids, attention_mask=torch.ones_like(ids))


def decode(ids: torch.Tensor) -> str:
    return " ".join("x" * int(i) for i in ids)


@torch.no_grad()
def test_tower_text_equals_clips_own_projections(hf_clip):
    pixels = torch.randn(1, 3, 16, 16)
    out = hf_clip(input_ids=torch.tensor([[3, 1, 4, 49]]), pixel_values=pixels)
    hidden = hf_clip.vision_model(pixels).last_hidden_state[0]
    source = TowerText(hf_clip, fake_tokenizer, decode)
    # Fed with the class token in the place of a patch, the source must give CLIP's own similarity of picture and text.
    (scores,) = source.relevance(question(tower_features=lambda: hidden[:1], grids=[(1, 1)]))
    assert scores.item() == pytest.approx(float(out.text_embeds[0] @ out.image_embeds[0]), abs=1e-5)

    text = out.text_embeds[0].tolist()
    first, second = source.relevance(question(tower_features=lambda: hidden[1:], grids=[(2, 4), (2, 4)]))
    for j, score in enumerate([*first.tolist(), *second.tolist()]):
        patch = hf_clip.visual_projection(hf_clip.vision_model.post_layernorm(hidden[1 + j]))
        assert score == pytest.approx(cosine(patch.tolist(), text), abs=1e-5)


def test_tower_text_refuses_a_tower_that_is_not_the_clips(hf_clip):
    source = TowerText(hf_clip, fake_tokenizer, decode)
    with pytest.raises(IncompatibleError, match="visual_projection takes 24"):
        source.relevance(question(tower_features=lambda: torch.zeros(4, 8)))
    with pytest.raises(UnsupportedModelError, match="merges tokens"):
        source.relevance(question(tower_features=lambda: torch.zeros(16, 24)))


def test_every_source_follows_the_protocol_and_refuses_an_empty_text(hf_clip):
    model, _, tokenizer = tiny_clip.load()
    empty = question(text_ids=torch.zeros(0, dtype=torch.long))
    blank = OpenClipText(model, tokenizer, lambda ids: "  ", MEAN, STD)
    for source in (EmbeddingText(), TowerText(hf_clip, fake_tokenizer, decode), blank):
        assert isinstance(source, TextSource)
        with pytest.raises(UnsupportedInputError, match="after the picture"):
            source.relevance(empty)
    with pytest.raises(UnsupportedInputError, match="decodes to nothing"):
        blank.relevance(question())
    with pytest.raises(ConfigError, match="three numbers"):
        OpenClipText(model, tokenizer, decode, (0.5,), STD)


# ---- dense tokens -------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize(("pool", "size"), [("avg", 32), ("avg", 8), ("tok", 8)])
def test_dense_tokens_of_open_clips_tower(pool, size):
    torch.manual_seed(1)
    vision = {"image_size": size, "patch_size": 8, "layers": 2, "width": 32, "head_width": 16, "pool_type": pool}
    text = {"context_length": 8, "vocab_size": 20, "width": 16, "heads": 2, "layers": 1}
    visual = open_clip.CLIP(12, vision, text).eval().visual
    x = torch.randn(2, 3, size, size)
    found = dense_tokens(visual, x)
    assert found.shape == (2, size // 8, size // 8, 12)
    visual.output_tokens = True  # open_clip's other way to the normalised tokens
    pooled, tokens = visual(x)
    assert torch.allclose(found.flatten(1, 2), tokens @ visual.proj, atol=1e-5)
    if pool == "avg":
        assert torch.allclose(found.mean((1, 2)), pooled, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "pool", "side"),
    [("test_vit", "avg", 10), ("test_efficientnet", "", 5), ("test_maxvit", "", 5)],
)
def test_dense_tokens_of_a_timm_tower_that_averages_average_to_its_embedding(name, pool, side):
    torch.manual_seed(2)
    visual = TimmModel(name, embed_dim=12, pool=pool, proj="linear", image_size=160).eval()
    x = torch.randn(2, 3, 160, 160)
    found = dense_tokens(visual, x)
    assert found.shape == (2, side, side, 12)
    assert torch.allclose(found.mean((1, 2)), visual(x), atol=1e-5)


@torch.no_grad()
def test_dense_tokens_of_an_attention_pool_are_the_path_of_its_values():
    torch.manual_seed(3)
    visual = TimmModel("test_vit3", embed_dim=12, pool="map", proj="linear", image_size=160).eval()
    trunk, x = visual.trunk, torch.randn(1, 3, 160, 160)
    tokens = trunk.forward_features(x)[:, trunk.num_prefix_tokens :]
    pool = trunk.attn_pool
    values = pool.kv(tokens).unflatten(-1, (2, -1))[..., 1, :]  # one token attends to itself: its value, unchanged
    y = pool.proj(values)
    y = y + pool.mlp(pool.norm(y))
    expected = visual.head(trunk.head(trunk.fc_norm(y)))
    assert torch.allclose(dense_tokens(visual, x).flatten(1, 2), expected, atol=1e-5)


def test_towers_without_patch_tokens_are_refused():
    vision = {"image_size": 32, "patch_size": 8, "layers": (1, 1, 1, 1), "width": 16}
    text = {"context_length": 8, "vocab_size": 20, "width": 16, "heads": 2, "layers": 1}
    resnet = open_clip.CLIP(12, vision, text).visual
    coca = open_clip.CLIP(
        12, {**vision, "layers": 1, "head_width": 16, "attentional_pool": True, "attn_pooler_heads": 2}, text
    ).visual
    for visual in (resnet, coca):
        with pytest.raises(UnsupportedModelError, match="no patch tokens"):
            dense_tokens(visual, torch.zeros(1, 3, 32, 32))


# ---- grids --------------------------------------------------------------------------------------------------------


def test_a_map_is_resized_in_the_right_orientation():
    ramp = torch.arange(4.0)[:, None].expand(4, 4)  # grows downwards
    down = resize_map(ramp, (3, 7))
    assert down.shape == (3, 7)
    assert (down.diff(dim=0) > 0).all()
    assert down.diff(dim=1).abs().max() < 1e-6
    across = resize_map(ramp.T, (3, 7))
    assert (across.diff(dim=1)[:, 1:-1] > 0).all()
    assert across.diff(dim=0).abs().max() < 1e-6


def test_doubling_a_map_is_the_usual_bilinear_interpolation():
    row = resize_map(torch.tensor([[0.0, 4.0]]), (1, 4))
    assert row[0].tolist() == pytest.approx([0.0, 1.0, 3.0, 4.0])
    same = torch.randn(3, 5)
    assert torch.equal(resize_map(same, (3, 5)), same)


# ---- ground truth -------------------------------------------------------------------------------------------------


def tokens_on(mask: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """[H * W] bool: tokens of which the shape covers a fifth at least, or the one that it covers most."""
    h, w = grid
    y, x = np.nonzero(mask)
    share = np.zeros(grid)
    np.add.at(share, (y * h // mask.shape[0], x * w // mask.shape[1]), 1.0)
    share *= h * w / mask.size
    return (share >= min(0.2, share.max())).ravel()


class Asker:
    """An ``OpenClipText`` over tiny-clip whose ids are numbers of texts."""

    def __init__(self) -> None:
        model, _, tokenizer = tiny_clip.load()
        self.texts: list[str] = []
        self.source = OpenClipText(model, tokenizer, lambda ids: self.texts[int(ids[0])], MEAN, STD)

    def ask(self, text: str, pixels: list[torch.Tensor], grids: list[tuple[int, int]]) -> list[torch.Tensor]:
        self.texts.append(text)
        number = torch.tensor([len(self.texts) - 1])
        scores = self.source.relevance(question(text_ids=number, grids=grids, pixels=lambda: pixels))
        assert [s.shape for s in scores] == [(h * w,) for h, w in grids]
        assert all(s.dtype == torch.float32 for s in scores)
        return scores


@pytest.fixture(scope="module")
def shapes() -> Asker:
    return Asker()


def normalised(picture: Any, size: tuple[int, int]) -> torch.Tensor:
    """[3, h, w] as a language model's image processor makes it."""
    pixels = torch.from_numpy(np.array(picture.image().resize(size[::-1]))).permute(2, 0, 1).float() / 255
    return (pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


@pytest.mark.parametrize(
    ("grid", "size", "form", "best_token"),
    [
        ((8, 8), (64, 64), "{}", 0.95),  # measured: 1.0
        ((7, 12), (196, 336), "{}", 0.85),  # 0.97
        # 0.72: the middle of a coarse patch of which the shape covers a fifth need not lie on the shape
        ((24, 24), (336, 336), "where is {}?", 0.55),
    ],
    ids=["own grid", "not square", "LLaVA's grid"],
)
def test_the_named_shape_is_more_relevant_than_the_other(shapes, grid, size, form, best_token):
    n, best, above = 60, 0, 0
    for number in range(n):
        picture, named, text = named_pair(random.Random(f"test-relevance-{number}"))
        (other,) = (thing for thing in picture.things if thing is not named)
        (scores,) = shapes.ask(form.format(text), [normalised(picture, size)], [grid])
        here, there = tokens_on(named.mask, grid), tokens_on(other.mask, grid)
        best += bool(here[int(scores.argmax())])
        above += bool(scores[here].mean() > scores[there].mean())
    assert best / n >= best_token
    assert above / n >= ABOVE_OTHER


def test_the_score_moves_with_the_question(shapes):
    moved = 0
    for number in range(20):
        picture, named, text = named_pair(random.Random(f"test-moves-{number}"))
        (other,) = (thing for thing in picture.things if thing is not named)
        here, x = tokens_on(named.mask, (8, 8)), normalised(picture, (64, 64))
        (asked,) = shapes.ask(text, [x], [(8, 8)])
        (unasked,) = shapes.ask(f"a {other.color} {other.shape}", [x], [(8, 8)])
        moved += bool(asked[here].mean() > unasked[here].mean())
    assert moved >= 18


def test_segments_of_several_sizes_are_scored_one_by_one(shapes):
    picture, _, text = named_pair(random.Random("test-segments"))
    x = normalised(picture, (64, 64))
    parts, grids = [x, x[:, :32], x[:, :, 16:]], [(8, 8), (3, 6), (5, 2)]
    together = shapes.ask(text, parts, grids)
    for pixels, grid, found in zip(parts, grids, together, strict=True):
        (alone,) = shapes.ask(text, [pixels], [grid])
        assert torch.allclose(found, alone, atol=1e-5)


def test_pixels_of_the_clips_own_size_reach_it_as_its_own_preprocessing_makes_them(shapes):
    picture, _, text = named_pair(random.Random("test-pixels"))
    model, preprocess, tokenizer = tiny_clip.load()
    with torch.no_grad():
        patches = dense_tokens(model.visual, preprocess(picture.image())[None])[0].flatten(0, 1)
        direct = torch.cosine_similarity(patches, model.encode_text(tokenizer([text])))
    (found,) = shapes.ask(text, [normalised(picture, (64, 64))], [(8, 8)])
    assert torch.allclose(found, direct, atol=1e-4)
