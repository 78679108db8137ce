"""Pictures and clips for the Generate tab: the shipped generators, plain beside accelerated."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from vlmeff.errors import ConfigError, MissingExtraError

MODES = ("coupled", "exact", "cspd")
DIGITS = tuple(range(10))
PROMPTS = ("a red circle moving left", "a blue square moving up", "a green circle moving right")


@dataclass(frozen=True, eq=False)
class Drawn:
    """What came of it. ``rows``: (run, figures ...) under ``head``."""

    sheet: Image.Image
    head: list[str]
    rows: list[list[str]]
    note: str
    clips: tuple[Path, ...] = ()


def draw_digits(
    digit: int, *, mode: str, seed: int, count: int = 4, progress: Callable[[str], None] = lambda run: None
) -> Drawn:
    """``count`` samples of a class by tiny-mar: plainly with all steps, half and a quarter of them, and with ``mode``.

    Args:
        progress: told of each run before it begins; what it raises ends the drawing.
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
    # Anew for each call, which takes a tenth of a second and leaves nothing of the last visitor's settings.
    draft = load_draft() if config.needs_draft else None
    target = wrap(load("tiny-mar")[0], None, continuous=config, draft=draft)
    compared = compare_modes(target, [digit] * count, config=config, seed=seed, progress=progress)
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


def make_clip(
    prompt: str,
    preset: str,
    *,
    seed: int,
    folder: Path,
    progress: Callable[[str], None] = lambda what: None,
    on_step: Callable[[], None] = lambda: None,
) -> Drawn:
    """A clip by tiny-wan, unwrapped and with a preset.

    Args:
        folder: where the two mp4 files go; their names are ours, not the visitor's.
        progress, on_step: as of ``generate_video``.
    Raises:
        MissingExtraError: the extra ``diffusion`` is not installed.
    """
    from vlmeff.diffusion.generating import check_extra, generate_video

    check_extra()
    from vlmeff.diffusion.sheet import draw_sheet, write_mp4

    videos = generate_video(prompt, preset=preset, seed=seed, progress=progress, on_step=on_step)
    clips = []
    for name, run in zip(("unwrapped", "preset"), videos.runs, strict=True):
        clips.append(folder / f"{name}.mp4")
        write_mp4(run.frames, clips[-1])
    difference = videos.differences
    rows = [[r.label, f"{r.seconds:.2f}", f"{r.transformer_bytes / 2**20:.2f}", "-", "-"] for r in videos.runs]
    rows[-1][3:] = [f"{difference['latent_error']:.4f}", f"{difference['psnr_db']:.1f}"]
    head = ["run", "seconds", "transformer, MiB", "latent error", "PSNR, dB"]
    note = "Same prompt, same noise. A model this small gains memory, not time."
    return Drawn(draw_sheet(videos), head, rows, note, tuple(clips))
