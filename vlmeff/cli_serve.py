"""``vlmeff serve``: an OpenAI-compatible server of a wrapped model."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Annotated

import typer
from rich.console import Console

from vlmeff.errors import ConfigError

err = Console(stderr=True)

LOG_LEVELS = ("critical", "error", "warning", "info", "debug")


def serve_command(
    model: Annotated[str, typer.Option(help="Zoo name, local folder or hub id.")] = "tiny-llava",
    preset: Annotated[str, typer.Option(help="A preset of the zoo; none for the model as it is.")] = "fast",
    revision: Annotated[str | None, typer.Option(help="Commit or tag on the hub.")] = None,
    host: Annotated[str, typer.Option(help="Address to listen at; others than this machine's own are open.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=65_535, help="Port to listen at; 0 takes a free one.")] = 8000,
    served_name: Annotated[str | None, typer.Option(help="What clients call the model; its own name.")] = None,
    device: Annotated[str | None, typer.Option(help="For example cuda; the CPU when left out.")] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer that may be asked for.")] = 1024,
    max_images: Annotated[int, typer.Option(min=0, help="Pictures in one request.")] = 8,
    max_image_mb: Annotated[float, typer.Option(min=0.001, help="Size of a picture's file.")] = 10.0,
    max_image_pixels: Annotated[int, typer.Option(min=1, help="Checked before it is decoded.")] = 20_000_000,
    max_request_mb: Annotated[float, typer.Option(min=0.001, help="Size of a whole request.")] = 32.0,
    max_text_chars: Annotated[int, typer.Option(min=1, help="Characters of all texts of a request.")] = 50_000,
    allow_media_domain: Annotated[
        list[str] | None,
        typer.Option(help="A host that pictures may be fetched from by https (repeat for more); none when left out."),
    ] = None,
    cors_origin: Annotated[
        list[str] | None, typer.Option(help="An origin whose pages may ask (repeat for more); none when left out.")
    ] = None,
    replicas: Annotated[
        int, typer.Option(min=1, help="Copies of the model on this machine, behind Ray Serve where more than one.")
    ] = 1,
    log_level: Annotated[str, typer.Option(help=", ".join(LOG_LEVELS) + ".")] = "warning",
) -> None:
    """Serve a model with a preset to OpenAI clients: /v1/chat/completions, /v1/responses, /v1/models, /health."""
    from vlmeff.integrations.server import serve as serve_one
    from vlmeff.integrations.server_fetch import check_address
    from vlmeff.integrations.server_gate import RequestLimits
    from vlmeff.integrations.server_images import PictureLimits

    if dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise ConfigError(f"--dtype {dtype!r} must be auto, float32, bfloat16 or float16.")
    if log_level not in LOG_LEVELS:
        raise ConfigError(f"--log-level {log_level!r} must be one of {', '.join(LOG_LEVELS)}.")
    domains = tuple(domain.lower() for domain in allow_media_domain or ())
    for domain in domains:
        try:
            check_address(f"https://{domain}/", domains)
        except ValueError as error:
            raise ConfigError(f"--allow-media-domain {domain!r} is no host name such as example.com.") from error
    pictures = PictureLimits(
        max_images=max_images,
        max_image_mb=max_image_mb,
        max_image_pixels=max_image_pixels,
        media_domains=domains,
    )
    limits = RequestLimits(
        pictures=pictures,
        max_request_mb=max_request_mb,
        max_text_chars=max_text_chars,
        max_new_tokens=max_new_tokens,
    )
    serve: Callable[..., None] = serve_one
    if replicas > 1:
        from vlmeff.integrations.server_replicas import serve_replicas

        serve = functools.partial(serve_replicas, replicas)
    serve(
        model,
        None if preset == "none" else preset,
        host=host,
        port=port,
        name=served_name,
        revision=revision,
        device=device,
        dtype=dtype,
        limits=limits,
        cors_origins=cors_origin or (),
        log_level=log_level,
        say=lambda line: err.print(line, highlight=False, markup=False, soft_wrap=True),
    )
