"""What is drawn at each token, against the plan and against pictures in which every token has a colour of its own.

Pictures are built so that the colour at the middle of a cell says which token is shown there: it must be that colour
where the token was kept, the colour under a grey veil where it was dropped, and a dot where it was merged.
"""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny_models import (
    IMAGE,
    llava_next_inputs,
    prompts,
    qwen_videos,
    tiny,
    video_prompts,
)

import vlmeff
from tokenpruning.plan import ANCHOR, BUFFER, MERGED, REGISTER, TEXT
from vlmeff.drawing import overlays
from vlmeff.errors import ConfigError, UnsupportedModelError
from vlmeff.vlm.families import Family
from vlmeff.vlm.overlay import DROPPED, RESAMPLED, TAKEN, Panel, View, arrange, draw_panel, font_size, legend

MEAN, STD = [0.5, 0.4, 0.3], [0.25, 0.2, 0.3]
PROCESSOR = SimpleNamespace(image_processor=SimpleNamespace(image_mean=MEAN, image_std=STD))
FRAME_COLOR = {
    ANCHOR: (213, 94, 0),
    BUFFER: (230, 159, 0),
    REGISTER: (0, 158, 115),
    TEXT: (0, 114, 178),
    MERGED: (204, 121, 167),
    RESAMPLED: (0, 114, 178),
}
DOT = (204, 121, 167)
ROUNDING = 3  # of 255: normalising, 8 bits, resizing
CAPTION = font_size(720) + font_size(720) // 2  # height of the line above a panel
GAP = 9  # pixels between panels on 720


def colors(*shape, seed=0):
    """[*shape, 3] in 0 .. 255, far enough from the frames' and the veil's for no mix-up by chance."""
    return torch.randint(0, 256, (*shape, 3), generator=torch.Generator().manual_seed(seed)).float()


def normalised(rgb):
    """[..., 3] in 0 .. 255 -> what a processor makes of it."""
    return (rgb / 255 - torch.tensor(MEAN)) / torch.tensor(STD)


def tiles_of(rgb, patch=4):
    """[..., H, W, 3] -> [..., 3, H * patch, W * patch] normalised: every token one flat square."""
    x = normalised(rgb).movedim(-1, -3)
    return x.repeat_interleave(patch, -2).repeat_interleave(patch, -1)


def middle(box):
    x, y, w, h = box
    return round(x + w / 2 - 0.5), round(y + h / 2 - 0.5)


def cells(rows, columns, *, width, left=0, top=0):
    """[(r, c)] -> (x, y, w, h) of square cells on a panel ``width`` pixels wide."""
    side = width / columns
    return {(r, c): (left + c * side, top + r * side, side, side) for r in range(rows) for c in range(columns)}


def check_cell(picture, box, rgb, mark):
    """One cell of a drawn picture (an RGB array) shows token colour ``rgb`` treated as ``mark`` says."""
    x, y = middle(box)
    seen, rgb = picture[y, x].astype(float), np.asarray(rgb, float)
    if mark == TAKEN:
        assert tuple(seen) == DOT
        x, y = round(box[0] + box[2] / 4), round(box[1] + box[3] / 4)  # beside the dot
        seen = picture[y, x].astype(float)
    expected = rgb if mark >= 0 else 0.3 * rgb + 0.7 * 200
    # Away from the middle of a cell of four pixels its neighbours have some part in the colour.
    assert np.abs(seen - expected).max() <= (12 if mark == TAKEN else ROUNDING)
    corner = tuple(picture[int(np.ceil(box[1])), int(np.ceil(box[0]))])
    if mark >= 0:
        assert corner == FRAME_COLOR[mark]
    else:
        assert corner not in FRAME_COLOR.values()


def marks_of(selection, size):
    out = [DROPPED] * size
    if selection.into is not None:
        for token, into in enumerate(selection.into.tolist()):
            out[token] = TAKEN if into >= 0 else DROPPED
    for token, kind in zip(selection.index.tolist(), selection.kind.tolist(), strict=True):
        out[token] = kind
    return out


def check_grid(picture, boxes, rgb, marks):
    """``boxes``: of ``cells``; rgb [H, W, 3]; marks: list in raster order."""
    columns = rgb.shape[1]
    for (r, c), box in boxes.items():
        check_cell(picture, box, rgb[r, c], marks[r * columns + c])


def array(picture):
    return np.asarray(picture.convert("RGB"))


