"""The field for a picture, which hands over the file that was uploaded and leaves opening it to ``Limits.picture``."""

from __future__ import annotations

from typing import Any

import gradio as gr


def picture_field(elem_id: str, *, height: int = 260) -> gr.Image:
    """A ``gr.Image`` that gives the path of the file.

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
