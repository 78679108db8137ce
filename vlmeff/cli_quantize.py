"""``vlmeff quantize``: write a video model with quantized layers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress

from vlmeff.errors import ConfigError

out = Console()
err = Console(stderr=True)


def quantize_command(
    model: Annotated[
        str | None, typer.Option(help="Zoo name, local folder or hub id of a video pipeline or transformer.")
    ] = None,
    to: Annotated[Path | None, typer.Option("--out", help="Folder that is written.")] = None,
    scheme: Annotated[str, typer.Option(help="A scheme (--list), or auto, which chooses by hardware.")] = "auto",
    group: Annotated[int | None, typer.Option(min=1, help="Input channels that share a scale.")] = None,
    rank: Annotated[int | None, typer.Option(min=1, help="Of the high-precision branch of svdq schemes.")] = None,
    refine: Annotated[int, typer.Option(min=0, help="Rounds of fitting the branch again.")] = 0,
    alpha: Annotated[float, typer.Option(help="How far activations are smoothed, 0 to 1.")] = 0.5,
    keep: Annotated[
        list[str] | None, typer.Option(help="Pattern of module names that stay as they are; may be repeated.")
    ] = None,
    text_encoder: Annotated[str | None, typer.Option(help="A weight-only scheme for the text encoder.")] = None,
    memory_gb: Annotated[float | None, typer.Option(help="If 8 bits exceed it, auto takes 4.")] = None,
    prompt: Annotated[
        list[str] | None, typer.Option(help="Calibration prompt of svdq schemes; may be repeated.")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Denoising steps of each calibration video; the pipeline's own.")
    ] = None,
    height: Annotated[int | None, typer.Option(min=1, help="Of the calibration videos; the pipeline's own.")] = None,
    width: Annotated[int | None, typer.Option(min=1, help="Of the calibration videos; the pipeline's own.")] = None,
    frames: Annotated[int | None, typer.Option(min=1, help="Of the calibration videos; the pipeline's own.")] = None,
    revision: Annotated[str | None, typer.Option(help="Commit or tag on the hub.")] = None,
    device: Annotated[str | None, typer.Option(help="For example cuda; the CPU when left out.")] = None,
    dry_run: Annotated[bool, typer.Option(help="Print what would be quantized, and end.")] = False,
    overwrite: Annotated[bool, typer.Option(help="Write into a folder that is not empty.")] = False,
    show_list: Annotated[bool, typer.Option("--list", help="List the schemes, and end.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Quantize the linear layers of a video transformer and write it; ``vlmeff.load(DIR)[0]`` gives it back."""
    from vlmeff.diffusion.schemes import SCHEMES, SUMMARIES, get_scheme

    if show_list:
        for name in SCHEMES:
            out.print(f"{name:<12} {SUMMARIES[name]}", highlight=False)
        return
    if model is None:
        raise ConfigError("--model is missing: name a model, such as tiny-wan.")
    if scheme != "auto":
        get_scheme(scheme, group=group, rank=rank)  # before anything is loaded
    if to is None and not dry_run:
        raise ConfigError("--out is missing: name the folder to write, or pass --dry-run.")
    if to is not None and to.exists() and not overwrite and (not to.is_dir() or any(to.iterdir())):
        raise ConfigError(f"--out {str(to)!r} is not an empty folder; name another one, or pass --overwrite.")

    from vlmeff.diffusion.plan import Quant, transformers_of
    from vlmeff.diffusion.rules import as_rules
    from vlmeff.loading import load

    calibrate: dict[str, Any] | None = None
    if prompt:
        sizes = {"height": height, "width": width, "num_frames": frames, "num_inference_steps": steps}
        given = {key: value for key, value in sizes.items() if value is not None}
        calibrate = {"prompt": list(prompt), **given}
    quant = Quant(
        scheme,
        group=group,
        rank=rank,
        rules=as_rules([(pattern, "keep", "--keep") for pattern in keep]) if keep else None,
        calibrate=calibrate,
        alpha=alpha,
        refine=refine,
        text_encoder=text_encoder,
        memory_gb=memory_gb,
        keep_original=False,
    )
    with err.status("loading"):
        loaded, _ = load(model, revision=revision, device=device)
    modules = transformers_of(loaded)
    if dry_run:
        _dry_run(modules, quant, as_json=as_json)
        return
    assert to is not None
    from vlmeff.diffusion.checkpoint import save_pipeline, save_quantized
    from vlmeff.diffusion.wrapped import quantize_model

    with Progress(console=err, transient=True) as bar:
        task = bar.add_task("quantizing", total=None)

        def step(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        done, notes = quantize_model(loaded, quant, progress=step)
    producer = "svdq" if any(q.scheme.startswith("svdq") for q in done.values()) else "rtn"
    if len(modules) == 1 and "" in modules:
        save_quantized(loaded, to, producer=producer, base_model=model)
    else:
        save_pipeline(loaded, to, producer=producer)
    if as_json:
        tables = {name: q.table.to_dict() for name, q in done.items()}
        print(json.dumps({"out": str(to), "notes": notes, "components": tables}))
        return
    for name, q in done.items():
        out.print(f"[bold]{name or model}[/]: {q.scheme}", highlight=False)
        out.print(str(q.table), highlight=False, soft_wrap=True, markup=False)
    for note in notes:
        err.print(note, highlight=False, markup=False)
    out.print(f'written to {to}; load it with vlmeff.load("{to}")', highlight=False, markup=False)


def _dry_run(modules: dict[str, Any], quant: Any, *, as_json: bool) -> None:
    from vlmeff.diffusion.families import dry_run
    from vlmeff.diffusion.schemes import LayerSpec, get_scheme
    from vlmeff.diffusion.wrapped import choose_scheme

    tables = {}
    for name, module in modules.items():
        scheme, why = choose_scheme(module, quant)
        asked = get_scheme(scheme, group=quant.group, rank=quant.rank)

        def spec_of(other: str, asked: LayerSpec = asked) -> LayerSpec:
            return asked if other == asked.scheme else get_scheme(other)

        table = dry_run(module, scheme, list(quant.rules) if quant.rules else None, spec_of=spec_of)
        tables[name or type(module).__name__] = {"scheme": scheme, "why": why, **table.to_dict()}
        if not as_json:
            out.print(f"{name or type(module).__name__}: {scheme} {f'({why})' if why else ''}", highlight=False)
            out.print(str(table), highlight=False, soft_wrap=True, markup=False)
    if as_json:
        print(json.dumps(tables))