def call(name, inputs, tokens, model=None, **arguments):
    model = vlmeff.wrap(model or tiny(name), None, tokens=tokens)
    model.generate(**inputs, max_new_tokens=1, **arguments)
    return model


def llava_call(tokens, pictures, **arguments):
    """A wrapped LLaVA after a call, its inputs, and the colours of the tokens of each picture [pictures, 6, 6, 3]."""
    model = tiny("llava")
    inputs, rgb = prompts(model, pictures), colors(sum(pictures), 6, 6)
    inputs["pixel_values"] = tiles_of(rgb)
    return call("llava", inputs, tokens, model, **arguments), inputs, rgb


# -- pictures


@pytest.mark.parametrize("width", [240, 720, 1200])
@pytest.mark.parametrize(
    ("tokens", "kinds"),
    [
        (vlmeff.HiPrune(keep=0.5, alpha=0.9), {ANCHOR, BUFFER, REGISTER, DROPPED}),
        (vlmeff.VisionZip(keep=0.4, contextual=0.3), {REGISTER, MERGED, TAKEN}),
        (vlmeff.Random(keep=0.3), {REGISTER, DROPPED}),
    ],
    ids=["hiprune", "visionzip", "random"],
)
def test_every_token_of_every_picture_is_drawn_as_the_plan_says(tokens, kinds, width):
    model, inputs, rgb = llava_call(tokens, [1, 0, 2])
    drawn = overlays(model, inputs, PROCESSOR, width=width)
    items = vlmeff.report(model).plan.items
    assert [overlay.label for overlay in drawn] == ["picture 1", "picture 2", "picture 3"]
    found = set()
    for overlay, item, picture in zip(drawn, items, rgb, strict=True):
        marks = marks_of(item.selections[0], 36)
        found |= set(marks)
        assert overlay.sheet.width == width
        check_grid(array(overlay.sheet), cells(6, 6, width=width), picture, marks)
        assert len(overlay.frames) == 1
    assert found == kinds


def test_without_a_processor_the_range_of_the_pixels_is_stretched():
    model, inputs, rgb = llava_call(vlmeff.Random(keep=0.5), [1])
    inputs["pixel_values"] = (rgb[0] * 0.013 - 2).movedim(-1, 0)[None].repeat_interleave(4, -1).repeat_interleave(4, -2)
    (overlay,) = overlays(model, inputs)
    low, high = float(rgb.min()), float(rgb.max())
    marks = marks_of(vlmeff.report(model).plan.items[0].selections[0], 36)
    check_grid(array(overlay.sheet), cells(6, 6, width=720), (rgb[0] - low) / (high - low) * 255, marks)


def test_a_call_that_kept_everything_is_drawn_whole():
    model, inputs, rgb = llava_call(vlmeff.HiPrune(keep=1.0), [1])
    (overlay,) = overlays(model, inputs, PROCESSOR)
    check_grid(array(overlay.sheet), cells(6, 6, width=720), rgb[0], [REGISTER] * 36)


# Size of the picture -> tiles (rows, columns) of its mosaic and the rectangle (top, left, height, width) that is left.
NEXT = {(16, 60): ((1, 3), (1, 0, 4, 18)), (45, 17): ((2, 1), (0, 1, 12, 4)), (48, 48): ((2, 2), (0, 0, 12, 12))}


