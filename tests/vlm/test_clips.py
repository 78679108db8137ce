"""Key clips: each step against a slow formulation, the whole against videos of which the relevant frames are known."""

from __future__ import annotations

import itertools
import math
import random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn

from vlmeff.errors import ConfigError, DataError
from vlmeff.models import tiny_clip
from vlmeff.models.tiny_clip.captions import COLORS, SHAPES, draw_picture
from vlmeff.vlm.clips import (
    _groups_in_time,
    best_length,
    choose_anchors,
    fit,
    merge_spans,
    peaks,
    select_clips,
    token_grid,
    window,
)

FOUND, AIMED = 0.9, 0.9  # measured: 1.0 of the relevant stretches found, best frame relevant in 1.0 of the videos
scores_of = st.lists(st.integers(0, 4), min_size=1, max_size=20)


class ColourClip(nn.Module):
    """A CLIP whose embedding of a picture is the colour of its first pixel; every text means red."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def encode_image(self, pixels: torch.Tensor) -> torch.Tensor:
        return pixels * self.scale

    def encode_text(self, ids: torch.Tensor) -> torch.Tensor:
        return torch.tensor([[1.0, 0.0, 0.0]]).expand(len(ids), 3)


def first_pixel(image: Image.Image) -> torch.Tensor:
    return torch.tensor(image.getpixel((0, 0))).float() / 255


COLOUR = {"clip": ColourClip(), "tokenizer": lambda texts: torch.zeros(len(texts), 4), "preprocess": first_pixel}


def colour_video(reds: list[int], size: tuple[int, int] = (560, 420)) -> list[Image.Image]:
    """Frames of one colour each; ``size`` (width, height)."""
    return [Image.new("RGB", size, (red, 255 - red, 40)) for red in reds]


# ---- steps --------------------------------------------------------------------------------------------------------


@given(scores_of)
def test_peaks_are_the_plateaus_with_lower_neighbours(values):
    found = peaks(torch.tensor(values).float())
    expected = []
    for i in range(len(values)):
        for j in range(i, len(values)):
            flat = len(set(values[i : j + 1])) == 1
            left = i == 0 or values[i - 1] < values[i]
            right = j == len(values) - 1 or values[j + 1] < values[j]
            if flat and left and right:
                expected.append((i + j) // 2)
    assert found == expected
    assert any(values[i] == max(values) for i in found)


@settings(deadline=None, max_examples=60)
@given(st.sets(st.integers(0, 60), min_size=2, max_size=8), st.data())
def test_groups_in_time_are_the_best_of_all_partitions(times, data):
    times = sorted(times)
    k = data.draw(st.integers(1, len(times) - 1))

    def cost(groups: Any) -> float:
        return sum(float(np.var(g)) * len(g) for g in groups)

    found = _groups_in_time(times, k)
    assert [t for group in found for t in group] == times
    assert len(found) == k
    every = (
        [times[a:b] for a, b in itertools.pairwise([0, *cuts, len(times)])]
        for cuts in itertools.combinations(range(1, len(times)), k - 1)
    )
    assert cost(found) == pytest.approx(min(cost(g) for g in every), abs=1e-6)


@given(scores_of, st.integers(1, 6))
def test_anchors_are_few_ascending_relevant_and_hold_the_best_frame(values, clips):
    scores = torch.tensor(values).float()
    anchors = choose_anchors(scores, clips)
    assert anchors == sorted(set(anchors))
    assert 1 <= len(anchors) <= clips
    assert max(values[i] for i in anchors) == max(values)
    assert all(values[i] >= sum(values) / len(values) - 1e-5 for i in anchors)


def test_anchors_spread_over_time_instead_of_crowding_at_the_best_scores():
    scores = torch.zeros(100)
    scores[[10, 12, 14, 16]] = torch.tensor([0.9, 0.95, 0.93, 0.94])
    scores[[50, 90]] = torch.tensor([0.6, 0.7])
    assert choose_anchors(scores, 3) == [12, 50, 90]
    assert choose_anchors(scores, 2) == [12, 90]


def test_without_the_floor_low_peaks_are_anchors_too():
    scores = torch.tensor([0.0, 0.1, 0.0, 0.0, 0.9, 0.8, 0.0, 0.1, 0.0])
    assert choose_anchors(scores, 3) == [4]
    assert choose_anchors(scores, 3, relevant_only=False) == [1, 4, 7]


@given(st.integers(0, 19), st.integers(1, 30), st.integers(1, 20))
def test_a_window_holds_its_anchor_and_stays_in_the_video(anchor, length, n):
    anchor = min(anchor, n - 1)
    start, stop = window(anchor, length, n)
    assert 0 <= start <= anchor < stop <= n
    assert stop - start == min(length, n)


@settings(deadline=None, max_examples=40)
@given(st.integers(2, 12), st.integers(1, 8), st.integers(0, 1000))
def test_the_length_maximises_the_objective(n, longest, seed):
    generator = torch.Generator().manual_seed(seed)
    embeddings = nn.functional.normalize(torch.randn(n, 5, generator=generator), dim=-1)
    scores, anchor = torch.rand(n, generator=generator), seed % n
    values = []
    for length in range(1, min(longest, n) + 1):
        frames = range(*window(anchor, length, n))
        relevance = sum(float(scores[i]) for i in frames) / length
        redundancy = sum(float(embeddings[i] @ embeddings[j]) for i in frames for j in frames) / length**2
        values.append(relevance - 0.5 * redundancy + 0.05 * length / min(longest, n))
    found = best_length(anchor, scores, embeddings, longest)
    assert values[found - 1] == pytest.approx(max(values), abs=1e-5)


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(1, 8)), min_size=1, max_size=6))
def test_merged_clips_are_disjoint_and_hold_the_same_frames_and_anchors(pairs):
    spans = [(start, start + length, start) for start, length in pairs]
    merged = merge_spans(spans)
    frames = [i for start, stop, _ in merged for i in range(start, stop)]
    assert frames == sorted({i for start, stop, _ in spans for i in range(start, stop)})
    assert sorted(a for _, _, anchors in merged for a in anchors) == sorted(a for _, _, a in spans)
    assert all(start <= a < stop for start, stop, anchors in merged for a in anchors)


@given(st.integers(10, 2000), st.integers(10, 2000), st.integers(1, 3000), st.sampled_from([14, 28, 32]))
def test_a_fitted_frame_keeps_the_budget_and_its_shape(height, width, tokens, side):
    h, w = fit((height, width), tokens, side)
    rows, columns = token_grid((height, width), side)
    assert h % side == w % side == 0
    assert h // side <= rows
    assert w // side <= columns
    assert (h // side) * (w // side) <= tokens
    if rows * columns <= tokens:
        assert (h // side, w // side) == (rows, columns)
    elif min(rows, columns) ** 2 * tokens >= 100 * rows * columns:  # ten tokens or more on the short side
        assert (h // side) * (w // side) >= 0.85 * tokens
        assert h / w == pytest.approx(rows / columns, rel=0.15)


# ---- the whole ----------------------------------------------------------------------------------------------------


def check(chosen: Any, video: list[Any], budget: int, side: int) -> None:
    assert chosen.indices == sorted(set(chosen.indices))
    assert [i for c in chosen.clips for i in range(c.start, c.stop)] == chosen.indices
    assert all(frame is video[i] for frame, i in zip(chosen.frames, chosen.indices, strict=True))
    assert all(c.start <= a < c.stop for c in chosen.clips for a in c.anchors)
    assert all(a.stop <= b.start for a, b in itertools.pairwise(chosen.clips))
    assert chosen.token_count == sum(h * w for h, w in chosen.sizes) / side**2
    assert chosen.token_count <= budget
    assert len(chosen.scores) == len(video)


@settings(deadline=None, max_examples=30)
@given(
    reds=st.lists(st.integers(0, 255), min_size=1, max_size=30),
    clips=st.integers(1, 6),
    length=st.one_of(st.just("adaptive"), st.integers(1, 4)),
)
def test_any_video_gives_ascending_clips_within_the_budget(reds, clips, length):
    video = colour_video(reds, (70, 42))
    chosen = select_clips(video, "red", clips=clips, clip_length=length, token_side=14, **COLOUR)
    check(chosen, video, clips * 3 * 5, 14)
    assert len(chosen.clips) <= clips


@pytest.mark.parametrize("length", [1, 2, 3, 4])
def test_longer_clips_of_smaller_frames_have_the_same_number_of_tokens(length):
    reds = [250 if i in (10, 30, 50) else 20 for i in range(60)]
    video = colour_video(reds)
    chosen = select_clips(video, "red", clips=3, clip_length=length, token_side=14, **COLOUR)
    budget = 3 * 40 * 30
    check(chosen, video, budget, 14)
    assert [c.anchors for c in chosen.clips] == [(10,), (30,), (50,)]
    assert len(chosen.indices) == 3 * length
    assert chosen.token_count >= 0.93 * budget
    assert chosen.sizes[0][0] == pytest.approx(420 / math.sqrt(length), rel=0.05)


def test_overlapping_clips_become_one_with_the_tokens_of_both():
    reds = [250 if i in (10, 12) else 20 for i in range(40)]
    chosen = select_clips(colour_video(reds), "red", clips=2, clip_length=4, token_side=14, **COLOUR)
    (clip,) = chosen.clips
    assert (clip.start, clip.stop, clip.anchors) == (9, 15, (10, 12))
    per_frame = 2 * 1200 // 6
    assert 0.93 * per_frame <= clip.size[0] * clip.size[1] / 14**2 <= per_frame


def test_an_adaptive_clip_takes_in_what_is_relevant_and_stops_before_what_is_not():
    reds = [240 if 20 <= i < 24 else 10 for i in range(40)]
    chosen = select_clips(colour_video(reds), "red", clips=1, **COLOUR)
    assert set(chosen.indices) >= {21, 22}
    assert set(chosen.indices) <= set(range(20, 24))


@pytest.fixture(scope="module")
def shape_clip() -> dict[str, Any]:
    model, preprocess, tokenizer = tiny_clip.load()
    return {"clip": model, "preprocess": preprocess, "tokenizer": tokenizer}


def shape_video(rng: random.Random, shown: list[range], n: int) -> tuple[list[Image.Image], str]:
    """Frames of two shapes; in those of ``shown`` one of them is the asked kind, which is nowhere else."""
    kinds = [(color, shape) for color in COLORS for shape in SHAPES]
    asked = kinds.pop(rng.randrange(len(kinds)))
    inside = {i for part in shown for i in part}
    frames = [
        draw_picture(rng, kinds=[asked if i in inside else rng.choice(kinds), rng.choice(kinds)]).image()
        for i in range(n)
    ]
    return frames, f"is there a {asked[0]} {asked[1]}?"


def test_the_clips_hold_the_frames_that_show_what_is_asked(shape_clip):
    found = aimed = 0
    videos = 12
    for number in range(videos):
        rng = random.Random(f"test-clips-{number}")
        first, second = rng.randrange(3, 14), rng.randrange(24, 34)
        shown = [range(first, first + 4), range(second, second + 4)]
        video, text = shape_video(rng, shown, 40)
        chosen = select_clips(video, text, clips=4, **shape_clip)
        check(chosen, video, 4 * 4, 28)
        found += sum(any(i in part for i in chosen.indices) for part in shown)
        best = max(range(len(video)), key=lambda i: float(chosen.scores[i]))
        aimed += any(best in part for part in shown)
        assert best in chosen.indices
    assert found >= FOUND * 2 * videos
    assert aimed >= AIMED * videos


def test_tensors_and_the_shipped_clip_choose_as_pictures_do(shape_clip):
    video, text = shape_video(random.Random("test-kinds"), [range(5, 9)], 16)
    pictures = select_clips(video, text, clips=2, **shape_clip)
    tensors = torch.stack([torch.from_numpy(np.array(f)).permute(2, 0, 1) for f in video])
    named = select_clips(tensors, text, clips=2, clip="tiny-clip")
    assert named.indices == pictures.indices
    assert torch.allclose(named.scores, pictures.scores, atol=1e-6)
    for picture, tensor, (h, w) in zip(pictures.resized(), named.resized(), named.sizes, strict=True):
        assert picture.size == (w, h)
        assert tensor.shape == (3, h, w)
        assert tensor.dtype == torch.uint8
        # PIL rounds and clamps to 8 bits between its two passes as well, which shows at edges.
        assert np.abs(np.array(picture).astype(int) - tensor.permute(1, 2, 0).numpy()).max() <= 8


# ---- edges --------------------------------------------------------------------------------------------------------


def test_one_frame_and_fewer_frames_than_clips():
    one = select_clips(colour_video([200]), "red", clips=5, **COLOUR)
    assert (one.indices, one.sizes) == ([0], [(420, 560)])
    few = select_clips(colour_video([200, 10, 220]), "red", clips=8, **COLOUR)
    assert few.indices == sorted(few.indices)
    assert {0, 2} <= set(few.indices)


@pytest.mark.parametrize("text", ["", "  \n", None])
def test_an_empty_question_is_refused(text):
    with pytest.raises(ConfigError, match="question is empty"):
        select_clips(colour_video([1, 2]), text, **COLOUR)


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"clips": 0}, "clips=0"),
        ({"clip_length": 0}, "clip_length=0"),
        ({"clip_length": "long"}, "'adaptive'"),
        ({"max_shrink": 0.5}, "max_shrink"),
        ({"token_budget": 0}, "token_budget"),
        ({"clip": "ViT-B-32"}, "is not a model"),
        ({"clip": "tiny-clip"}, "leave them out"),
        ({"tokenizer": None}, "tokenizer="),
        ({"clip_length": 5, "token_budget": 300}, "Give token_budget=375"),
        ({"token_budget": 70}, "Give token_budget=75"),
    ],
)
def test_what_cannot_work_is_named(changed, match):
    with pytest.raises(ConfigError, match=match):
        select_clips(colour_video([9, 10, 9, 8, 7, 6, 5, 4]), "red", **{**COLOUR, "clips": 2, **changed})


def test_the_budget_that_the_message_names_is_enough():
    select_clips(colour_video([9, 10, 9, 8]), "red", token_budget=75, **COLOUR)


@pytest.mark.parametrize("frames", [[], [Image.new("RGB", (4, 4)), Image.new("RGB", (4, 5))], [np.zeros((4, 4, 3))]])
def test_frames_that_are_no_video_are_refused(frames):
    with pytest.raises(DataError, match="select_clips: frames"):
        select_clips(frames, "red", **COLOUR)
