"""The Video tab: which frames are sent, what is refused, and answers against transformers' own generate."""

from __future__ import annotations

import gc
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("imageio")
pytest.importorskip("imageio_ffmpeg")

import imageio.v2 as imageio

from vlmeff.demo import video
from vlmeff.demo.engine import Choice, Engine, Text
from vlmeff.demo.video import MOST_FRAMES, ask_video, choose_frames, kept, read_clip
from vlmeff.demo.work import Stop, Stopped
from vlmeff.errors import DataError, UnsupportedModelError
from vlmeff.models.tiny_clip.captions import COLORS
from vlmeff.models.tiny_wan.clips import Clip as Moving

EXAMPLE = Path(video.__file__).parent / "examples" / "moving-shapes.mp4"
PATIENCE_SECONDS = 60.0  # other tests share the cores
QUESTION = "is there a green triangle?"
FPS, SIDE, GROUND = 12, 224, (235, 238, 246)
H264_DB = 30.0
GREY_STEP = 6  # so that a frame's number can be read off it after coding


def drawn() -> np.ndarray:
    """The frames of the example: three shapes, two seconds each."""
    parts = [
        Moving(color="red", shape="circle", direction="right", x=112, y=100, radius=34, speed=4.5),
        Moving(color="blue", shape="square", direction="up", x=120, y=112, radius=34, speed=4.5),
        Moving(color="green", shape="triangle", direction="left", x=112, y=122, radius=34, speed=4.5),
    ]
    frames = []
    for part in parts:
        cover = part.coverage(2 * FPS, SIDE)[..., None]
        frames.append(np.rint(cover * np.array(COLORS[part.color]) + (1 - cover) * np.array(GROUND)).astype(np.uint8))
    return np.concatenate(frames)


def write(path: Path, frames: Any, fps: float) -> Path:
    with imageio.get_writer(path, fps=fps, codec="libx264", quality=9, macro_block_size=2) as writer:
        for frame in frames:
            writer.append_data(frame)
    return path


def greys(count: int, side: int = 64) -> list[np.ndarray]:
    return [np.full((side, side, 3), GREY_STEP * n, np.uint8) for n in range(count)]


@pytest.fixture(scope="module")
def qwen() -> Engine:
    engine = Engine("tiny-qwen")
    engine.load()
    return engine


def test_the_example_shows_the_shapes_that_it_was_drawn_from():
    assert EXAMPLE.stat().st_size < 200_000
    decoded = np.stack(imageio.mimread(EXAMPLE, memtest=False))
    assert decoded.shape == drawn().shape
    assert 10 * np.log10(255**2 / np.square(decoded.astype(float) - drawn()).mean()) > H264_DB


