"""``vlmeff generate image``: pictures of a MAR generator, accelerated beside plain."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from vlmeff.errors import ConfigError, UnsupportedModelError

if TYPE_CHECKING:
    from vlmeff.models.mar.comparing import Comparison
    from vlmeff.models.mar.trunk import MAR
    from vlmeff.speculative.continuous import Continuous

out = Console()
err = Console(stderr=True)


def image(
    out_file: Annotated[Path, typer.Option("--out", help="The sheet of samples, a .png file.")],
    model: Annotated[str, typer.Option(help="tiny-mar, a folder, or an official MAR checkpoint file.")] = "tiny-mar",
    classes: Annotated[list[int] | None, typer.Option("--class", help="Class to draw; may be repeated.")] = None,
    count: Annotated[
        int | None, typer.Option(min=1, help="Samples of each class: by default 10, or 1 without --class.")
    ] = None,
    mode: Annotated[
        str, typer.Option(help="plain, coupled, coupled-strict, exact, cspd or cspd-official.")
    ] = "coupled",
    seed: Annotated[int, typer.Option(min=0, help="Of the noise that all runs share.")] = 0,
    num_iter: Annotated[int | None, typer.Option(min=1, help="Steps of the transformer; one per token.")] = None,
    cfg: Annotated[float, typer.Option(min=0.0, help="Weight of classifier-free guidance; 1 is none.")] = 1.0,
    window: Annotated[int | None, typer.Option(min=0, help="Steps that one round looks at.")] = None,
    delta: Annotated[float | None, typer.Option(min=0.0, help="Tolerance of the coupled mode.")] = None,
    draft: Annotated[
        str | None, typer.Option(help="Draft model: a folder or file. By default the one beside the model, if needed.")
    ] = None,
    compare: Annotated[
        bool, typer.Option("--compare/--no-compare", help="Also decode plainly: all steps, half, a quarter.")
    ] = True,
    vae: Annotated[Path | None, typer.Option(help="kl16.ckpt, which official checkpoints need.")] = None,
    device: Annotated[str | None, typer.Option(help="For example cuda; the CPU when left out.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Draw samples with speculative decoding beside plain decoding, and show what each run cost."""
    from vlmeff.cli_generate import check_file

    check_file("--out", out_file, ".png")
    config = make_config(mode, window=window, delta=delta, draft=draft)
    from vlmeff.models.mar.comparing import compare_modes
    from vlmeff.models.mar.sheet import draw_sheet

    target = load_wrapped(model, draft, config, vae=vae, device=device)
    if target.codec is None:
        raise ConfigError(f"--vae: {model} makes latents; give the VAE that turns them into pictures (kl16.ckpt).")
    chosen = classes or list(range(min(10, target.config.class_num)))
    labels = [label for label in chosen for _ in range(count or (10 if classes else 1))]
    with err.status("sampling"):
        comparison = compare_modes(
            target, labels, config=config, num_iter=num_iter, cfg=cfg, seed=seed, compare=compare
        )
    said = ", ".join(map(str, dict.fromkeys(labels)))
    title = f"{Path(model).name}, class {said}, seed {seed}, cfg {cfg:g}"
    draw_sheet(comparison, title=title).save(out_file)
    if as_json:
        print(json.dumps({"model": model, "mode": mode, "out": str(out_file)} | comparison.to_dict()))
        return
    _show(comparison, title)


def make_config(mode: str, *, window: int | None, delta: float | None, draft: str | None) -> Continuous:
    """The configuration that the options say; options of another mode are an error."""
    from vlmeff.speculative.continuous import Continuous

    given: dict[str, Any] = {"window": window, "delta": delta}
    given = {name: value for name, value in given.items() if value is not None}
    if mode == "plain":
        if given or draft is not None:
            named = ", ".join(f"--{name}" for name in [*given, *([] if draft is None else ["draft"])])
            raise ConfigError(f"{named}: has no effect with --mode plain; leave it out.")
        return Continuous(mode=None)
    if draft is not None and mode.startswith("coupled"):
        given["proposal"] = "draft"
    config = Continuous.named(mode, **given)
    if config.plain and draft is not None:
        raise ConfigError(f"--draft: has no effect with --mode {mode} --window {config.window}, which decodes plainly.")
    return config


def load_wrapped(model: str, draft: str | None, config: Continuous, *, vae: Path | None, device: str | None) -> MAR:
    """The model, wrapped with the configuration and, where its mode needs one, with a draft."""
    from vlmeff.models.mar.loading import load_draft
    from vlmeff.models.mar.vae import load_vae
    from vlmeff.wrapping import wrap

    target = _load(model, device)
    if vae is not None:
        target.use_codec(load_vae(vae))
    if config.plain:
        return target
    second = None
    if config.needs_draft:
        second = _load(draft, device) if draft is not None else load_draft(_folder(model), device=device)
    return wrap(target, None, continuous=config, draft=second)


def _load(name: str, device: str | None) -> MAR:
    """A MAR model by zoo name, folder, or checkpoint file."""
    from vlmeff.loading import load
    from vlmeff.models.mar.loading import load_mar
    from vlmeff.models.mar.trunk import MAR

    loaded = load_mar(name, device=device) if Path(name).is_file() else load(name, device=device)[0]
    if not isinstance(loaded, MAR):
        raise UnsupportedModelError(
            f"--model {name!r} is a {type(loaded).__name__}; images come from MAR generators (tiny-mar, a folder or an "
            "official checkpoint file)."
        )
    return loaded


def _folder(name: str) -> Path:
    """Where the draft of a model would stand."""
    from vlmeff.models.mar.loading import find_mar

    source = find_mar(name.split("/")[0] if name.startswith("tiny-mar/") else name)
    return source.parent if source.is_file() else source


def _show(comparison: Comparison, title: str) -> None:
    table = Table(title=escape(title), title_justify="left", show_edge=False)
    for name in ("", "passes", "tokens per round", "deviation", "seconds", "speed-up"):
        table.add_column(name, justify="left" if not name else "right")
    plain = comparison.plain
    for run in comparison.runs:
        fields = [str(run.target_passes)]
        fields.append("" if run.tokens_per_round is None else f"{run.tokens_per_round:.2f}")
        fields.append("" if run.deviation_rms is None or run is plain else f"{run.deviation_rms:.4f}")
        fields.append(f"{run.seconds:.2f}")
        fields.append("" if plain is None or run is plain else f"{plain.seconds / run.seconds:.2f} x")
        table.add_row(run.label, *fields)
    out.print(table)
    out.print(f"[dim]{escape(comparison.guarantee)} Deviation: RMS of the latents to plain; seconds: this run.[/]")
