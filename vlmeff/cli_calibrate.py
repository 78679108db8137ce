"""``vlmeff calibrate``: derive a method's settings for a model from samples."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

calibrate_app = typer.Typer(no_args_is_help=True, help="Derive a method's settings for a model from samples.")
out = Console()
err = Console(stderr=True)

Samples = Annotated[
    str,
    typer.Option(
        "--samples",
        "--images",
        help="A folder of pictures, a .jsonl file of image and question, or mosaics or scenes (generated).",
    ),
]
Question = Annotated[str, typer.Option(help="What is asked about the pictures of a folder.")]


@calibrate_app.command("adaptinfer")
def calibrate_adaptinfer(
    out_file: Annotated[Path, typer.Option("--out", help="The schedule file to write (.json).")],
    samples: Samples,
    model: Annotated[str, typer.Option(help="Zoo name, local folder or hub id.")] = "tiny-llava",
    question: Question = "Describe the picture in detail.",
    limit: Annotated[int, typer.Option(min=1, help="Most samples to take; the paper used about 1000.")] = 200,
    target: Annotated[
        float | None, typer.Option(help="Mean share of the visual tokens processed, over the layers; 0.3 if possible.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="For example cuda; the CPU when left out.")] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
) -> None:
    """Find the layers at which a model's look at the picture shifts, and how much to keep behind each."""
    from rich.progress import Progress

    from vlmeff.calibrating import calibrate_schedule

    with Progress(console=err) as bar:
        task = bar.add_task(f"measuring {model}", total=limit)
        calibration = calibrate_schedule(
            model,
            samples,
            out_file,
            question=question,
            limit=limit,
            target=target,
            device=device,
            dtype=dtype,
            progress=lambda done: bar.update(task, completed=done),
        )
    schedule = calibration.schedule
    table = Table(title=f"{calibration.samples} samples", title_justify="left", show_edge=False)
    for column in ("after layer", "share of current tokens kept"):
        table.add_column(column)
    for layer, ratio in zip(schedule.layers, schedule.ratios, strict=True):
        table.add_row(str(layer), f"{ratio:.3f}")
    out.print(table)
    out.print(f"processed on average over layers: {calibration.processed:.1%} of the visual tokens")
    out.print(f"written to {out_file}; use it with vlmeff.AdaptInfer(schedule={str(out_file)!r})", soft_wrap=True)


@calibrate_app.command("hiprune")
def calibrate_hiprune(
    samples: Samples,
    model: Annotated[str, typer.Option(help="Zoo name, local folder or hub id.")] = "tiny-llava",
    limit: Annotated[int, typer.Option(min=1, help="Most samples to take; the paper used 5000.")] = 200,
    top: Annotated[float, typer.Option(help="Share of the tokens compared; the paper shows 0.05, 0.1, 0.25.")] = 0.1,
    plot: Annotated[Path | None, typer.Option(help="Draw the curve (.png).")] = None,
    out_file: Annotated[Path | None, typer.Option("--out", help="Write the curve and the suggestion (.json).")] = None,
    device: Annotated[str | None, typer.Option(help="For example cuda; the CPU when left out.")] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
) -> None:
    """Find the vision layer up to which a model looks at objects: HiPrune's object layer."""
    from rich.progress import Progress

    from vlmeff.calibrating import calibrate_object_layer

    with Progress(console=err) as bar:
        task = bar.add_task(f"measuring {model}", total=limit)
        curve, default = calibrate_object_layer(
            model,
            samples,
            out=out_file,
            plot=plot,
            limit=limit,
            top=top,
            device=device,
            dtype=dtype,
            progress=lambda done: bar.update(task, completed=done),
        )
    title = f"{curve.samples} pictures, strongest {curve.top:.0%} of the tokens"
    table = Table(title=title, title_justify="left", show_edge=False)
    for column in ("layer", "mean distance", "rise to the next", ""):
        table.add_column(column)
    for layer, distance, rise in zip(curve.layers, curve.distances, [*curve.rises, None], strict=True):
        marks = ["suggested"] * (layer == curve.object_layer) + ["default"] * (layer == default)
        table.add_row(str(layer), f"{distance:.3f}", "" if rise is None else f"{rise:+.3f}", ", ".join(marks))
    out.print(table)
    if curve.object_layer is None:
        out.print(f"the distance never rises, so there is no turning point; the default stays: {default}")
    else:
        advice = "" if curve.agreement >= 0.5 else f": no clear turning point, better keep the default ({default})"
        out.print(f"{curve.agreement:.0%} of the pictures suggest this layer by themselves{advice}", soft_wrap=True)
        out.print(f"use it with vlmeff.HiPrune(object_layer={curve.object_layer})")
    for path in (out_file, plot):
        if path is not None:
            out.print(f"written to {path}", soft_wrap=True)


