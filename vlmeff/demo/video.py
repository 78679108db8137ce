"""A visitor's video: a few frames of it, and a question about them, answered as it is and with a preset."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

from vlmeff.demo.compare import PLAIN, Comparison, Side
from vlmeff.demo.engine import Answering, Choice, Done, Text, video_turn
from vlmeff.demo.work import Note, Stop
from vlmeff.errors import DataError, MissingExtraError
from vlmeff.vlm.clips import select_clips

MOST_SECONDS = 60.0
MOST_PIXELS = 3840 * 2160  # of a frame
MOST_FRAMES = 12
LOOKED_AT = 36  # frames among which clips are chosen
CLIPS = 3  # with the largest shrink of two, at most 3 * 2 * 2 = MOST_FRAMES frames
LONGEST_SIDE = 896
CPU_SECONDS = 60
# Without the list FFmpeg follows playlists, which name other files of this machine or addresses.
DEMUXERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,gif"
GUARDS = [
    *("-format_whitelist", DEMUXERS, "-protocol_whitelist", "file", "-max_pixels", str(MOST_PIXELS)),
    *("-timelimit", str(CPU_SECONDS), "-threads", "1"),
]
UNREADABLE = "That file cannot be read as a video; use mp4, mov, webm, mkv, avi or gif."


@dataclass(frozen=True, eq=False)
class Clip:
    """Frames of a video of ``duration`` seconds: numbers ``indices`` of the ``of`` that were sampled evenly."""

    frames: list[Image.Image]
    indices: list[int]
    of: int
    duration: float

    @property
    def seconds(self) -> list[float]:
        """When each frame is."""
        return [index * self.duration / self.of for index in self.indices]

    @property
    def metadata(self) -> dict[str, Any]:
        """What processors derive the times of the frames from."""
        return {
            "total_num_frames": self.of,
            "fps": self.of / self.duration,
            "duration": self.duration,
            "frames_indices": list(self.indices),
        }


def read_clip(path: str | Path, *, most_frames: int = MOST_FRAMES, stop: Stop | None = None) -> Clip:
    """At most ``most_frames`` RGB frames, spread evenly over the video.

    Length and size are read from the file's header; FFmpeg decodes nothing of a larger size, and for no longer than
    the limit even where the header says less than the truth.

    Raises:
        DataError: it is no video, too long or too large.  MissingExtraError: imageio-ffmpeg is not installed.
        Stopped: ``stop`` was set between two frames.
    """
    stop = stop if stop is not None else Stop()
    try:
        import imageio_ffmpeg
    except ImportError as error:
        raise MissingExtraError("imageio_ffmpeg", "demo", "videos") from error

    try:
        probe = imageio_ffmpeg.read_frames(str(path), input_params=GUARDS)
        header = next(probe)
        probe.close()
        width, height = header["source_size"]
        duration = float(header["duration"])
    except (OSError, RuntimeError, ValueError, LookupError, AssertionError, StopIteration) as error:
        raise DataError(UNREADABLE) from error
    if width * height > MOST_PIXELS:
        raise DataError(f"The video has {width} x {height} pixels, more than {MOST_PIXELS} in all: make it smaller.")
    if not 0 < duration < float("inf"):
        raise DataError("The video does not say how long it is; save it as mp4.")
    if duration > MOST_SECONDS:
        raise DataError(f"The video is {duration:.0f} seconds long, more than {MOST_SECONDS:.0f}: cut out a part.")

    step = duration / most_frames  # the first frame of each step is taken
    chosen = f"select='isnan(prev_selected_t)+gt(floor(t/{step}),floor(prev_selected_t/{step}))'"
    side = f"scale='min(iw,{LONGEST_SIDE})':'min(ih,{LONGEST_SIDE})':force_original_aspect_ratio=decrease"
    wanted = ["-vf", f"{chosen},{side}", "-fps_mode", "vfr", "-frames:v", str(most_frames), "-an", "-sn", "-dn"]
    try:
        frames = imageio_ffmpeg.read_frames(
            str(path), input_params=[*GUARDS, "-t", str(MOST_SECONDS)], output_params=wanted
        )
        size = next(frames)["size"]
        pictures = []
        for data in frames:
            stop.check()
            pictures.append(Image.frombytes("RGB", size, data))
    except (OSError, RuntimeError, ValueError, LookupError, AssertionError, StopIteration) as error:
        raise DataError(UNREADABLE) from error
    if not pictures:
        raise DataError(UNREADABLE)
    return Clip(pictures, list(range(len(pictures))), len(pictures), duration)


def choose_frames(clip: Clip, question: str) -> Clip:
    """The frames that tiny-clip finds the question to be about, at most ``MOST_FRAMES``.

    Raises:
        ConfigError, DataError: as ``vlmeff.select_clips``.
    """
    chosen = select_clips(clip.frames, question, clip="tiny-clip", clips=CLIPS)
    return replace(clip, frames=list(chosen.frames), indices=[clip.indices[i] for i in chosen.indices])


def ask_video(
    engine: Answering,
    clip: Clip,
    question: str,
    choice: Choice,
    *,
    model: str | None = None,
    max_new_tokens: int = 64,
    stop: Stop | None = None,
) -> Iterator[Comparison]:
    """Answer as it is, then with the preset; yields the page after every piece of news.

    Raises:
        UnsupportedModelError: the model takes no videos.
    """
    stop = stop if stop is not None else Stop()
    turns = [video_turn(question, clip.frames, clip.metadata)]
    now = Comparison(status="starting", choice=choice)
    yield now
    for label, how in (("baseline", PLAIN), ("preset", choice)):
        if stop.asked:
            break
        for news in engine.answer(turns, how, model=model, max_new_tokens=max_new_tokens, stop=stop):
            if isinstance(news, Note):
                now = replace(now, status=f"{label}: {news.text}")
            else:
                side = Side(news.text, news if isinstance(news, Done) else None)
                said: dict[str, Any] = {label: side}
                now = replace(now, status=f"{label}: answering" if isinstance(news, Text) else now.status, **said)
            yield now
    yield replace(now, status="stopped" if stop.asked else "")


def kept(done: Done) -> list[tuple[Image.Image, str]]:
    """What became of the tokens, in order: a picture and its caption for each stretch of frames that shares tokens."""
    if not done.maps or done.maps[0].resampled:
        return []
    return [(one.after, f"{one.kept} of {one.total}") for one in done.maps]
