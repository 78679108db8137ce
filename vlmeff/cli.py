"""The command line: ``vlmeff ask | demo | presets | calibrate | doctor | eval | serve | zoo``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from vlmeff import __version__
from vlmeff.cli_calibrate import calibrate_app
from vlmeff.cli_demo import demo_command
from vlmeff.cli_doctor import doctor
from vlmeff.cli_eval import eval_app
from vlmeff.cli_generate import generate_app
from vlmeff.cli_generate_image import image
from vlmeff.cli_quantize import quantize_command
from vlmeff.cli_qvgen import train_qvgen
from vlmeff.cli_serve import serve_command
from vlmeff.errors import ConfigError, VlmeffError

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Vision-language models that cost less to run.")
zoo_app = typer.Typer(no_args_is_help=True, help="The model zoo: verified models and presets.")
app.add_typer(zoo_app, name="zoo")
app.add_typer(calibrate_app, name="calibrate")
app.add_typer(eval_app, name="eval")
generate_app.command("image")(image)
app.add_typer(generate_app, name="generate")

out = Console()
err = Console(stderr=True)


def main() -> None:
    """Run the command line; an error of vlmeff is one line on stderr and its exit code."""
    try:
        code = app(standalone_mode=False)  # a typer.Exit comes back as its code
    except VlmeffError as error:
        err.print(f"[bold red]error:[/] {_plain(error)}", highlight=False, soft_wrap=True)
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        err.print("interrupted")
        sys.exit(130)
    except Exception as error:
        # click's usage errors know how to show themselves; everything else is a bug and keeps its traceback.
        show = getattr(error, "show", None)
        if show is None:
            raise
        show()
        sys.exit(getattr(error, "exit_code", 2))
    sys.exit(code if isinstance(code, int) else 0)


def _plain(error: object) -> str:
    from rich.markup import escape

    return escape(str(error))


def _version(value: bool) -> None:
    if value:
        print(f"vlmeff {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show it and exit.")
    ] = False,
) -> None:
    """Options before the command."""


@app.command()
def ask(
    image: Annotated[Path, typer.Argument(help="A picture file.")],
    question: Annotated[str, typer.Argument(help="What to ask about it.")],
    model: Annotated[str, typer.Option(help="Zoo name, local folder or hub id.")] = "tiny-llava",
    preset: Annotated[str, typer.Option(help="A preset of the zoo (vlmeff presets).")] = "fast",
    tokens: Annotated[
        str | None,
        typer.Option(help="Another token method, such as divprune; two joined by + (hiprune+adaptinfer)."),
    ] = None,
    keep: Annotated[
        float | None, typer.Option(help="Share of visual tokens kept (at most 1), or tokens per image (from 2 on).")
    ] = None,
    kv: Annotated[str | None, typer.Option(help="A KV retention policy, such as prefixkv or snapkv.")] = None,
    keep_ratio: Annotated[float | None, typer.Option(help="Share of the prompt's KV entries that it keeps.")] = None,
    compare: Annotated[bool, typer.Option("--compare/--no-compare", help="Run the unwrapped model too.")] = True,
    save_overlay: Annotated[
        Path | None, typer.Option(help="Write the kept tokens as a picture (.png) or an animation (.gif, .webp).")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 64,
    warmup: Annotated[int, typer.Option(min=0, help="Unmeasured runs before each measured one.")] = 1,
    device: Annotated[str | None, typer.Option(help="For example cuda; the CPU when left out.")] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Answer a question about a picture, with the preset beside the unwrapped model, and show what each run cost."""
    from vlmeff.asking import ask_picture  # torch is imported only when a model runs
    from vlmeff.pictures import open_picture

    if dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise ConfigError(f"--dtype {dtype!r} must be auto, float32, bfloat16 or float16.")
    if not question.strip():
        raise ConfigError("the question is empty: say what to ask about the picture.")
    if save_overlay is not None:
        if not save_overlay.parent.is_dir():
            raise ConfigError(f"--save-overlay: the folder {str(save_overlay.parent)!r} does not exist.")
        if save_overlay.is_dir() or save_overlay.suffix.lower() not in (".png", ".gif", ".webp"):
            raise ConfigError(
                f"--save-overlay {str(save_overlay)!r} must be a file name that ends in .png, .gif or .webp."
            )
    picture = open_picture(image)
    overrides: dict[str, Any] = {}
    named = None if tokens is None else _token_methods(tokens)
    if keep is not None:
        overrides["keep"] = int(keep) if keep > 1 and keep == int(keep) else keep
    if keep_ratio is not None:
        overrides["keep_ratio"] = keep_ratio
    with err.status("starting") as status:

        def progress(step: str) -> None:
            status.update(step)
            err.print(f"[dim]{step}[/]", highlight=False)

        answers = ask_picture(
            picture,
            question,
            model=model,
            preset=preset,
            tokens=named,
            kv=kv,
            overrides=overrides,
            compare=compare,
            max_new_tokens=max_new_tokens,
            warmup=warmup,
            device=device,
            dtype=dtype,
            progress=progress,
        )
    if save_overlay is not None:
        try:
            answers.overlay().save(save_overlay)
        except OSError as error:
            raise ConfigError(f"--save-overlay {str(save_overlay)!r} cannot be written: {error}") from error
        err.print(f"[dim]overlay written to {save_overlay}[/]", highlight=False)
    if as_json:
        print(json.dumps(answers.to_dict()))
        return
    _show(answers)


