"""``vlmeff train-qvgen``: train a video transformer for 4- or 3-bit weights and activations, and write it packed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from vlmeff.errors import ConfigError, DataError, MissingExtraError, UnsupportedModelError

if TYPE_CHECKING:
    from vlmeff.diffusion.qvgen.config import TrainingConfig
    from vlmeff.diffusion.qvgen.training import Training

out_console = Console()
err = Console(stderr=True)

CLIPS, QUANTIZED, SETTINGS = "clips", "quantized", "config.yaml"
GENERATED = "tiny-wan"  # whose data can be drawn
# What a run on generated clips takes unless told otherwise: minutes on a CPU.
GENERATED_DEFAULTS = {"steps": 400, "batch_size": 8, "lr": 3e-4, "rank": 16, "validate_every": 100}


def train_qvgen(
    out: Annotated[Path, typer.Option("--out", help="Folder for checkpoint, log, plot and the quantized model.")],
    model: Annotated[str, typer.Option(help="Zoo name or folder of a pipeline.")] = GENERATED,
    data: Annotated[
        Path | None,
        typer.Option(help="Folder of encoded clips, or of videos (.mp4) with prompts (.txt); tiny-wan draws its own."),
    ] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file of settings; the options below go before it.")] = None,
    bits: Annotated[int | None, typer.Option(help="Of weights and activations: 4 or 3.")] = None,
    phi: Annotated[
        str | None, typer.Option(help="svd (QVGen), none (plain training), keep, drop or lora (controls).")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Clips of a step.")] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate.")] = None,
    rank: Annotated[int | None, typer.Option(help="Of the auxiliary module at the start.")] = None,
    decay_fraction: Annotated[
        float | None, typer.Option(help="Share of the training after which it is gone; 1 as in the paper.")
    ] = None,
    shift: Annotated[float | None, typer.Option(help="Of the noise; the scheduler's when left out.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of everything random.")] = None,
    precision: Annotated[str | None, typer.Option(help="auto, float32 or bfloat16.")] = None,
    gradient_checkpointing: Annotated[
        bool | None, typer.Option(help="Compute activations twice instead of keeping them.")
    ] = None,
    clips: Annotated[int, typer.Option(min=1, help="Clips to draw for tiny-wan.")] = 480,
    frames: Annotated[int | None, typer.Option(min=1, help="Frames of a video of --data; all when left out.")] = None,
    height: Annotated[int | None, typer.Option(min=1, help="Pixels that videos are resized to.")] = None,
    width: Annotated[int | None, typer.Option(min=1, help="Pixels that videos are resized to.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on where an interrupted run was, with its settings.")
    ] = False,
    device: Annotated[str | None, typer.Option(help="For example cuda; the CPU when left out.")] = None,
) -> None:
    """Train a video transformer for few bits (QVGen, arXiv 2505.11497) and write it packed.

    A copy of the transformer in full precision is the teacher. Settings not listed here (clip_lr, decay, warmup_steps,
    condition_dropout, validation_clips, rules, ...) go into the file of --config. Plain training at the same number of
    steps (--phi none) is the baseline to compare with; on small models it is often as good.
    """
    try:
        import diffusers  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("diffusers", "diffusion", "video diffusion models") from error
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from vlmeff.diffusion.qvgen.config import TrainingConfig, read_yaml
    from vlmeff.diffusion.qvgen.data import ClipFolder
    from vlmeff.diffusion.qvgen.training import CHECKPOINT, train

    if not resume and (out / CHECKPOINT).exists():
        raise ConfigError(f"--out {str(out)!r} holds a training run: pass --resume to go on, or another folder.")
    flags: dict[str, Any] = {
        "bits": bits,
        "phi": phi,
        "steps": steps,
        "batch_size": batch_size,
        "lr": lr,
        "rank": rank,
        "decay_fraction": decay_fraction,
        "shift": shift,
        "seed": seed,
        "precision": precision,
        "gradient_checkpointing": gradient_checkpointing,
    }
    chosen = _merged(
        GENERATED_DEFAULTS if model == GENERATED and data is None else {},
        read_yaml(out / SETTINGS) if resume and (out / SETTINGS).is_file() else {},
        {} if config is None else read_yaml(config),
        {name: value for name, value in flags.items() if value is not None},
    )
    settings = TrainingConfig.from_dict(chosen)
    pipe = open_pipeline(model)
    folder = prepare_data(pipe, model, data, out, clips=clips, frames=frames, height=height, width=width, device=device)
    source = ClipFolder(folder)
    if not (resume and (out / SETTINGS).is_file()):
        _write_settings(settings, out)
    transformer = pipe.transformer
    pipe.vae = pipe.text_encoder = None  # room for training
    if device is not None:
        transformer.to(device)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err) as bar:
        task = bar.add_task("training", total=settings.steps)

        def show(row: dict[str, Any]) -> None:
            if "loss" in row:
                text = f"loss {row['loss']:.4g} grad {row['grad_norm']:.3g} rank {row['rank']}"
                bar.update(task, completed=row["step"] + 1, description=text)
            else:
                without = f"{row['validation_without_phi']:.4g}"
                bar.console.print(f"step {row['step'] + 1}: held out {row['validation']:.4g}, without Phi {without}")

        run = train(transformer, source, pipe.scheduler, settings, out=out, resume=resume, progress=show)
    _finish(run, out, model)


def open_pipeline(model: str) -> Any:
    """The diffusers pipeline of a folder or of a zoo name, in float32.

    Raises:
        UnsupportedModelError: not a pipeline with one transformer.
    """
    import torch

    from vlmeff.diffusion.loading import is_pipeline, load_video
    from vlmeff.loading import load

    pipe: Any = load_video(model, dtype=torch.float32) if is_pipeline(model) else load(model, dtype=torch.float32)[0]
    if getattr(pipe, "transformer", None) is None or getattr(pipe, "scheduler", None) is None:
        raise UnsupportedModelError(
            f"--model {model}: {type(pipe).__name__} is not a pipeline with a transformer and a scheduler; pass the "
            "folder of the whole pipeline."
        )
    if getattr(pipe, "transformer_2", None) is not None:
        raise UnsupportedModelError(
            f"--model {model} has two transformers, each for a part of the timesteps; training one of them is not "
            "supported."
        )
    return pipe


def prepare_data(
    pipe: Any,
    model: str,
    data: Path | None,
    out: Path,
    *,
    clips: int,
    frames: int | None = None,
    height: int | None = None,
    width: int | None = None,
    device: str | None = None,
) -> Path:
    """The folder of encoded clips: ``data`` itself, or ``out/clips``, which is made from videos or drawings once.

    Raises:
        ConfigError: there are no data, and the model cannot draw its own.
        DataError: videos or shards cannot be used.
    """
    from vlmeff.diffusion.qvgen.data import EMPTY_PROMPT, SHARD
    from vlmeff.diffusion.qvgen.encode import encode_clips, read_videos

    if data is not None and not data.is_dir():
        raise DataError(f"--data {str(data)!r}: no such folder.")
    if data is not None and any(data.glob(SHARD)):
        return data
    if data is None and model != GENERATED:
        raise ConfigError(f"--data is needed: a folder of clips to train {model} on. Only {GENERATED} draws its own.")
    folder = out / CLIPS
    if (folder / EMPTY_PROMPT).is_file():  # written last: the clips are complete
        err.print(f"[dim]clips of {folder} are used again[/]", highlight=False)
        return folder
    for part in folder.glob(SHARD):  # of an encoding that was interrupted
        part.unlink()
    if device is not None:
        pipe.vae.to(device)
        pipe.text_encoder.to(device)
    with err.status("encoding clips"):
        if data is not None:
            step = pipe.vae_scale_factor_temporal
            count = encode_clips(pipe, read_videos(data, frames=frames, step=step), folder, height=height, width=width)
        else:
            from vlmeff.models.tiny_wan.architecture import MAX_TEXT
            from vlmeff.models.tiny_wan.clips import draw

            drawn = (draw("train", index) for index in range(clips))
            pairs = ((clip.pixels(), clip.prompt) for clip in drawn)
            count = encode_clips(pipe, pairs, folder, max_sequence_length=MAX_TEXT)
    err.print(f"[dim]{count} clips encoded to {folder}[/]", highlight=False)
    return folder


def _merged(*layers: dict[str, Any]) -> dict[str, Any]:
    """Settings of which later ones win; ``bits`` wins over w_bits and a_bits that came before it."""
    merged: dict[str, Any] = {}
    for layer in layers:
        if "bits" in layer:
            merged = {name: value for name, value in merged.items() if name not in ("w_bits", "a_bits")}
        merged.update(layer)
    return merged


def _write_settings(settings: TrainingConfig, out: Path) -> None:
    import yaml

    out.mkdir(parents=True, exist_ok=True)
    (out / SETTINGS).write_text(yaml.safe_dump(settings.to_dict(), sort_keys=False))


def _finish(run: Training, out: Path, model: str) -> None:
    table = Table(title=f"{run.config.steps} steps in {run.seconds:.0f} s", title_justify="left", show_edge=False)
    for column in ("", ""):
        table.add_column(column)
    losses = [row["loss"] for row in run.history if "loss" in row]
    table.add_row("loss, first step", f"{losses[0]:.4g}")
    table.add_row("loss, mean of the last ten steps", f"{sum(losses[-10:]) / len(losses[-10:]):.4g}")
    if run.final_validation is not None:
        table.add_row("loss on held-out clips", f"{run.final_validation:.4g}")
    out_console.print(table)
    if run.config.phi == "keep":
        out_console.print("the auxiliary module was kept: there is nothing to export; a reference, not a model")
        return
    from vlmeff.diffusion.checkpoint import save_quantized
    from vlmeff.diffusion.qvgen.export import export

    names = export(run.transformer, dtype=run.dtype)
    save_quantized(run.transformer, out / QUANTIZED, producer="qvgen", base_model=model)
    out_console.print(
        f"{len(names)} layers with {run.config.w_bits}-bit weights and {run.config.a_bits}-bit activations written to "
        f"{out / QUANTIZED}",
        soft_wrap=True,
    )
