"""``vlmeff demo``: the page in a browser."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from vlmeff.errors import ConfigError

err = Console(stderr=True)


def demo_command(
    model: Annotated[
        list[str] | None,
        typer.Option(help="Zoo name, local folder or hub id; repeat it to offer several. Default: the shipped ones."),
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen at; others than this machine's own are open.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65_535, help="Port to listen at; 0 takes a free one.")] = 7860,
    auth: Annotated[
        str | None, typer.Option(help="USER:FILE, a name and password (first line of the file) that the page asks for.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="For example cuda; the CPU when left out.")] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    max_file_mb: Annotated[float, typer.Option(min=0.001, help="Size of a picture's file.")] = 10.0,
    max_pixels: Annotated[int, typer.Option(min=1, help="Of a picture, checked before it is decoded.")] = 20_000_000,
    max_pictures: Annotated[int, typer.Option(min=1, help="Pictures in one conversation.")] = 8,
    max_question_chars: Annotated[int, typer.Option(min=1, help="Characters of a question.")] = 2000,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer that may be asked for.")] = 512,
    log_dir: Annotated[
        Path | None, typer.Option(help="Let visitors save comparisons there (JSON and PNG); off when left out.")
    ] = None,
) -> None:
    """Open a page that answers questions about pictures with and without a preset, and shows what each cost."""
    from vlmeff.demo.limits import Limits
    from vlmeff.demo.serving import SHIPPED, read_auth, serve_demo

    if dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise ConfigError(f"--dtype {dtype!r} must be auto, float32, bfloat16 or float16.")
    limits = Limits(
        max_file_mb=max_file_mb,
        max_pixels=max_pixels,
        max_pictures=max_pictures,
        max_question_chars=max_question_chars,
        max_new_tokens=max_new_tokens,
    )
    serve_demo(
        model or list(SHIPPED),
        host=host,
        port=port,
        auth=None if auth is None else read_auth(auth),
        limits=limits,
        device=device,
        dtype=dtype,
        log_dir=log_dir,
        say=lambda line: err.print(line, highlight=False, markup=False, soft_wrap=True),
    )