def _token_methods(text: str) -> list[str]:
    """Names joined by +, which is also part of a name: hiprune++."""
    from tokenpruning import methods

    if text in methods.names():
        return [text]
    inner = text.rpartition("+")
    return [text] if not inner[1] or inner[0] not in methods.names() else [inner[0], inner[2]]


def _show(answers: Any) -> None:
    runs = answers.runs
    table = Table(title=answers.question, title_justify="left", show_edge=False)
    table.add_column("")
    for run in runs:
        table.add_column(run.label, overflow="fold")
    table.add_column("how", style="dim")
    table.add_row("answer", *[f"[bold]{_plain(run.answer)}[/]" for run in runs], "")
    rows = [{name: (value, how) for name, value, how in run.report.rows_of_text()} for run in runs]
    names = [name for name in max(rows, key=len) if name != "method"]  # the wrapped run has the most rows
    for name in names:
        values = [row.get(name, ("", ""))[0] for row in rows]
        table.add_row(name, *values, next(row[name][1] for row in rows if name in row))
    if answers.speedup:
        text = ", ".join(f"{name} {factor:.2f} x" for name, factor in answers.speedup.items())
        table.add_row("speed-up", "", text, "measured, this run")
    out.print(table)


@app.command()
def presets(
    model: Annotated[str | None, typer.Option(help="Show what each preset is for this model.")] = None,
) -> None:
    """List the presets."""
    from vlmeff import zoo

    subject: Any = model
    if model is not None and zoo.find_model(model) is None:
        from vlmeff.loading import load

        subject = load(model)[0]
    rows = zoo.preset_table(subject)
    table = Table(show_edge=False)
    for column in ("preset", "status", "tokens", "steps", "summary"):
        table.add_column(column, overflow="fold")
    for row in rows:
        tokens = "" if row.tokens_in is None else f"{row.tokens_in} -> {row.tokens_kept}"
        table.add_row(row.preset, row.status or "", tokens, row.steps, row.summary)
    out.print(table)


app.command("doctor")(doctor)
app.command("serve")(serve_command)
app.command("demo")(demo_command)
app.command("quantize")(quantize_command)
app.command("train-qvgen")(train_qvgen)


@zoo_app.command("list")
def zoo_list(
    status: Annotated[str | None, typer.Option(help="Only entries of this status.")] = None,
    task: Annotated[str | None, typer.Option(help="Only models of this task.")] = None,
) -> None:
    """List the entries: which preset on which model, and how far it is proven."""
    from vlmeff import zoo
    from vlmeff.zoo_schema import KeptTokens

    table = Table(show_edge=False)
    for column in ("entry", "status", "tokens", "licence"):
        table.add_column(column)
    known = zoo.load_zoo()
    for entry in zoo.list_entries(task=task, status=status):
        kept = entry.tokens
        # Models of dynamic resolution have a formula instead.
        tokens = f"{kept.tokens_in} -> {kept.kept}" if isinstance(kept, KeptTokens) else "dynamic"
        table.add_row(entry.name, entry.status, tokens, known.models[entry.model].license)
    out.print(table)


@zoo_app.command("show")
def zoo_show(name: Annotated[str, typer.Argument(help="An entry, a model or a preset.")]) -> None:
    """Show one record as YAML."""
    import yaml

    from vlmeff import zoo
    from vlmeff.errors import UnknownModelError

    known = zoo.load_zoo()
    record = known.entries.get(name) or known.models.get(name) or known.presets.get(name)
    if record is None:
        raise UnknownModelError("zoo record", name, [*known.entries, *known.models, *known.presets])
    plain = record.model_dump(mode="json", by_alias=True, exclude_none=True)
    print(yaml.safe_dump(plain, sort_keys=False, allow_unicode=True), end="")


@zoo_app.command("validate")
def zoo_validate(
    file: Annotated[Path | None, typer.Argument(help="A zoo file; the shipped one when left out.")] = None,
) -> None:
    """Check a zoo file against the schema and the rules."""
    from vlmeff import zoo

    problems = zoo.validate_file(file)
    for problem in problems:
        err.print(problem, highlight=False, markup=False, soft_wrap=True)
    if problems:
        raise typer.Exit(2)
    out.print(f"{file.name if file else 'model_zoo.yaml'}: valid")


@zoo_app.command("schema")
def zoo_schema() -> None:
    """Print the JSON Schema of a zoo file."""
    from vlmeff import zoo

    print(json.dumps(zoo.json_schema(), indent=2))


if __name__ == "__main__":
    main()