@pytest.mark.parametrize(("count", "most"), [(40, 12), (40, 7), (12, 12), (5, 12), (1, 12)])
def test_frames_are_the_first_of_equal_stretches(tmp_path, count, most):
    clip = read_clip(write(tmp_path / "a.mp4", greys(count), 10), most_frames=most)
    numbers = [round(float(np.asarray(frame).mean()) / GREY_STEP) for frame in clip.frames]
    stretches = [n * most // count for n in range(count)]
    assert numbers == [n for n in range(count) if n == 0 or stretches[n] != stretches[n - 1]]
    assert clip.duration == pytest.approx(count / 10, abs=0.02)
    assert clip.seconds[0] == 0
    assert clip.metadata["fps"] == pytest.approx(len(clip.frames) / clip.duration)


def test_large_frames_are_made_smaller_and_keep_their_shape(tmp_path):
    wide = [np.zeros((180, 1920, 3), np.uint8)] * 3
    clip = read_clip(write(tmp_path / "a.mp4", wide, 3))
    assert {frame.size for frame in clip.frames} == {(896, 84)}


def test_a_video_that_is_too_long_or_too_large_is_refused(tmp_path, monkeypatch):
    with pytest.raises(DataError, match="70 seconds long, more than 60"):
        read_clip(write(tmp_path / "long.mp4", greys(35, 16), 0.5))
    monkeypatch.setattr(video, "MOST_PIXELS", 64 * 64 - 1)
    with pytest.raises(DataError, match="64 x 64 pixels, more than 4095"):
        read_clip(write(tmp_path / "large.mp4", greys(3), 3))


def test_ffmpeg_itself_decodes_no_larger_frames(tmp_path):
    path = write(tmp_path / "large.mp4", [np.zeros((2176, 3856, 3), np.uint8)], 1)
    with pytest.raises(DataError):
        read_clip(path)


def test_a_playlist_that_names_other_files_is_refused(tmp_path, monkeypatch):
    write(tmp_path / "secret.mp4", greys(20), 10)
    lure = tmp_path / "lure.mp4"
    lure.write_text("ffconcat version 1.0\nfile secret.mp4\nduration 2.0\n")
    with pytest.raises(DataError, match="cannot be read as a video"):
        read_clip(lure)
    monkeypatch.setattr(video, "GUARDS", [])
    assert read_clip(lure).frames  # so without the guard it is followed


def test_a_stop_ends_the_reading_and_ffmpeg(tmp_path, monkeypatch):
    started: list[Any] = []
    real = subprocess.Popen

    def remembered(*args: Any, **options: Any) -> Any:
        started.append(real(*args, **options))
        return started[-1]

    monkeypatch.setattr("subprocess.Popen", remembered)
    path = write(tmp_path / "a.mp4", greys(40), 10)
    stop = Stop()
    stop.set()
    with pytest.raises(Stopped):
        read_clip(path, stop=stop)
    gc.collect()
    assert started
    assert all(process.poll() is not None for process in started)


@pytest.mark.parametrize("content", [b"", b"no video", b"\x00\x00\x00\x18ftypmp42" + bytes(100)])
def test_what_is_no_video_is_refused_without_a_path_of_the_server(tmp_path, content):
    path = tmp_path / "broken.mp4"
    path.write_bytes(content)
    with pytest.raises(DataError, match="cannot be read as a video") as caught:
        read_clip(path)
    assert str(tmp_path) not in str(caught.value)


def test_a_truncated_video_is_refused_or_read_as_far_as_it_goes(tmp_path):
    path = tmp_path / "cut.mp4"
    path.write_bytes(EXAMPLE.read_bytes()[:6000])
    with pytest.raises(DataError):
        read_clip(path)


@pytest.mark.parametrize(
    ("question", "span"),
    [("is there a red circle?", (0, 2)), ("is there a blue rectangle?", (2, 4)), (QUESTION, (4, 6))],
)
def test_the_chosen_frames_show_what_is_asked(question, span):
    clip = read_clip(EXAMPLE, most_frames=video.LOOKED_AT)
    chosen = choose_frames(clip, question)
    assert 1 <= len(chosen.frames) <= MOST_FRAMES
    inside = [span[0] <= time < span[1] for time in chosen.seconds]
    assert sum(inside) >= 0.9 * len(inside)
    for frame, index in zip(chosen.frames, chosen.indices, strict=True):
        assert frame is clip.frames[index]


def test_answers_are_those_of_transformers_on_the_same_frames(qwen):
    clip = read_clip(EXAMPLE)
    (*_, now) = ask_video(qwen, clip, QUESTION, Choice(preset="fast"))
    assert now.baseline.done is not None
    assert now.preset.done is not None
    chat = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": QUESTION}]}]
    prompt = qwen.processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    inputs = qwen.processor(
        text=[prompt], videos=[clip.frames], video_metadata=[clip.metadata], do_sample_frames=False, return_tensors="pt"
    )
    assert float(inputs["second_per_grid_ts"][0]) == pytest.approx(2 * clip.duration / len(clip.frames))
    ids = qwen.model.generate(**inputs, do_sample=False, max_new_tokens=64)
    expected = qwen.processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    assert now.baseline.text == expected != ""
    tokens = int(inputs["video_grid_thw"].prod()) // 4
    assert now.baseline.done.report.visual_tokens_after == tokens
    assert now.preset.done.report.visual_tokens_before == tokens
    assert now.preset.done.report.visual_tokens_after < tokens


def test_the_strip_has_a_picture_for_each_pair_of_frames_and_counts_the_kept_tokens(qwen):
    clip = read_clip(EXAMPLE)
    (*_, now) = ask_video(qwen, clip, QUESTION, Choice(preset="fast"))
    done = now.preset.done
    assert done is not None
    strip = kept(done)
    assert len(strip) == len(clip.frames) // 2
    counts = [int(caption.split(" of ")[0]) for _, caption in strip]
    assert sum(counts) == done.report.visual_tokens_after


def test_a_model_without_videos_says_so():
    with pytest.raises(UnsupportedModelError, match="takes no videos"):
        list(ask_video(Engine("tiny-llava"), read_clip(EXAMPLE), QUESTION, Choice(preset="fast")))


# -- through the page --------------------------------------------------------------------------------------------------


class Endless:
    """Goes on until it is stopped."""

    def __init__(self) -> None:
        self.ended = self.begun = 0

    def presets(self, name: str) -> list[str]:
        return ["fast"]

    def answer(self, turns: Any, choice: Choice, *, stop: Any = None, **options: Any) -> Iterator[Any]:
        self.begun += 1
        try:
            end = time.monotonic() + PATIENCE_SECONDS
            while not stop.asked:
                assert time.monotonic() < end, "nobody stopped it"
                yield Text("word")
                time.sleep(0.02)
        finally:
            self.ended += 1


@pytest.fixture(scope="module")
def page() -> Iterator[tuple[Endless, str]]:
    pytest.importorskip("gradio")
    from vlmeff.demo.page import build_demo, launch_options
    from vlmeff.demo.site import Site

    engine = Endless()
    site: Any = Site(engine, ["tiny-qwen"])
    demo = build_demo(site)
    demo.launch(prevent_thread_lock=True, quiet=True, **launch_options(site))
    yield engine, demo.local_url
    demo.close()


def test_stop_ends_the_run_and_no_second_one_begins(page):
    from gradio_client import Client, handle_file

    engine, url = page
    client = Client(url, verbose=False)
    file = handle_file(str(EXAMPLE))
    job = client.submit("tiny-qwen", file, QUESTION, "fast", False, api_name="/video")
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not engine.begun:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert engine.ended == 0
    assert "stopped" in client.predict(api_name="/stop_video")
    while engine.ended < engine.begun or not job.done():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert engine.begun == 1


def test_a_path_that_was_not_uploaded_is_refused(page, tmp_path):
    import httpx

    engine, url = page
    before = engine.begun
    here = tmp_path / "private.mp4"
    here.write_bytes(EXAMPLE.read_bytes())
    for file in ({"path": str(here), "meta": {"_type": "gradio.FileData"}}, {"path": str(here)}):
        body = {"data": ["tiny-qwen", file, QUESTION, "fast", False]}
        start = httpx.post(f"{url}gradio_api/call/video", json=body, timeout=PATIENCE_SECONDS)
        if start.status_code == 200:
            ended = httpx.get(f"{url}gradio_api/call/video/{start.json()['event_id']}", timeout=60).text
            assert "event: error" in ended
            assert "event: complete" not in ended
    assert engine.begun == before


def test_no_video_and_no_question_are_said_in_plain_words(page):
    from gradio_client import Client, handle_file

    _, url = page
    client = Client(url, verbose=False)
    with pytest.raises(Exception, match="no video yet"):
        client.predict("tiny-qwen", None, QUESTION, "fast", False, api_name="/video")
    file = handle_file(str(EXAMPLE))
    with pytest.raises(Exception, match="no question yet"):
        client.predict("tiny-qwen", file, " ", "fast", False, api_name="/video")
