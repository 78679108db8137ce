"""Serve the page: address, passwords, and what Gradio is told not to do."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from vlmeff.demo.engine import Engine
from vlmeff.demo.limits import Limits
from vlmeff.demo.site import Site
from vlmeff.errors import ConfigError, MissingExtraError

LOOPBACK = ("127.0.0.1", "localhost", "::1")
SHIPPED = ("tiny-llava", "tiny-qwen")
OPENING = ("GRADIO_ALLOWED_PATHS", "GRADIO_MCP_SERVER", "GRADIO_VIBE_MODE")  # they undo what is fixed here
OPEN = (
    "warning: {host} can be reached from other machines and there is no password: whoever knows the address can ask, "
    "and read what others sent. Add --auth USER:FILE, or leave --host out."
)


def check_gradio() -> None:
    """Raises MissingExtraError (E-ENV-01)."""
    if importlib.util.find_spec("gradio") is None:
        raise MissingExtraError("gradio", "demo", "the pages of vlmeff demo")


def read_auth(text: str) -> tuple[str, str]:
    """(user, password) from "USER:FILE"; the password is the first line of the file, so that no command line shows it.

    Raises:
        ConfigError: another form, or the file is missing or empty.
    """
    user, colon, name = text.partition(":")
    if not user or not colon or not name:
        raise ConfigError("--auth must be USER:FILE; the password is the first line of the file.")
    try:
        lines = Path(name).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:  # which must not be told: it may be the password itself
        raise ConfigError("--auth: what stands behind USER: is no text file that can be read.") from error
    if not lines or not lines[0]:
        raise ConfigError("--auth: the file is empty; its first line is the password.")
    return user, lines[0]


def serve_demo(
    models: Sequence[str] = SHIPPED,
    *,
    host: str = "127.0.0.1",
    port: int = 7860,
    auth: tuple[str, str] | None = None,
    limits: Limits | None = None,
    device: str | None = None,
    dtype: str = "auto",
    log_dir: Path | None = None,
    block: bool = True,
    say: Callable[[str], None] = print,
) -> Any:
    """Load the first model and serve the page until it is interrupted.

    Args:
        models: what the visitor may choose from; the first is loaded at once, so that a wrong name fails here.
        host: others than this machine's own address are open to its network.  port: 0 takes a free one.
        auth: (user, password) that the page asks for.
        log_dir: where visitors may save a comparison; None: the page has no such button.
        block: False returns the running page (``close()`` ends it).
    Raises:
        MissingExtraError, ConfigError, UnknownModelError, ModelLoadError, UnsupportedModelError.
    """
    check_gradio()
    # Before Gradio is imported: it reads this once.
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    for variable in OPENING:
        os.environ.pop(variable, None)
    from vlmeff.demo.page import build_demo, launch_options

    if host not in LOOPBACK and auth is None:
        say(OPEN.format(host=host))
    say(f"loading {models[0]}")
    engine = Engine(models[0], device=device, dtype=dtype)
    engine.load()
    site = Site(engine, list(dict.fromkeys(models)), limits or Limits(), log_dir)
    demo = build_demo(site)
    try:
        demo.launch(
            server_name=host,
            server_port=port or _free_port(host),
            auth=auth,
            blocked_paths=_blocked(),
            prevent_thread_lock=True,
            quiet=True,
            **launch_options(site),
        )
    except OSError as error:  # Gradio's own text speaks of options that this command does not have
        raise ConfigError(f"--port {port}: {host} cannot listen there; is it in use? 0 takes a free port.") from error
    say(f"the demo is at {demo.local_url}  (Ctrl-C ends it)")
    if block:
        try:
            demo.block_thread()
        finally:
            demo.close()
    return demo


def _blocked() -> list[str]:
    """The working directory, of which nothing is served; what holds the uploads cannot be blocked without them."""
    from gradio.utils import get_upload_folder

    uploads, here = Path(get_upload_folder()).resolve(), Path.cwd().resolve()
    return [] if uploads.is_relative_to(here) else [str(here)]


def _free_port(host: str) -> int:
    import socket

    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])
