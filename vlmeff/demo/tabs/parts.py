"""Pieces that tabs share."""

from __future__ import annotations

from typing import Any

import gradio as gr

from vlmeff.demo import look
from vlmeff.demo.site import Site


def picture_field(elem_id: str, *, height: int = 260) -> gr.Image:
    """A ``gr.Image`` that gives the path of the file and leaves opening it to ``Limits.picture``.

    Left to itself it opens the file, and tells the visitor of a broken one where it lies on the server. No subclass,
    because Gradio writes a stub file beside the module of each.
    """
    field = gr.Image(
        type="filepath", image_mode=None, sources=["upload", "clipboard"], label="Picture", height=height, buttons=[],
        elem_id=elem_id, alt_text="The picture that the question is about",
    )  # fmt: skip
    field.preprocess = _path  # type: ignore[method-assign]
    return field


def _path(payload: Any) -> str | None:
    """Gradio has checked that it is an upload's. Pictures inside a request (``data:`` addresses) are not taken."""
    return None if payload is None else payload.path


def on_failure(site: Site, tab: str, event: Any, status: gr.HTML) -> None:
    """What the status line says after an error, and after the stop button, which Gradio takes for one."""

    def ended(request: gr.Request) -> str:
        return look.status(site.after(request.session_hash, tab))

    event.failure(ended, None, [status], api_visibility="private", queue=False, show_progress="hidden")