@pytest.mark.parametrize("size", NEXT)
def test_tiles_stand_where_they_stand_in_the_mosaic(size):
    (tile_rows, tile_columns), (top, left, height, width) = NEXT[size]
    model = tiny("llava_next")
    inputs = llava_next_inputs(model, [1], sizes=[size])
    rgb = colors(1 + tile_rows * tile_columns, 6, 6)
    inputs["pixel_values"] = tiles_of(rgb)[None]
    call("llava_next", inputs, vlmeff.Random(keep=0.5), model)
    (overlay,) = overlays(model, inputs, PROCESSOR)
    (item,) = vlmeff.report(model).plan.items
    kept, segments = {}, iter(item.selections)
    kept[0] = set(next(segments).index.tolist())
    for tile in range(1, len(rgb)):  # each tile's own rectangle, in raster order
        y0, x0 = 6 * ((tile - 1) // tile_columns), 6 * ((tile - 1) % tile_columns)
        ys = [y for y in range(6) if top <= y0 + y < top + height]
        xs = [x for x in range(6) if left <= x0 + x < left + width]
        chosen = next(segments).index.tolist()
        kept[tile] = {6 * ys[i // len(xs)] + xs[i % len(xs)] for i in chosen}
    sheet = array(overlay.sheet)

    cell = (720 - GAP) / (6 + width)
    marks = [REGISTER if i in kept[0] else DROPPED for i in range(36)]
    check_grid(sheet, cells(6, 6, width=int(6 * cell)), rgb[0], marks)
    at = int(6 * cell) + GAP
    for (r, c), box in cells(height, width, width=int(width * cell), left=at).items():
        y, x = r + top, c + left
        tile = 1 + y // 6 * tile_columns + x // 6
        inside = 6 * (y % 6) + x % 6
        mx, my = middle(box)
        shown, color = sheet[my, mx].astype(float), rgb[tile, y % 6, x % 6].numpy()
        expected = color if inside in kept[tile] else 0.3 * color + 0.7 * 200
        assert np.abs(shown - expected).max() <= ROUNDING, (r, c)


def test_qwen_pictures_are_not_square():
    model = tiny("qwen2_5_vl")
    inputs = prompts(model, [2, 1])
    grids = [(h // 2, w // 2) for _, h, w in inputs["image_grid_thw"].tolist()]
    assert any(h != w for h, w in grids)
    rgb = [colors(h, w, seed=i) for i, (h, w) in enumerate(grids)]
    inputs["pixel_values"] = torch.cat([patches(x, model) for x in rgb])
    call("qwen2_5_vl", inputs, vlmeff.HiPrune(keep=0.5, alpha=1.0), model)
    drawn = overlays(model, inputs, PROCESSOR)
    for overlay, item, picture, (h, w) in zip(drawn, vlmeff.report(model).plan.items, rgb, grids, strict=True):
        wide = min(720, round(round(1.5 * 720) * w / h))  # tall pictures become narrower and stand in the middle
        boxes = cells(h, w, width=wide, left=(720 - wide) // 2)
        check_grid(array(overlay.sheet), boxes, picture, marks_of(item.selections[0], h * w))


def patches(rgb, model):
    """[..., 3] colours of tokens in raster order -> packed patches: four per token, of one colour."""
    vision = model.config.vision_config
    one = normalised(rgb).view(-1, 3, 1)
    flat = one.expand(-1, -1, vision.temporal_patch_size * vision.patch_size**2).flatten(1)
    return flat.repeat_interleave(vision.spatial_merge_size**2, 0)


def test_a_resampled_picture_shows_the_smaller_grid_over_a_blurred_picture():
    model = tiny("llava")
    inputs = prompts(model, [1])
    fine = (torch.arange(24)[:, None] + torch.arange(24)) % 2 * 200.0  # a chequerboard of single pixels
    coarse = torch.where(torch.arange(24) < 16, 0.0, 50.0)  # the right third is lighter
    inputs["pixel_values"] = normalised((fine + coarse)[..., None].expand(-1, -1, 3)).movedim(-1, 0)[None]
    call("llava", inputs, vlmeff.Fourier(side=3), model)
    (overlay,) = overlays(model, inputs, PROCESSOR)
    sheet = array(overlay.sheet)
    assert vlmeff.report(model).visual_tokens_after == 9
    for box in cells(3, 3, width=720).values():
        assert tuple(sheet[int(box[1]), int(box[0])]) == FRAME_COLOR[RESAMPLED]
        x, y = middle(box)
        inside = sheet[y - 40 : y + 40, x - 40 : x + 40].astype(float)
        assert inside.std() < 20, "the detail of the old grid is still there"
        assert abs(inside.mean() - (150 if box[0] >= 480 else 100)) < 12


# -- videos


@pytest.fixture
def qwen_video():
    model = tiny("qwen2_vl")
    inputs = qwen_videos(model, [5, 0, 2], pictures=[1, 2, 0])
    t, h, w = inputs["video_grid_thw"][0].tolist()
    rgb = colors(t, h // 2, w // 2)
    parts = patches(rgb, model)
    inputs["pixel_values_videos"] = torch.cat([parts, inputs["pixel_values_videos"][len(parts) :]])
    return call("qwen2_vl", inputs, vlmeff.HiPrune(keep=0.5), model), inputs, rgb


def test_a_video_has_a_frame_per_slice_in_order_and_a_contact_sheet(qwen_video):
    model, inputs, rgb = qwen_video
    drawn = overlays(model, inputs, PROCESSOR)
    assert [overlay.label for overlay in drawn] == [*(f"picture {i}" for i in (1, 2, 3)), "video 1", "video 2"]
    video = drawn[3]
    assert [len(overlay.frames) for overlay in drawn[3:]] == [3, 1]
    selections = vlmeff.report(model).plan.items[3].selections
    each = (720 - 2 * GAP) // 3
    for number, (frame, color, pick) in enumerate(zip(video.frames, rgb, selections, strict=True)):
        marks = marks_of(pick, 6)
        check_grid(array(frame), cells(2, 3, width=720, top=CAPTION), color, marks)
        boxes = cells(2, 3, width=each, left=number * (each + GAP), top=CAPTION)
        check_grid(array(video.sheet), boxes, color, marks)


@pytest.mark.parametrize("name", ["llava_onevision", "perception_lm"])
def test_frames_of_other_families_make_one_video_per_video(name):
    model = tiny(name)
    inputs = video_prompts(model, [4, 0, 4])
    call(name, inputs, vlmeff.Random(keep=0.5), model)
    drawn = overlays(model, inputs)
    assert [(overlay.label, len(overlay.frames)) for overlay in drawn] == [("video 1", 4), ("video 2", 4)]


# -- inside the language model

SCHEDULE = vlmeff.Schedule(layers=(0, 1), ratios=(0.5, 0.4))


def columns_of_short_prompt(inputs, plan, row, width):
    """{column of the shortened prompt: (picture, token)} of a row, counted by hand; rows are packed to the right."""
    ids, mask = inputs["input_ids"].tolist(), inputs["attention_mask"].tolist()
    number = sum(token == IMAGE for earlier in ids[:row] for token in earlier)
    entries = []
    for token, valid in zip(ids[row], mask[row], strict=True):
        if token == IMAGE:
            number += 1
            if _stays(plan, number - 1):
                entries.append(divmod(number - 1, 36))
        elif valid:
            entries.append(None)
    start = width - len(entries)
    return {start + i: entry for i, entry in enumerate(entries) if entry is not None}


def _stays(plan, number):
    return plan is None or number % 36 in plan.items[number // 36].kept.tolist()


@pytest.mark.parametrize("arguments", [{}, {"num_beams": 2}], ids=["greedy", "beams"])
@pytest.mark.parametrize(
    "before", [None, vlmeff.HiPrune(keep=0.5), vlmeff.VisionZip(keep=0.5)], ids=["alone", "hiprune", "visionzip"]
)
def test_adaptinfer_shows_every_stage_of_every_picture(before, arguments):
    inner = vlmeff.AdaptInfer(schedule=SCHEDULE)
    model, inputs, rgb = llava_call(inner if before is None else [before, inner], [2, 2], **arguments)
    report = vlmeff.report(model)
    drawn = overlays(model, inputs, PROCESSOR)
    assert [len(overlay.frames) for overlay in drawn] == [3] * 4
    record = report.inner
    copies = 2 if arguments else 1
    start = [[REGISTER] * 36 for _ in range(4)]
    if before is not None:
        start = [marks_of(item.selections[0], 36) for item in report.plan.items]
    stages = [start]
    for kept in record.kept:
        marks = [[DROPPED] * 36 for _ in range(4)]
        for row in range(2):
            where = columns_of_short_prompt(inputs, report.plan, row, record.width)
            for column in kept[row * copies].tolist():
                picture, token = where[column]
                marks[picture][token] = TEXT
        if before is not None:  # what was merged into a token stays or goes with it
            for picture, item in enumerate(report.plan.items):
                pick = item.selections[0]
                for token, into in enumerate([] if pick.into is None else pick.into.tolist()):
                    if into >= 0 and marks[picture][token] != TEXT and pick.index[into] != token:
                        alive = marks[picture][int(pick.index[into])] == TEXT
                        marks[picture][token] = TAKEN if alive else DROPPED
        stages.append(marks)
    assert sum(mark == TEXT for marks in stages[-1] for mark in marks) == 2 * record.kept[-1].shape[1] > 0
    for number, overlay in enumerate(drawn):
        for frame, marks in zip(overlay.frames, stages, strict=True):
            check_grid(array(frame), cells(6, 6, width=720, top=CAPTION), rgb[number], marks[number])
        each = (720 - 2 * GAP) // 3
        for stage, marks in enumerate(stages):
            boxes = cells(6, 6, width=each, left=stage * (each + GAP), top=CAPTION)
            check_grid(array(overlay.sheet), boxes, rgb[number], marks[number])


def test_adaptinfer_on_tiles_with_separators_draws_as_many_tokens_as_it_kept():
    model = tiny("llava_next")
    inputs = llava_next_inputs(model, [1], sizes=[(16, 60)])
    inputs["pixel_values"] = torch.zeros_like(inputs["pixel_values"])
    call("llava_next", inputs, vlmeff.AdaptInfer(schedule=SCHEDULE), model)
    (overlay,) = overlays(model, inputs, PROCESSOR)
    slots = iter(vlmeff.report(model).inner.kept)
    first = int((inputs["input_ids"][0] == IMAGE).nonzero()[0])
    cell, at = (720 - GAP) / 24, int(6 * (720 - GAP) / 24) + GAP
    for frame in overlay.frames[1:]:
        picture = array(frame)
        kept = {int(column) - first for column in next(slots)[0]}
        thumbnail = cells(6, 6, width=int(6 * cell), top=CAPTION)
        mosaic = cells(4, 18, width=int(18 * cell), left=at, top=CAPTION)
        drawn = {6 * r + c for (r, c), box in thumbnail.items() if bright_frame(picture, box)}
        drawn |= {36 + 19 * r + c for (r, c), box in mosaic.items() if bright_frame(picture, box)}
        assert drawn == {slot for slot in kept if slot < 36 or (slot - 36) % 19 < 18}


def bright_frame(picture, box):
    """At its upper edge: the lines between tiles hide the others."""
    x, _ = middle(box)
    return tuple(picture[int(np.ceil(box[1])), x]) == FRAME_COLOR[TEXT]


# -- files


@pytest.mark.parametrize("suffix", [".gif", ".webp", ".GIF"])
def test_animations_have_every_frame_at_their_speed(tmp_path, qwen_video, suffix):
    model, inputs, _ = qwen_video
    inputs["pixel_values_videos"] = torch.zeros_like(inputs["pixel_values_videos"])  # frames that look alike
    overlay = overlays(model, inputs, PROCESSOR)[3]
    overlay.save(tmp_path / f"video{suffix}")
    check_animation(tmp_path / f"video{suffix}", 3, 250)
    model, inputs, _ = llava_call(vlmeff.AdaptInfer(schedule=SCHEDULE), [1])
    overlays(model, inputs, PROCESSOR)[0].save(str(tmp_path / f"stages{suffix}"))
    check_animation(tmp_path / f"stages{suffix}", 3, 500)


def check_animation(path, frames, milliseconds):
    with Image.open(path) as animation:
        assert animation.n_frames == frames
        assert animation.info["loop"] == 0
        for number in range(frames):
            animation.seek(number)
            animation.load()
            assert animation.info["duration"] == milliseconds


def test_a_png_holds_the_sheet_and_other_suffixes_are_refused(tmp_path, qwen_video):
    model, inputs, _ = qwen_video
    overlay = overlays(model, inputs, PROCESSOR)[3]
    overlay.save(tmp_path / "video.png")
    assert np.array_equal(array(Image.open(tmp_path / "video.png")), array(overlay.sheet))
    for name in ("video.jpg", "video"):
        with pytest.raises(ConfigError, match=r"\.png.*\.gif or \.webp"):
            overlay.save(tmp_path / name)
        assert not (tmp_path / name).exists()


# -- errors


def test_inputs_of_another_call_are_refused():
    model, inputs, _ = llava_call(vlmeff.Random(keep=0.5), [1])
    with pytest.raises(ConfigError, match="last call"):
        overlays(model, prompts(model, [2]), PROCESSOR)
    with pytest.raises(ConfigError, match="pixel values"):
        overlays(model, {"input_ids": inputs["input_ids"]})
    with pytest.raises(ConfigError, match="width=100"):
        overlays(model, inputs, width=100)
    model.generate(input_ids=inputs["input_ids"][:, -3:], max_new_tokens=1)
    with pytest.raises(ConfigError, match="last call"):
        overlays(model, inputs, PROCESSOR)
    with pytest.raises(ConfigError, match="not wrapped"):
        overlays(vlmeff.unwrap(model), inputs)


def test_a_turn_that_went_on_from_a_cache_is_refused():
    for tokens in (vlmeff.Random(keep=0.5), vlmeff.AdaptInfer(schedule=SCHEDULE)):
        model, inputs, _ = llava_call(tokens, [1])
        first = model.generate(**inputs, max_new_tokens=2, return_dict_in_generate=True)
        mask = torch.ones_like(first.sequences)
        model.generate(
            input_ids=first.sequences, attention_mask=mask, past_key_values=first.past_key_values, max_new_tokens=1
        )
        with pytest.raises(ConfigError, match="past_key_values"):
            overlays(model, inputs, PROCESSOR)


def test_a_family_without_pixels_says_so(monkeypatch):
    model, inputs, _ = llava_call(vlmeff.Random(keep=0.5), [1])
    monkeypatch.setattr("vlmeff.vlm.families.llava.Llava.pixels", Family.pixels)
    with pytest.raises(UnsupportedModelError, match=r"LlavaForConditionalGeneration.*nothing to draw on"):
        overlays(model, inputs, PROCESSOR)


# -- the primitives


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_panel_treats_every_cell_as_its_mark_says(data):
    rows, columns = data.draw(st.integers(1, 7)), data.draw(st.integers(1, 7))
    width = data.draw(st.integers(8 * columns, 40 * columns))
    legal = [DROPPED, TAKEN, REGISTER, ANCHOR, BUFFER, TEXT, MERGED, RESAMPLED]
    marks = data.draw(st.lists(st.sampled_from(legal), min_size=rows * columns, max_size=rows * columns))
    rgb = colors(rows, columns, seed=data.draw(st.integers(0, 9)))
    picture = rgb.byte().repeat_interleave(16, 0).repeat_interleave(16, 1)
    panel = Panel(Image.fromarray(picture.numpy()), np.array(marks, np.int8).reshape(rows, columns))
    drawn = array(draw_panel(panel, width))
    assert drawn.shape[:2] == (panel.height(width), width)
    xs, ys = ([i * length // n for i in range(n + 1)] for n, length in ((columns, width), (rows, len(drawn))))
    for i, mark in enumerate(marks):
        r, c = divmod(i, columns)
        middle_pixel = drawn[(ys[r] + ys[r + 1] - 1) // 2, (xs[c] + xs[c + 1] - 1) // 2].astype(float)
        color = rgb[r, c].numpy()
        expected = DOT if mark == TAKEN else color if mark >= 0 else 0.3 * color + 0.7 * 200
        assert np.abs(middle_pixel - expected).max() <= ROUNDING
        if mark >= 0:
            edge = [drawn[ys[r], xs[c] : xs[c + 1]], drawn[ys[r] : ys[r + 1], xs[c + 1] - 1]]
            assert (np.concatenate(edge) == FRAME_COLOR[mark]).all()


def test_cells_too_small_for_frames_are_tinted():
    marks = np.array([[REGISTER, DROPPED], [TAKEN, ANCHOR]], np.int8)
    drawn = array(draw_panel(Panel(Image.new("RGB", (8, 8), (40, 80, 200)), marks), 8)).astype(float)
    picture, veil = np.array([40, 80, 200.0]), 0.3 * np.array([40, 80, 200.0]) + 140
    green, purple, orange = (np.array(FRAME_COLOR[mark]) for mark in (REGISTER, MERGED, ANCHOR))
    expected = [[(picture + green) / 2, veil], [(veil + purple) / 2, (picture + orange) / 2]]
    for r, c in np.ndindex(2, 2):
        assert np.abs(drawn[4 * r : 4 * r + 4, 4 * c : 4 * c + 4] - expected[r][c]).max() <= 1


@pytest.mark.parametrize("width", [240, 480, 720, 1200])
def test_the_legend_names_every_mark_within_its_width(width):
    marks = [ANCHOR, BUFFER, REGISTER, TEXT, MERGED, TAKEN, DROPPED]
    key = array(legend(marks, "108 of 324 visual tokens kept", width))
    assert key.shape[1] == width
    assert (key[:, -2:] == 255).all(), "something runs over the edge"
    shown = {tuple(pixel) for pixel in key.reshape(-1, 3)}
    assert {FRAME_COLOR[mark] for mark in (ANCHOR, BUFFER, REGISTER, TEXT, MERGED)} <= shown


@pytest.mark.parametrize("width", [240, 720, 1200])
@pytest.mark.parametrize("count", [1, 2, 5, 8])
def test_a_contact_sheet_shows_every_panel_once_in_reading_order(count, width):
    shades = [(20 * i, 0, 255 - 20 * i) for i in range(count)]
    views = [View([Panel(Image.new("RGB", (40, 30), s), np.full((3, 4), REGISTER, np.int8))], "x") for s in shades]
    sheet = array(arrange(views, width))
    places = [np.argwhere((sheet == shade).all(-1)).min(0).tolist() for shade in shades]
    assert sheet.shape[1] == width
    assert places == sorted(places)
    least = min(np.ptp(np.argwhere((sheet == shade).all(-1))[:, 1]) for shade in shades)
    assert least >= 140, "panels are too small to read"
