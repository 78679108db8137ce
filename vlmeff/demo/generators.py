"""Pictures and clips for the Generate tab: the shipped generators, plain beside accelerated. One at a time."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from vlmeff.errors import ConfigError, MissingExtraError

MODES = ("coupled", "exact", "cspd")
DIGITS = tuple(range(10))
PROMPTS = ("a red circle moving left", "a blue square moving up", "a green circle moving right")
LOOK_AGAIN_SECONDS = 0.1

_lock = threading.Lock()


@dataclass(frozen=True, eq=False)
class Drawn:
    """What came of it. ``rows``: (run, figures ...) under ``head``."""

    sheet: Image.Image
    head: list[str]
    rows: list[list[str]]
    note: str
    clips: tuple[Path, ...] = ()


def draw_digits(digit: int, *, mode: str, seed: int, count: int = 4) -> Drawn:
    """``count`` samples of a class by tiny-mar: plainly with all steps, half and a quarter of them, and with ``mode``.

    Raises:
        ConfigError: an argument cannot work.
    """
    if mode not in MODES or digit not in DIGITS:
        raise ConfigError(f"demo: mode must be one of {', '.join(MODES)} and the digit 0 to 9.")
    from vlmeff.loading import load
    from vlmeff.models.mar.comparing import compare_modes
    from vlmeff.models.mar.loading import load_draft
    from vlmeff.models.mar.sheet import draw_sheet
    from vlmeff.speculative.continuous import Continuous
    from vlmeff.wrapping import wrap

    config = Continuous.named(mode)
    with _lock:
        # Anew for each call, which takes a tenth of a second and leaves nothing of the last visitor's settings.
        draft = load_draft() if config.needs_draft else None
        target = wrap(load("tiny-mar")[0], None, continuous=config, draft=draft)
        compared = compare_modes(target, [digit] * count, config=config, seed=seed)
    plain = compared.plain
    rows = []
    for run in compared.runs:
        deviation = "-" if run is plain or run.deviation_rms is None else f"{run.deviation_rms:.4f}"
        tokens = "-" if run.tokens_per_round is None else f"{run.tokens_per_round:.2f}"
        faster = "-" if plain is None or run is plain else f"{plain.seconds / run.seconds:.2f} x"
        rows.append([run.label, str(run.target_passes), tokens, deviation, f"{run.seconds:.2f}", faster])
    head = ["run", "passes", "tokens per round", "deviation, RMS", "seconds", "speed-up"]
    return Drawn(draw_sheet(compared, title=f"digit {digit}, seed {seed}"), head, rows, compared.guarantee)


def missing_extra() -> str | None:
    """What to install before clips can be made, if anything."""
    from vlmeff.diffusion.generating import check_extra

    try:
        check_extra()
    except MissingExtraError as error:
        return str(error)
    return None


def make_clip(prompt: str, preset: str, *, seed: int, folder: Path) -> Iterator[str | Drawn]:
    """A clip by tiny-wan, unwrapped and with a preset; what is going on, then what came of it.

    Args:
        folder: where the two mp4 files go; their names are ours, not the visitor's.
    Raises:
        MissingExtraError: the extra ``diffusion`` is not installed.
    """
    from vlmeff.diffusion.generating import check_extra, generate_video

    check_extra()
    from vlmeff.diffusion.sheet import draw_sheet, write_mp4

    news: list[str] = []
    result: list[Any] = []

    def work() -> None:
        try:
            with _lock:
                result.append(generate_video(prompt, preset=preset, seed=seed, progress=news.append))
        except BaseException as error:  # handed to whoever asked
            result.append(error)

    worker = threading.Thread(target=work, daemon=True)
    worker.start()
    told = 0
    while worker.is_alive():
        worker.join(LOOK_AGAIN_SECONDS)
        if told < len(news):
            told = len(news)
            yield news[-1]
    (videos,) = result
    if isinstance(videos, BaseException):
        raise videos
    clips = []
    for name, run in zip(("unwrapped", "preset"), videos.runs, strict=True):
        clips.append(folder / f"{name}.mp4")
        write_mp4(run.frames, clips[-1])
    difference = videos.differences
    rows = [[r.label, f"{r.seconds:.2f}", f"{r.transformer_bytes / 2**20:.2f}", "-", "-"] for r in videos.runs]
    rows[-1][3:] = [f"{difference['latent_error']:.4f}", f"{difference['psnr_db']:.1f}"]
    head = ["run", "seconds", "transformer, MiB", "latent error", "PSNR, dB"]
    note = "Same prompt, same noise. A model this small gains memory, not time."
    yield Drawn(draw_sheet(videos), head, rows, note, tuple(clips))
