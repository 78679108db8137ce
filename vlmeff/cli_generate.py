"""``vlmeff generate video``: a clip from a prompt, wrapped beside unwrapped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from vlmeff.errors import ConfigError

generate_app = typer.Typer(no_args_is_help=True, help="Generate videos and pictures, accelerated beside plain.")

out = Console()
err = Console(stderr=True)


@generate_app.callback()
def generate() -> None:
    """Generate videos and pictures, accelerated beside plain."""


@generate_app.command("video")
def video(
    prompt: Annotated[str, typer.Option(help='What to show. tiny-wan knows "a red circle moving left" and its like.')],
    out_file: Annotated[Path, typer.Option("--out", help="The clip of the wrapped pipeline, an .mp4 file.")],
    model: Annotated[str, typer.Option(help="Zoo name, local folder or hub id of a video pipeline.")] = "tiny-wan",
    preset: Annotated[str, typer.Option(help="A preset of the zoo; none for the pipeline as it is.")] = "fast",
    seed: Annotated[int, typer.Option(min=0, help="Of the noise that both clips start from.")] = 0,
    steps: Annotated[int | None, typer.Option(min=1, help="Denoising steps.")] = None,
    frames: Annotated[int | None, typer.Option(min=1, help="Frames of the clip (4 k + 1 for Wan).")] = None,
    height: Annotated[int | None, typer.Option(min=16, help="Pixels.")] = None,
    width: Annotated[int | None, typer.Option(min=16, help="Pixels.")] = None,
    guidance: Annotated[float | None, typer.Option(min=0.0, help="Scale of classifier-free guidance.")] = None,
    fps: Annotated[int, typer.Option(min=1, help="Frames a second of the mp4.")] = 8,
    compare: Annotated[bool, typer.Option("--compare/--no-compare", help="Run the unwrapped pipeline too.")] = True,
    sheet: Annotated[Path | None, typer.Option(help="Write the frames of both clips above each other (.png).")] = None,
    device: Annotated[str | None, typer.Option(help="For example cuda; the CPU when left out.")] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Generate a clip with the preset beside the unwrapped pipeline, and show what each run cost."""
    from vlmeff.diffusion.generating import check_extra, generate_video

    if not prompt.strip():
        raise ConfigError("--prompt is empty: say what to show.")
    if dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise ConfigError(f"--dtype {dtype!r} must be auto, float32, bfloat16 or float16.")
    check_file("--out", out_file, ".mp4")
    if sheet is not None:
        check_file("--sheet", sheet, ".png")
    check_extra()
    from vlmeff.diffusion.sheet import draw_sheet, write_mp4

    asked = {
        "num_inference_steps": steps,
        "num_frames": frames,
        "height": height,
        "width": width,
        "guidance_scale": guidance,
    }
    with err.status("starting") as status:

        def progress(step: str) -> None:
            status.update(step)
            err.print(f"[dim]{escape(step)}[/]", highlight=False)

        videos = generate_video(
            prompt,
            model=model,
            preset=None if preset == "none" else preset,
            seed=seed,
            compare=compare,
            call={name: value for name, value in asked.items() if value is not None},
            device=device,
            dtype=dtype,
            progress=progress,
        )
        progress(f"writing {out_file}")
        write_mp4(videos.runs[-1].frames, out_file, fps=fps)
        if sheet is not None:
            draw_sheet(videos).save(sheet)
    if as_json:
        files = {"out": str(out_file), "sheet": None if sheet is None else str(sheet)}
        print(json.dumps(videos.to_dict() | files))
        return
    _show(videos)


def check_file(option: str, file: Path, suffix: str) -> None:
    """Before anything is computed: the folder is there and the name ends as it should."""
    if file.suffix.lower() != suffix or file.is_dir():
        raise ConfigError(f"{option} {str(file)!r} must be a file name that ends in {suffix}.")
    if not file.parent.is_dir():
        raise ConfigError(f"{option}: the folder {str(file.parent)!r} does not exist.")


def _show(videos: Any) -> None:
    table = Table(title=escape(videos.prompt), title_justify="left", show_edge=False)
    table.add_column("")
    for run in videos.runs:
        table.add_column(run.label)
    table.add_column("how", style="dim")
    table.add_row("seconds", *[f"{run.seconds:.2f}" for run in videos.runs], "measured, the pipeline's call")
    sizes = [f"{run.transformer_bytes / 2**20:.2f} MiB" for run in videos.runs]
    table.add_row("transformer", *sizes, "measured, parameters and buffers")
    if videos.differences:
        differences = videos.differences
        blank = [""] * (len(videos.runs) - 1)
        table.add_row("latent error", *blank, f"{differences['latent_error']:.4f}", "relative, same seed")
        table.add_row("PSNR", *blank, f"{differences['psnr_db']:.1f} dB", "frames against unwrapped")
        table.add_row("speed-up", *blank, f"{differences['speedup']:.2f} x", "measured, this run")
    out.print(table)
    if videos.runs[-1].report is not None:
        out.print(str(videos.runs[-1].report), highlight=False, markup=False)