@calibrate_app.command("prefixkv")
def calibrate_prefixkv(
    out_file: Annotated[Path, typer.Option("--out", help="The recipe file to write (.json).")],
    samples: Samples,
    model: Annotated[str, typer.Option(help="Zoo name, local folder or hub id.")] = "tiny-llava",
    question: Question = "Describe the picture in detail.",
    limit: Annotated[int, typer.Option(min=1, help="Most samples to take; 16 to 64 are enough.")] = 32,
    budgets: Annotated[
        str | None, typer.Option(help="Shares of the cache kept, separated by commas; 0.1,0.2,...,0.9 when left out.")
    ] = None,
    sink: Annotated[int | None, typer.Option(min=0, help="First tokens that always stay; 4 when left out.")] = None,
    recent: Annotated[int | None, typer.Option(min=0, help="Last tokens that always stay; 8 when left out.")] = None,
    metric: Annotated[
        str | None, typer.Option(help="What importance is: full, mean or window; full, the paper's, when left out.")
    ] = None,
    window: Annotated[
        int | None, typer.Option(min=1, help="Last queries that --metric window looks at; 32 when left out.")
    ] = None,
    tokens: Annotated[str | None, typer.Option(help="Token method that the recipe is to be used with.")] = None,
    keep: Annotated[float | None, typer.Option(help="Share of the visual tokens that it keeps.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where an interrupted run was.")] = False,
    device: Annotated[str | None, typer.Option(help="For example cuda; the CPU when left out.")] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
) -> None:
    """Find the share of its key/value cache that each layer of a model keeps: PrefixKV's recipe."""
    from rich.progress import Progress

    from vlmeff.calibrating import calibrate_recipe

    with Progress(console=err) as bar:
        task = bar.add_task(f"measuring {model}", total=limit)
        recipe = calibrate_recipe(
            model,
            samples,
            out_file,
            question=question,
            limit=limit,
            budgets=budgets,
            sink=sink,
            recent=recent,
            metric=metric,
            window=window,
            tokens=tokens,
            keep=keep,
            resume=resume,
            device=device,
            dtype=dtype,
            progress=lambda done: bar.update(task, completed=done),
        )
    made = recipe.calibration
    title = f"{made['samples']} prompts of {made['mean_prompt_tokens']:.0f} tokens on average"
    table = Table(title=title, title_justify="left", show_edge=False)
    for column in ("kept", "least in a layer", "most in a layer", "two halves differ by"):
        table.add_column(column)
    for budget, shares in recipe.keep_ratios.items():
        halves = made["half_difference"].get(str(budget))
        least, most = (
            f"{share:.3f} (layer {recipe.layers[shares.index(share)]})" for share in (min(shares), max(shares))
        )
        table.add_row(f"{budget:g}", least, most, "" if halves is None else f"{halves:.4f}")
    out.print(table)
    out.print(f"written to {out_file}; use it with vlmeff.PrefixKV(recipe={str(out_file)!r})", soft_wrap=True)
